"""Promise: the step benchmark compares equal computations only, and says what it measured."""

import copy
import itertools
import math
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from models import ARCHITECTURES

from tcpa import Savings
from tcpa.bench import __main__ as cli
from tcpa.bench import step
from tcpa.bench.harness import model as harness_model
from tcpa.bench.harness import worker as harness_worker
from tcpa.bench.harness.breakdown import GAPS, KINDS, REST, add_up, kind_of, time_by_kind
from tcpa.bench.harness.case import StepCase
from tcpa.bench.harness.check import (
    Answer,
    ReferenceCache,
    Skipped,
    WrongResultError,
    largest_error,
)
from tcpa.bench.harness.model import build_model, fold_norms, plain_answer
from tcpa.bench.harness.provider import StepProvider
from tcpa.bench.harness.results import load, provenance
from tcpa.bench.harness.worker import StepResult, StoppedError, Worker, measure, measure_rounds
from tcpa.bench.providers.step import ladder, providers, tcpa_steps
from tcpa.bench.step import choose_steps, rows_of, table, utilisation_of
from tcpa.cli import UsageError

CPU = torch.device("cpu")
SMALL = StepCase(model="vit_tiny_patch16_224", batch=1)
PLAIN = StepProvider(name="official", savings=Savings.none())


def result(name, seconds, peak, error=0.0, **options):
    return StepResult(
        provider=StepProvider(name=name, **options),
        seconds=seconds,
        peak_bytes=peak * 2**20,
        error=error,
    )


