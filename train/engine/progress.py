"""What a person sees: a bar with rate and remaining time in a terminal, a line per epoch elsewhere.

Only the first process shows anything.
"""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .distributed import World


class Display:
    """Shows how far a run is. Nothing in it waits for the device."""

    def __init__(self, world: World, title: str, *, total_images: int, done_images: int) -> None:
        """Prepare the bar.

        Args:
            world: the processes; only the first one shows anything.
            title: name of the run.
            total_images: images of all epochs.
            done_images: of these, what an earlier start has done.
        """
        terminal = sys.stdout is not None and sys.stdout.isatty()
        self.console = Console(
            width=None if terminal else 120, highlight=False, quiet=not world.is_main
        )
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (world.is_main and self.console.is_terminal),
        )
        self._task = self._bar.add_task(
            title, total=max(total_images, 1), completed=done_images, note=""
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        """Count images whose step was handed to the device."""
        self._bar.update(self._task, advance=images)

    def note(self, text: str) -> None:
        """Show loss and rate beside the bar."""
        self._bar.update(self._task, note=text)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, soft_wrap=True)
