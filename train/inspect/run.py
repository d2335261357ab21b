"""The command `tcpa-train inspect`."""

import json
import sys
import time
from pathlib import Path

from rich.console import Console

from ...cli import UsageError, choose_device, output_folder
from ..options.inspect import InspectConfig
from ..storage import replace_file

PAGE, NUMBERS, FIGURES = "index.html", "numbers.json", "figures"
PROGRAM = "tcpa inspect"


def run_inspect(config: InspectConfig) -> Path:
    """Inspect what a configuration names and return the page.

    Raises:
        UsageError: something that was asked for cannot be had; the message says what to change.
    """
    # Heavy: after the options are known to be good.
    from .images import read_images
    from .measure import measure, to_json
    from .page import build_page
    from .subjects import load_subjects

    start = time.perf_counter()
    device = choose_device(config.device)
    prepare_output(config.output)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if config.demo:
        from .demo import demo_inputs

        subjects, images = demo_inputs(quick=config.quick, seed=config.seed, say=say)
        backbone = "the demo's ViT"
    else:
        assert config.images is not None
        subjects, backbone = load_subjects(
            config.runs, config.checkpoints, config.backbone, config.weights
        )
        model = subjects[0].model
        images = read_images(config.images, model, count=config.max_images, seed=config.seed)
        for name, reason in images.skipped:
            say(f"skipped {name}: {reason}")
    for subject in subjects:
        for model in (subject.model, *(state.model for state in subject.states)):
            model.to(device)
    found = measure(subjects, images, config, backbone=backbone, say=say)
    say("drawing")
    page, drawn = build_page(found)
    numbers = {"program": PROGRAM, **to_json(found)}
    files = {f"{FIGURES}/{drawing.name}.png": drawing.png for drawing in drawn}
    files |= {
        NUMBERS: (json.dumps(numbers, allow_nan=False) + "\n").encode(),
        # Last: a folder with a page is whole.
        PAGE: page.encode(),
    }
    _write(config.output, files)
    for of_model in found.measured:
        if of_model.selected is None:
            say(f"{of_model.name}: no selection maps ({of_model.no_selection})")
    seconds = time.perf_counter() - start
    say(f"{seconds:.0f} s; {config.output / PAGE}, {NUMBERS}, {len(drawn)} files in {FIGURES}/")
    return config.output / PAGE


def prepare_output(folder: Path) -> None:
    """Make the output folder, or accept one that an earlier inspection filled.

    Raises:
        UsageError: it holds something else, or cannot be written.
    """
    with output_folder(folder):
        known = {PAGE, NUMBERS, FIGURES}
        others = sorted(path.name for path in folder.iterdir() if path.name not in known)
        if others or (any(folder.iterdir()) and not _is_ours(folder)):
            raise UsageError(
                f"--output: got {folder}, which holds other files"
                f"{f' ({others[0]})' if others else ''}, expected a new or empty folder or one "
                "that an earlier inspection made; choose another"
            )
        (folder / FIGURES).mkdir(exist_ok=True)
        trial = folder / FIGURES / ".trial"
        trial.touch()
        trial.unlink()


def _is_ours(folder: Path) -> bool:
    if not (folder / NUMBERS).is_file():
        # A first inspection that did not get so far.
        return not (folder / PAGE).exists() and not any((folder / FIGURES).glob("[!.]*"))
    with (folder / NUMBERS).open("rb") as file:
        return PROGRAM.encode() in file.read(100)


def _write(folder: Path, files: dict[str, bytes]) -> None:
    with output_folder(folder):
        for name, data in files.items():
            replace_file(folder / name, data)
        for path in (folder / FIGURES).glob("*.png"):
            if f"{FIGURES}/{path.name}" not in files:
                # Of an earlier inspection.
                path.unlink()