def test_the_command_measures_and_writes_what_it_measured(tmp_path, capsys):
    path = tmp_path / "new" / "step.jsonl"
    options = ["--model", SMALL.model, "--batch", "2", "--rounds", "2", "--kinds"]
    arguments = ["step", *options, "--provider", "folded", "frozen ViT", "--results", str(path)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    rows = load(path)
    names = list(dict.fromkeys(row.provider for row in rows))
    assert names == ["official", "tcpa, folded norms", "frozen ViT"]
    for name in names:
        own = {row.metric: row for row in rows if row.provider == name}
        assert name in printed and own["time"].samples == 2 and own["time"].unit == "ms"
        assert own["time"].p20 <= own["time"].p50 <= own["time"].p80
        assert own["rate"].p50 == pytest.approx(2e3 / own["time"].p50)
        assert own["error"].p50 < 1e-3 and own["peak memory"].p50 > 100
        assert own["time of matrix products"].p50 > 0
        assert own["time"].shape == "vit_tiny_patch16_224-cub-b2"
        assert own["time"].mode == "train" and own["time"].provenance.torch == torch.__version__
    assert rows[0].provider == "official" and "ms by kind of kernel" in printed


def test_low_precision_is_checked_and_evaluation_measured():
    chosen = [
        p for p in providers("bfloat16", "cpu") if p.name in ("official", "tcpa, bf16 weights")
    ]
    case = StepCase(model=SMALL.model, batch=2, mode="eval")
    exact, low = measure(case, chosen, 1)
    assert exact.error < 1e-4 < low.error < 0.1


def test_prompts_on_images_are_left_out_unless_asked_for(monkeypatch):
    chosen = []

    def measure(case, found, *_, **__):
        chosen.append({p.name for p in found})
        raise WrongResultError("enough")

    monkeypatch.setattr(step, "measure", measure)
    for options in ([], ["--all"], ["--provider", "DAM-VP"]):
        assert step.main(options) == 1
    usual, everything, named = chosen
    assert not usual & {"VP", "DAM-VP + TCPA"} and "VPT-deep" in usual
    assert {"VP", "DAM-VP + TCPA", "official, frozen, compiled"} <= everything
    assert named == {"official", "DAM-VP"}


@pytest.mark.parametrize("method", ["vpt-deep", "vfpt", "linear"])
def test_other_methods_are_checked_against_their_own_plain_form(method):
    found = measure(SMALL, [StepProvider(name=method, method=method)], 1)
    assert found[0].error < 1e-4 and len(found[0].seconds) == 1


def test_the_plain_form_of_a_large_batch_works_in_parts(monkeypatch):
    case, answers = StepCase(model=SMALL.model, batch=5), []
    for size in (8, 2):
        monkeypatch.setattr(harness_model, "CHUNK", size)
        answers.append(plain_answer(case, PLAIN))
    assert largest_error(answers[1], answers[0]) < 1e-5


def test_the_yardstick_is_the_official_algorithm_as_it_stands():
    for precision in ("float32", "bfloat16", "float64"):
        first = providers(precision, "cpu")[0]
        assert first.savings == Savings.none() and first.precision != "bfloat16"
        assert not first.compiled and first.method == "tcpa"
    names = [p.name for p in providers("bfloat16", "cuda")]
    assert len(set(names)) == len(names)
    assert {"VPT-deep", "VFPT", "frozen ViT", "official, frozen, compiled"} <= set(names)


def test_only_a_gpu_has_graphs():
    assert any(p.graph for p in tcpa_steps("bfloat16", "cuda"))
    assert not any(p.graph for p in tcpa_steps("bfloat16", "cpu"))


def test_folding_norms_leaves_the_function_alone():
    plain = ARCHITECTURES["vit-tiny"].create(torch.float64).eval()
    folded = copy.deepcopy(plain)
    fold_norms(folded)
    images = ARCHITECTURES["vit-tiny"].images(dtype=torch.float64)
    assert torch.allclose(folded(images), plain(images), rtol=1e-12, atol=1e-12)
    assert all(bool((b.norm1.weight == 1).all()) for b in folded.blocks)
    assert not torch.equal(folded.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)


def test_all_forms_start_from_the_same_trained_values():
    models = [build_model(SMALL, p) for p in providers("bfloat16", "cpu") if p.method == "tcpa"]
    first = models[0].trainable_named_parameters()
    for model in models[1:]:
        for name, value in model.trainable_named_parameters().items():
            assert torch.equal(value, first[name]), name


def test_the_ladder_makes_one_change_at_a_time():
    for precision in ("float32", "bfloat16"):
        rungs = list(ladder(precision, "cuda"))
        assert rungs[0] == providers(precision, "cuda")[0] and rungs[0].savings == Savings.none()
        for before, rung in itertools.pairwise(rungs):
            changed = [
                name
                for name in ("precision", "savings", "impl", "compiled", "folded", "graph")
                if getattr(before, name) != getattr(rung, name)
            ]
            assert len(changed) == 1, rung.name
            if changed == ["savings"]:
                old, new = asdict(before.savings), asdict(rung.savings)
                assert sum(old[name] != new[name] for name in old) == 1
        assert rungs[-1].graph and rungs[-1].compiled and rungs[-1].folded
        assert len({rung.name for rung in rungs}) == len(rungs)


def test_the_table_and_the_rows_give_medians_and_ratios():
    results = [
        result("official", [0.030, 0.010, 0.020], 200, savings=Savings.none()),
        result("tcpa", [0.010], 50, 1e-6),
    ]
    used = utilisation_of(SMALL, results)
    printed = table(SMALL, results, used, provenance(CPU))
    assert "20 (14-26)" in printed and "1.00x" in printed
    assert "2.00x" in printed and "0.25x" in printed and "1e-06" in printed
    rows = {(r.provider, r.metric): r.p50 for r in rows_of(SMALL, results, used, provenance(CPU))}
    assert rows["tcpa", "MFU"] == pytest.approx(2 * rows["official", "MFU"])
    assert rows["tcpa", "HFU"] > rows["tcpa", "MFU"]
    assert rows["tcpa", "speed against the first"] == 2
    assert rows["tcpa", "memory against the first"] == 0.25
    assert rows["official", "time"] == pytest.approx(20)
    unknown = StepCase(model="eva02_tiny_patch14_224")
    used = utilisation_of(unknown, results)
    assert "MFU" not in {row.metric for row in rows_of(unknown, results, used, provenance(CPU))}


def answer(**values):
    return Answer({name: np.asarray(value, dtype=np.float32) for name, value in values.items()})


def test_no_figures_of_a_wrong_result():
    references = ReferenceCache(SMALL, plain_answer)
    references._answers["tcpa", "float32"] = answer(loss=1.0, keys=[1.0, 2.0])
    assert references.check(PLAIN, answer(loss=1.0, keys=[1.0, 2.0])) == 0
    for wrong in (
        answer(loss=1.0, keys=[1.01, 2.02]),
        answer(loss=1.0, keys=[math.nan, 2.0]),
        answer(loss=1.0),
    ):
        with pytest.raises(WrongResultError, match=r"'official' differs .*no figures of a wrong"):
            references.check(PLAIN, wrong)


def test_low_precision_may_err_twice_as_much_as_plain_low_precision():
    references = ReferenceCache(SMALL, plain_answer)
    references._answers["tcpa", "float32"] = answer(loss=1.0)
    references._answers["tcpa", "autocast"] = answer(loss=1.01)
    low = StepProvider(name="tcpa", precision="bfloat16")
    assert references.check(low, answer(loss=1.02)) == pytest.approx(0.02, rel=1e-3)
    with pytest.raises(WrongResultError, match=r"by 3\.0e-02 \(allowed 2e-02\)"):
        references.check(low, answer(loss=0.97))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch: got 0, expected at least 1"),
        (["--threads", "-3"], "--threads: got -3, expected at least 0"),
        (["--model", "vit_tiny"], "--model: got 'vit_tiny', expected a timm model"),
        (["--provider", "fast"], "--provider: got 'fast', expected a part of one of 'official'"),
        (["--device", "cuda:99"], "--device: got 'cuda:99', expected auto, cpu or a device"),
        (
            ["--model", "resnet18", "--provider", "VFPT"],
            "--model resnet18 --batch 8: backbone: ResNet is not",
        ),
    ],
)
def test_bad_options_are_refused_by_name(arguments, message, capsys):
    assert step.main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


