"""Seeing what the prompts do: arrays for a notebook, and figures of them.

    from tcpa import inspect

    found = inspect.selections(model, images)
    print(inspect.usage(found).dead, inspect.overlap(found).neighbours)
    inspect.draw_selection(image, found.image[-1, 0], found.grid, found.num_pool[1])

Functions return numpy arrays in small records; figures are made by the `draw_...` functions, which
import matplotlib, as `tsne` and `separation` import scikit-learn, only when they are called (extra
`plot`). For the raw tensors of one pass see `PromptedViT.capture`.
"""

from .attention import (
    AttentionMaps,
    Diversity,
    attention_maps,
    diversity,
    effective_rank,
    patch_token,
)
from .feature_space import Separation, features, separation, tsne
from .figures import (
    Series,
    draw_attention,
    draw_attention_surface,
    draw_image,
    draw_lines,
    draw_points,
    draw_selection,
    draw_usage,
)
from .passes import Pool, patch_grid
from .selection import (
    Change,
    Overlap,
    Selections,
    Usage,
    change,
    entropy_bits,
    expected_jaccard,
    overlap,
    selections,
    usage,
    why_nothing_is_selected,
)

__all__ = [
    "AttentionMaps",
    "Change",
    "Diversity",
    "Overlap",
    "Pool",
    "Selections",
    "Separation",
    "Series",
    "Usage",
    "attention_maps",
    "change",
    "diversity",
    "draw_attention",
    "draw_attention_surface",
    "draw_image",
    "draw_lines",
    "draw_points",
    "draw_selection",
    "draw_usage",
    "effective_rank",
    "entropy_bits",
    "expected_jaccard",
    "features",
    "overlap",
    "patch_grid",
    "patch_token",
    "selections",
    "separation",
    "tsne",
    "usage",
    "why_nothing_is_selected",
]
