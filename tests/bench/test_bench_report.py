"""Promise: the report shows what was measured, from files alone, and tells noise from change."""

import dataclasses
import json
import re
import sys

import pytest

from tcpa.bench import __main__ as cli
from tcpa.bench import report
from tcpa.bench.compare import compare, differences
from tcpa.bench.costs.ceilings import measured
from tcpa.bench.costs.operations import OPERATIONS
from tcpa.bench.harness.case import Shape, standard_shapes
from tcpa.bench.harness.results import Provenance, Row
from tcpa.bench.report.data import latest, table

MADE = Provenance(
    device="Synthetic GPU",
    driver="1.2",
    torch="2.15.0",
    triton="3.9.0",
    timm="1.0.31",
    python="3.11.2",
    system="Linux x86_64",
    commit="0123456789ab",
    dirty=False,
    date="2026-11-21T12:00:00+00:00",
)


def row(operation, provider, p50=1.0, *, made=MADE, **fields):
    """A synthetic row; nothing in this file was measured."""
    values = {
        "command": "ops",
        "shape": "b16-224-p36-b128",
        "dtype": "bf16",
        "mode": "forward",
        "metric": "time",
        "unit": "ms",
        "p20": 0.97 * p50,
        "p80": 1.04 * p50,
        "samples": 30,
        **fields,
    }
    return Row(operation=operation, provider=provider, p50=p50, provenance=made, **values)


STEPS = {"official": ("float32", 4.0), "tcpa": ("autocast", 1.3), "tcpa, bf16": ("bfloat16", 1.0)}
SHARES = {"official": 0.05, "compiled": 0.2, "sdpa, no gate": 0.4, "tcpa triton": 0.45}
KINDS = {"matrix products": 11.0, "attention": 3.3, "norms": 1.2, "copies": 0.8, "other": 0.5}


def synthetic_rows():
    """Rows as every command writes them."""
    ceilings = {"command": "ceilings", "dtype": "bf16", "mode": "both"}
    rows = [
        row("copy", "torch", 4000.0, **ceilings, metric="bandwidth", unit="GB/s"),
        row("matrix product", "torch", 700.0, **ceilings, metric="rate", unit="TFLOP/s"),
    ]
    for shape in standard_shapes():
        for operation, cost_of in OPERATIONS.items():
            for mode in ("forward", "backward", "both"):
                least = cost_of(shape, "bf16", mode).seconds(700e12, 4e12) * 1e3 + 0.005
                rows += [
                    row(operation, provider, least / share, mode=mode, shape=shape.name)
                    for provider, share in SHARES.items()
                    if operation == "gated_attention" or provider != "sdpa, no gate"
                ]
    for provider, (dtype, factor) in STEPS.items():
        for batch in (32, 64, 128):
            shape = f"vit_base_patch16_224-cub-b{batch}"
            step = {"command": "step", "mode": "train", "dtype": dtype, "shape": shape}
            rows.append(row("step", provider, batch * 0.13 * factor, **step))
            memory = {"metric": "peak memory", "unit": "MiB", "samples": 1}
            rows.append(row("step", provider, 40.0 * batch * factor, **step, **memory))
            rows += [
                row("step", provider, time * factor * batch / 128, metric=f"time of {kind}", **step)
                for kind, time in KINDS.items()
            ]
    for provider in ("VFPT", "tcpa"):
        epoch = {"command": "epoch", "dtype": "float32", "metric": "seconds per epoch", "unit": "s"}
        rows += [
            row("epoch from cache", provider, 9.0, mode=mode, **epoch) for mode in ("train", "eval")
        ]
    return rows


def save(path, rows):
    path.write_text("".join(each.to_json() + "\n" for each in rows), encoding="utf-8")
    return str(path)


STATIC = {
    "torch": "2.15.0",
    "triton": "3.9.0",
    "kernels": [
        {
            "name": "gated_attention_fwd vit_b16_224",
            "architecture": "sm_90",
            "dtype": "bf16",
            "promised": True,
            "registers": 127,
            "stack": 0,
            "spill_stores": 0,
            "spill_loads": 0,
            "shared": 57344,
            "programs": 2,
            "failures": [],
        }
    ],
}


def test_the_report_writes_a_page_that_needs_nothing_else(tmp_path, capsys):
    results = save(tmp_path / "results.jsonl", synthetic_rows())
    (tmp_path / "static.json").write_text(json.dumps(STATIC))
    output = tmp_path / "report"
    options = ["--output", str(output), "--static", str(tmp_path / "static.json")]
    assert cli.main(["report", results, *options]) == 0
    figures = sorted(path.stem for path in output.glob("*.png"))
    for kind in ("time-ops-gated-attention", "time-step-float32-autocast-bfloat16", "roofline",
                 "time-epoch-epoch-from-cache", "kinds-step", "scaling-prompts-ops",
                 "scaling-batch-step"):  # fmt: skip
        assert any(name.startswith(kind) for name in figures), f"{kind} is missing in {figures}"
    text = (output / "index.html").read_text(encoding="utf-8")
    assert f"{len(figures)} figures" in capsys.readouterr().out
    assert text.count("<svg") == len(figures)
    assert "://" not in text and "<script" not in text and "@import" not in text
    assert not re.search(r'(src|href)="(?!#)', text) and "url(" not in re.sub(r"url\(#", "", text)
    assert "prefers-color-scheme: dark" in text and "currentColor" in text
    assert "Synthetic GPU" in text and "0123456789ab" in text and "57344" in text


