"""Visual Prompt Tuning, shallow or deep, and Visual Fourier Prompt Tuning: prompt tokens.

Axes: B batch, P prompt tokens of a block, C width, N blocks.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import require, require_bool, require_choice, require_int, require_number
from .base import Choices, Modules, PromptConfig
from .modules import PromptSource


@dataclass(frozen=True, kw_only=True, slots=True)
class VPTConfig(PromptConfig):
    """Visual Prompt Tuning, shallow or deep (ECCV 2022), and Visual Fourier Prompts (NeurIPS
    2024)."""

    name: ClassVar[str] = "vpt"

    length: int = 10
    """Prompt tokens per prompted block."""

    deep: bool = True
    """True: fresh prompts in front of every block (VPT-Deep). False: prompts enter before the first
    block and pass through all blocks as ordinary tokens (VPT-Shallow)."""

    fourier_fraction: float = 0.0
    """Fraction of the prompt tokens, rounded down, that a 2-D Fourier transform replaces (VFPT's
    alpha); 0 is plain VPT. Which tokens these are makes no difference to the function."""

    fourier_dims: Literal["all", "hidden", "sequence"] = "all"
    """Dimensions that the Fourier transform covers."""

    dropout: float = 0.0
    """Probability with which training zeroes a prompt element, per sample, before the transform."""

    init: Literal["xavier", "uniform"] = "xavier"
    """"xavier": U(-v, v) with v = sqrt(6 / (3 * patch area + C)) (VPT, VFPT). "uniform": U(-1, 1)
    (the VFPT baseline of the official TCPA code)."""

    def __post_init__(self) -> None:
        require_int("length", self.length, 1)
        require_bool("deep", self.deep)
        require_number("fourier_fraction", self.fourier_fraction, 0.0)
        bound = "a fraction from 0 to 1"
        require(
            self.fourier_fraction <= 1, "fourier_fraction", self.fourier_fraction, bound, "fix it"
        )
        require_choice("fourier_dims", self.fourier_dims, ("all", "hidden", "sequence"))
        require_number("dropout", self.dropout, 0.0, 1.0)
        require_choice("init", self.init, ("xavier", "uniform"))

    @property
    def label(self) -> str:
        return "VFPT" if self.fourier_fraction else "VPT-deep" if self.deep else "VPT-shallow"

    def describe(self) -> str:
        kind = "Fourier " if self.fourier_fraction else ""
        return f"{kind}{self.length} {'a block' if self.deep else 'at the first block'}"

    def build(self, backbone: Any, choices: Choices) -> Modules:
        return {"tokens": VPTPrompts(self, backbone)}

    @classmethod
    def vfpt(cls, length: int = 10, fourier_fraction: float = 0.5) -> Self:
        """Return VFPT: VPT-Deep of which a fraction of the tokens goes through the transform."""
        return cls(length=length, fourier_fraction=fourier_fraction, dropout=0.1)

    @classmethod
    def official_vfpt(cls) -> Self:
        """Return the VFPT baseline of the official code: 10 tokens, all transformed, U(-1, 1)."""
        return cls(length=10, fourier_fraction=1.0, dropout=0.1, init="uniform")


@torch.library.custom_op("tcpa::fourier_transform", mutates_args=())
def _fourier_transform(prompts: Tensor, dims: list[int]) -> Tensor:
    exact = prompts.to(torch.promote_types(prompts.dtype, torch.float32))
    # Contiguous: the real part alone is a view with every second element.
    return torch.fft.fftn(exact, dim=dims).real.to(prompts.dtype).contiguous()


@_fourier_transform.register_fake
def _(prompts: Tensor, dims: list[int]) -> Tensor:
    return torch.empty_like(prompts, memory_format=torch.contiguous_format)


def _save_dims(ctx: Any, inputs: tuple[Tensor, list[int]], output: Tensor) -> None:
    ctx.dims = inputs[1]


def _transform_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    # The map is its own transpose.
    return _fourier_transform(grad, ctx.dims), None


_fourier_transform.register_autograd(_transform_gradient, setup_context=_save_dims)


def fourier_transform(prompts: Tensor, dims: tuple[int, ...] = (-2, -1)) -> Tensor:
    """Return the real part of the unnormalised discrete Fourier transform of the prompts.

    The map is linear and its own transpose. It is an opaque operation, because compilers generate
    no code for complex numbers. Computed in float32 or better.

    Args:
        prompts: float `[..., P, C]`.
        dims: dimensions to transform.

    Returns:
        `[..., P, C]` of the same dtype.

    Cost:
        12 blocks of 36 x 768 take 0.95 ms with torch.fft on one CPU core, against 9.8 ms as two
        products with cosine and sine matrices (medians of 30, interleaved); hence torch.fft.

    Source:
        VFPT (NeurIPS 2024); the official TCPA code transforms both pools jointly.
    """
    return _fourier_transform(prompts, list(dims)) if prompts.numel() else prompts


def drop_elements(
    prompts: Tensor, p: float, batch_size: int, training: bool, shared: bool
) -> Tensor:
    """Drop elements of `[N, P, C]`; per-sample masks turn it into `[N, B, P, C]`."""
    if not training or p == 0:
        return prompts
    if not shared:
        prompts = prompts.unsqueeze(1).expand(-1, batch_size, -1, -1)
    return F.dropout(prompts, p)


def init_tokens(prompts: Tensor, backbone: Any) -> None:
    """Draw prompts `[..., C]` from VPT's U(-v, v), v = sqrt(6 / (3 * patch area + C))."""
    patch_area = math.prod(backbone.patch_embed.patch_size)
    bound = math.sqrt(6 / (3 * patch_area + prompts.shape[-1]))
    nn.init.uniform_(prompts, -bound, bound)


class VPTPrompts(PromptSource):
    """VPT's prompt tokens: one set for every block (deep) or for the first one (shallow)."""

    def __init__(self, config: VPTConfig, backbone: Any) -> None:
        super().__init__()
        self.config, self.shallow = config, not config.deep
        depth = len(backbone.blocks) if config.deep else 1
        self.prompts = nn.Parameter(torch.empty(depth, config.length, backbone.embed_dim))
        if config.init == "xavier":
            init_tokens(self.prompts, backbone)
        else:
            nn.init.uniform_(self.prompts, -1.0, 1.0)

    def forward(self, batch_size: int) -> Tensor:
        """Return the prompts of all prompted blocks, `[N, P, C]` or, per sample, `[N, B, P, C]`."""
        config = self.config
        prompts = drop_elements(
            self.prompts, config.dropout, batch_size, self.training, shared=False
        )
        count = int(config.fourier_fraction * config.length)
        if count == 0:
            return prompts
        dims = {"all": (-2, -1), "hidden": (-1,), "sequence": (-2,)}[config.fourier_dims]
        transformed = fourier_transform(prompts[..., :count, :], dims)
        return torch.cat((transformed, prompts[..., count:, :]), dim=-2)
