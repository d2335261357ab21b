"""Promise: the reference operations compute the written formulas, with exact gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from tcpa import (
    gated_attention_reference,
    match_prompts_reference,
    pack_gate,
    random_gate,
    role_gate,
    unpack_gate,
)
from tcpa.reference import build_gate, num_gate_words, rank_entries, select_entries, split_gate

F64 = torch.float64


@pytest.mark.parametrize("num_prompts", [0, 1, 31, 32, 33, 36, 64, 100])
def test_gate_words_hold_one_bit_per_prompt(num_prompts):
    visible = torch.rand(2, 5, num_prompts) < 0.5
    gate = pack_gate(visible)
    assert gate.dtype == torch.int32 and gate.shape == (2, 5, math.ceil(num_prompts / 32))
    assert gate.shape[-1] == num_gate_words(num_prompts)
    assert torch.equal(unpack_gate(gate, num_prompts), visible)


def test_bit_31_is_the_sign_bit():
    visible = torch.zeros(1, 1, 32, dtype=torch.bool)
    visible[..., 31] = True
    assert pack_gate(visible).item() == -(2**31)


WORDS = pack_gate(torch.ones(2, 3, 40, dtype=torch.bool))
LAYOUT = {"batch_size": 2, "num_tokens": 5, "num_pool": (3, 4), "top_k": (1, 2)}
REFUSED = {
    "not-bool": (
        pack_gate,
        {"visible": WORDS},
        TypeError,
        r"visible: got torch\.int32, expected boo",
    ),
    "no-tensor": (pack_gate, {"visible": [True]}, TypeError, "visible: got list, expected bool"),
    "no-axes": (pack_gate, {"visible": torch.tensor(True)}, ValueError, "visible: got a tensor wi"),
    "not-words": (
        unpack_gate,
        {"gate": WORDS.long()},
        TypeError,
        r"gate: got torch\.int64, expected i",
    ),
    "list": (unpack_gate, {"gate": [1]}, TypeError, "gate: got list, expected int32"),
    "negative": (
        unpack_gate,
        {"num_prompts": -1},
        ValueError,
        "num_prompts: got -1, expected an int",
    ),
    "float": (
        unpack_gate,
        {"num_prompts": 4.0},
        TypeError,
        r"num_prompts: got 4\.0, expected an int",
    ),
    "many": (
        unpack_gate,
        {"num_prompts": 65},
        ValueError,
        "gate: got 2 words, expected at least 3",
    ),
    "top-k": (random_gate, {"top_k": (1, 5)}, ValueError, r"top_k\[1\]: got 5, expected .* 0 to 4"),
    "pool": (random_gate, {"num_pool": 7}, TypeError, "num_pool: got 7, expected two integers"),
    "batch": (
        random_gate,
        {"batch_size": -1},
        ValueError,
        "batch_size: got -1, expected an integer",
    ),
    "generator": (
        random_gate,
        {"generator": 3},
        TypeError,
        r"generator: got int, expected a torch\.",
    ),
    "prefix": (
        role_gate,
        {"num_prefix_tokens": 6},
        ValueError,
        "num_prefix_tokens: got 6.* 0 to 5",
    ),
    "lengths": (
        role_gate,
        {"lengths": (1, 0)},
        ValueError,
        r"lengths\[1\]: got 0, expected an int",
    ),
}


@pytest.mark.parametrize(("function", "change", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_of_gates_are_refused_by_name(function, change, kind, message):
    good = {
        pack_gate: {},
        unpack_gate: {"gate": WORDS, "num_prompts": 40},
        random_gate: LAYOUT,
        role_gate: {name: LAYOUT[name] for name in ("num_tokens", "num_pool")},
    }
    with pytest.raises(kind, match=message):
        function(**(good[function] | change))


@pytest.mark.parametrize("selection", ["nearest", "farthest"])
def test_ties_go_to_the_lower_index(selection):
    similarity = torch.tensor([0.5, 0.7, 0.5, 0.7, 0.5])
    expected = {"nearest": [1, 3, 0, 2, 4], "farthest": [0, 2, 4, 1, 3]}[selection]
    assert rank_entries(similarity, selection).tolist() == expected
    selected = select_entries(similarity, 3, selection)
    assert selected.nonzero().flatten().tolist() == sorted(expected[:3])


def test_a_nan_counts_as_most_similar_and_stays_in_its_row():
    similarity = torch.tensor([[0.1, float("nan"), 0.3], [0.1, 0.2, 0.3]])
    selected = select_entries(similarity, 1)
    assert selected.tolist() == [[False, True, False], [False, False, True]]


def slow_match(x, cls_keys, image_keys, cls_top_k, image_top_k, num_prefix):
    """Token by token, entry by entry: selections and distance of Eq. 9 and 14."""
    distances = {"cls": [], "image": []}
    chosen = {}
    for b in range(x.shape[0]):
        for token in range(x.shape[1]):
            pool, k = ("cls", cls_top_k) if token < num_prefix else ("image", image_top_k)
            keys = cls_keys if pool == "cls" else image_keys
            cosines = [float(x[b, token] @ key / (x[b, token].norm() * key.norm())) for key in keys]
            order = sorted(range(len(keys)), key=lambda r: (-cosines[r], r))[:k]
            chosen[b, token] = set(order)
            distances[pool] += [1 - cosines[r] for r in order]
    return chosen, sum(sum(d) / len(d) for d in distances.values() if d)


@pytest.mark.parametrize(
    ("num_prefix", "k"),
    [(1, (2, 3)), (3, (1, 1)), (0, (2, 3)), (7, (4, 6)), (1, (4, 6)), (1, (0, 2))],
    ids=["cls", "registers", "no-prefix", "no-patches", "whole-pools", "k-zero"],
)
def test_match_equals_the_token_by_token_formula(num_prefix, k):
    x = torch.randn(2, 7, 8, dtype=F64)
    cls_keys, image_keys = torch.randn(4, 8, dtype=F64), torch.randn(6, 8, dtype=F64)
    gate, distance = match_prompts_reference(
        x,
        cls_keys,
        image_keys,
        cls_top_k=k[0],
        image_top_k=k[1],
        num_prefix_tokens=num_prefix,
        lengths=(2, 3),
    )
    chosen, expected = slow_match(x, cls_keys, image_keys, *k, num_prefix)
    visible = unpack_gate(gate, 4 * 2 + 6 * 3)
    for (b, token), entries in chosen.items():
        start, length = (0, 2) if token < num_prefix else (8, 3)
        rows = {start + r * length + i for r in entries for i in range(length)}
        assert set(visible[b, token].nonzero().flatten().tolist()) == rows
    assert distance.item() == pytest.approx(expected, rel=1e-12)


def test_farthest_is_nearest_of_the_opposite_keys():
    x, keys = torch.randn(2, 5, 8, dtype=F64), torch.randn(6, 8, dtype=F64)
    options = {"cls_top_k": 2, "image_top_k": 3}
    far, _ = match_prompts_reference(x, keys, keys, selection="farthest", **options)
    near, _ = match_prompts_reference(x, -keys, -keys, **options)
    assert torch.equal(far, near)


def test_a_given_gate_is_measured_and_returned():
    x, keys = torch.randn(2, 9, 8, dtype=F64), torch.randn(40, 8, dtype=F64)
    options = {"cls_top_k": 2, "image_top_k": 3, "lengths": (1, 2)}
    gate, distance = match_prompts_reference(x, keys, keys, **options)
    again, replayed = match_prompts_reference(x, keys, keys, gate=gate, **options)
    assert again is gate and torch.equal(replayed, distance)
    other = random_gate(2, 9, num_pool=(40, 40), top_k=(2, 3), lengths=(1, 2))
    assert match_prompts_reference(x, keys, keys, gate=other, **options)[1] > distance


def test_random_gates_have_k_entries_and_follow_their_generator():
    options = {"num_pool": (6, 9), "top_k": (2, 4), "lengths": (3, 2), "num_prefix_tokens": 2}
    gates = [
        random_gate(3, 50, generator=torch.Generator().manual_seed(seed), **options)
        for seed in (7, 7, 8)
    ]
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])
    cls_selected, image_selected = split_gate(gates[0], (6, 9), (3, 2), 2)
    assert (cls_selected.sum(-1) == 2).all() and (image_selected.sum(-1) == 4).all()
    # 3 * 48 draws of 4 among 9: every entry turns up, and no two tokens need agree.
    assert (image_selected.flatten(0, 1).sum(0) > 20).all()
    assert torch.equal(build_gate(cls_selected, image_selected, (3, 2)), gates[0])


def test_role_gate_shows_each_token_its_whole_pool():
    visible = unpack_gate(role_gate(5, num_pool=(2, 3), lengths=(2, 1), num_prefix_tokens=2), 7)
    expected = [[1, 1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 0, 1, 1, 1]] * 3
    assert visible[0].int().tolist() == expected


def test_match_gradients():
    x = torch.randn(2, 5, 6, dtype=F64, requires_grad=True)
    keys = [torch.randn(r, 6, dtype=F64, requires_grad=True) for r in (3, 4)]

    def distance(*arguments):
        return match_prompts_reference(*arguments, cls_top_k=2, image_top_k=3)[1]

    assert gradcheck(distance, (x, *keys))


def test_match_measures_low_precision_in_float32():
    x, keys = torch.randn(2, 5, 64).bfloat16(), torch.randn(6, 64)
    options = {"cls_top_k": 2, "image_top_k": 3}
    gate, distance = match_prompts_reference(x, keys, keys, **options)
    exact_gate, exact = match_prompts_reference(x.double(), keys.double(), keys.double(), **options)
    assert distance.dtype == torch.float32 and torch.equal(gate, exact_gate)
    assert distance.item() == pytest.approx(exact.item(), rel=1e-6)


def slow_attention(q, k, v, k_prompt, v_prompt, visible, normalize_over):
    """One query and head at a time."""
    out = torch.empty_like(q)
    for b, i, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        prompts = (k_prompt[b, :, h], v_prompt[b, :, h])
        keys = torch.cat((k[b, :, h], prompts[0]))
        values = torch.cat((v[b, :, h], prompts[1]))
        gate = torch.cat((torch.ones(k.shape[1], dtype=F64), visible[b, i].to(F64)))
        weights = torch.exp(keys @ q[b, i, h] / math.sqrt(q.shape[-1]))
        denominator = weights.sum() if normalize_over == "all" else (weights * gate).sum()
        out[b, i, h] = (weights * gate) @ values / denominator
    return out


@pytest.mark.parametrize("normalize_over", ["all", "visible"])
@pytest.mark.parametrize("num_prompts", [0, 1, 36], ids=["none", "one", "two-words"])
def test_attention_equals_the_query_by_query_formula(normalize_over, num_prompts):
    q = torch.randn(2, 3, 2, 4, dtype=F64)
    k, v = torch.randn(2, 2, 5, 2, 4, dtype=F64)
    k_prompt, v_prompt = torch.randn(2, 2, num_prompts, 2, 4, dtype=F64)
    visible = torch.rand(2, 3, num_prompts) < 0.5
    expected = slow_attention(q, k, v, k_prompt, v_prompt, visible, normalize_over)
    got = gated_attention_reference(
        q, k, v, k_prompt, v_prompt, pack_gate(visible), normalize_over=normalize_over
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize_over", ["all", "visible"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
def test_attention_gradients(normalize_over, shared):
    tokens = [torch.randn(2, n, 2, 3, dtype=F64, requires_grad=True) for n in (3, 4, 4)]
    shape = (5, 2, 3) if shared else (2, 5, 2, 3)
    prompts = [torch.randn(shape, dtype=F64, requires_grad=True) for _ in range(2)]
    gate = pack_gate(torch.rand(2, 3, 5) < 0.5)

    def attend(*arguments):
        return gated_attention_reference(*arguments, gate, normalize_over=normalize_over)

    assert gradcheck(attend, (*tokens, *prompts))
