"""Options of `tcpa-train inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...cli import UsageError, require
from .checks import MAX_SEED
from .run import Positional

EXCLUDED = ("images", "checkpoints", "backbone")
"""Options without a meaning in the demo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Show what the prompts of trained models do: a page of figures, PNG files, all the numbers."""

    runs: Annotated[tuple[Path, ...], Positional] = ()
    """Finished runs or saved adapters of one backbone; the first is the one that is looked at most
    closely, the others and the bare backbone stand beside it."""

    images: Path | None = None
    """Folder of images; folders inside it, two or more, are classes."""

    demo: bool = False
    """Train TCPA and VPT-deep on the digits of the demo and inspect those: no run, no images."""

    output: Path = Path("inspection")
    """Folder for index.html, numbers.json and figures/; an earlier inspection in it is replaced."""

    checkpoints: tuple[Path, ...] = ()
    """Earlier adapters of the first run, in order, to see how its selections changed; by default
    the checkpoints that the run kept."""

    backbone: str | None = None
    """timm model, if not the one that the adapter names."""

    weights: str | None = None
    """Weights of the backbone: pretrained (timm's), none or a file, as for `run`; by default those
    of the first run, timm's for an adapter."""

    max_images: int = 500
    """Images to read; more are left out at random."""

    show: int = 3
    """Images whose maps are drawn."""

    patches: tuple[str, ...] = ()
    """Patches whose attention is drawn, ROW,COLUMN from 0; two by default."""

    block: int | None = None
    """Block whose attention is drawn, from 1; the last by default."""

    head: int | None = None
    """Attention head to draw, from 1; by default the mean over all heads."""

    batch_size: int = 16
    """Images at once."""

    seed: int = 0
    """Of the demo's training, of t-SNE and of the choice of images."""

    device: str = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""

    quick: bool = False
    """With --demo: two epochs and few images, only to see that all works."""

    def __post_init__(self) -> None:
        for name in ("max_images", "show", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, _option(name), value, "1 or more", "leave it out for the default")
        for name in ("block", "head"):
            value = getattr(self, name)
            usable = value is None or value >= 1
            require(usable, _option(name), value, "1 or more", "they are numbered from 1")
        expected = "an integer from 0 to 2**32 - 1"
        usable = 0 <= self.seed < min(2**32, MAX_SEED)
        require(usable, "--seed", self.seed, expected, "choose another")
        self.patch_places()
        if not self.demo:
            self._check_inputs()
            return
        require(not self.runs, "RUNS", " ".join(map(str, self.runs)), "none with --demo", "drop it")
        for name in EXCLUDED:
            value = getattr(self, name)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            require(not value, _option(name), shown, "nothing with --demo", "leave it out")

    def _check_inputs(self) -> None:
        require(not self.quick, "--quick", True, "it with --demo only", "leave it out")
        if not self.runs:
            raise UsageError(
                "RUNS: got none, expected a finished run or an adapter; name its folder, or pass "
                "--demo"
            )
        if self.images is None:
            raise UsageError(
                "--images: got none, expected a folder of images; name one (for a run, its test "
                "images)"
            )

    def patch_places(self) -> tuple[tuple[int, int], ...]:
        """Return row and column of the patches that were asked for.

        Raises:
            UsageError: one is no pair of numbers.
        """
        found = []
        for text in self.patches:
            parts = text.split(",")
            numbers = len(parts) == 2 and all(part.strip().isdecimal() for part in parts)
            require(numbers, "--patches", repr(text), "ROW,COLUMN from 0", "write 3,4 for instance")
            found.append((int(parts[0]), int(parts[1])))
        return tuple(found)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
