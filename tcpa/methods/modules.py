"""What the modules of a method may do: give prompts, let tokens select, act on images.

Axes: B batch, L tokens, P prompt rows of a block, C width, N blocks, H heads, D head dim.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..checks import require
from ..dispatch import Impl
from ..reference import NormalizeOver


class Match(NamedTuple):
    """What the tokens of a block select."""

    gate: Tensor | None = None
    """int32 `[B or 1, L, W]`; None lets every token see every prompt."""
    distance: Tensor | None = None
    """Scalar."""
    normed: Tensor | None = None
    """The tokens after the block's first norm, where that comes with the matching."""


class PromptSource(nn.Module):
    """Where the prompts of all blocks come from, `forward(batch_size)`: `[N, P, C]` shared by the
    batch, or `[N, B, P, C]`; and what else happens around a block."""

    shallow = False
    """Whether prompts enter before the first block alone, N = 1, and pass through as tokens do."""

    prunes = False
    """Whether it has masks, and `prune`, as E2VPT has."""

    selects = False
    """Whether tokens select their prompts."""

    normalize_over: NormalizeOver = "all"

    @property
    def noise(self) -> float:
        """Standard deviation of what training adds to the tokens between matching and norm."""
        return 0.0

    @property
    def num_pruned(self) -> int:
        """Number of values that pruning has taken out."""
        return 0

    def match(
        self, index: int, x: Tensor, norm: nn.LayerNorm | None, *, draw: bool, impl: Impl
    ) -> Match:
        """Let the tokens `[B, L, C]` of block `index` select.

        Args:
            index, x: the block, its tokens.
            norm: the block's first norm, if it may be computed along.
            draw: select at random.
            impl: as in `match_prompts`.
        """
        return Match()

    def extra_keys(self) -> Tensor | None:
        """Return prompts that are their own keys and values, `[N, P, H, D]`."""
        return None

    def query_scale(self, index: int) -> Tensor | None:
        """Return what a block's queries are multiplied by, a scalar."""
        return None

    def after_block(self, index: int, before: Tensor, after: Tensor, num_tokens: int) -> Tensor:
        """Return what follows a block, from its input and output `[B, L + P, C]`, if shallow."""
        return after


class Fitted(nn.Module):
    """A module some of whose values are found in training images, outside of gradient steps."""

    fitted = True

    def resize_for(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Make room for saved values, named with a prefix, whose number may differ."""

    def find_fitted(self) -> None:
        """See whether the values are there, after they were replaced."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **options: Any
    ) -> None:
        self.resize_for(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
        self.find_fitted()


class InputPrompt(Fitted):
    """What is done to the normalised images `[B, 3, height, width]`, `forward(images)`."""

    clustered = False
    """Whether an image's prompt follows from its plain feature: `fit(features)`, then
    `assign(features)` and `forward(images, index)`."""


def require_clusters(prompt: InputPrompt | None) -> Any:
    """Return a prompt on the image that has clusters; a ValueError says what else came."""
    fits, got = prompt is not None and prompt.clustered, type(prompt).__name__
    remedy = "wrap with input_prompt=DAMVPConfig()"
    require(fits, "input_prompt", got, "the frames of DAM-VP", remedy)
    return prompt
