"""What a method says of itself, so that nothing outside this folder asks which one it is.

A model is put together from three choices: token prompts (`PromptConfig`), what is done to the
image (`InputConfig`), what else is trained (`TuningConfig`). A method is one file here: a frozen
dataclass derived from one of the three, with a `name`, whose `build` makes its modules. The names
are found by importing the folder; no list is edited.

Axes: B batch, L tokens, P prompt rows of a block, C width, N blocks, H heads, D head dim.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import nn

from .. import vit
from ..checks import require

MODULES = (
    "pools",
    "tokens",
    "value_affine",
    "input_prompt",
    "feature_prompt",
    "adapters",
    "side",
    "image_prompt",
    "mapping",
)
"""Names of a method's modules, in the order in which a model holds them: parts of the names of
saved values. `pools` or `tokens` is a `PromptSource`, `input_prompt` an `InputPrompt`."""

Modules = dict[str, nn.Module]
"""Modules by name, in the order in which they are made."""


class Normalization(NamedTuple):
    """Channel mean and standard deviation that the images were normalised with; a record."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


WITHOUT_SELECTION = "a model without TCPA, whose tokens all see the same prompts or none"


class MethodConfig:
    """A choice: settings, and everything that others have to know of them."""

    __slots__ = ()

    name: ClassVar[str]
    """Under which it is saved, and asked for on the command line."""

    kinds: ClassVar[dict[str, type[Any]]]
    """All choices of this kind by name."""

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            cls.kinds[cls.name] = cls

    @property
    def label(self) -> str:
        """Its short name in figures and tables."""
        return type(self).__name__.removesuffix("Config").removesuffix("Tuning")

    def has(self, *settings: str) -> bool:
        """Whether it has all these settings; the command line asks before it replaces them."""
        known = {field.name for field in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        return known.issuperset(settings)

    def replace(self, **changes: Any) -> Self:
        """Return it with other settings, checked again."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def validate(self, backbone: Any, choices: "Choices") -> None:
        """Raise ValueError, with the reason, for what makes no sense with it; `wrap` calls this."""

    def build(self, backbone: Any, choices: "Choices") -> Modules:
        """Make its modules, the names among `MODULES`."""
        return {}

    def describe(self) -> str:
        """Say it in a few words, for `tcpa-train methods`."""
        return self.name

    def why_not_compiled(self) -> str | None:
        """Return what torch.compile cannot follow, for `--compile`; None where it can."""
        return None


class PromptConfig(MethodConfig):
    """Token prompts."""

    __slots__ = ()
    kinds: ClassVar[dict[str, type["PromptConfig"]]] = {}

    length: int
    """Prompt tokens, where there are no pools."""

    match_weight: float = 0.0
    """Weight of the match distance in the loss; the optimizer step reads it."""

    dropout_setting: ClassVar[str] = "dropout"
    """Which setting `--prompt-dropout` replaces."""

    @property
    def num_prompts(self) -> int:
        """P, the prompt rows of one block."""
        return self.length

    @property
    def random_epochs(self) -> int:
        """First epochs of training that select at random; `PromptedViT.set_epoch` reads it."""
        return 0

    @property
    def finds_unused_parameters(self) -> bool:
        """Whether some parameters get no gradient, which DistributedDataParallel must know."""
        return False

    def why_nothing_is_selected(self) -> str | None:
        """Return why tokens select no prompts, for `tcpa.inspect`; None where they do."""
        return WITHOUT_SELECTION

    def on_image(self) -> str | None:
        """Say what it does to the image besides, for `tcpa-train methods`."""
        return None

    def fit_to(self, backbone: Any) -> Self:
        """Return it without what a backbone cannot use; `wrap` builds the result."""
        return self

    def resized(self, rows: int) -> Self:
        """Return it with so many prompt rows a block and without dropout, for the demo."""
        return self.replace(length=rows, dropout=0.0)


class InputConfig(MethodConfig):
    """What is done to the image before anything else."""

    __slots__ = ()
    kinds: ClassVar[dict[str, type["InputConfig"]]] = {}

    critical_share: float = 1.0
    """Share of the values of each of its parameters that a step updates; see `LIONConfig`."""

    forward_passes: ClassVar[int] = 1
    """Passes through the backbone that an image takes, for the cost model."""

    @property
    def maps_logits(self) -> bool:
        """Whether the backbone keeps its own head, whose logits are mapped to classes."""
        return False

    def fits_before(self, epoch: int) -> Literal["clusters", "mapping"] | None:
        """Return what is found in the training images before an epoch, from 0."""
        return None


class TuningConfig(MethodConfig):
    """Trainable parameters besides prompts: the head always."""

    __slots__ = ()
    kinds: ClassVar[dict[str, type["TuningConfig"]]] = {}

    trains_backbone: ClassVar[bool] = False
    """Whether parameters of the backbone are trained, which then have to be in float32."""

    @property
    def plain_head(self) -> bool:
        """Whether the head is timm's, as torch initialises it."""
        return True

    @property
    def needs_own_head(self) -> bool:
        """Whether a head that the backbone brings has to be replaced."""
        return False

    def make_head(self, linear: nn.Module) -> nn.Module:
        """Return the head around the fresh last layer of timm: `nn.Linear`, or `nn.Identity`."""
        return linear

    def load_pretrained(self, model: Any) -> None:
        """Put pretrained values into modules of a model; RuntimeError where there are none."""

    def without_download(self) -> Self:
        """Return it with random values in place of pretrained ones."""
        return self

    def scaled_to(self, width: int, reference: int) -> Self:
        """Return it for a backbone of a width, from sizes stated for another, for the demo."""
        return self

    def backbone_parameters(self, backbone: Any) -> dict[str, nn.Parameter]:
        """Return the trainable parameters of the backbone, the head's apart, by name."""
        return {}

    def dropout_layers(self, backbone: Any) -> list[nn.Dropout]:
        """Return the dropout layers of the backbone that training switches on, rates set."""
        return []


class Choices(NamedTuple):
    """The choices that make a model, and what their modules have to know."""

    prompts: PromptConfig | None
    input_prompt: InputConfig | None
    tuning: TuningConfig
    num_classes: int | None
    normalization: Normalization

    def validate(self, backbone: Any) -> None:
        """Refuse what cannot work together.

        Raises:
            TypeError: a choice is of the wrong type.
            ValueError: choices, or a choice and the backbone, make no sense; the message says why.
        """
        names = ("config", "input_prompt", "tuning")
        bases = (PromptConfig, InputConfig, TuningConfig)
        for name, base, choice in zip(names, bases, self, strict=False):
            if choice is not None and not isinstance(choice, tuple(base.kinds.values())):
                got = type(choice).__name__
                expected = ", ".join(kind.__name__ for kind in base.kinds.values())
                raise TypeError(f"{name}: got {got}, expected {expected} or None; create one")
        if self.tuning.trains_backbone:
            dtype = vit.input_weight(backbone).dtype
            exact, remedy = dtype.itemsize >= 4, "convert it with .float() and train under autocast"
            got = f"a backbone in {dtype} under {type(self.tuning).__name__}"
            require(exact, "tuning", got, "float32: it trains weights of the backbone", remedy)
        for choice in (self.tuning, self.input_prompt, self.prompts):
            if choice is not None:
                choice.validate(backbone, self)

    def build(self, backbone: Any) -> dict[str, nn.Module | None]:
        """Return all modules by name, None where there is none, on the device of the backbone and
        in float32 at least."""
        made: Modules = {}
        for choice in (self.prompts, self.input_prompt, self.tuning):
            if choice is not None:
                made |= choice.build(backbone, self)
        weight = vit.input_weight(backbone)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for module in made.values():
            module.to(device=weight.device, dtype=dtype)
        made.setdefault("image_prompt", nn.Sequential())
        return {name: made.get(name) for name in MODULES}


def require_one_head(backbone: Any, name: str, expected: str, remedy: str) -> None:
    """Refuse a backbone with two heads."""
    heads = len(vit.classifier_layers(backbone))
    require(heads == 1, name, f"a backbone with {heads} heads", expected, remedy)
