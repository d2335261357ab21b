"""Promise: the cost model counts what a step really computes, and says that it is an estimate."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from models import Architecture
from torch.utils.flop_counter import FlopCounterMode

from tcpa import AutoVPConfig, DAMVPConfig, Savings, TCPAConfig, VPConfig, VPTConfig, wrap
from tcpa.bench import __main__ as cli
from tcpa.bench.costs.estimate import change, estimate
from tcpa.bench.costs.model import step
from tcpa.bench.costs.operations import gated_attention
from tcpa.bench.costs.workload import Workload, total
from tcpa.bench.hardware import DATASHEETS, Ceilings
from tcpa.bench.harness.case import PROMISED, Backbone
from tcpa.bench.harness.results import Provenance
from tcpa.bench.roofline import FORMS, VALUES

CLASSES, BATCH, SIZE = 5, 2, 64
ViT = Architecture("vit_tiny_patch16_224", SIZE, {"img_size": SIZE, "depth": 3})
SMALL = Workload(
    vit=Backbone(3, 64, 3, 16),
    patches=(SIZE // 16) ** 2,
    prompts=11,
    entries=8,
    batch=BATCH,
    dtype="fp32",
    classes=CLASSES,
)
TCPA = TCPAConfig(
    cls_pool_size=3,
    image_pool_size=5,
    cls_prompt_length=2,
    cls_top_k=2,
    image_top_k=2,
    prompt_dropout=0.0,
    random_selection_epochs=0,
)
METHODS = {
    "tcpa": (TCPA, SMALL),
    "tcpa-per-sample": (
        dataclasses.replace(TCPA, prompt_dropout=0.1),
        dataclasses.replace(SMALL, per_sample=True),
    ),
    "tcpa-image-prompt": (
        dataclasses.replace(TCPA, image_prompt=True),
        dataclasses.replace(SMALL, image_prompt=True),
    ),
    "vpt-deep": (VPTConfig(length=11), dataclasses.replace(SMALL, method="vpt-deep")),
    "vfpt": (VPTConfig.vfpt(11), dataclasses.replace(SMALL, method="vfpt", per_sample=True)),
    **{
        f"{name}{end}": (config, dataclasses.replace(work, input_prompt=prompt))
        for name, prompt in (
            ("vp", VPConfig()),
            ("dam-vp", DAMVPConfig(num_clusters=3)),
            ("autovp", AutoVPConfig()),
        )
        for end, config, work in (
            ("", None, dataclasses.replace(SMALL, method="linear", prompts=0)),
            ("+tcpa", TCPA, SMALL),
        )
    },
    "linear": (None, dataclasses.replace(SMALL, method="linear", prompts=0)),
}
SAVINGS = {
    "all": Savings(),
    "none": Savings.none(),
    **{
        f"only {field.name}": dataclasses.replace(Savings.none(), **{field.name: True})
        for field in dataclasses.fields(Savings)
    },
    **{
        f"without {field.name}": dataclasses.replace(Savings(), **{field.name: False})
        for field in dataclasses.fields(Savings)
    },
}


def counted(config, work, impl, train):
    """FLOPs that torch's counter sees in one step of the real model."""
    options = {"input_prompt": work.input_prompt, "savings": work.savings, "impl": impl}
    model = wrap(ViT.create(), config, num_classes=CLASSES, **options)
    images = ViT.images(BATCH)
    if isinstance(work.input_prompt, DAMVPConfig):
        model.fit_clusters(ViT.images(3))
    if train:
        with FlopCounterMode(display=False) as counter:
            logits, distance = model(images, return_distance=True)
            (F.cross_entropy(logits, torch.tensor([0, 1])) + distance).backward()
    else:
        # The counter cannot follow tensors that could have gradients where none are made.
        model.eval().requires_grad_(False)
        with torch.no_grad():
            model(images)
            with FlopCounterMode(display=False) as counter:
                model(images)
    return counter.get_total_flops()


CASES = [
    (method, name)
    for method in METHODS
    for name in SAVINGS
    if method in ("tcpa", "vpt-deep") or name in ("all", "none")
]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("method", "name"), CASES)
def test_the_formulas_equal_a_count_of_the_plain_operations(method, name, train):
    (config, work), savings = METHODS[method], SAVINGS[name]
    work = dataclasses.replace(work, savings=savings)
    operations = step(work, train=train)
    # The reference keeps its scores: it makes none again.
    expected = total(operations).flops - sum(o.repeated for o in operations)
    if train and work.prompts and not tokens_have_gradients(work):
        # Where only prompts have gradients, the fused form leaves the tokens' scores alone; the
        # reference multiplies do with all values.
        expected += 2 * BATCH * work.tokens**2 * work.vit.width
    assert counted(config, work, "reference", train) == expected


def tokens_have_gradients(work):
    saved = work.savings
    dense = work.method == "tcpa" and not saved.gate_bits
    return work.image_gradient or not saved.prompt_keys_only or dense


