"""Promise: measured launches go before the table's, and only a right and faster one is written."""

import json
from types import MappingProxyType

import pytest
import torch

from tcpa.bench import __main__ as cli
from tcpa.bench import tune, tune_cases
from tcpa.bench.tune_cases import AttentionShape, LaunchRow, MatchShape
from tcpa.cli import UsageError
from tcpa.kernels import launch
from tcpa.kernels.launch import Launch, choose_launch, override

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
runs_kernels = pytest.mark.skipif(
    DEVICE.type == "cpu" and not launch.interpreting(), reason="needs a GPU or TRITON_INTERPRET=1"
)
SHAPES = {
    "gated": AttentionShape(batch=2, tokens=9, heads=1, head_dim=16, pool=(3, 4), top_k=2),
    "other": MatchShape(batch=2, tokens=7, width=40, pool=(5, 6), top_k=2),
}
FWD = LaunchRow(operation="gated_attention_fwd", dtype="fp32", bucket="d64", inputs="fp32")
HEAD = {"architecture": "sm_77", "device": "none", "commit": "none"}
ROW = {
    "operation": "gated_attention_fwd",
    "dtype": "bf16",
    "bucket": "d64",
    "blocks": {"BLOCK_M": 16, "BLOCK_N": 32},
    "num_warps": 2,
    "num_stages": 3,
    "max_registers": 96,
    "median_us": 10.0,
    "previous_us": 20.5,
}


def shape_of(operation):
    return SHAPES["gated" if operation.startswith("gated") else "other"]


def make_launch(block_m, registers=None):
    blocks = MappingProxyType({"BLOCK_M": block_m, "BLOCK_N": 32})
    return Launch(blocks=blocks, num_warps=4, num_stages=2, max_registers=registers)


