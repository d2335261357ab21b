"""Host side of prompt matching: what a matching is, what it returns, and which inputs it takes.

Axes: B batch, L tokens, R pool entries, C width, W gate words.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .common import require_kernel_dtype, require_launchable
from .launch import DTYPE_CLASSES, Launch, architecture_of, choose_launch

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


def _refuse(name: str, got: object, expected: str, remedy: str) -> None:
    raise ValueError(f"{name}: got {got}, expected {expected}; {remedy}")


def fits(x: Tensor, cls_keys: Tensor, image_keys: Tensor) -> bool:
    """Tell whether the kernels take tensors of these dtypes, this width and these pools."""
    known = all(t.dtype in DTYPE_CLASSES for t in (x, cls_keys, image_keys))
    pools = max(cls_keys.shape[0], image_keys.shape[0])
    return known and pools <= MAX_POOL and 1 <= x.shape[-1] <= MAX_WIDTH


def check_tensors(x: Tensor, cls_keys: Tensor, image_keys: Tensor) -> None:
    """Raise unless the kernels take these tensors; the message names what to do."""
    if not torch.compiler.is_compiling():
        # The interpreter's switch cannot be traced; a launch that cannot be made still raises.
        require_launchable(x.device)
    for name, tensor, ndim in (
        ("x", x, 3),
        ("cls_keys", cls_keys, 2),
        ("image_keys", image_keys, 2),
    ):
        require_kernel_dtype(name, tensor)
        if tensor.ndim != ndim:
            axes = "[B, L, C]" if ndim == 3 else "[R, C]"
            _refuse(name, f"shape {list(tensor.shape)}", axes, "reshape it")
        if tensor.device != x.device:
            _refuse(name, f"device {tensor.device}", f"{x.device} as x", "move it with .to()")
        if tensor.shape[-1] != x.shape[-1]:
            _refuse(name, f"width {tensor.shape[-1]}", f"{x.shape[-1]} as x", "resize the keys")
        if ndim == 2 and tensor.shape[0] > MAX_POOL:
            expected = f"at most {MAX_POOL} entries"
            _refuse(name, f"{tensor.shape[0]} pool entries", expected, "pass impl='reference'")
    if not 1 <= x.shape[2] <= MAX_WIDTH:
        _refuse("x", f"width {x.shape[2]}", f"1 to {MAX_WIDTH}", "pass impl='reference'")
    if x.shape[0] * x.shape[1] > MAX_TOKENS:
        _refuse("x", f"{x.shape[0] * x.shape[1]} tokens", "fewer than 2 ** 31", "split the batch")


def check_affine(x: Tensor, **parameters: Tensor | None) -> None:
    """Raise unless the parameters of a LayerNorm over C fit x."""
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        require_kernel_dtype(name, tensor)
        if tuple(tensor.shape) != (x.shape[2],):
            expected = f"[{x.shape[2]}], the width of x"
            _refuse(name, f"shape {list(tensor.shape)}", expected, "normalise over C alone")
        if tensor.device != x.device:
            _refuse(name, f"device {tensor.device}", f"{x.device} as x", "move it with .to()")
        if torch.is_grad_enabled() and tensor.requires_grad:
            got, expected = "a tensor that requires grad", "a frozen one (it gets no gradient)"
            _refuse(name, got, expected, "call requires_grad_(False) or normalise outside")


def check_matching(x: Tensor, matching: Matching, gate: Tensor | None) -> None:
    """Raise unless the numbers and the given gate fit the pools."""
    limits = (
        ("cls_top_k", matching.cls_top_k, 0, matching.cls_pool),
        ("image_top_k", matching.image_top_k, 0, matching.image_pool),
        ("num_prefix_tokens", matching.num_prefix, 0, x.shape[1]),
        ("lengths[0]", matching.cls_length, 1, 2**20),
        ("lengths[1]", matching.image_length, 1, 2**20),
    )
    for name, value, low, high in limits:
        if not low <= value <= high:
            _refuse(name, value, f"{low} to {high}", "choose a number in range")
    if gate is None:
        return
    if gate.dtype != torch.int32:
        raise TypeError(f"gate: got {gate.dtype}, expected int32 words; make them with pack_gate")
    expected = (x.shape[0], x.shape[1], matching.num_words)
    if tuple(gate.shape) != expected:
        remedy = "one word holds 32 prompt rows"
        _refuse("gate", f"shape {list(gate.shape)}", f"{list(expected)}, [B, L, W]", remedy)
    if gate.device != x.device:
        _refuse("gate", f"device {gate.device}", f"{x.device} as x", "move it with .to()")


def make_matching(
    x: Tensor,
    cls_keys: Tensor,
    image_keys: Tensor,
    gate: Tensor | None,
    *,
    cls_top_k: int,
    image_top_k: int,
    num_prefix_tokens: int,
    lengths: tuple[int, int],
    selection: str,
) -> Matching:
    """Check the arguments of a matching and collect its numbers."""
    check_tensors(x, cls_keys, image_keys)
    if selection not in ("nearest", "farthest"):
        _refuse("selection", repr(selection), "'nearest' or 'farthest'", "choose one of them")
    matching = Matching(
        cls_pool=cls_keys.shape[0],
        image_pool=image_keys.shape[0],
        cls_top_k=cls_top_k,
        image_top_k=image_top_k,
        num_prefix=num_prefix_tokens,
        cls_length=lengths[0],
        image_length=lengths[1],
        farthest=selection == "farthest",
    )
    check_matching(x, matching, gate)
    return matching