@pytest.mark.parametrize("name", ["all", "without skip_input_gradient", "without frozen_backbone"])
@pytest.mark.parametrize("method", ["tcpa", "tcpa-per-sample", "tcpa-image-prompt"])
def test_the_formulas_equal_a_count_of_the_fused_operations(method, name):
    config, work = METHODS[method]
    work = dataclasses.replace(work, savings=SAVINGS[name])
    assert counted(config, work, "sdpa", True) == total(step(work, train=True)).flops


@pytest.mark.parametrize(("config", "work"), METHODS.values(), ids=METHODS)
def test_the_trained_values_are_counted(config, work):
    model = wrap(ViT.create(), config, input_prompt=work.input_prompt, num_classes=CLASSES)
    assert model.num_trainable == work.trained


# One block of ViT-B/16, 36 shared prompts, batch 128, bfloat16, at 790 TFLOP/s and 4.3 TB/s, made
# by hand: GFLOP, MB and microseconds at least. The arithmetic of LayerNorm is in there (0.2 GFLOP a
# row or less), ours counts products only.
BY_HAND = {
    "forward": {
        "norm 1 + matching": (1.5, 77.5, 18.0),
        "qkv": (89.3, 158, 113.1),
        "attention": (18.05, 155, 36.1),
        "projection + residual": (29.7, 117, 37.7),
        "norm 2": (0.15, 77.5, 18.0),
        "fc1 + GELU": (119.0, 353, 150.6),
        "fc2 + residual": (119.0, 237, 150.6),
    },
    "backward": {
        "fc2": (119.0, 198, 150.6),
        "GELU": (0.0, 155, 36.0),
        "fc1": (119.0, 198, 150.6),
        "norm 2 + residual": (0.2, 155, 36.0),
        "projection": (29.7, 79, 37.7),
        "attention": (45.1, 310, 72.1),
        "qkv": (89.3, 158, 113.1),
        "norm 1 + matching": (3.0, 155, 36.0),
    },
}
FLOPS, BANDWIDTH = 790e12, 4.3e12
NO_SKIPS = dataclasses.replace(Savings(), last_block_head_rows=False, skip_input_gradient=False)
ROWS_OF_PROMPTS = dataclasses.replace(NO_SKIPS, prompt_keys_only=False)


@pytest.mark.parametrize(("direction", "total_us"), [("forward", 524), ("backward", 632)])
def test_a_table_made_by_hand_is_reproduced(direction, total_us):
    operations = [
        operation
        for operation in step(Workload(savings=NO_SKIPS), train=True)
        if operation.block == 5 and operation.direction == direction
    ]
    found = {operation.name: operation.cost for operation in operations}
    for name, (gflop, megabytes, microseconds) in BY_HAND[direction].items():
        cost = found[name]
        assert cost.flops / 1e9 == pytest.approx(gflop, abs=0.25)
        # Gate words and the softmax's statistics are 1.4 MB.
        assert cost.bytes / 1e6 == pytest.approx(megabytes, abs=1.6)
        assert cost.seconds(FLOPS, BANDWIDTH) * 1e6 == pytest.approx(microseconds, abs=0.5)
    assert found.keys() - BY_HAND[direction].keys() == {"prompt keys, values"}
    bound = sum(cost.seconds(FLOPS, BANDWIDTH) for cost in found.values())
    assert bound * 1e6 == pytest.approx(total_us, rel=0.002)


@pytest.mark.parametrize(
    ("work", "teraflop", "milliseconds"),
    [
        (Workload(savings=NO_SKIPS), 9.42, 13.9),
        (Workload(method="linear", prompts=0, savings=NO_SKIPS), 9.25, 13.9),
        (Workload(method="vpt-deep", savings=ROWS_OF_PROMPTS), 11.07, 16.4),
    ],
    ids=["tcpa", "plain", "vpt-deep"],
)
def test_whole_steps_made_by_hand_are_reproduced(work, teraflop, milliseconds):
    operations = step(work, train=True)
    assert total(operations).flops / 1e12 == pytest.approx(teraflop, rel=0.002)
    bound = sum(o.cost.seconds(FLOPS, BANDWIDTH) for o in operations)
    # The embedding, the last norm and the head are 0.07 ms of ours and none of the hand's.
    assert bound * 1e3 == pytest.approx(milliseconds + 0.07, abs=0.06)


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_attention_costs_what_the_race_says(mode):
    (found,) = (
        operation.cost
        for operation in step(Workload(savings=NO_SKIPS), train=True)
        if (operation.block, operation.name, operation.direction) == (5, "attention", mode)
    )
    assert found == gated_attention(PROMISED, "bf16", mode)


