"""Arguments of gated attention on the host: checks, strides and sizes that its kernels share."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..host import dtype_error, require_launchable
from ..launch import Launch, architecture_of, choose_launch

LOG2_E = 1.4426950408889634
MIN_HEAD_DIM, MAX_HEAD_DIM, MAX_PROMPTS = 16, 128, 256
# In-block offsets are 32 bits wide: block rows times the row stride must stay below 2 ** 31.
MAX_ROW_STRIDE = 2**31 // 512
TAIL_ROWS = 16
# The least factor of the scores: 0 itself would turn the -inf of a masked key into NaN.
MIN_SCALE = 1e-30


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionInputs:
    """What both passes read, with strides that the kernels address."""

    q: Tensor
    """`[B, Lq, H, D]`."""
    k: Tensor
    """`[B, L, H, D]`."""
    v: Tensor
    """`[B, L, H, D]`."""
    k_prompt: Tensor
    """`[P, H, D]` shared by the batch, or `[B, P, H, D]`."""
    v_prompt: Tensor
    """Like `k_prompt`."""
    gate: Tensor | None
    """int32 `[B, Lq, W]` or `[1, Lq, W]`."""
    scale: float
    """Factor of the scores."""
    visible: bool
    """Whether hidden prompts are left out of the denominator."""

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor,
        gate: Tensor | None, scale: float, visible: bool,
    ) -> "AttentionInputs":  # fmt: skip
        """Take the arguments of the operation, copying only what cannot be read in place."""
        tensors = (addressable(tensor) for tensor in (q, k, v, k_prompt, v_prompt))
        q, k, v, k_prompt, v_prompt = tensors
        gated = gate is not None and k_prompt.shape[-3] > 0
        return cls(
            q=q, k=k, v=v, k_prompt=k_prompt, v_prompt=v_prompt,
            gate=addressable(gate) if gated else None, scale=scale, visible=visible,
        )  # fmt: skip

    @property
    def shared(self) -> bool:
        """Whether all samples use the same prompts."""
        return self.k_prompt.ndim == 3

    @property
    def num_prompts(self) -> int:
        """P."""
        return self.k_prompt.shape[-3]

    @property
    def num_keys(self) -> int:
        """S = P + L."""
        return self.num_prompts + self.k.shape[1]

    @property
    def scale_log2(self) -> float:
        """Factor of the scores for a softmax with base 2."""
        return max(self.scale, MIN_SCALE) * LOG2_E

    def launch(self, operation: str) -> Launch:
        """Choose the launch of one of the kernels."""
        bucket = bucket_of(self.q.shape[-1])
        architecture = architecture_of(self.q.device)
        return choose_launch(
            operation, architecture=architecture, dtype=self.q.dtype, bucket=bucket
        )

    def pointers(self) -> tuple[Tensor, ...]:
        """Return the tensors in the order of the kernels' first arguments."""
        # A kernel without a gate never reads that pointer; any tensor stands in for it.
        gate = self.q if self.gate is None else self.gate
        return self.q, self.k, self.v, self.k_prompt, self.v_prompt, gate

    def strides(self) -> tuple[int, ...]:
        """Return the strides in the order of the kernels' arguments."""
        strides = [stride for t in (self.q, self.k, self.v) for stride in t.stride()[:3]]
        for prompt in (self.k_prompt, self.v_prompt):
            strides += [0, *prompt.stride()[:2]] if self.shared else prompt.stride()[:3]
        if self.gate is None:
            return (*strides, 0, 0)
        batch_stride = self.gate.stride(0) if self.gate.shape[0] > 1 else 0
        return (*strides, batch_stride, self.gate.stride(1))

    def first_token(self, block_n: int) -> int:
        """Return where tokens begin when a gap fills the keys up to whole blocks of `block_n`."""
        return self.num_prompts + -self.num_keys % block_n

    def sizes(self, block_n: int) -> tuple[int, ...]:
        """Return heads, queries, tokens, prompts and the first token's row."""
        tokens, first_token = self.k.shape[1], self.first_token(block_n)
        return self.q.shape[2], self.q.shape[1], tokens, self.num_prompts, first_token

    def block_constants(self, launch: Launch) -> dict[str, int]:
        """Return the compile-time arguments of a kernel that owns blocks of queries."""
        block_m, block_n = launch.blocks["BLOCK_M"], launch.blocks["BLOCK_N"]
        mixed_blocks = triton.cdiv(self.first_token(block_n), block_n)
        tail = tail_rows(self.q.shape[1], block_m)
        return {"END_MIXED": mixed_blocks * block_n, "TAIL": tail}

    def constants(self) -> dict[str, int | bool | str]:
        """Return the compile-time arguments common to all kernels."""
        head_dim = self.q.shape[-1]
        return {
            "GATED": self.gate is not None,
            "VISIBLE": self.visible,
            "PRECISION": precision_of(self.q.dtype),
            "NUM_WORDS": 0 if self.gate is None else self.gate.shape[2],
            "D": head_dim,
            "BLOCK_D": block_d(head_dim),
            "enable_fp_fusion": True,
        }


