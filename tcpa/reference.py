"""Reference operations: what `match_prompts` and `gated_attention` compute, written for reading.

These functions are the specification. Every faster implementation is compared with them, so they
use plain tensor algebra, run on any device and in any floating-point dtype, and leave the gradients
to autograd.

Axes: B batch, H heads, L tokens, P prompt rows, S = L + P keys, D head dim, C = H * D, R pool
entries, W = ceil(P / 32) gate words. Tokens are ordered prefix tokens (CLS, registers, ...), then
patches; prompt rows are ordered CLS pool, then image pool, each entry contributing `length`
consecutive rows.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import require, require_dtype, require_gate, require_int, require_int_pair

Selection = Literal["nearest", "farthest"]
NormalizeOver = Literal["all", "visible"]

GATE_WORD_BITS = 32
NORM_EPS = 1e-12


def num_gate_words(num_prompts: int) -> int:
    """Return W, the number of 32-bit words that hold one bit for each of `num_prompts` rows."""
    return -(-num_prompts // GATE_WORD_BITS)


def pack_gate(visible: Tensor) -> Tensor:
    """Pack booleans into gate words: bit `r % 32` of word `r // 32` says "prompt row r is visible".

    Args:
        visible: bool `[..., P]`.

    Returns:
        int32 `[..., W]`; bit 31 is the sign bit.

    Raises:
        TypeError, ValueError: `visible` does not fit; the message says why.
    """
    remedy = "say for each prompt row whether it is visible"
    require_dtype("visible", visible, torch.bool, "tensor [..., P]", remedy)
    return pack_bits(visible)


def pack_bits(visible: Tensor) -> Tensor:
    """Compute `pack_gate`; trusts its argument."""
    num_prompts = visible.shape[-1]
    words = num_gate_words(num_prompts)
    padded = F.pad(visible.long(), (0, words * GATE_WORD_BITS - num_prompts))
    bits = padded.reshape(*visible.shape[:-1], words, GATE_WORD_BITS)
    place = torch.arange(GATE_WORD_BITS, device=visible.device)
    unsigned = (bits << place).sum(-1)
    # Two's complement by hand: a cast of an out-of-range int64 is not defined to wrap.
    return (unsigned - ((unsigned >> 31) << 32)).to(torch.int32)


def unpack_gate(gate: Tensor, num_prompts: int) -> Tensor:
    """Undo `pack_gate`.

    Args:
        gate: int32 `[..., W]`.
        num_prompts: P, the number of prompt rows; at most `32 * W`.

    Returns:
        bool `[..., P]`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    require_gate(gate)
    require_int("num_prompts", num_prompts, 0)
    words = num_gate_words(num_prompts)
    got, expected = f"{gate.shape[-1]} words", f"at least {words} for num_prompts={num_prompts}"
    require(gate.shape[-1] >= words, "gate", got, expected, "pass the num_prompts it was made for")
    return unpack_bits(gate, num_prompts)