def test_a_page_without_figures_needs_no_matplotlib(tmp_path, capsys, monkeypatch):
    results = save(tmp_path / "results.jsonl", synthetic_rows())
    monkeypatch.delitem(sys.modules, "tcpa.bench.report.figures", raising=False)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    output = ["--output", str(tmp_path / "out")]
    assert cli.main(["report", results, *output]) == 2
    assert "report: matplotlib is not installed (extra 'plot'); run: pip" in capsys.readouterr().err
    assert cli.main(["report", results, *output, "--no-figures"]) == 0
    assert "<svg" not in (tmp_path / "out" / "index.html").read_text()


README = """# title
<!-- bench:ops/gated_attention/b16-224-p36-b128/forward|both -->
old
<!-- /bench -->
between
<!-- bench:step/time|peak memory/vit_base_patch16_224-cub-b128 -->
<!-- /bench -->
<!-- bench:epoch -->
typed by hand
<!-- /bench -->
end
"""


def test_tables_of_a_readme_are_generated_and_stay_the_same(tmp_path, capsys):
    rows = [each for each in synthetic_rows() if each.command != "epoch"]
    results, readme = save(tmp_path / "r.jsonl", rows), tmp_path / "README.md"
    readme.write_text(README)
    assert cli.main(["report", results, "--markdown", str(readme)]) == 0
    assert "left as it is, no rows: bench:epoch" in capsys.readouterr().out
    text = readme.read_text()
    assert "| mode | provider | time, ms |" in text and "| backward |" not in text
    assert "| forward | sdpa, no gate (another function) |" in text and "9.00x" in text
    assert "| bfloat16 | tcpa, bf16 | 16.6 (16.1-17.3) | 5,120 |" in text
    assert "typed by hand" in text
    assert "\nold\n" not in text and text.startswith("# title\n") and text.endswith("end\n")
    assert cli.main(["report", results, "--markdown", str(readme)]) == 0
    assert readme.read_text() == text
    capsys.readouterr()
    assert cli.main(["report", results, "--markdown"]) == 0
    printed = capsys.readouterr().out
    for title in (
        "ops on Synthetic GPU",
        "step on Synthetic GPU",
        "Synthetic GPU: kernel-time breakdown",
    ):
        assert title in printed


def test_the_latest_row_of_each_device_counts():
    other = dataclasses.replace(MADE, device="Other GPU")
    rows = [
        row("step", "tcpa", 3.0),
        row("step", "tcpa", 2.0),
        row("step", "tcpa", 9.0, made=other),
    ]
    assert [each.p50 for each in latest(rows)] == [2.0, 9.0]


def test_a_table_shows_what_varies_and_tells_the_rest_as_conditions():
    shown = table([row("step", "a", 4.0), row("step", "b", 2.0)])
    assert shown.header == ["provider", "time, ms"]
    assert shown.rows == [["a", "4.00 (3.88-4.16)"], ["b", "2.00 (1.94-2.08) 2.00x"]]
    for word in ("Synthetic GPU", "b16-224-p36-b128", "30 samples", "as fast as a", "2026-11-21"):
        assert word in shown.notes[0]


def test_the_best_measured_ceilings_of_each_device_count():
    ceilings = {"command": "ceilings", "mode": "both"}
    rows = [
        row("copy", "torch", 3.9, **ceilings, metric="bandwidth", unit="TB/s"),
        row("copy", "torch", 4000.0, **ceilings, metric="bandwidth", unit="GB/s"),
        row("qkv", "torch", 650.0, **ceilings, metric="rate", unit="TFLOP/s"),
        row("fc1", "torch", 700.0, **ceilings, metric="rate", unit="TFLOP/s"),
    ]
    (found,) = measured(rows, "bf16")
    assert (found.flops, found.bandwidth) == (700e12, 4e12) and "measured" in found.source
    assert measured(rows, "fp32") == []


