"""Small VTAB-1k tasks in the layout of the folder that circulates, with generated images."""

from pathlib import Path

import numpy as np
from dataset_trees import picture

from tcpa.train.data.vtab_tasks import ROOT, TASKS

ONE_PER_GROUP = ("vtab-pets", "vtab-eurosat", "vtab-clevr-count")


def write_task(
    name: str,
    root: Path,
    *,
    counts: tuple[int, int, int] = (16, 8, 12),
    classes: int = 3,
    size: tuple[int, int] = (48, 40),
    kind: str = "png",
    seed: int = 0,
) -> Path:
    """Write a task where `vtab-1k.zip` would be unpacked.

    Args:
        name: one of `TASKS`.
        root: what `--data` names.
        counts: images of train800.txt, val200.txt and test.txt.
        classes: how many of the task's classes occur.
        size: width and height, pixels; every third image stands.
        kind: "png", or "jpg" as in the copies.
        seed: of the pixels.

    Returns:
        The task's folder.
    """
    rng = np.random.default_rng(seed)
    folder = root / ROOT / TASKS[name].folder
    lists: dict[str, list[str]] = {}
    number = 0
    for split, count in zip(("train800", "val200", "test"), counts, strict=True):
        lists[split] = []
        inner = "images/test" if split == "test" else "images/train"
        (folder / inner).mkdir(parents=True, exist_ok=True)
        for place in range(count):
            label = place % min(classes, TASKS[name].classes)
            path = f"{inner}/{number:06d}.{kind}"
            picture(rng, label, size if place % 3 else size[::-1]).save(folder / path)
            lists[split].append(f"{path} {label}")
            number += 1
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for split, lines in lists.items():
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder
