"""Host side of prompt matching: what a matching is, what it returns, and which inputs it takes.

Axes: B batch, L tokens, R pool entries, C width, W gate words.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..host import dtype_error, require_launchable
from ..launch import Launch, architecture_of, choose_launch

MAX_POOL = 64
MAX_WIDTH = 4096
MAX_TOKENS = 2**31 - 2**12


class Norm(NamedTuple):
    """A LayerNorm whose affine parameters are frozen."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Matching(NamedTuple):
    """What a matching does, beside its tensors."""

    cls_pool: int
    image_pool: int
    cls_top_k: int
    image_top_k: int
    num_prefix: int
    cls_length: int
    image_length: int
    farthest: bool

    @property
    def num_words(self) -> int:
        """W, the gate words of a token."""
        rows = self.cls_pool * self.cls_length + self.image_pool * self.image_length
        return -(-rows // 32)

    @property
    def block_r(self) -> int:
        """Entries of a pool rounded up to what a kernel holds."""
        return max(16, triton.next_power_of_2(max(self.cls_pool, self.image_pool)))

    def counts(self, x: Tensor) -> tuple[float, float]:
        """Return how many selections the distance of each pool is the mean of, at least 1."""
        batch, tokens, _ = x.shape
        cls_count = batch * self.num_prefix * self.cls_top_k
        image_count = batch * (tokens - self.num_prefix) * self.image_top_k
        return float(max(cls_count, 1)), float(max(image_count, 1))

    def num_tiles(self, x: Tensor, rows: int) -> tuple[int, int]:
        """Return how many tiles of `rows` tokens the prefix tokens and the patches fill."""
        batch, tokens, _ = x.shape
        patches = batch * (tokens - self.num_prefix)
        return triton.cdiv(batch * self.num_prefix, rows), triton.cdiv(patches, rows)


class Matched(NamedTuple):
    """What a forward computes; the last three are saved for the backward."""

    normed: Tensor
    distance: Tensor
    gate: Tensor
    """Empty where a gate is given."""
    stats: Tensor
    """float32 `[2 or 4, B, L]`: 1 / |x|, sum of the selected similarities, mean, 1 / deviation."""
    key_parts: Tensor
    """float16 `[2, R_cls + R_image, C]`: unit keys times KEY_SCALE, high and low part."""
    key_inverse: Tensor
    """float32 `[R_cls + R_image]`: 1 / |key|."""


def bucket_of(width: int) -> str:
    """Return the launch bucket of rows of C elements."""
    return next(f"c{limit}" for limit in (192, 384, 768, MAX_WIDTH) if width <= limit)


def launch_of(operation: str, x: Tensor) -> Launch:
    """Return the launch of a matching kernel for rows of `x`."""
    architecture = architecture_of(x.device)
    bucket = bucket_of(x.shape[-1])
    return choose_launch(operation, architecture=architecture, dtype=x.dtype, bucket=bucket)


def empty_outputs(x: Tensor, matching: Matching, given: bool, norm: bool) -> Matched:
    """Allocate the results of a forward."""
    batch, tokens, width = x.shape
    num_keys = matching.cls_pool + matching.image_pool
    gate_shape = (0,) if given else (batch, tokens, matching.num_words)
    return Matched(
        normed=x.new_empty(x.shape if norm else (0,)),
        distance=x.new_empty((), dtype=torch.float32),
        gate=x.new_empty(gate_shape, dtype=torch.int32),
        stats=x.new_empty((4 if norm else 2, batch, tokens), dtype=torch.float32),
        # One row at least: kernels read some key even where a pool is empty.
        key_parts=x.new_empty((2, max(num_keys, 1), width), dtype=torch.float16),
        key_inverse=x.new_empty((num_keys,), dtype=torch.float32),
    )


def dense_rows(tensor: Tensor) -> Tensor:
    """Return `tensor`, copied only when its last axis is not dense."""
    dense = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if dense else tensor.contiguous()


def refusal(
    x: Tensor,
    cls_keys: Tensor,
    image_keys: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Exception | None:
    """Return what to raise where the kernels do not take tensors like these."""
    affine = [(n, t) for n, t in (("weight", weight), ("bias", bias)) if t is not None]
    for name, tensor in (("x", x), ("cls_keys", cls_keys), ("image_keys", image_keys), *affine):
        error = dtype_error(name, tensor)
        if error is not None:
            return error
    for name, keys in (("cls_keys", cls_keys), ("image_keys", image_keys)):
        if keys.shape[0] > MAX_POOL:
            return ValueError(
                f"{name}: got {keys.shape[0]} pool entries, expected at most {MAX_POOL} entries; "
                "pass impl='reference'"
            )
    batch, tokens, width = x.shape
    if not 1 <= width <= MAX_WIDTH:
        return ValueError(f"x: got width {width}, expected 1 to {MAX_WIDTH}; pass impl='reference'")
    if batch * tokens > MAX_TOKENS:
        return ValueError(
            f"x: got {batch * tokens} tokens, expected fewer than 2 ** 31; split the batch"
        )
    for name, tensor in affine:
        if torch.is_grad_enabled() and tensor.requires_grad:
            return ValueError(
                f"{name}: got a tensor that requires grad, expected a frozen one (it gets no "
                "gradient); call requires_grad_(False) or normalise outside"
            )
    return None


def check_inputs(
    x: Tensor,
    cls_keys: Tensor,
    image_keys: Tensor,
    gate: Tensor | None,
    matching: Matching,
    norm: Norm | None = None,
) -> None:
    """Assert what the kernels rely on, so that none reads past the end of a tensor."""
    require_launchable(x.device)
    assert x.ndim == 3, x.shape
    batch, tokens, width = x.shape
    weight, bias, _ = norm or Norm(None, None, 0.0)
    refused = refusal(x, cls_keys, image_keys, weight=weight, bias=bias)
    assert refused is None, refused
    assert cls_keys.shape == (matching.cls_pool, width), (x.shape, cls_keys.shape)
    assert image_keys.shape == (matching.image_pool, width), (x.shape, image_keys.shape)
    assert 0 <= matching.cls_top_k <= matching.cls_pool, matching
    assert 0 <= matching.image_top_k <= matching.image_pool, matching
    assert 0 <= matching.num_prefix <= tokens, matching
    assert 1 <= matching.cls_length <= 2**20 and 1 <= matching.image_length <= 2**20, matching
    for parameter in (weight, bias):
        assert parameter is None or parameter.shape == (width,), parameter.shape
    if gate is not None:
        assert gate.dtype == torch.int32, gate.dtype
        assert gate.shape == (batch, tokens, matching.num_words), gate.shape
    given = [t for t in (cls_keys, image_keys, weight, bias, gate) if t is not None]
    assert all(t.device == x.device for t in given), [t.device for t in given]


def make_matching(
    cls_keys: Tensor,
    image_keys: Tensor,
    *,
    cls_top_k: int,
    image_top_k: int,
    num_prefix_tokens: int = 1,
    lengths: tuple[int, int] = (1, 1),
    selection: str = "nearest",
) -> Matching:
    """Collect the numbers of a matching."""
    assert selection in ("nearest", "farthest"), selection
    return Matching(
        cls_pool=cls_keys.shape[0],
        image_pool=image_keys.shape[0],
        cls_top_k=cls_top_k,
        image_top_k=image_top_k,
        num_prefix=num_prefix_tokens,
        cls_length=lengths[0],
        image_length=lengths[1],
        farthest=selection == "farthest",
    )