def addressable(tensor: Tensor) -> Tensor:
    """Return `tensor`, copied only when its strides are beyond what the kernels address.

    The last axis must be dense; other axes may have any stride up to `MAX_ROW_STRIDE`, 0 included.
    """
    if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        rows = [s for s, n in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if n > 1]
        if all(stride <= MAX_ROW_STRIDE for stride in rows[1:]):
            return tensor
    return tensor.contiguous()


def precision_of(dtype: torch.dtype) -> str:
    """Return the `input_precision` of products: float32 is multiplied as float32, not as TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def block_d(head_dim: int) -> int:
    """Return the columns of a block: the head dim rounded up to a power of two."""
    return max(triton.next_power_of_2(head_dim), MIN_HEAD_DIM)


def bucket_of(head_dim: int) -> str:
    """Name the rows of the launch table: "d64" up to 64 columns, "d128" above."""
    return "d64" if block_d(head_dim) <= 64 else "d128"


def tail_rows(num_queries: int, block_m: int) -> int:
    """Return 16 when the queries beyond whole blocks fit a block of 16 rows, else 0."""
    return TAIL_ROWS if 0 < num_queries % block_m <= TAIL_ROWS < block_m else 0


def refusal(q: Tensor, k_prompt: Tensor) -> Exception | None:
    """Return what to raise where the kernels do not take this dtype, head dim or P."""
    head_dim, num_prompts = q.shape[-1], k_prompt.shape[-3]
    expected = None
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        expected = f"q: got head dim {head_dim}, expected {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    elif num_prompts > MAX_PROMPTS:
        expected = f"k_prompt: got {num_prompts} prompt rows, expected at most {MAX_PROMPTS}"
    error = None if expected is None else ValueError(f"{expected}; pass impl='reference'")
    return dtype_error("q", q) or error


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor, gate: Tensor | None
) -> None:
    """Assert what the kernels rely on, so that none reads past the end of a tensor."""
    require_launchable(q.device)
    assert q.ndim == k.ndim == 4 and k_prompt.ndim in (3, 4), (q.shape, k.shape, k_prompt.shape)
    refused = refusal(q, k_prompt)
    assert refused is None, refused
    batch, queries, heads, head_dim = q.shape
    assert k.shape == v.shape == (batch, k.shape[1], heads, head_dim), (q.shape, k.shape, v.shape)
    num_prompts = k_prompt.shape[-3]
    of_prompts = (*(batch,) * (k_prompt.ndim - 3), num_prompts, heads, head_dim)
    assert k_prompt.shape == v_prompt.shape == of_prompts, (q.shape, k_prompt.shape, v_prompt.shape)
    alike = {(t.device, t.dtype) for t in (q, k, v, k_prompt, v_prompt)}
    assert len(alike) == 1, alike
    if gate is not None:
        assert gate.dtype == torch.int32 and gate.device == q.device, (gate.dtype, gate.device)
        words = -(-num_prompts // 32)
        assert gate.shape in ((batch, queries, words), (1, queries, words)), gate.shape


__all__ = [
    "AttentionInputs",
    "addressable",
    "block_d",
    "bucket_of",
    "check_inputs",
    "precision_of",
    "refusal",
    "tail_rows",
]
