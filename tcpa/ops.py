"""The two operations of TCPA: public entries that check their arguments and choose an
implementation.

`match_prompts` says which prompts every token may see, `gated_attention` attends accordingly.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from . import kernels, sdpa
from .checks import (
    require,
    require_choice,
    require_int,
    require_number,
    require_same,
    require_same_device,
    require_shape,
    require_tensor,
)
from .reference import (
    NormalizeOver,
    Selection,
    gated_attention_reference,
    match_prompts_reference,
    num_gate_words,
)

Impl = Literal["auto", "triton", "sdpa", "reference"]
IMPLS = ("auto", "triton", "sdpa", "reference")

NO_AUTOCAST = ("meta",)
"""Device types that torch.autocast refuses; asking torch itself would break compiled graphs."""

SHORT = 192
"""Tokens below which the reference is faster than the fused CPU attention in 16-bit precision."""

_log = logging.getLogger("tcpa")
_announced: set[tuple[str, str]] = set()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype in which torch.autocast computes on a device; None while it is off."""
    kind = device.type
    on = kind not in NO_AUTOCAST and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch torch.autocast off for a device that knows it."""
    unknown = device.type in NO_AUTOCAST
    return nullcontext() if unknown else torch.autocast(device.type, enabled=False)


def choose_impl(
    impl: Impl,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    num_tokens: int | None = None,
) -> tuple[str, str]:
    """Resolve `impl` for a device and a size.

    Args:
        impl: "triton" (fused kernels), "sdpa" (exact composition over PyTorch's fused attention, on
            the CPU), "reference", or "auto": the fastest of these that can run.
        device: where the tensors are.
        dtype: in which the attention is computed.
        num_tokens: L, if known.

    Returns:
        The implementation that will run and the reason for it.

    Raises:
        ValueError: unknown `impl`.
        RuntimeError: an implementation was asked for by name and cannot run; nothing else is run in
            its place.
    """
    require_choice("impl", impl, IMPLS)
    if impl == "reference":
        return "reference", "asked for"
    no_triton, no_sdpa = kernels.unavailable_reason(device), sdpa.unavailable_reason(device)
    if impl == "auto":
        if no_triton is None:
            return "triton", "kernels can run here"
        # Measured on a CPU with native bfloat16: forward and backward at L = 65 take 0.3x, at
        # L = 197 1.0x and at L = 577 1.3x the time of "sdpa"; in float32 1.0x, 1.4x and 1.7x.
        short = num_tokens is not None and num_tokens < SHORT and dtype.itemsize == 2
        if no_sdpa is None and short:
            return "reference", f"{no_triton}; the fastest for {num_tokens} tokens in {dtype}"
        return ("sdpa", no_triton) if no_sdpa is None else ("reference", no_triton)
    reason = no_triton if impl == "triton" else no_sdpa
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run: {reason}; pass impl='auto' or 'reference'")
    return impl, "asked for"


def _resolve(impl: Impl, x: Tensor, num_tokens: int) -> str:
    """Choose an implementation and log an automatic choice once."""
    choice = choose_impl(impl, x.device, dtype=x.dtype, num_tokens=num_tokens)
    if impl == "auto" and not torch.compiler.is_compiling() and choice not in _announced:
        _announced.add(choice)
        _log.info("implementation: %s (%s)", *choice)
    return choice[0]


def match_prompts(
    x: Tensor,
    cls_keys: Tensor,
    image_keys: Tensor,
    *,
    cls_top_k: int,
    image_top_k: int,
    num_prefix_tokens: int = 1,
    lengths: tuple[int, int] = (1, 1),
    selection: Selection = "nearest",
    gate: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Select prompts for every token by cosine similarity and measure the match distance.

    Every prefix token selects the `cls_top_k` entries of the CLS pool whose keys are most similar
    to it, every patch the `image_top_k` entries of the image pool. With S = 1 - cos(x_l, key_r) the
    distance is the mean of S over the selections of all prefix tokens plus the mean of S over the
    selections of all patches.

    Args:
        x: `[B, L, C]` float tokens before the block's norm: prefix tokens first, then patches.
        cls_keys: `[R_cls, C]` keys of the CLS pool, R_cls >= 0.
        image_keys: `[R_image, C]` keys of the image pool, R_image >= 0.
        cls_top_k: entries that a prefix token sees, 0 to R_cls.
        image_top_k: entries that a patch sees, 0 to R_image.
        num_prefix_tokens: how many leading tokens select from the CLS pool, 0 to L.
        lengths: prompt rows per entry of the CLS pool and of the image pool.
        selection: "nearest" (official code) or "farthest" (Eq. 10 taken literally).
        gate: int32 `[B, L, W]`, a selection to measure in place of the nearest one (random or
            replayed). It should let every token see top_k entries of its pool: the mean divides by
            that number.
        impl: "auto", "triton" or "reference" ("sdpa" is the same here).

    Returns:
        gate: int32 `[B, L, W]` with W = ceil(P / 32) words for the P = R_cls * lengths[0] +
            R_image * lengths[1] prompt rows; bit r of token l says that it sees prompt row r. Has
            no gradient.
        distance: scalar, float32 (float64 for float64 `x`), 0 where nothing can be selected.
            Differentiable with respect to `x` and the keys.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the `impl` that was asked for cannot run here.

    Numerics:
        Similarities in float32 or better, whatever the dtype of `x`. Ties go to the lower index;
        NaN counts as most similar. A sample's gate depends on that sample alone. Deterministic.

    Cost:
        2 * B * L * C * R multiply-adds and one read of `x`; 4 * W bytes per token are written.

    Source:
        Eq. 9, 10 and 14, Section 3.3; means and joint differentiation as in the official code.
    """
    require_tensor("x", x, "[B, L, C]", 3)
    for name, keys in (("cls_keys", cls_keys), ("image_keys", image_keys)):
        require_tensor(name, keys, "[R, C]", 2)
        require_same_device(name, keys, x)
        require_shape(name, keys, (keys.shape[0], x.shape[2]), "R pool entries, C as in x")
    require_int("cls_top_k", cls_top_k, 0, cls_keys.shape[0])
    require_int("image_top_k", image_top_k, 0, image_keys.shape[0])
    require_int("num_prefix_tokens", num_prefix_tokens, 0, x.shape[1])
    for index, length in enumerate(lengths):
        require_int(f"lengths[{index}]", length, 1)
    require_choice("selection", selection, ("nearest", "farthest"))
    num_prompts = cls_keys.shape[0] * lengths[0] + image_keys.shape[0] * lengths[1]
    if gate is not None:
        _check_gate(gate, (x.shape[0], x.shape[1], num_gate_words(num_prompts)), x.device)
    _resolve(impl, x, x.shape[1])
    with without_autocast(x.device):
        return match_prompts_reference(
            x,
            cls_keys,
            image_keys,
            cls_top_k=cls_top_k,
            image_top_k=image_top_k,
            num_prefix_tokens=num_prefix_tokens,
            lengths=lengths,
            selection=selection,
            gate=gate,
        )


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prompt: Tensor,
    v_prompt: Tensor,
    gate: Tensor | None,
    *,
    scale: float | None = None,
    normalize_over: NormalizeOver = "all",
    impl: Impl = "auto",
) -> Tensor:
    """Attend to all tokens and to the prompts whose gate bit is set.

    With s_ij = scale * q_i . k_j over the S = L + P keys and g_ij = 1 on tokens, the gate bit on
    prompts, `normalize_over="all"` computes

        o_i = sum_j softmax_j(s_ij) g_ij v_j,

    where prompts that a token does not see still count in its denominator, and "visible" computes

        o_i = sum_j g_ij exp(s_ij) v_j / sum_j g_ij exp(s_ij).

    Args:
        q: `[B, Lq, H, D]` float queries; Lq may be smaller than L.
        k, v: `[B, L, H, D]` keys and values of the tokens, any strides.
        k_prompt, v_prompt: `[P, H, D]` shared by the batch or `[B, P, H, D]` per sample, P >= 0.
        gate: int32 `[B, Lq, W]`, W = ceil(P / 32), or `[1, Lq, W]` shared by the batch; None lets
            every query see every prompt.
        scale: factor of the scores; 1 / sqrt(D) when absent.
        normalize_over: "all" (Eq. 12-13, official code) or "visible" (Eq. 6-7).
        impl: "auto", "triton", "sdpa" or "reference"; see `choose_impl`.

    Returns:
        `[B, Lq, H, D]` of q's dtype (the autocast dtype under torch.autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the `impl` that was asked for cannot run here.

    Numerics:
        Products in q's dtype, softmax in float32 or better. Samples do not mix. Deterministic.

    Cost:
        4 * B * H * Lq * S * D multiply-adds.

    Source:
        Section 3.3, Eq. 12-13 and Eq. 6-7.
    """
    dtype = autocast_dtype(require_tensor("q", q, "[B, Lq, H, D]", 4).device)
    if dtype is not None:
        q, k, v, k_prompt, v_prompt = (t.to(dtype) for t in (q, k, v, k_prompt, v_prompt))
    _check_attention(q, k, v, k_prompt, v_prompt)
    if gate is not None:
        words = num_gate_words(k_prompt.shape[-3])
        batch = 1 if gate.ndim == 3 and gate.shape[0] == 1 else q.shape[0]
        _check_gate(gate, (batch, q.shape[1], words), q.device)
    if scale is not None:
        require_number("scale", scale, 0.0)
    require_choice("normalize_over", normalize_over, ("all", "visible"))
    name = _resolve(impl, q, k.shape[1])
    # Without a gate PyTorch's own attention computes the same, on any device.
    ungated = impl == "auto" and q.device.type != "cpu" and gate is None
    attend = gated_attention_reference
    if name == "sdpa" or ungated:
        attend = sdpa.gated_attention_sdpa
    with without_autocast(q.device):
        return attend(q, k, v, k_prompt, v_prompt, gate, scale=scale, normalize_over=normalize_over)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor) -> None:
    batch, _, heads, head_dim = q.shape
    for name, tensor in (("k", k), ("v", v)):
        require_tensor(name, tensor, "[B, L, H, D]", 4)
        require_same(name, tensor, "q", q)
        expected = (batch, k.shape[1], heads, head_dim)
        require_shape(name, tensor, expected, "B, L, H, D with B, H, D of q and L of k")
    for name, tensor in (("k_prompt", k_prompt), ("v_prompt", v_prompt)):
        require_tensor(name, tensor, "[P, H, D] or [B, P, H, D]", 3, 4)
        require_same(name, tensor, "q", q)
        leading = (batch,) if k_prompt.ndim == 4 else ()
        expected = (*leading, k_prompt.shape[-3], heads, head_dim)
        require_shape(name, tensor, expected, "P, H, D with H, D of q and P of k_prompt")


def _check_gate(gate: Tensor, expected: tuple[int, int, int], device: torch.device) -> None:
    if not isinstance(gate, Tensor) or gate.dtype != torch.int32:
        got = gate.dtype if isinstance(gate, Tensor) else type(gate).__name__
        raise TypeError(f"gate: got {got}, expected int32 gate words; make them with pack_gate")
    require_shape("gate", gate, expected, "batch, queries, ceil(P / 32) words")
    got, remedy = f"device {gate.device}", "move it with .to()"
    require(gate.device == device, "gate", got, f"{device}", remedy)
