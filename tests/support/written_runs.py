"""Folders of runs as `tcpa-train run` leaves them, without the training."""

import json
from dataclasses import replace

from tcpa.train.options.run import RunConfig
from tcpa.train.recipes.runspec import resolve

VERSIONS = {"torch": "2.15"}


def split_record(name, complete):
    images = 5000 if complete else 30
    cache = {"key": "k", "index_sha256": "i"}
    about = {"rule": "VPT's split files", "images": images, "classes": 200, "expected_images": 5000}
    return about | {"split": name, "complete": complete, "cache": cache}


def write_run(output, accuracies=(80.0, 89.0, 88.0), *, complete=True, device="H200", **options):
    """Write what a run of three epochs leaves behind; `accuracies` of the epochs, percent."""
    config = RunConfig(**{"dataset": "cub", "seed": 1, "output": output} | options)
    settings = resolve(config)
    settings = replace(settings, epochs=len(accuracies))
    folder = settings.folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings.describe()))
    splits = ("train", "val", "test") if config.protocol == "val" else ("train", "test")
    start = {
        "date": "2026-01-02T03:04:05+00:00",
        "versions": VERSIONS,
        "device": device,
        "processes": 1,
        "precision": "bf16",
        "eval_precision": "bf16",
        "backbone": {"name": config.backbone, "weights": "pretrained", "fingerprint": "f" * 64},
        "data": {name: split_record(name, complete) for name in splits},
    }
    (folder / "environment.json").write_text(json.dumps([start]))
    chosen = config.protocol if config.protocol == "val" else "test"
    lines = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        lines.append({"kind": "epoch", "epoch": epoch, "loss": 3.0 / epoch, "seconds": 2.0})
        lines.append({"kind": "evaluation", "split": chosen, "epoch": epoch, "seconds": 0.5,
                      "accuracy": accuracy, "loss": 1.0})  # fmt: skip
    best = max(accuracies)
    epoch = accuracies.index(best) + 1
    if chosen == "val":
        lines.append(lines[-1] | {"split": "test", "epoch": epoch, "accuracy": best})
    text = "".join(json.dumps({"step": 1, **line}) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    result = {
        "dataset": config.dataset,
        "method": config.method,
        "seed": settings.seed,
        "protocol": config.protocol,
        "accuracy": best,
        "epoch": epoch,
        "epochs": settings.epochs,
        "seconds_per_epoch": 2.0,
        "seconds_per_evaluation": 0.5,
        "images_per_second": 5000.0,
        "pipeline_images_per_second": 90000.0,
        "trainable": 12345,
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder
