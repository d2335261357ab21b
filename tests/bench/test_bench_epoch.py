"""Promise: seconds per epoch come from real passes over images, the same from every source."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tcpa.bench import __main__ as cli
from tcpa.bench import epoch
from tcpa.bench.epoch import (
    Rate,
    one_form_each,
    rows_of,
    table,
    without_tcpa,
)
from tcpa.bench.harness.case import StepCase
from tcpa.bench.harness.check import Skipped, WrongResultError
from tcpa.bench.harness.images import Cached, Files
from tcpa.bench.harness.model import checked_runners
from tcpa.bench.harness.provider import StepProvider
from tcpa.bench.harness.results import load, provenance
from tcpa.bench.providers.step import providers
from tcpa.cli import UsageError
from tcpa.train.data.speed import cached_photos, write_photos

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 3)


def sources(photos, folder):
    split = cached_photos(photos, folder / "cache")
    return [
        Files(photos, CPU, batch=2, workers=0, size=224),
        Cached(split, CPU, batch=2, resident=False, size=224),
        Cached(split, CPU, batch=2, resident=True, size=224),
    ]


def test_photos_are_jpegs_of_the_promised_size(photos):
    with Image.open(photos[1]) as picture:
        assert picture.format == "JPEG" and picture.size == (500, 375)
        assert np.asarray(picture).std() > 10


def test_all_sources_give_the_same_test_images(photos, tmp_path):
    from_disk, *others = (list(s.epoch(0, train=False)) for s in sources(photos, tmp_path))
    assert [images.shape for images, _ in from_disk] == [(2, 3, 224, 224), (1, 3, 224, 224)]
    for other in others:
        for (a, label), (b, same) in zip(from_disk, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
            assert torch.equal(label, same)


def test_training_draws_crops_and_order_and_leaves_nothing_out(photos, tmp_path):
    torch.manual_seed(0)
    for source in sources(photos, tmp_path):
        epochs = [list(source.epoch(number, train=True)) for number in range(4)]
        labels = [torch.cat([label for _, label in epoch]).tolist() for epoch in epochs]
        assert all(sorted(seen) == [0, 1, 2] for seen in labels)
        first = [
            torch.cat([images for images, _ in epoch])[seen.index(0)]
            for epoch, seen in zip(epochs, labels, strict=True)
        ]
        assert any(not torch.equal(first[0], other) for other in first[1:])


def test_the_command_measures_every_source_and_mode(tmp_path, capsys):
    path = tmp_path / "epoch.jsonl"
    options = ["--model", "test_vit", "--batch", "2", "--images", "2", "--rounds", "1"]
    arguments = [*options, "--workers", "0", "--provider", "frozen ViT", "--results", str(path)]
    assert cli.main(["epoch", *arguments]) == 0
    printed = capsys.readouterr().out
    rows = load(path)
    assert {row.provider for row in rows} == {"official", "frozen ViT"}
    assert {row.operation for row in rows} == {"epoch from disk", "epoch from cache"}
    assert {row.mode for row in rows} == {"train", "eval"}
    seconds = {(r.provider, r.operation, r.mode): r.p50 for r in rows if r.unit == "s"}
    assert len(seconds) == 8 and all(value > 0 for value in seconds.values())
    assert "scaled up from 2 images" in printed and "frozen ViT" in printed


def test_seconds_are_for_the_images_of_cub():
    rate = Rate("tcpa", "float32", "cache", "train", [100.0], [1000.0], [110.0], [2.0], [1.25])
    rows = rows_of(StepCase(), rate, 32, provenance(CPU))
    assert rows[0].metric == "seconds per epoch" and rows[0].p50 == pytest.approx(53.94)
    slow = Rate("official", "float32", "cache", "train", [50.0], [1000.0], [51.0], [1.0])
    assert {row.p50 for row in rows if row.metric.startswith("time against")} == {1.25}
    printed = table([slow, rate], 32)
    assert "2.00x" in printed and "1.25x" in printed and "scaled" not in table([slow, rate], 5394)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_method_is_measured_with_and_without_tcpa(precision):
    first, *rest = one_form_each(providers(precision, "cpu"), precision)
    assert first.name == "official" and {p.precision for p in rest} == {precision}
    pairs = {without_tcpa(p, rest).method: p.method for p in rest if p.base_method}
    assert pairs == {
        "vp": "vp+tcpa",
        "vpt-deep": "vpt+tcpa",
        "dam-vp": "dam-vp+tcpa",
        "autovp": "autovp+tcpa",
        "vfpt": "tcpa",
    }
    places = {p.method: place for place, p in enumerate(rest)}
    assert all(places[own] == places[base] + 1 for base, own in pairs.items())
    assert len(rest) == 11 and without_tcpa(first, rest) is None


def test_our_best_form_joins_on_a_gpu():
    (*_, last) = one_form_each(providers("bfloat16", "cuda"), "bfloat16")
    assert last.graph and last.compiled and last.name.startswith("tcpa")


def test_methods_are_checked_before_they_are_timed():
    case = StepCase(model="vit_tiny_patch16_224", batch=2)
    on_images = [p for p in providers("float32", "cpu") if p.input_prompt is not None]
    assert len(on_images) == 6
    # In low precision a token near two prompts may select either.
    on_images += [p for p in providers("bfloat16", "cpu") if p.name == "DAM-VP"]
    names = [p.name for p in on_images]
    on_images[-1] = replace(on_images[-1], name="low")
    assert list(checked_runners(case, on_images, Skipped())) == [*names[:-1], "low"]


def test_a_method_that_fails_is_left_out_and_named(capsys):
    case = StepCase(model="test_vit", batch=2)
    good = StepProvider(name="VPT-deep", method="vpt-deep")
    kernels = replace(good, name="kernels", impl="triton", precision="float64")
    skipped = Skipped()
    assert list(checked_runners(case, [good, kernels], skipped)) == ["VPT-deep"]
    assert skipped.report("tcpa-bench epoch") == 2
    told = capsys.readouterr().err
    assert told.startswith("tcpa-bench epoch: left out: kernels, --model test_vit --batch 2: ")
    with pytest.raises(UsageError, match="kernels, --model test_vit"):
        checked_runners(case, [kernels, good], Skipped())
    skipped.add(WrongResultError("provider 'x' differs"))
    skipped.add(UsageError("y"))
    assert skipped.status == 1


def test_no_figure_of_a_wrong_result(tmp_path, capsys, monkeypatch):
    def wrong(*_):
        raise WrongResultError("provider 'VP' differs")

    monkeypatch.setattr(epoch, "checked_runners", wrong)
    path = tmp_path / "epoch.jsonl"
    options = ["--model", "vit_tiny_patch16_224", "--images", "2", "--batch", "2"]
    assert epoch.main([*options, "--source", "cache", "--results", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.err == "tcpa-bench epoch: provider 'VP' differs\n"
    assert "s/epoch" not in printed.out and path.read_text() == ""


def test_an_interruption_keeps_the_rounds_before(tmp_path, capsys, monkeypatch):
    measured, left = epoch.images_per_second, [10]

    def images_per_second(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(epoch, "images_per_second", images_per_second)
    path = tmp_path / "epoch.jsonl"
    options = ["--model", "test_vit", "--batch", "2", "--images", "2", "--rounds", "9"]
    options += ["--source", "cache", "--provider", "frozen ViT", "--results", str(path)]
    assert epoch.main(options) == 130
    # A round: the pipeline, then two methods alone and with it.
    assert {row.samples for row in load(path)} == {1}
    assert {row.provider for row in load(path)} == {"official", "frozen ViT"}
    printed = capsys.readouterr()
    assert "s/epoch" in printed.out and "interrupted" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch: got 0, expected at least 1"),
        (["--images", "3"], "--images: got 3, expected at least 8, one --batch"),
        (["--source", "device"], "--source: got device with --device cpu, expected disk or cache"),
        (["--workers", "-1"], "--workers: got -1, expected at least 0"),
        (["--model", "vit_tiny"], "--model: got 'vit_tiny', expected a timm model"),
    ],
)
def test_bad_options_are_refused_by_name(arguments, message, capsys):
    assert epoch.main(arguments) == 2
    assert message in capsys.readouterr().err