CURRENT, FAST, OTHER = make_launch(32), make_launch(16), make_launch(16, 128)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Measured launches are read from an empty folder."""
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    launch.forget_measured()
    yield tmp_path
    monkeypatch.undo()
    launch.forget_measured()


def write(folder, *rows, name="sm_77", **head):
    content = {**HEAD, "architecture": name, **head, "rows": list(rows)}
    (folder / f"{name}.json").write_text(json.dumps(content))


def chosen(architecture="sm_77", dtype=torch.bfloat16, operation="gated_attention_fwd"):
    return choose_launch(operation, architecture=architecture, dtype=dtype, bucket="d64")


def test_a_measured_row_goes_before_the_table_on_its_architecture_only(folder):
    before = {(a, d): chosen(a, d) for a in ("sm_80", "sm_90") for d in launch.DTYPE_NAMES}
    write(folder, ROW)
    launch.forget_measured()
    measured = chosen()
    assert measured.blocks == ROW["blocks"] and measured.options()["maxnreg"] == 96
    assert (measured.num_warps, measured.num_stages) == (2, 3)
    for (architecture, dtype), row in before.items():
        assert chosen(architecture, dtype) == row
    # Neither another dtype nor another operation takes it.
    assert chosen(dtype=torch.float16) == chosen("default", torch.float16)
    assert chosen(operation="gated_attention_dq") == chosen("default", operation=FWD.operation)


DAMAGES = {
    "no_json": ("{", "content: no JSON"),
    "no_rows": (json.dumps(HEAD), "rows: missing"),
    "other_architecture": ({}, "architecture: got 'sm_80', expected 'sm_77'"),
    "operation": ({"operation": "dance"}, r"rows\[1\]\.operation: unknown 'dance'"),
    "dtype": ({"dtype": "fp8"}, r"rows\[1\]\.dtype: unknown 'fp8'"),
    "bucket": ({"bucket": "d999"}, r"rows\[1\]\.bucket: unknown 'd999'"),
    "blocks": ({"blocks": {"BLOCK_M": 16}}, r"rows\[1\]\.blocks: got \['BLOCK_M'\]"),
    "block": ({"blocks": {"BLOCK_M": 16, "BLOCK_N": "x"}}, r"\.blocks: got 'x' for BLOCK_N"),
    "warps": ({"num_warps": 0}, r"rows\[1\]\.num_warps: got 0"),
    "registers": ({"max_registers": "all"}, r"rows\[1\]\.max_registers: got 'all'"),
    "missing": ({"num_stages": "absent"}, r"rows\[1\]\.num_stages: missing"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_by_name(folder, damage, message):
    if isinstance(damage, str):
        (folder / "sm_77.json").write_text(damage)
    elif not damage:
        write(folder, ROW, architecture="sm_80")
    else:
        broken = {name: value for name, value in (ROW | damage).items() if value != "absent"}
        write(folder, ROW, broken)
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as refusal:
            chosen()
        assert str(folder / "sm_77.json") in str(refusal.value)
        assert "delete the file or run `tcpa-bench tune` again" in str(refusal.value)


def test_override_changes_one_operation_and_restores(folder):
    fwd, dq = chosen(), chosen(operation="gated_attention_dq")
    with override("gated_attention_fwd", CURRENT):
        assert chosen() == chosen("sm_90", torch.float32) == CURRENT
        assert chosen(operation="gated_attention_dq") == dq
        with pytest.raises(KeyError), override("gated_attention_fwd", FAST):
            assert chosen() == FAST
            raise KeyError
        assert chosen() == CURRENT
    assert chosen() == fwd
    with pytest.raises(LookupError, match="no operation 'dance'"), override("dance", FAST):
        pass


def table_targets(dtypes=("bf16", "fp16", "fp32")):
    return list(tune_cases.targets(tune_cases.OPERATIONS, dtypes, tune_cases.BUCKETS))


@pytest.mark.parametrize("architecture", ["default", "sm_80", "sm_90"])
def test_candidates_are_legal(architecture):
    found = table_targets()
    assert {t.operation for t in found} == {name for name, *_ in launch.LAUNCHES}
    for target in found:
        current = tune._current(target, architecture)
        launches = tune_cases.candidates(target, current)
        assert launches[0] == current and 1 < len(launches) < 40
        assert all(one not in launches[:i] for i, one in enumerate(launches))
        for one in launches:
            assert one.blocks.keys() == current.blocks.keys(), target
            sizes = dict(one.blocks)
            assert all(n > 0 and n & (n - 1) == 0 for n in (*sizes.values(), one.num_warps))
            if "SLICES" in sizes:
                halves, slices = sizes["HALVES"], sizes["SLICES"]
                assert halves >= 2
                # A slice of a low tile, or 16 rows of a tall one, for every warp.
                assert one.num_warps == slices if halves < 8 else one.num_warps == halves // 2
                assert halves < 8 or slices == 1
            elif target.operation != tune_cases.PROMPT_SUM:
                # A gate word holds 32 keys.
                assert sizes["BLOCK_M"] >= 16 and sizes.get("BLOCK_N", 32) >= 32


def test_the_hopper_forward_has_the_expected_candidates():
    target = LaunchRow(operation="gated_attention_fwd", dtype="bf16", bucket="d64", inputs="bf16")
    launches = tune_cases.candidates(target, tune._current(target, "sm_90"))
    found = {(*one.blocks.values(), one.num_warps, one.num_stages) for one in launches}
    for blocks in ((128, 64, 8), (64, 64, 4), (128, 128, 8), (64, 128, 4)):
        assert {(*blocks, 2), (*blocks, 3)} <= found
    assert {one.max_registers for one in launches} == {None, 128, 168}


@runs_kernels
@pytest.mark.parametrize("operation", tune_cases.OPERATIONS)
def test_a_problem_is_right_and_launches_its_operation(operation):
    (target, *_) = tune_cases.targets([operation], ["fp32"], tune_cases.BUCKETS)
    problem = tune_cases.make_problem(target, DEVICE, shape_of(operation))
    found = problem.results()
    assert tune.difference(found, problem.truth()) is None
    launcher = problem.launcher(operation)
    launcher()
    # No block size: what is timed, and what is checked, use the launch in force.
    nothing = Launch(blocks={}, num_warps=4, num_stages=1)
    for call in (launcher, problem.results):
        with override(operation, nothing), pytest.raises(KeyError, match=r"BLOCK_|HALVES"):
            call()


def test_selections_do_not_hang_on_rounding():
    generator = torch.Generator().manual_seed(0)
    rows, keys = torch.randn(2, 8, 3, generator=generator), torch.eye(3)
    rows[0, 3] = torch.tensor([1.0, 1.0, 0.0])
    tune_cases._make_clear(rows, keys, 1)
    ordered = tune_cases.cosine_similarity(rows, keys).sort(-1, descending=True).values
    assert (ordered[..., 0] - ordered[..., 1]).min() > tune_cases.CLEAR_MARGIN


class Clock:
    """Gives every launch the times that it is told, and notes in which order they were asked."""

    def __init__(self, times):
        self.times, self.order = times, []

    def __call__(self, call):
        one = chosen()
        call()

        def measure():
            assert chosen() == one
            self.order.append(one)
            return self.times(one)

        return measure


def times_of(**by_block):
    """Times by BLOCK_M: m32=100."""
    return Clock(lambda one: by_block[f"m{one.blocks['BLOCK_M']}"])


@pytest.fixture
def few(monkeypatch):
    """Three candidates, one tiny shape."""
    make = tune_cases.make_problem
    monkeypatch.setattr(tune, "candidates", lambda target, current: [current, FAST, OTHER])
    monkeypatch.setattr(tune, "_current", lambda target, architecture: CURRENT)
    monkeypatch.setattr(
        tune,
        "make_problem",
        lambda target, device: make(target, device, shape_of(target.operation)),
    )


def tuned(clock, rounds=4):
    problem = tune.make_problem(FWD, DEVICE)
    return tune.tune(FWD, problem, CURRENT, clock, rounds)


@runs_kernels
@pytest.mark.usefixtures("few")
def test_the_faster_candidate_is_chosen(capsys):
    clock = Clock(lambda one: 100.0 if one == CURRENT else 90.0 if one == OTHER else 95.0)
    row = tuned(clock)
    assert row["max_registers"] == 128 and row["blocks"] == dict(OTHER.blocks)
    assert row["median_us"] == 90.0 and row["previous_us"] == 100.0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert printed[0].endswith("current") and printed[2].endswith("chosen")
    assert "BLOCK_M=16 BLOCK_N=32" in printed[2] and "gated_attention_fwd" in printed[2]
    # Interleaved: every round has each launch once, not always in the same order.
    rounds = [clock.order[i : i + 3] for i in range(0, 12, 3)]
    assert all(one in part for part in rounds for one in (CURRENT, FAST, OTHER))
    assert any(part != rounds[0] for part in rounds)


@runs_kernels
@pytest.mark.usefixtures("few")
def test_a_tie_keeps_the_current_row(capsys):
    row = tuned(times_of(m32=100.0, m16=98.5))
    assert row["blocks"] == dict(CURRENT.blocks) and row["median_us"] == row["previous_us"]
    assert capsys.readouterr().out.splitlines()[0].endswith("current chosen")


def trial(one, *times):
    return tune.Trial(launch=one, measure=lambda: 0.0, microseconds=list(times))


def test_noise_keeps_the_current_row():
    steady, noisy = trial(FAST, 85.0, 85.0, 85.0), trial(CURRENT, 80.0, 100.0, 120.0)
    assert tune.choose_trial([noisy, steady], CURRENT) is steady
    overlapping = trial(FAST, 90.0, 90.0, 115.0)
    assert tune.choose_trial([noisy, overlapping], CURRENT) is noisy
    # Without a current launch that works the fastest one is taken.
    assert tune.choose_trial([noisy, steady], OTHER) is steady


@runs_kernels
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("kind", ["gradient", "nan"])
def test_a_wrong_candidate_is_discarded_and_reported(kind, monkeypatch, capsys):
    problem = tune.make_problem(FWD, DEVICE)
    results = problem.results

    def corrupted():
        found = results()
        if chosen() == OTHER:
            found["dv"][0, 0] = float("nan") if kind == "nan" else found["dv"][0, 0] * 1.1 + 0.1
        return found

    monkeypatch.setattr(problem, "results", corrupted)
    clock = Clock(lambda one: 1.0 if one == OTHER else 100.0)
    row = tune.tune(FWD, problem, CURRENT, clock, 3)
    assert row["blocks"] == dict(CURRENT.blocks) and OTHER not in clock.order
    assert "WRONG RESULT, discarded: dv: off by" in capsys.readouterr().out


def test_another_selection_is_wrong():
    gate = torch.tensor([1, 2])
    assert tune.difference({"gate": gate}, {"gate": gate.clone()}) is None
    assert tune.difference({"gate": gate}, {"gate": gate + 1}) == "gate: another selection"


@runs_kernels
@pytest.mark.usefixtures("few")
def test_a_candidate_that_does_not_run_is_named(monkeypatch, capsys):
    problem = tune.make_problem(FWD, DEVICE)
    results = problem.results

    def limited():
        if chosen() == CURRENT:
            raise RuntimeError("first line\nptxas error: too many registers\nlast line")
        return results()

    monkeypatch.setattr(problem, "results", limited)
    row = tune.tune(FWD, problem, CURRENT, times_of(m16=5.0), 2)
    # The current row itself fails: the best of the others, and no figure to compare with.
    assert row["blocks"] == dict(FAST.blocks) and row["previous_us"] is None
    assert "does not run: ptxas error: too many registers" in capsys.readouterr().out
    monkeypatch.setattr(problem, "truth", lambda: {k: v + 1 for k, v in results().items()})
    assert tune.tune(FWD, problem, CURRENT, times_of(m16=5.0), 2) is None
    assert "NO CANDIDATE IS RIGHT" in capsys.readouterr().out


def run_rows(folder, clock, *operations, dtype="fp32"):
    rows = list(tune_cases.targets(operations, [dtype], ["d64"]))
    return tune.run(rows, DEVICE, folder / "sm_77.json", HEAD, clock, 2)


@runs_kernels
@pytest.mark.usefixtures("few")
def test_rows_are_merged_and_used(folder):
    write(folder, ROW, {**ROW, "operation": FWD.operation, "dtype": "fp32", "num_stages": 9})
    assert chosen(dtype=torch.float32).num_stages == 9
    assert run_rows(folder, times_of(m32=100.0, m16=50.0), FWD.operation) == 0
    content = json.loads((folder / "sm_77.json").read_text())
    assert content["device"] == "none" and len(content["rows"]) == 2
    assert ROW in content["rows"]
    assert chosen(dtype=torch.float32) == FAST
    assert [path.name for path in folder.iterdir()] == ["sm_77.json"]


@runs_kernels
@pytest.mark.usefixtures("few")
def test_an_interruption_keeps_what_was_written(folder, capsys):
    def times(one):
        if launch._OVERRIDES.keys() == {"gated_attention_dq"}:
            raise KeyboardInterrupt
        return 100.0 if one == CURRENT else 50.0

    def clock(call):
        (one,) = launch._OVERRIDES.values()
        return lambda: times(one)

    assert run_rows(folder, clock, FWD.operation, "gated_attention_dq") == 130
    assert "interrupted; rows measured before are in" in capsys.readouterr().out
    (row,) = launch.read_measured(folder / "sm_77.json").values()
    assert row["operation"] == FWD.operation and row["median_us"] == 50.0


@runs_kernels
@pytest.mark.usefixtures("few")
def test_a_damaged_file_is_set_aside_and_measured_anew(folder, capsys):
    (folder / "sm_77.json").write_text("{")
    assert run_rows(folder, times_of(m32=100.0, m16=50.0), FWD.operation) == 0
    assert (folder / "sm_77.json.damaged").read_text() == "{"
    assert len(launch.read_measured(folder / "sm_77.json")) == 1
    assert "kept as" in capsys.readouterr().out


def test_a_row_that_cannot_be_stored_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--output: .* could not be written .*\"median_us\": 10"):
        tune.store(tmp_path / "file" / "sm_77.json", HEAD, ROW)


def test_an_unwritable_folder_is_refused_before_measuring(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "architecture_of", lambda device: "sm_77")
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    assert tune.main(["--output", str(tmp_path / "file")]) == 2
    assert "--output: got " in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(folder, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err.strip() == (
        "tcpa-bench tune: no CUDA device; launches are measured, not guessed; "
        "--dry-run lists the candidates"
    )
    assert not list(folder.iterdir())


def test_the_dry_run_lists_every_operation(monkeypatch, folder, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {tuple(line.split()[:3]) for line in lines[2:]}
    assert rows == {(t.operation, t.bucket, t.dtype) for t in table_targets(["bf16"])}
    assert {name for name, _, _ in rows} == {name for name, *_ in launch.LAUNCHES}
    assert sum(line.endswith("  current") for line in lines) == len(rows)
    options = ["--operation", "match_keys_bwd", "--dtype", "fp16", "fp32", "--bucket", "c768"]
    assert cli.main(["tune", "--dry-run", *options]) == 0
    rows = {tuple(line.split()[:3]) for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows == {("match_keys_bwd", "c768", "fp16"), ("match_keys_bwd", "c768", "fp32")}
    (folder / "default.json").write_text("{")
    assert cli.main(["tune", "--dry-run"]) == 2
    assert "default.json: content: no JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "--rounds: got 1, expected at least 2"),
        (["--operation", "dance"], "invalid choice: 'dance'"),
        (["--operation", "match_keys_bwd", "--bucket", "d64"], "no row of the launch table"),
    ],
)
def test_bad_options_are_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_a_device_is_measured(folder):
    options = ["--operation", tune_cases.PROMPT_SUM, "--rounds", "3", "--output", str(folder)]
    assert tune.main(options) == 0
    (path,) = folder.iterdir()
    (row,) = launch.read_measured(path).values()
    assert 1 < row["median_us"] < 10_000 and row["median_us"] <= row["previous_us"]