def test_providers_are_chosen_by_name_or_part():
    chosen = choose_steps(providers("float32", "cpu"), ["VPT-deep"])
    assert [provider.name for provider in chosen] == ["official", "VPT-deep"]
    chosen = choose_steps(providers("float32", "cpu"), ["frozen vit", "as tokens"])
    tokens = "VPT-deep, prompts as tokens"
    assert [provider.name for provider in chosen] == ["official", tokens, "frozen ViT"]


def test_a_provider_that_died_is_named(monkeypatch):
    monkeypatch.setattr(harness_worker, "_serve", os.getpid)
    worker = Worker(SMALL, StepProvider(name="tcpa"))
    with pytest.raises(UsageError, match=r"provider 'tcpa': its process ended with exit code 1"):
        worker.step()
    worker.stop()


class Scripted:
    """A provider that answers so many steps."""

    def __init__(self, name, steps, error):
        self.provider, self.left, self.error = StepProvider(name=name), steps, error

    def step(self):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return 10.0 + self.left, 50.0


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(UsageError("gone"), 2, "step: gone"), (KeyboardInterrupt(), 130, "step: interrupted")],
)
def test_the_rounds_before_a_failure_are_kept(
    error, status, message, tmp_path, capsys, monkeypatch
):
    def rounds_of(steps):
        running = [Scripted("official", 9, error), Scripted("tcpa", steps, error)]
        return measure_rounds(running, [0.0, 1e-7], 5)

    with pytest.raises(type(error)):
        rounds_of(0)
    with pytest.raises(StoppedError, match="ended after 2 rounds"):
        rounds_of(2)
    monkeypatch.setattr(step, "measure", lambda *_, **__: rounds_of(2))
    path = tmp_path / "step.jsonl"
    assert step.main(["--results", str(path)]) == status
    printed, told = capsys.readouterr()
    assert "2 rounds" in printed and "tcpa" in printed and message in told
    assert {row.samples for row in load(path) if row.metric == "time"} == {2}


