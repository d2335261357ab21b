"""The operations of TCPA: public entries check arguments, `*_unchecked` choose how to compute.

`match_prompts` says which prompts every token may see, `gated_attention` attends accordingly;
`norm_match` is the block's LayerNorm and `match_prompts` in one kernel. The model calls the
unchecked forms, which take the same arguments.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .checks import (
    require,
    require_choice,
    require_gate,
    require_int,
    require_int_pair,
    require_number,
    require_same_device,
    require_shape,
    require_tensor,
)
from .cpu import gated_attention_dense, gated_attention_sdpa
from .dispatch import IMPLS, Impl, autocast_dtype, resolve, without_autocast
from .reference import (
    NormalizeOver,
    Selection,
    gated_attention_reference,
    match_prompts_reference,
    num_gate_words,
)


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
        impl: "auto", "triton" or "reference" ("sdpa" and "dense" are the same).

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
    _check_matching(
        x, cls_keys, image_keys, cls_top_k, image_top_k, num_prefix_tokens, lengths, selection, gate
    )
    require_choice("impl", impl, IMPLS)
    return match_prompts_unchecked(
        x,
        cls_keys,
        image_keys,
        cls_top_k=cls_top_k,
        image_top_k=image_top_k,
        num_prefix_tokens=num_prefix_tokens,
        lengths=lengths,
        selection=selection,
        gate=gate,
        impl=impl,
    )


def match_prompts_unchecked(
    x: Tensor, cls_keys: Tensor, image_keys: Tensor, *, impl: Impl = "auto", **options: Any
) -> tuple[Tensor, Tensor]:
    """Compute `match_prompts`; trusts its arguments."""
    name = resolve(impl, x, x.shape[1], lambda: kernels.matching_refusal(x, cls_keys, image_keys))
    if name == "triton":
        return kernels.match_prompts(x, cls_keys, image_keys, **options)
    with without_autocast(x.device):
        return match_prompts_reference(x, cls_keys, image_keys, **options)


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
        impl: "auto", "triton", "sdpa", "dense" or "reference"; see `choose_impl`.

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
    _check_attention(q, k, v, k_prompt, v_prompt)
    if gate is not None:
        require_gate(gate, "[B, Lq, W] or [1, Lq, W]")
        words = num_gate_words(k_prompt.shape[-3])
        batch = 1 if gate.shape[0] == 1 else q.shape[0]
        _check_gate(gate, (batch, q.shape[1], words), q.device)
    if scale is not None:
        require_number("scale", scale, 0.0)
    require_choice("normalize_over", normalize_over, ("all", "visible"))
    require_choice("impl", impl, IMPLS)
    return gated_attention_unchecked(
        q, k, v, k_prompt, v_prompt, gate, scale=scale, normalize_over=normalize_over, impl=impl
    )


def gated_attention_unchecked(
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
    """Compute `gated_attention`; trusts its arguments."""
    dtype = autocast_dtype(q.device)
    if dtype is not None:
        q, k, v, k_prompt, v_prompt = (t.to(dtype) for t in (q, k, v, k_prompt, v_prompt))
    name = resolve(impl, q, k.shape[1], lambda: kernels.attention_refusal(q, k_prompt))
    options = {"scale": None if scale is None else float(scale), "normalize_over": normalize_over}
    if name == "triton":
        return kernels.gated_attention(q, k, v, k_prompt, v_prompt, gate, **options)
    if q.numel() == 0 or k.numel() == 0:
        # PyTorch's fused attention divides by these sizes.
        attend = gated_attention_reference
    elif name == "sdpa" or (impl == "auto" and q.device.type != "cpu" and gate is None):
        # Without a gate PyTorch's own attention computes the same, on any device.
        attend = gated_attention_sdpa
    elif name == "dense":
        attend = gated_attention_dense
    else:
        attend = gated_attention_reference
    with without_autocast(q.device):
        return attend(q, k, v, k_prompt, v_prompt, gate, **options)


def norm_match(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every token with LayerNorm, and match the same tokens, before the norm, with the
    prompt pools.

    The kernels read `x` once for both.

    Args:
        x: `[B, L, C]` float tokens before the norm.
        weight: `[C]` scale of the LayerNorm, of the dtype of `x`, or float32 with 16-bit `x`; None
            is one.
        bias: `[C]` shift of the LayerNorm, of the dtype of `weight`; None is zero.
        eps: added to the variance.
        cls_keys, image_keys, cls_top_k, image_top_k, num_prefix_tokens, lengths, selection, gate:
            as in `match_prompts`.
        impl: "auto", "triton" (frozen weight and bias only) or "reference"
            ("sdpa" and "dense" are the same).

    Returns:
        normed: `[B, L, C]`, in the dtype of `x` (the reference: of `torch.nn.functional.layer_norm`
            under the current autocast).
        gate, distance: as in `match_prompts`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the `impl` that was asked for cannot run here.

    Numerics:
        LayerNorm in float32 or better; matching as in `match_prompts`. Deterministic.

    Cost:
        One read of `x` and one write of the normed tokens (kernels).

    Source:
        Eq. 9, 10 and 14, Section 3.3; the norm is the first of the transformer block.
    """
    _check_matching(
        x, cls_keys, image_keys, cls_top_k, image_top_k, num_prefix_tokens, lengths, selection, gate
    )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            require_tensor(name, parameter, "[C]", 1)
            require_same_device(name, parameter, "x", x)
            require_shape(name, parameter, (x.shape[2],), "C as in x")
    require_number("eps", eps, 0.0)
    require_choice("impl", impl, IMPLS)
    impl = _resolve_norm_match(impl, x, weight, bias, cls_keys, image_keys)
    if impl != "triton":
        _check_affine_dtype(x, weight, bias)
    return norm_match_unchecked(
        x,
        weight,
        bias,
        eps,
        cls_keys,
        image_keys,
        cls_top_k=cls_top_k,
        image_top_k=image_top_k,
        num_prefix_tokens=num_prefix_tokens,
        lengths=lengths,
        selection=selection,
        gate=gate,
        impl=impl,
    )


