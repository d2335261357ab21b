"""Promise: results keep their conditions, survive interruptions, and follow from sound formulas."""

import dataclasses
import math

import pytest
import torch

import tcpa.provenance
from tcpa.bench.costs import operations as cost
from tcpa.bench.harness import case as shapes
from tcpa.bench.harness import timing
from tcpa.bench.harness.case import PROMISED, Shape, parse_shape, small_shapes, standard_shapes
from tcpa.bench.harness.results import Provenance, Results, Row, load, provenance
from tcpa.bench.harness.timing import Quantiles, interleave, peak_memory, ratio
from tcpa.cli import UsageError

CPU = torch.device("cpu")
WHERE = Provenance(
    device="a device",
    driver="",
    torch="2",
    triton="3",
    timm="1",
    python="3.11",
    system="Linux x86_64",
    commit="abc",
    dirty=False,
    date="2026-11-21T12:00:00+00:00",
)


def row(provider="tcpa", p50=2.0, **fields):
    values = {
        "command": "ops",
        "operation": "gated_attention",
        "shape": PROMISED.name,
        "dtype": "bf16",
        "mode": "both",
        "provider": provider,
        "metric": "time",
        "unit": "us",
        "p20": 1.0,
        "p50": p50,
        "p80": 3.0,
        "samples": 9,
        "provenance": WHERE,
    }
    return Row(**(values | fields))


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new folder" / "results.jsonl"
    kept = Results(path)
    kept.add([row(), row("official", math.inf)])
    assert load(path) == kept.rows == [row(), row("official", math.inf)]
    path.write_text(path.read_text() + row().to_json()[:50])
    assert load(path) == kept.rows, "a line that was cut off is left out"
    again = Results(path)
    again.add([row("official", 1.0)])
    assert [r.p50 for r in again.measured(provider="official")] == [math.inf, 1.0]
    assert again.measured(provider="official", mode="forward") == []
    assert len(path.read_text().splitlines()) == 3
    nowhere = Results()
    nowhere.add([row()])
    assert nowhere.rows == [row()]


@pytest.mark.parametrize("length", [1, 50, 10**6])
def test_rows_after_a_line_that_was_cut_off_are_not_joined_to_it(length, tmp_path, capsys):
    path, last = tmp_path / "results.jsonl", row("official").to_json()
    path.write_text(row().to_json() + "\n" + last[:length])
    Results(path).add([row("third")])
    kept = [row(), row("official")] if length > len(last) else [row()]
    assert load(path) == [*kept, row("third")]
    told = capsys.readouterr().err
    assert ("its last line was cut off" in told) == (len(kept) == 1)


