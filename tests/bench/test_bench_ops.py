"""Promise: the race times correct results only, keeps every row, and resumes where it ended."""

import dataclasses
import json

import pytest
import torch

from tcpa.bench import __main__ as cli
from tcpa.bench import ops
from tcpa.bench.costs import ceilings
from tcpa.bench.costs import operations as cost
from tcpa.bench.harness import timing
from tcpa.bench.harness.case import Shape, parse_shape
from tcpa.bench.harness.provider import choose
from tcpa.bench.harness.results import Results, Row, load, make_rows, provenance
from tcpa.bench.ops import MODES, Race, call_of
from tcpa.bench.ops_table import TIME, OperationCase, best_composition, table
from tcpa.bench.providers.attention import PROVIDERS
from tcpa.bench.providers.attention_case import AttentionCase
from tcpa.bench.providers.operations import OPERATIONS, Operation
from tcpa.cli import UsageError

CPU = torch.device("cpu")
TINY = Shape("ti16", 32, 3, 1)
NAMED = {provider.label: provider for provider in PROVIDERS}
OFFICIAL, OURS = NAMED["official"], NAMED["tcpa reference"]
METRICS = {
    ("time", "us"),
    ("rate", "TFLOP/s"),
    ("bandwidth", "GB/s"),
    ("share of ceiling", "%"),
    ("speed", "x official"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Measure ceilings on little, and compile nothing."""
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(ceilings.PRODUCT_SIZE, "cpu", 16)
    for operation in OPERATIONS.values():
        plain = tuple(p for p in operation.providers if "flex" not in p.label)
        plain = tuple(p for p in plain if "compiled" not in p.label)
        small = dataclasses.replace(operation, providers=plain)
        monkeypatch.setitem(OPERATIONS, operation.name, small)


def attention(*providers):
    """Return gated attention with other providers."""
    return Operation("gated_attention", AttentionCase, providers)


def altered(provider, name, change):
    """Return a provider under another name whose results are changed."""

    def prepare(case, training):
        prepared = provider.prepare(case, training)
        return dataclasses.replace(
            prepared, read=lambda outputs, grads: change(prepared.read(outputs, grads))
        )

    return dataclasses.replace(provider, name=name, prepare=prepare)


def failing(name, error):
    def prepare(case, training):
        raise error

    return dataclasses.replace(OFFICIAL, name=name, prepare=prepare)


def race(*providers, path=None, modes=("both",), **options):
    """Run a race on a tiny shape."""
    found = Race(CPU, Results(path), seconds=0.001, **options)
    found.run(attention(*providers), TINY, "fp32", modes)
    return found


def test_the_command_measures_all_operations_end_to_end(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    arguments = ["--device", "cpu", "--shape", TINY.name, "--seconds", "0.001"]
    assert cli.main(["ops", *arguments, "--results", str(path)]) == 0
    printed = capsys.readouterr().out
    rows = load(path)
    for name, operation in OPERATIONS.items():
        for mode in MODES:
            found = {r.provider for r in rows if (r.operation, r.mode) == (name, mode)}
            for provider in operation.providers:
                reason = provider.unavailable(TINY, "fp32", CPU, mode)
                assert (provider.label in found) == (reason is None), provider.label
                assert reason is None or f"not available: {reason}: " in printed
            assert f"\n{name}, ti16-32-p3-b1, fp32, {mode}\n" in printed
    assert {row.command for row in rows} == {"ops", "ceilings"}
    assert {(row.metric, row.unit) for row in rows if row.command == "ceilings"} == {
        ("bandwidth", "GB/s"),
        ("rate", "TFLOP/s"),
    }
    where = provenance(CPU)
    for row in rows:
        assert row.provenance == where and row.dtype == "fp32"
        assert 0 <= row.p20 <= row.p50 <= row.p80 and row.samples >= 1
        assert row.shape == TINY.name or row.command == "ceilings"


def test_the_rows_of_a_provider_follow_from_its_time():
    rows = race(OFFICIAL, NAMED["composition C, duplicated keys [sdpa default]"], OURS).results.rows
    ours = {(r.metric, r.unit): r for r in rows if r.provider == "tcpa reference"}
    memory = {("peak memory", "MiB")}
    assert ours.keys() - memory == METRICS | {("speed", "x best composition")}
    work = cost.OPERATIONS["gated_attention"](TINY, "fp32", "both")
    seconds = ours["time", "us"].p50 / 1e6
    assert ours["rate", "TFLOP/s"].p50 == pytest.approx(work.flops / seconds / 1e12)
    assert ours["bandwidth", "GB/s"].p50 == pytest.approx(work.bytes / seconds / 1e9)
    reached = {row.metric: row.p50 for row in rows if row.command == "ceilings"}
    least = work.seconds(reached["rate"] * 1e12, reached["bandwidth"] * 1e9)
    assert ours["share of ceiling", "%"].p50 == pytest.approx(100 * least / seconds)
    base = next(r for r in rows if r.provider == "official" and r.unit == "x official")
    assert base.p50 == 1.0


def test_a_floor_gets_no_rates_and_a_mark(capsys):
    rows = race(OFFICIAL, NAMED["sdpa, no gate [default]"]).results.rows
    metrics = {row.metric for row in rows if row.provider.startswith("sdpa, no gate")}
    assert metrics - {"peak memory"} == {"time", "speed"}
    printed = capsys.readouterr().out
    assert "sdpa, no gate [default] *" in printed
    assert "* less work than the operation's: a floor, no competitor" in printed


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_provider_is_refused_and_gets_no_row(mode, capsys):
    def change(found):
        return {name: value * 1.01 for name, value in found.items()}

    found = race(OFFICIAL, altered(OFFICIAL, "wrong", change), modes=[mode])
    printed = capsys.readouterr().out
    assert "WRONG, no figure: out: largest error " in printed and ": wrong\n" in printed
    assert found.wrong == 1
    assert {row.provider for row in found.results.rows} == {"torch", "official"}


def test_a_wrong_gradient_is_told_by_the_exit_status(monkeypatch, capsys):
    def change(found):
        return found | ({"k": -found["k"]} if "k" in found else {})

    wrong = altered(OFFICIAL, "wrong", change)
    monkeypatch.setitem(OPERATIONS, "gated_attention", attention(OFFICIAL, wrong))
    arguments = ["--device", "cpu", "--shape", TINY.name, "--seconds", "0.001"]
    arguments += ["--operation", "gated_attention"]
    assert ops.main(arguments) == 1
    printed, told = capsys.readouterr()
    # Its outputs are right: without gradients it takes part, with them it does not.
    assert printed.count("WRONG, no figure: k: largest error ") == 2
    assert told == "tcpa-bench ops: 1 wrong results, see above\n"


def test_what_became_wrong_shows_no_earlier_figure(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    race(OFFICIAL, OURS, path=path)
    assert "\n  tcpa reference  " in capsys.readouterr().out
    wrong = altered(OURS, OURS.name, lambda found: found | {"out": -found["out"]})
    race(OFFICIAL, wrong, path=path, again=True)
    printed = capsys.readouterr().out
    assert "\n  tcpa reference  " not in printed and "WRONG, no figure: out: largest" in printed


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "cannot run: out of memory: bad"),
        (MemoryError(), "cannot run: out of memory: bad"),
        (RuntimeError("[x] DefaultCPUAllocator: can't allocate memory"), "out of memory: bad"),
        (NotImplementedError("\n no kernel\nhint"), "NotImplementedError: no kernel: bad"),
    ],
)
def test_what_cannot_run_is_a_line_and_no_crash(error, message, capsys):
    found = race(OFFICIAL, failing("bad", error))
    assert message in capsys.readouterr().out and found.wrong == 0
    assert {row.provider for row in found.results.rows} == {"torch", "official"}


def test_a_case_that_does_not_fit_is_a_line_and_no_crash(monkeypatch, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = Race(CPU, Results())
    found.run(Operation("gated_attention", too_large, (OFFICIAL,)), TINY, "fp32", ["both"])
    expected = "gated_attention, ti16-32-p3-b1, fp32: cannot run: out of memory"
    assert expected in capsys.readouterr().out and found.results.rows == []


def test_a_run_resumes_and_measures_again_only_when_asked(tmp_path, monkeypatch, capsys):
    path, timed = tmp_path / "results.jsonl", []
    interleave = timing.interleave

    def watched(calls, *arguments, **options):
        timed.append(list(calls))
        return interleave(calls, *arguments, **options)

    monkeypatch.setattr(timing, "interleave", watched)
    race(OFFICIAL, path=path)
    assert timed == [["official"]] and "measured before" not in capsys.readouterr().out
    first = race(OFFICIAL, path=path)
    assert len(timed) == 1 and "both (measured before)\n" in capsys.readouterr().out
    assert first.results.rows == load(path)
    # A provider that was not there before runs beside those that were: ratios are of one run.
    race(OFFICIAL, OURS, path=path)
    assert timed[1:] == [["tcpa reference", "official"]]
    race(OFFICIAL, path=path, again=True)
    assert timed[2:] == [["official"]]
    # Another commit is another measurement.
    here = provenance(CPU)
    monkeypatch.setattr(ops, "provenance", lambda _: dataclasses.replace(here, commit="other"))
    race(OFFICIAL, path=path)
    assert len(timed) == 4


def test_an_interrupted_run_keeps_its_rows(tmp_path, monkeypatch, capsys):
    path, interleave, calls = tmp_path / "results.jsonl", timing.interleave, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return interleave(*arguments, **options)

    monkeypatch.setattr(timing, "interleave", interrupted)
    arguments = ["--device", "cpu", "--shape", TINY.name, "--operation", "match_prompts"]
    arguments += ["--seconds", "0.001", "--results", str(path)]
    assert ops.main(arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {row.mode for row in load(path) if row.command == "ops"} == {"forward"}
    assert ops.main(arguments) == 0
    assert {row.mode for row in load(path)} == set(MODES)


def test_what_is_timed_is_what_the_mode_says():
    case = AttentionCase(TINY, "fp32", CPU)
    prepared = OFFICIAL.prepare(case, True)
    (out,) = call_of(OFFICIAL.prepare(case, False), "forward")()
    assert not out.requires_grad
    backward = call_of(prepared, "backward")
    # One graph serves every call.
    for one, other in zip(backward(), backward(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(backward(), call_of(prepared, "both")(), strict=True):
        assert torch.equal(one, other)


def test_the_best_back_end_is_the_one_reported(capsys):
    slow, fast = (
        dataclasses.replace(NAMED["composition C, duplicated keys [sdpa default]"], back_end=name)
        for name in ("slow", "fast")
    )
    times = {slow.label: [3.0, 1.0, 3.0], fast.label: [2.0, 2.0, 9.0], "official": [1.0] * 3}
    assert best_composition([OFFICIAL, slow, fast], times) == fast.label
    assert best_composition([OFFICIAL], times) is None
    found = Race(CPU, Results())
    case = OperationCase("gated_attention", TINY, "fp32", "both")
    for label, values in times.items():
        fields = case.fields | {"provider": label}
        rows = make_rows({TIME: timing.Quantiles.of(values)}, provenance(CPU), **fields)
        found.results.add(rows)
    printed = table(case, [OFFICIAL, slow, fast], found.results.rows, {}, new=True)
    assert f"{fast.label}, best of 2" in printed and slow.label not in printed
    assert "2 (2-6.2)" in printed


def test_matching_is_measured_where_there_is_something_to_match(capsys):
    found = Race(CPU, Results())
    operation = OPERATIONS["match_prompts"]
    found.run(operation, Shape("ti16", 32, 0, 1), "fp32", ["both"])
    found.run(operation, Shape("ti16", 32, 3, 1, per_sample=True), "fp32", ["both"])
    printed = capsys.readouterr().out
    assert "ti16-32-p0-b1: not measured, there are no prompts to match" in printed
    assert "ti16-32-p3s-b1: not measured, matching is that of ti16-32-p3-b1" in printed
    assert found.results.rows == []


def test_without_prompts_attention_is_measured_and_compositions_say_why_not(capsys):
    found = Race(CPU, Results(), seconds=0.001)
    found.run(OPERATIONS["gated_attention"], parse_shape("ti16-32-p0-b1"), "fp32", ["both"])
    assert "without prompts this is plain attention: composition" in capsys.readouterr().out
    expected = {"torch", "official", "tcpa reference", "tcpa sdpa"}
    found = {row.provider for row in found.results.rows}
    assert expected <= found and not any(name.startswith("composition") for name in found)


def test_providers_are_chosen_by_name_or_part():
    labels = [p.label for operation in OPERATIONS.values() for p in operation.providers]
    assert choose(["official"], labels) == {"official"}
    assert choose(["Composition C"], labels) == {
        p.label for p in OPERATIONS["gated_attention"].providers if "composition C" in p.name
    }
    assert choose(["tcpa s", "OFFICIAL"], labels) == {"tcpa sdpa", "official"}
    with pytest.raises(UsageError, match=r"--provider: got 'flash4', expected a part of one of"):
        choose(["official", "flash4"], labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operation", "softmax"], "--operation: invalid choice: 'softmax'"),
        (["--mode", "train"], "--mode: invalid choice: 'train'"),
        (["--dtype", "fp8"], "--dtype: invalid choice: 'fp8'"),
        (["--shape", "b16"], "--shape: got 'b16', expected BACKBONE-IMAGE-"),
        (["--provider", "nobody"], "--provider: got 'nobody', expected a part of one of"),
        (["--seconds", "0"], "--seconds: got 0.0, expected a number above 0"),
        (["--seconds", "nan"], "--seconds: got nan, expected a number above 0"),
        (["--results", "/proc/none/r.jsonl"], "--results: got /proc/none/r.jsonl, expected a file"),
    ],
)
def test_bad_options_are_refused_by_name(arguments, message, capsys):
    try:
        status = ops.main(["--device", "cpu", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(capsys):
    assert ops.main(["--device", "cuda:99"]) == 2
    assert "--device: got 'cuda:99', expected auto, cpu or a device" in capsys.readouterr().err


def test_when_nothing_can_be_measured_the_exit_status_tells(capsys):
    arguments = ["--device", "cpu", "--shape", TINY.name, "--provider", "cudnn"]
    assert ops.main(arguments) == 2
    printed, told = capsys.readouterr()
    assert "not available: runs on cuda, the device is cpu: composition" in printed
    assert "nothing was measured" in told


def test_the_list_shows_who_takes_part_and_measures_nothing(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    assert ops.main(["--device", "cpu", "--list", "--results", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("shapes: b16-224-p36-b4 ")
    for operation in OPERATIONS.values():
        assert f"{operation.name}:" in lines
        for provider in operation.providers:
            assert any(provider.label in line for line in lines), provider.label
    assert any(line.endswith("forward, backward, both") for line in lines)
    assert any("interpreter" in line for line in lines) and not path.exists()


def test_ceilings_follow_from_sizes_and_times(monkeypatch):
    def interleave(calls, device, *, seconds):
        for call in calls.values():
            call()
        return {"copy": [2.0, 2.0], "product": [4.0, 4.0]}

    monkeypatch.setattr(ceilings, "interleave", interleave)
    found = ceilings.measure(CPU, "fp32")
    assert (found.flops, found.bandwidth) == (2 * 16**3 / 4.0, 2 * 2**16 / 2.0)
    (again,) = ceilings.measured(ceilings.rows_of(found, CPU, "fp32", provenance(CPU)), "fp32")
    assert (again.flops, again.bandwidth) == pytest.approx((found.flops, found.bandwidth))


def test_rows_are_plain_json():
    for row in race(OFFICIAL).results.rows:
        assert isinstance(row, Row) and json.loads(row.to_json())["provider"] == row.provider