def norm_match_unchecked(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cls_keys: Tensor,
    image_keys: Tensor,
    *,
    impl: Impl = "auto",
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `norm_match`; trusts its arguments."""
    if _resolve_norm_match(impl, x, weight, bias, cls_keys, image_keys) == "triton":
        return kernels.norm_match(x, weight, bias, eps, cls_keys, image_keys, **options)
    normed = F.layer_norm(x, x.shape[2:], weight, bias, eps)
    with without_autocast(x.device):
        return normed, *match_prompts_reference(x, cls_keys, image_keys, **options)


def _resolve_norm_match(
    impl: Impl, x: Tensor, weight: Tensor | None, bias: Tensor | None, *keys: Tensor
) -> Impl:
    affine = {"weight": weight, "bias": bias}
    return resolve(impl, x, x.shape[1], lambda: kernels.matching_refusal(x, *keys, **affine))


def _check_matching(
    x: Tensor,
    cls_keys: Tensor,
    image_keys: Tensor,
    cls_top_k: int,
    image_top_k: int,
    num_prefix_tokens: int,
    lengths: tuple[int, int],
    selection: Selection,
    gate: Tensor | None,
) -> None:
    require_tensor("x", x, "[B, L, C]", 3)
    require(x.shape[2] >= 1, "x", f"shape {list(x.shape)}", "[B, L, C] with C >= 1", "check it")
    for name, keys in (("cls_keys", cls_keys), ("image_keys", image_keys)):
        require_tensor(name, keys, "[R, C]", 2)
        require_same_device(name, keys, "x", x)
        require_shape(name, keys, (keys.shape[0], x.shape[2]), "R pool entries, C as in x")
    require_int("cls_top_k", cls_top_k, 0, cls_keys.shape[0])
    require_int("image_top_k", image_top_k, 0, image_keys.shape[0])
    require_int("num_prefix_tokens", num_prefix_tokens, 0, x.shape[1])
    require_int_pair("lengths", lengths, 1)
    require_choice("selection", selection, ("nearest", "farthest"))
    num_prompts = cls_keys.shape[0] * lengths[0] + image_keys.shape[0] * lengths[1]
    if gate is not None:
        require_gate(gate, "[B, L, W]")
        _check_gate(gate, (x.shape[0], x.shape[1], num_gate_words(num_prompts)), x.device)


def _check_affine_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Check that PyTorch's LayerNorm takes parameters of these dtypes for tokens like `x`."""
    if x.device.type != "cpu" and autocast_dtype(x.device) is not None:
        # There autocast computes LayerNorm in float32, whatever comes.
        return
    dtypes = (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            expected = " or ".join(map(str, dict.fromkeys(dtypes)))
            remedy = f"convert it with {name}.to(x.dtype)"
            fits = parameter.dtype in dtypes
            require(fits, name, parameter.dtype, f"{expected} as x is {x.dtype}", remedy)
    if weight is not None and bias is not None:
        same, expected = bias.dtype == weight.dtype, f"{weight.dtype} as weight"
        require(same, "bias", bias.dtype, expected, "convert it with bias.to(weight.dtype)")


def _check_attention(q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor) -> None:
    require_tensor("q", q, "[B, Lq, H, D]", 4)
    require(q.shape[3] >= 1, "q", f"shape {list(q.shape)}", "[B, Lq, H, D] with D >= 1", "check it")
    for name, tensor in (("k", k), ("v", v)):
        require_tensor(name, tensor, "[B, L, H, D]", 4)
    for name, tensor in (("k_prompt", k_prompt), ("v_prompt", v_prompt)):
        require_tensor(name, tensor, "[P, H, D] or [B, P, H, D]", 3, 4)
    batch, _, heads, head_dim = q.shape
    leading = (batch,) if k_prompt.ndim == 4 else ()
    of_tokens = (batch, k.shape[1], heads, head_dim), "B, L, H, D with B, H, D of q and L of k"
    of_prompts = (*leading, k_prompt.shape[-3], heads, head_dim), "P, H, D with H, D of q"
    for name, tensor, expected in (
        ("k", k, of_tokens),
        ("v", v, of_tokens),
        ("k_prompt", k_prompt, of_prompts),
        ("v_prompt", v_prompt, of_prompts),
    ):
        require_same_device(name, tensor, "q", q)
        if autocast_dtype(q.device) is None:
            got, remedy = tensor.dtype, "convert with .to(q.dtype) or call under torch.autocast"
            require(got == q.dtype, name, got, f"{q.dtype}", remedy)
        require_shape(name, tensor, *expected)


def _check_gate(gate: Tensor, expected: tuple[int, int, int], device: torch.device) -> None:
    require_shape("gate", gate, expected, "batch, queries, ceil(P / 32) words")
    require(
        gate.device == device, "gate", f"device {gate.device}", f"{device}", "move it with .to()"
    )
