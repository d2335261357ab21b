"""Arguments of gated attention on the host: checks, strides and sizes that its kernels share."""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .common import LOG2_E, addressable, precision_of, require_kernel_dtype
from .launch import DTYPE_CLASSES, Launch, architecture_of, choose_launch

MIN_HEAD_DIM, MAX_HEAD_DIM, MAX_PROMPTS = 16, 128, 256
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


def block_d(head_dim: int) -> int:
    """Return the columns of a block: the head dim rounded up to a power of two."""
    return max(triton.next_power_of_2(head_dim), MIN_HEAD_DIM)


def bucket_of(head_dim: int) -> str:
    """Name the rows of the launch table: "d64" up to 64 columns, "d128" above."""
    return "d64" if block_d(head_dim) <= 64 else "d128"


def tail_rows(num_queries: int, block_m: int) -> int:
    """Return 16 when the queries beyond whole blocks fit a block of 16 rows, else 0."""
    return TAIL_ROWS if 0 < num_queries % block_m <= TAIL_ROWS < block_m else 0


def fits(q: Tensor, k_prompt: Tensor) -> bool:
    """Tell whether the kernels take tensors of this dtype, head dim and number of prompt rows."""
    head_dim, num_prompts = q.shape[-1], k_prompt.shape[-3]
    in_range = MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM and num_prompts <= MAX_PROMPTS
    return q.dtype in DTYPE_CLASSES and in_range


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor, gate: Tensor | None
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the kernels fit the inputs."""
    require_kernel_dtype("q", q)
    _require(q.ndim == 4, "q", f"shape {list(q.shape)}", "[B, Lq, H, D]", "reshape it")
    batch, queries, heads, head_dim = q.shape
    supported = f"a head dim from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    in_range = MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM
    _require(in_range, "q", f"head dim {head_dim}", supported, "pass impl='reference'")
    tokens, prompts = k.shape[1:2], k_prompt.shape[-3:-2]
    leading = (batch,) if k_prompt.ndim == 4 else ()
    expected = {
        "k": (k, (batch, *tokens, heads, head_dim)),
        "v": (v, (batch, *tokens, heads, head_dim)),
        "k_prompt": (k_prompt, (*leading, *prompts, heads, head_dim)),
        "v_prompt": (v_prompt, (*leading, *prompts, heads, head_dim)),
    }
    for name, (tensor, shape) in expected.items():
        got = f"shape {list(tensor.shape)}"
        _require(tuple(tensor.shape) == shape, name, got, f"{list(shape)} as in q", "check it")
        _require(tensor.device == q.device, name, tensor.device, q.device, "move it with .to()")
        if tensor.dtype != q.dtype:
            raise TypeError(
                f"{name}: got {tensor.dtype}, expected {q.dtype}; convert it with .to()"
            )
    num_prompts = k_prompt.shape[-3]
    few = num_prompts <= MAX_PROMPTS
    limit = f"at most {MAX_PROMPTS}"
    _require(few, "k_prompt", f"{num_prompts} prompt rows", limit, "pass impl='reference'")
    if gate is not None:
        _check_gate(gate, (batch, queries, -(-num_prompts // 32)), q.device)


def _check_gate(gate: Tensor, shape: tuple[int, int, int], device: torch.device) -> None:
    if gate.dtype != torch.int32:
        raise TypeError(f"gate: got {gate.dtype}, expected int32 words; make them with pack_gate")
    got = f"shape {list(gate.shape)}"
    fits = tuple(gate.shape) in (shape, (1, *shape[1:]))
    _require(fits, "gate", got, f"{list(shape)} or batch 1", "pack one bit per prompt row")
    _require(gate.device == device, "gate", gate.device, device, "move it with .to()")


def check_options(scale: float | None, normalize_over: str) -> None:
    """Check the keyword arguments of gated attention."""
    if scale is not None:
        finite = isinstance(scale, int | float) and 0 <= scale < math.inf
        _require(finite, "scale", repr(scale), "a finite number >= 0", "change it")
    known = normalize_over in ("all", "visible")
    _require(known, "normalize_over", repr(normalize_over), "'all' or 'visible'", "choose one")


def _require(holds: bool, name: str, got: object, expected: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {got}, expected {expected}; {remedy}")


__all__ = [
    "AttentionInputs",
    "block_d",
    "bucket_of",
    "check_inputs",
    "check_options",
    "fits",
    "tail_rows",
]