def test_a_provider_that_fails_costs_no_other_its_figures(tmp_path, capsys, monkeypatch):
    bad = [
        StepProvider(name="kernels", method="vpt-deep", impl="triton", precision="float64"),
        StepProvider(name="wrong", method="linear", savings=Savings.none()),
    ]
    good = StepProvider(name="official", method="linear")
    check = ReferenceCache.check

    def strict(self, provider, answer):
        if provider.name == "wrong":
            raise WrongResultError("provider 'wrong' differs")
        return check(self, provider, answer)

    monkeypatch.setattr(ReferenceCache, "check", strict)
    monkeypatch.setattr(step, "providers", lambda *_: [good, *bad, replace(good, name="last")])
    path = tmp_path / "step.jsonl"
    options = ["--model", "test_vit", "--batch", "1", "--rounds", "1", "--results", str(path)]
    assert step.main(options) == 1
    told = capsys.readouterr().err
    assert "left out: kernels, --model test_vit" in told and "left out: provider 'wrong'" in told
    assert {row.provider for row in load(path)} == {"official", "last"}
    with pytest.raises(UsageError, match="kernels"):
        measure(SMALL, [*bad, good], 1, skipped=Skipped())


def test_a_wrong_result_is_told_in_one_line(monkeypatch, capsys):
    def measure(*_, **__):
        raise WrongResultError("provider 'tcpa' differs")

    monkeypatch.setattr(step, "measure", measure)
    assert step.main([]) == 1
    assert capsys.readouterr() == ("", "tcpa-bench step: provider 'tcpa' differs\n")


def test_a_file_that_cannot_be_written_is_refused_before(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "measure", lambda *_, **__: pytest.fail("measured all the same"))
    assert step.main(["--results", str(tmp_path)]) == 2
    assert "--results: got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_gated_attention_forward", "attention"),
        ("aten::_scaled_dot_product_flash_attention", "attention"),
        ("_norm_match_forward_kernel", "norm and match"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("nvjet_tst_128x256", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("void at::native::multi_tensor_apply_kernel<adam>", "optimiser"),
        ("Memcpy DtoD", "copies and casts"),
        ("triton_poi_fused_gelu_0", REST),
    ],
)
def test_kernels_are_told_apart_by_name(name, kind):
    assert kind_of(name) == kind


def test_time_by_kind_adds_up():
    x = torch.randn(256, 256)
    found = time_by_kind(lambda: (x @ x).softmax(1) + 1, CPU)
    assert list(found) == [*KINDS, REST, GAPS]
    assert found["matrix products"] > 0 and found["attention"] > 0 and found[REST] > 0


class Event:
    def __init__(self, name, start, end, device="DeviceType.CUDA"):
        self.name, self.device_type, self.is_user_annotation = name, device, False
        self.time_range = self
        self.start, self.end = start, end

    def elapsed_us(self):
        return self.end - self.start


def test_gaps_are_the_time_without_a_kernel():
    events = [Event("gemm", 0, 10), Event("gelu", 15, 20), Event("cpu", 0, 99, "DeviceType.CPU")]
    found = add_up(events, gpu=True)
    assert found["matrix products"] == pytest.approx(10e-6)
    assert found[REST] == pytest.approx(5e-6) and found[GAPS] == pytest.approx(5e-6)


def test_without_triton_the_command_says_so(monkeypatch, capsys):
    def absent(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    assert cli.main(["static"]) == 2
    assert "tcpa-bench: static needs triton, which is not installed" in capsys.readouterr().err


def test_the_command_line_lists_its_commands(capsys):
    assert cli.main(["--help"]) == 0
    assert "step" in capsys.readouterr().out
    assert cli.main(["stp"]) == 2 and "unknown command 'stp'" in capsys.readouterr().err
    assert cli.main([]) == 2


def test_the_step_of_a_compiled_form_can_be_made():
    harness_model.Runner(SMALL, replace(PLAIN, compiled=True))