@pytest.mark.parametrize("text", ["notes of mine", '{"answer": 42}'])
def test_a_file_of_one_line_that_is_not_ours_is_left_alone(text, tmp_path):
    path = tmp_path / "notes"
    path.write_text(text)
    with pytest.raises(UsageError, match="line 1 is no row of results"):
        Results(path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "no object with a provenance"),
        ("1", "no object with a provenance"),
        ("nonsense", "Expecting value"),
        (row().to_json().replace('"unit"', '"units"'), r"missing or unknown fields \['unit', 'uni"),
        (row().to_json().replace('"commit"', '"comit"'), r"missing or unknown fields \['comit', '"),
        (row().to_json().replace('"p20": 1.0', '"p20": "1"'), "p20, p50 and p80 must be numbers"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_by_line(line, message, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{row().to_json()}\n{line}\n{row().to_json()}\n")
    with pytest.raises(
        UsageError, match=rf"--results: .*, line 2 is no row of results .*{message}"
    ):
        Results(path)


def test_a_file_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--results: got .*, expected a file that can be written"):
        Results(tmp_path / "file" / "results.jsonl")
    for path in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(UsageError, match=r"FILE: .* cannot be read"):
            load(path)


def test_the_conditions_are_those_of_this_run(monkeypatch):
    provenance.cache_clear()
    where = provenance(CPU)
    assert where.torch == torch.__version__ and where.driver == ""
    assert f"{torch.get_num_threads()} threads" in where.device
    assert provenance(CPU) is where
    monkeypatch.setattr(tcpa.provenance, "output_of", lambda command: "")
    provenance.cache_clear()
    assert provenance(CPU).commit == "" and provenance(CPU).dirty is False
    provenance.cache_clear()


def test_quantiles():
    found = Quantiles.of([float(n) for n in range(11)])
    assert (found.p20, found.p50, found.p80, found.samples) == (2.0, 5.0, 8.0, 11)
    assert Quantiles.of([4.0]) == Quantiles(4.0, 4.0, 4.0, 1)
    assert found.scaled(1e6).p80 == 8e6
    # The fastest fifth of the times are the highest fifth of the rates.
    assert found.rate(16.0) == Quantiles(2.0, 3.2, 8.0, 11)


def test_variants_run_in_turn():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = interleave(calls, CPU, seconds=0.0, min_rounds=3)
    assert order == ["a", "a", "b", "b", *"ab" * 3]
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}
    assert len(interleave(calls, CPU, seconds=60.0, max_rounds=7)["a"]) == 7


def test_the_ratio_is_that_of_pairs():
    times = {"official": [2.0, 20.0, 2.0], "tcpa": [1.0, 10.0, 1.0]}
    assert ratio(times, "tcpa", "official") == Quantiles(2.0, 2.0, 2.0, 3)
    assert ratio(times, "official", "official").p50 == 1.0


def test_peak_memory_sees_what_a_call_needs():
    found = peak_memory(lambda: torch.ones(2**26, dtype=torch.int8), CPU)
    if found is None:
        pytest.skip("this system does not count memory")
    assert 0.9 * 2**26 <= found < 2 * 2**26


def test_peak_memory_is_unknown_where_nobody_counts(monkeypatch):
    def denied(field):
        raise OSError

    monkeypatch.setattr(timing, "_resident", denied)
    assert peak_memory(lambda: None, CPU) is None


def test_the_name_of_a_shape_tells_all():
    for shape in (*standard_shapes(), *small_shapes()):
        assert parse_shape(shape.name) == shape
    for name, vit in shapes.BACKBONES.items():
        assert parse_shape(f"{name}-224-p10-b1").vit is vit


def test_sizes_of_the_promised_shape():
    assert standard_shapes()[0] == PROMISED
    assert len(set(standard_shapes())) == len(standard_shapes())
    assert (PROMISED.tokens, PROMISED.vit.width) == (197, 768)
    assert (PROMISED.pools, PROMISED.top_k) == ((18, 18), (10, 10))
    assert parse_shape("dinov2_b14-224-p7s-b2").tokens == 5 + 256
    assert Shape("ti16", 32, 7, 1).pools == (3, 4) and Shape("ti16", 32, 7, 1).top_k == (3, 4)


@pytest.mark.parametrize(
    "text",
    ["", "b16", "b16-224-p36", "x16-224-p36-b1", "b16-8-p36-b1", "b16-224-p36-b0", "b16-224-p-b1"],
)
def test_another_name_is_refused(text):
    with pytest.raises(UsageError, match=rf"^--shape: got {text!r}, expected BACKBONE-IMAGE-pPROM"):
        parse_shape(text)


def test_the_work_of_attention():
    # By hand: B 128, H 12, L 197, S 233, D 64; a row of q is 768 elements of 2 bytes.
    forward = cost.gated_attention(PROMISED, "bf16", "forward")
    assert forward.flops == 2 * 2 * 128 * 12 * 197 * 233 * 64
    rows = 128 * 197 * 768 * 2
    small = 2 * 36 * 768 * 2 + 4 * 128 * 197 * 2 + 4 * 128 * 12 * 197
    assert forward.bytes == 4 * rows + small
    backward = cost.gated_attention(PROMISED, "bf16", "backward")
    assert backward.flops == 2.5 * forward.flops
    both = cost.gated_attention(PROMISED, "bf16", "both")
    assert both == forward + backward
    own = cost.gated_attention(dataclasses.replace(PROMISED, per_sample=True), "bf16", "forward")
    assert own.flops == forward.flops
    assert own.bytes - forward.bytes == 127 * 2 * 36 * 768 * 2
    assert cost.gated_attention(PROMISED, "fp32", "both").bytes > 1.9 * both.bytes


def test_the_work_of_matching():
    forward = cost.match_prompts(PROMISED, "bf16", "forward")
    assert forward.flops == 2 * 128 * 197 * 768 * 36
    rows = 128 * 197 * 768 * 2
    assert forward.bytes == rows + 4 * 128 * 197 * 2 + 4 * 36 * 768
    for mode, more in (("forward", 1), ("backward", 1), ("both", 2)):
        match, norm = (
            cost.OPERATIONS[n](PROMISED, "bf16", mode) for n in ("match_prompts", "norm_match")
        )
        assert norm.flops == match.flops and norm.bytes - match.bytes == more * rows


def test_the_least_time_is_that_of_the_scarcer_resource():
    work = cost.Cost(flops=100.0, bytes=10.0)
    assert work.seconds(50.0, 10.0) == 2.0 and work.seconds(200.0, 1.0) == 10.0