def test_a_regression_is_found_and_noise_is_not(tmp_path, capsys):
    old = [row("step", name, 10.0) for name in ("slower", "noisy", "faster", "little")]
    old.append(row("copy", "rate", 10.0, metric="rate", unit="TFLOP/s"))
    new = [
        row("step", "slower", 12.0),
        row("step", "noisy", 10.6),
        row("step", "faster", 5.0),
        row("step", "little", 10.2, p20=10.19, p80=10.21),
        row("copy", "rate", 5.0, metric="rate", unit="TFLOP/s"),
        row("step", "new", 1.0),
    ]
    verdicts = {change.new.provider: change.verdict for change in compare(old, new)}
    assert verdicts == {
        "slower": "worse", "noisy": "same", "faster": "better", "little": "same", "rate": "worse"
    }  # fmt: skip
    paths = [save(tmp_path / "old.jsonl", old), save(tmp_path / "new.jsonl", new)]
    assert cli.main(["compare", *paths]) == 1
    printed = capsys.readouterr().out
    assert "2 worse, 1 better, 2 the same" in printed and "1.200" in printed
    assert "noisy" not in printed and "conditions differ" not in printed
    assert cli.main(["compare", paths[0], paths[0]]) == 0
    output = ["--output", str(tmp_path / "out"), "--no-figures"]
    assert cli.main(["report", paths[1], "--baseline", paths[0], *output]) == 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert 'class="worse"' in page and 'class="better"' in page


@pytest.mark.parametrize(
    ("metric", "before", "after", "verdict"),
    [
        # One sample shows no noise: the threshold decides.
        ("peak memory", 100.0, 102.0, "same"),
        ("peak memory", 100.0, 104.0, "worse"),
        ("peak memory", 100.0, 90.0, "better"),
        ("peak memory", 100.0, 100.0, "same"),
        ("time", 1.0, float("nan"), "worse"),
        ("MFU", 40.0, 60.0, "better"),
        ("HFU", 40.0, 60.0, "better"),
        ("time of attention", 40.0, 60.0, "worse"),
    ],
)
def test_verdicts(metric, before, after, verdict):
    values = (dict.fromkeys(("p20", "p80"), value) | {"p50": value} for value in (before, after))
    old, new = (row("step", "tcpa", metric=metric, samples=1, **value) for value in values)
    assert [change.verdict for change in compare([old], [new])] == [verdict]


def test_what_was_predicted_is_not_compared():
    guess = [row("step", "tcpa", value, metric="predicted speed") for value in (1.0, 2.0)]
    assert compare(guess[:1], guess[1:]) == []


def test_other_devices_and_versions_are_said():
    newer = dataclasses.replace(MADE, device="Other GPU", torch="2.16.0", date="2027-01-01")
    changes = compare([row("step", "tcpa", 1.0)], [row("step", "tcpa", 1.0, made=newer)])
    assert differences(changes) == [
        "device: 'Synthetic GPU' -> 'Other GPU'",
        "torch: '2.15.0' -> '2.16.0'",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "absent", "--output", "out"], "RESULTS: absent cannot be read"),
        (["report", "empty", "--output", "out"], "RESULTS: got empty without a row"),
        (["report", "other", "--output", "out"], "RESULTS: other, line 1 is no row of results"),
        (["report", "good"], "report: got neither --output nor --markdown"),
        (["report", "good", "--output", "empty"], "--output: got empty, expected a folder"),
        (["report", "good", "--markdown", "absent"], "--markdown: absent cannot be read"),
        (["report", "good", "--markdown", "plain"], "--markdown: got plain with no markers"),
        (["report", "good", "--markdown", "strange"], "markers without rows: nothing"),
        (["report", "good", "--markdown", "open"], "--markdown: got bench:step without an end in"),
        (["report", "good", "--output", "out", "--static", "other"], "--static: got other"),
        (["report", "good", "--output", "out", "--baseline", "empty"], "--baseline: got empty"),
        (["compare", "good", "absent"], "NEW: absent cannot be read"),
        (["compare", "empty", "good"], "OLD: got empty without a row"),
        (["compare", "good", "unlike"], "OLD and NEW have no row in common"),
        (["compare", "good", "good", "--threshold", "-1"], "--threshold: got -1.0, expected a p"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "good", [row("step", "tcpa", 1.0)])
    save(tmp_path / "unlike", [row("other", "tcpa", 1.0)])
    (tmp_path / "empty").touch()
    (tmp_path / "other").write_text('{"kernels": []}\n')
    (tmp_path / "plain").write_text("# no markers\n")
    marked = "<!-- bench:step -->\n<!-- bench:ops -->\n<!-- /bench -->\n"
    (tmp_path / "open").write_text(marked)
    (tmp_path / "strange").write_text("<!-- bench:nothing -->\n<!-- /bench -->\n")
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_nothing_but_rows_is_needed_to_draw(tmp_path):
    small = [row("gated_attention", "tcpa", 1.0, shape=Shape("s16", 224, 0, 1).name)]
    (drawing,) = report.draw(small)
    assert drawing.png.startswith(b"\x89PNG") and drawing.svg.startswith("<svg")
    assert report.draw([row("copy", "torch", 1.0, metric="bandwidth", unit="GB/s")]) == []
