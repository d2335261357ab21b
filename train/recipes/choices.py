"""The choice of a search as a file, and its use by `run` and `sweep`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...cli import UsageError
from ..engine.rundir import differences
from ..storage import read_json, write_json

CHOICE = "choice.json"

FREE = ("learning_rate", "weight_decay", "rate_batch", "seed", "note", "epochs", "chosen")
"""Fields of a recipe in which a run may differ from the search whose choice it takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What `choice.json` says of a finished search."""

    dataset: str
    method: str
    """Full name of the method."""
    learning_rate: float
    """Peak of the schedule, at the batch size of the conditions."""
    weight_decay: float
    val_accuracy: float
    """Of the chosen trial after its last epoch, percent."""
    seed: int
    epochs: int
    """Of each trial."""
    grid: str
    """Where the grid comes from."""
    rule: str
    """How the choice was made."""
    conditions: dict[str, Any]
    """What else decided the trials; a run that takes the choice has to have the same."""
    trials: list[dict[str, Any]]
    """Every pair with its accuracy on validation images, null where the loss was not finite."""


def choice_path(folder: Path, dataset: str, method: str) -> Path:
    """Return where the choice of a search is, in the search's --output; by full name."""
    return folder / dataset / method / CHOICE


def write_choice(path: Path, choice: Choice) -> None:
    """Replace the file of a choice; see `write_json` for errors."""
    write_json(path, asdict(choice))


def read_choice(folder: Path, dataset: str, method: str) -> Choice:
    """Return the choice for a dataset and a method, see `choice_path`.

    Raises:
        UsageError: there is none, or its file is damaged.
    """
    path = choice_path(folder, dataset, method)
    found = read_json(path)
    if found is None:
        raise UsageError(
            f"--choices: got {folder} without {path.relative_to(folder)}, expected the choice of a "
            f"finished search; run `tcpa-train search {method} {dataset} --output {folder}`"
        )
    choice = _as_choice(found)
    if choice is None or (choice.dataset, choice.method) != (dataset, method):
        raise UsageError(
            f"{path}: got a file that is no choice for {method} on {dataset}, expected one that "
            "`tcpa-train search` wrote; repeat the search, which writes it again"
        )
    return choice


def _as_choice(found: Any) -> Choice | None:
    """Return what a file holds as a choice; None if it is none."""
    try:
        choice = Choice(**found)
        usable = float(choice.learning_rate) > 0 and float(choice.weight_decay) >= 0
    except (TypeError, ValueError):
        return None
    return choice if usable else None


def conditions_of(description: dict[str, Any]) -> dict[str, Any]:
    """Return what of a run's description the choice depends on, apart from rate and decay."""
    recipe = {name: v for name, v in description["recipe"].items() if name not in FREE}
    options = {name: v for name, v in description["options"].items() if name != "protocol"}
    return description | {"recipe": recipe, "options": options}


def require_conditions(choice: Choice, description: dict[str, Any], folder: Path) -> None:
    """Raise UsageError unless the description of a run is like those of the trials, apart from
    seed, epochs and protocol."""
    changed = differences(choice.conditions, conditions_of(description))
    if changed:
        name, before, now = changed[0]
        path = choice_path(folder, choice.dataset, choice.method)
        raise UsageError(
            f"{name}: got {now}, expected {before} as in the search of {path}; search again with "
            "the same options, or leave --choices out"
        )
