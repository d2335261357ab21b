"""Output mappings of AutoVP: from the logits of a model's own head to those of other classes.

Axes: B batch, C classes, S source classes, m sources of a class.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import require
from .input_config import AutoVPConfig


class OutputMapping(nn.Module):
    """Map source logits `[B, S]` to logits `[B, C]`: by a linear layer, or by means.

    Attributes:
        index: int64 `[C, m]`, the source classes of every class; -1 before `fit`. None under
            "full".
    """

    index: Tensor | None

    def __init__(self, config: AutoVPConfig, num_sources: int, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_sources, self.num_classes = config, num_sources, num_classes
        remedy = "create the backbone with the head of its training, or use mapping='head'"
        require(num_sources > 0, "mapping: source classes", num_sources, "at least one", remedy)
        self.linear, self.fitted = None, config.mapping == "full"
        index = None
        if config.mapping == "full":
            self.linear = nn.Linear(num_sources, num_classes)
        else:
            needed = num_classes * config.sources
            bound = f"at least {needed}, {config.sources} for each of {num_classes} classes"
            remedy = "use fewer sources, or mapping='full'"
            enough = num_sources >= needed
            require(enough, "mapping: source classes", num_sources, bound, remedy)
            index = torch.full((num_classes, config.sources), -1)
        self.register_buffer("index", index)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self.find_fitted()

    def find_fitted(self) -> None:
        """See whether sources are chosen, after they were replaced."""
        self.fitted = self.index is None or bool((self.index >= 0).all())

    def fit(self, counts: Tensor) -> None:
        """Choose the sources of every class.

        Args:
            counts: `[S, C]`, how many training images of a class the model takes for a source
                class.
        """
        assert self.index is not None
        chosen = frequency_mapping(counts, self.config.sources)
        self.index.copy_(chosen)
        self.fitted = True

    def forward(self, logits: Tensor) -> Tensor:
        """Map logits.

        Raises:
            RuntimeError: the sources are not chosen yet.
        """
        if self.linear is not None:
            return self.linear(logits.to(self.linear.weight.dtype))
        if not self.fitted or self.index is None:
            raise RuntimeError(
                "mapping: no source classes are chosen yet; call model.mapping.fit with the sum of "
                "model.count_sources(images, labels) over training images first"
            )
        return logits[:, self.index.flatten()].unflatten(1, self.index.shape).mean(-1)


def frequency_mapping(counts: Tensor, sources: int) -> Tensor:
    """Give every class the source classes that its images are most often taken for.

    Greedy: the highest count of all first; a source class serves one class, a class takes
    `sources`. Equal counts go to the lower source class, then to the lower class.

    Args:
        counts: `[S, C]`, S >= C * sources.
        sources: m.

    Returns:
        int64 `[C, m]` on the CPU.

    Source:
        ILM-VP and AutoVP (frequency label mapping).
    """
    num_classes = counts.shape[1]
    order = counts.detach().cpu().flatten().argsort(descending=True, stable=True).tolist()
    found: list[list[int]] = [[] for _ in range(num_classes)]
    used: set[int] = set()
    missing = num_classes * sources
    for place in order:
        source, target = divmod(place, num_classes)
        if source in used or len(found[target]) == sources:
            continue
        found[target].append(source)
        used.add(source)
        missing -= 1
        if missing == 0:
            break
    return torch.tensor(found)