def test_several_gpus_pay_for_the_ring_and_share_the_epoch():
    work, ceilings = Workload(), Ceilings("given", FLOPS, BANDWIDTH, "by hand")
    one, four = (estimate(work, ceilings, gpus=n, link=25e9) for n in (1, 4))
    assert one.all_reduce == 0 and four.gradient_bytes == 4 * work.trained
    assert four.all_reduce == pytest.approx(1.5 * 4 * work.trained / 25e9)
    assert four.train_step == pytest.approx(one.train_step + four.all_reduce)
    assert (one.train_epoch / one.train_step, four.train_epoch / four.train_step) == (43, 11)
    assert four.images_per_second == pytest.approx(512 / four.train_step)
    assert four.input_bytes_per_second == pytest.approx(four.images_per_second * 3 * 224 * 224)


def run(capsys, *arguments):
    assert cli.main(["roofline", *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_prints_and_writes_an_estimate(tmp_path, capsys):
    path = tmp_path / "estimate.json"
    given = ["--tflops", "790", "--tbytes", "4.3"]
    printed = run(capsys, *given, "--json", str(path), "--gpus", "2", "--vary", "gpus")
    assert printed.startswith("ESTIMATE, not a measurement") and "GIVEN by hand" in printed
    for line in printed.splitlines():
        assert "step   " not in line or "estimate" in line
    found = json.loads(path.read_text())
    assert found["label"] == "estimate, not a measurement"
    assert set(found["methods"]) == set(FORMS) and set(found["varied"]) == {
        *map(str, VALUES["gpus"])
    }
    assert sum(each["seconds"] for each in found["operations"]) == pytest.approx(
        found["estimate"]["train_step"] - found["estimate"]["all_reduce"]
    )


def test_a_datasheet_is_labelled_as_an_assumption(capsys):
    for gpu, sheet in DATASHEETS.items():
        printed = run(capsys, "--gpu", gpu, "--flops-share", "0.5")
        assert f"ASSUMED: 50% of {sheet.half / 1e12:.1f} TFLOP/s" in printed
    assert "66.9 TFLOP/s" in run(capsys, "--dtype", "fp32", "--gpu", "h100")


def test_measured_ceilings_are_taken_from_results(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    shared = {
        "command": "ceilings", "shape": "64 MiB", "dtype": "bf16", "mode": "both",
        "provider": "torch", "p20": 1, "p80": 1, "samples": 3,
        "provenance": dict.fromkeys((f.name for f in dataclasses.fields(Provenance)), "x"),
    }  # fmt: skip
    rows = [
        {**shared, "operation": "copy", "metric": "bandwidth", "unit": "GB/s", "p50": 20.0},
        {**shared, "operation": "qkv", "metric": "rate", "unit": "GFLOP/s", "p50": 300.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = run(capsys, "--results", str(path))
    assert "ceilings of x: 0.300 TFLOP/s, 0.0200 TB/s" in printed and "measured x: qkv" in printed
    assert cli.main(["roofline", "--results", str(path), "--dtype", "fp16"]) == 2
    assert "has no ceilings in fp16" in capsys.readouterr().err


@pytest.mark.parametrize("name", VALUES)
def test_every_size_can_be_varied(name, capsys):
    printed = run(capsys, "--vary", name)
    table = printed[printed.index(f"{name} (estimates)") :].splitlines()[1:]
    assert [line.split()[0] for line in table[: len(VALUES[name])]] == [*map(str, VALUES[name])]
    assert ("one bit" in printed) == (name == "top-k")


def test_a_larger_size_never_costs_less():
    ceilings = Ceilings("given", FLOPS, BANDWIDTH, "by hand")
    for name in ("tokens", "prompts", "batch", "depth"):
        steps = [estimate(change(Workload(), name, v), ceilings).train_step for v in VALUES[name]]
        assert steps == sorted(steps) and steps[0] < steps[-1], name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "b300"], "--gpu: got 'b300', expected one of h100, h200, a100, 4090, mi300x"),
        (["--results", "absent"], "--results: absent cannot be read"),
        (["--results", "empty"], "--results: empty has no ceilings in bf16"),
        (["--results", "other"], "--results: other, line 1 is no row of results"),
        (["--batch", "0"], "--batch: got 0, expected at least 1"),
        (["--image", "8"], "--image: got 8, expected at least 16"),
        (["--prompts", "-1"], "--prompts: got -1, expected at least 0"),
        (["--top-k", "19"], "--top-k: got 19, expected at most 18"),
        (["--flops-share", "1.5"], "--flops-share: got 1.5, expected a share"),
        (["--tflops", "790"], "ceilings: got --tflops 790.0, --tbytes None, expected both"),
        (["--tflops", "790", "--tbytes", "-1"], "--tbytes: got -1.0, expected a positive number"),
        (["--values", "3"], "--values: got [3], expected --vary"),
        (["--vary", "tokens", "--values", "1"], "--values: got 1, expected more than"),
        (["--vary", "batch", "--values", "0"], "--values: got 0, expected at least 1"),
        (["--vary", "top-k", "--values", "20"], "--top-k: got 20, expected at most 18"),
        (["--json", "."], "--json: got ., expected a file"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "other").write_text("{}\n")
    assert cli.main(["roofline", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