def unpack_bits(gate: Tensor, num_prompts: int) -> Tensor:
    """Compute `unpack_gate`; trusts its arguments."""
    row = torch.arange(num_prompts, device=gate.device)
    word = gate.index_select(-1, row // GATE_WORD_BITS)
    return ((word >> (row % GATE_WORD_BITS)) & 1).bool()


def match_prompts_reference(
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
) -> tuple[Tensor, Tensor]:
    """Select prompts for every token by cosine similarity and measure the match distance.

    See `tcpa.match_prompts` for arguments, results and source; this function trusts its arguments.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    # One product for both pools: slicing x instead would cost a zero-filled gradient per slice.
    num_cls = cls_keys.shape[0]
    similarity = cosine_similarity(x.to(dtype), torch.cat((cls_keys, image_keys)).to(dtype))
    cls_similarity = similarity[:, :num_prefix_tokens, :num_cls]
    image_similarity = similarity[:, num_prefix_tokens:, num_cls:]
    if gate is None:
        cls_selected = select_entries(cls_similarity, cls_top_k, selection)
        image_selected = select_entries(image_similarity, image_top_k, selection)
        gate = build_gate(cls_selected, image_selected, lengths)
    else:
        num_pool = (cls_keys.shape[0], image_keys.shape[0])
        cls_selected, image_selected = split_gate(gate, num_pool, lengths, num_prefix_tokens)
    distance = _mean_distance(cls_similarity, cls_selected, cls_top_k)
    return gate, distance + _mean_distance(image_similarity, image_selected, image_top_k)


def cosine_similarity(x: Tensor, keys: Tensor) -> Tensor:
    """Return the cosine of every token with every key; zero vectors have similarity 0.

    The tokens are divided by their norm after the product, so that autograd keeps `x` itself and no
    normalised copy of it.

    Args:
        x: `[B, L, C]`.
        keys: `[R, C]`, of the same dtype.

    Returns:
        `[B, L, R]`.
    """
    unit_keys = F.normalize(keys, dim=-1, eps=NORM_EPS)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_EPS)
    return (x @ unit_keys.mT) / norm


def select_entries(similarity: Tensor, top_k: int, selection: Selection = "nearest") -> Tensor:
    """Mark the `top_k` most (or least) similar pool entries; ties go to the lower index.

    Args:
        similarity: `[..., R]`.
        top_k: entries to select, 0 to R.
        selection: "nearest" (official code) or "farthest" (Eq. 10 taken literally).

    Returns:
        bool `[..., R]`.
    """
    order = rank_entries(similarity, selection)[..., :top_k]
    nothing = torch.zeros(similarity.shape, dtype=torch.bool, device=similarity.device)
    return nothing.scatter(-1, order, True)


def rank_entries(similarity: Tensor, selection: Selection = "nearest") -> Tensor:
    """Return pool entries in order of preference, int64 `[..., R]`; ties go to the lower index."""
    nearest_first = selection == "nearest"
    return torch.argsort(similarity.detach(), dim=-1, descending=nearest_first, stable=True)


def build_gate(cls_selected: Tensor, image_selected: Tensor, lengths: tuple[int, int]) -> Tensor:
    """Turn the selected pool entries into gate words.

    Prefix tokens see rows of the CLS pool only, patches rows of the image pool only.

    Args:
        cls_selected: bool `[B, L_prefix, R_cls]`.
        image_selected: bool `[B, L_patch, R_image]`.
        lengths: rows per entry of the CLS pool and of the image pool.

    Returns:
        int32 `[B, L_prefix + L_patch, W]`.
    """
    cls_rows = cls_selected.repeat_interleave(lengths[0], dim=-1)
    image_rows = image_selected.repeat_interleave(lengths[1], dim=-1)
    prefix = F.pad(cls_rows, (0, image_rows.shape[-1]))
    patches = F.pad(image_rows, (cls_rows.shape[-1], 0))
    return pack_bits(torch.cat((prefix, patches), dim=1))


def split_gate(
    gate: Tensor, num_pool: tuple[int, int], lengths: tuple[int, int], num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Undo `build_gate`: the selected entries are those whose first row is visible.

    Args:
        gate: int32 `[B, L, W]`.
        num_pool: R_cls and R_image.
        lengths: rows per entry of the CLS pool and of the image pool.
        num_prefix_tokens: how many leading tokens select from the CLS pool.

    Returns:
        bool `[B, L_prefix, R_cls]` and bool `[B, L_patch, R_image]`.
    """
    cls_rows = num_pool[0] * lengths[0]
    visible = unpack_bits(gate, cls_rows + num_pool[1] * lengths[1])
    cls_selected = visible[:, :num_prefix_tokens, : cls_rows : lengths[0]]
    return cls_selected, visible[:, num_prefix_tokens:, cls_rows :: lengths[1]]


def random_gate(
    batch_size: int,
    num_tokens: int,
    *,
    num_pool: tuple[int, int],
    top_k: tuple[int, int],
    lengths: tuple[int, int] = (1, 1),
    num_prefix_tokens: int = 1,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a gate in which every token sees a uniformly random subset of its pool.

    The subsets are drawn without replacement and independently for every token (the official code's
    selection in the first epochs; not in the paper).

    Args:
        batch_size: B.
        num_tokens: L, prefix tokens included.
        num_pool: R_cls and R_image.
        top_k: entries that each prefix token and each patch sees.
        lengths: rows per entry of the CLS pool and of the image pool.
        num_prefix_tokens: how many leading tokens select from the CLS pool.
        device: where the gate is made.
        generator: source of randomness; the device's default one when absent.

    Returns:
        int32 `[B, L, W]`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    require_int("batch_size", batch_size, 0)
    _check_layout(num_tokens, num_pool, lengths, num_prefix_tokens)
    require_int_pair("top_k", top_k, 0, num_pool)
    if generator is not None and not isinstance(generator, torch.Generator):
        got = type(generator).__name__
        raise TypeError(f"generator: got {got}, expected a torch.Generator; make one, or pass None")

    def draw(tokens: int, pool: int, k: int) -> Tensor:
        # torch.compile takes no generator where shapes are dynamic, not even None.
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        noise = torch.rand(batch_size, tokens, pool, device=device, **source)
        return select_entries(noise, k)

    prefix = draw(num_prefix_tokens, num_pool[0], top_k[0])
    patches = draw(num_tokens - num_prefix_tokens, num_pool[1], top_k[1])
    return build_gate(prefix, patches, lengths)


def role_gate(
    num_tokens: int,
    *,
    num_pool: tuple[int, int],
    lengths: tuple[int, int] = (1, 1),
    num_prefix_tokens: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the gate of R-TCPA alone: every token sees the whole pool of its role.

    Returns:
        int32 `[1, L, W]`, the same for every sample.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check_layout(num_tokens, num_pool, lengths, num_prefix_tokens)

    def whole(tokens: int, pool: int) -> Tensor:
        return torch.ones(1, tokens, pool, dtype=torch.bool, device=device)

    prefix = whole(num_prefix_tokens, num_pool[0])
    return build_gate(prefix, whole(num_tokens - num_prefix_tokens, num_pool[1]), lengths)


def _check_layout(
    num_tokens: int, num_pool: tuple[int, int], lengths: tuple[int, int], num_prefix_tokens: int
) -> None:
    require_int("num_tokens", num_tokens, 0)
    require_int("num_prefix_tokens", num_prefix_tokens, 0, num_tokens)
    require_int_pair("num_pool", num_pool, 0)
    require_int_pair("lengths", lengths, 1)


def _mean_distance(similarity: Tensor, selected: Tensor, top_k: int) -> Tensor:
    """Mean of 1 - cosine over the selected entries of all rows; 0 where nothing can be selected."""
    count = similarity.shape[0] * similarity.shape[1] * top_k
    # `where`, not a product: an unselected NaN must not reach the sum.
    distance = torch.where(selected, 1 - similarity, 0.0)
    return distance.sum() / max(count, 1)


def gated_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prompt: Tensor,
    v_prompt: Tensor,
    gate: Tensor | None,
    *,
    scale: float | None = None,
    normalize_over: NormalizeOver = "all",
) -> Tensor:
    """Attend to all tokens and to the prompts whose gate bit is set.

    See `tcpa.gated_attention` for arguments, results and source; this function trusts its
    arguments.
    """
    num_tokens, num_prompts, head_dim = k.shape[1], k_prompt.shape[-3], q.shape[-1]
    factor = head_dim**-0.5 if scale is None else scale
    # [B, L, H, D] -> [B, H, L, D]; shared prompts [P, H, D] -> [H, P, D] broadcast over the batch.
    q_BHLD = q.transpose(1, 2) * factor
    k_BHLD, v_BHLD = k.transpose(1, 2), v.transpose(1, 2)
    k_prompt, v_prompt = k_prompt.transpose(-3, -2), v_prompt.transpose(-3, -2)
    token_scores = q_BHLD @ k_BHLD.mT
    prompt_scores = q_BHLD @ k_prompt.mT
    visible = None if gate is None else unpack_bits(gate, num_prompts)[:, None]
    if visible is not None and normalize_over == "visible":
        prompt_scores = prompt_scores.masked_fill(~visible, float("-inf"))
    scores_BHLS = torch.cat((token_scores, prompt_scores), dim=-1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    probs_BHLS = torch.softmax(scores_BHLS, dim=-1, dtype=dtype).to(q.dtype)
    token_probs, prompt_probs = probs_BHLS.split((num_tokens, num_prompts), dim=-1)
    if visible is not None:
        # The gate acts after the softmax and nothing is renormalised (Eq. 12-13).
        prompt_probs = prompt_probs.masked_fill(~visible, 0.0)
    return (token_probs @ v_BHLD + prompt_probs @ v_prompt).transpose(1, 2)
