"""Prompt parameters: TCPA's pools, VPT's tokens, and the optional prompts on the image.

Axes: B batch, P prompt rows of a block, R pool entries, C width, N blocks.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PromptConfig, TCPAConfig, VPTConfig


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


def init_tokens(prompts: Tensor, patch_area: int) -> None:
    """Draw prompts `[..., C]` from VPT's U(-v, v), v = sqrt(6 / (3 * patch area + C))."""
    bound = math.sqrt(6 / (3 * patch_area + prompts.shape[-1]))
    nn.init.uniform_(prompts, -bound, bound)


class PromptPools(nn.Module):
    """The CLS pool and the image pool of every block: keys to match, prompts to attend to.

    All values start from U(-1, 1), as in the official code.
    """

    def __init__(self, config: TCPAConfig, backbone: Any) -> None:
        super().__init__()
        self.config = config
        depth, width = len(backbone.blocks), backbone.embed_dim
        cls_pool, image_pool = config.cls_pool_size, config.image_pool_size
        self.cls_keys = nn.Parameter(torch.empty(depth, cls_pool, width))
        self.cls_prompts = nn.Parameter(
            torch.empty(depth, cls_pool, config.cls_prompt_length, width)
        )
        self.image_keys = nn.Parameter(torch.empty(depth, image_pool, width))
        self.image_prompts = nn.Parameter(
            torch.empty(depth, image_pool, config.image_prompt_length, width)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all keys and prompts from U(-1, 1)."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1.0, 1.0)

    def forward(self, batch_size: int) -> Tensor:
        """Return the prompts of all blocks, ready for the first norm of each block.

        Args:
            batch_size: B; training with per-sample dropout or noise gives every sample its own.

        Returns:
            `[N, P, C]` shared by the batch, or `[N, B, P, C]`; rows of the CLS pool first.
        """
        config = self.config
        rows = torch.cat((self.cls_prompts.flatten(1, 2), self.image_prompts.flatten(1, 2)), dim=1)
        shared = config.prompt_dropout_shared
        prompts = drop_elements(rows, config.prompt_dropout, batch_size, self.training, shared)
        if config.prompt_transform == "fourier":
            prompts = self._transform(prompts)
        if config.token_noise > 0 and self.training:
            if prompts.ndim == 3:
                prompts = prompts.unsqueeze(1).expand(-1, batch_size, -1, -1)
            prompts = prompts + config.token_noise * torch.randn_like(prompts)
        return prompts

    def _transform(self, prompts: Tensor) -> Tensor:
        if self.config.fourier_scope == "joint":
            return fourier_transform(prompts)
        cls_rows = self.config.cls_rows
        pools = (prompts[..., :cls_rows, :], prompts[..., cls_rows:, :])
        return torch.cat([fourier_transform(pool) for pool in pools], dim=-2)


class TokenPrompts(nn.Module):
    """VPT's prompt tokens: one set for every block (deep) or for the first one (shallow)."""

    def __init__(self, config: VPTConfig, backbone: Any) -> None:
        super().__init__()
        self.config = config
        self.patch_area = math.prod(backbone.patch_embed.patch_size)
        depth = len(backbone.blocks) if config.deep else 1
        self.prompts = nn.Parameter(torch.empty(depth, config.length, backbone.embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prompts from the distribution that the configuration names."""
        if self.config.init == "xavier":
            init_tokens(self.prompts, self.patch_area)
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


class ValueAffine(nn.Module):
    """Scale and shift the values of every prompt row, shared by all blocks (official flag ADVP)."""

    def __init__(self, num_prompts: int, backbone: Any) -> None:
        super().__init__()
        attn = backbone.blocks[0].attn
        width = attn.num_heads * attn.head_dim
        self.scale = nn.Parameter(torch.empty(1, num_prompts, width))
        self.shift = nn.Parameter(torch.empty(1, num_prompts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start near the identity: 1 + 0.1 z and 0.1 z with Kaiming-normal z."""
        for parameter, offset in ((self.scale, 1.0), (self.shift, 0.0)):
            if parameter.numel():
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            with torch.no_grad():
                parameter.mul_(0.1).add_(offset)

    def forward(self, values: Tensor) -> Tensor:
        """Map prompt values `[P, H, D]` or `[B, P, H, D]`."""
        heads = values.shape[-2:]
        scale, shift = self.scale[0].unflatten(-1, heads), self.shift[0].unflatten(-1, heads)
        return (values * scale + shift).to(values.dtype)


class ConvImagePrompt(nn.Module):
    """Add a learned residual to the normalised image: 11 x 11 convolutions 3 -> 9 -> 3 with
    PReLU."""

    def __init__(self, channels: int = 3, hidden: int = 9, kernel_size: int = 11) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, kernel_size, padding="same")
        self.activation = nn.PReLU()
        self.contract = nn.Conv2d(hidden, channels, kernel_size, padding="same")

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, 3, height, width]`."""
        # The convolutions stay in float32 when frozen weights and images are in less.
        x = images.to(self.expand.weight.dtype)
        return images + self.contract(self.activation(self.expand(x))).to(images.dtype)


class SimAM(nn.Module):
    """Weight every pixel by a parameter-free attention over its channel (SimAM, ICML 2021)."""

    def __init__(self, regularizer: float = 1e-3) -> None:
        super().__init__()
        self.regularizer = regularizer

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, 3, height, width]`."""
        deviation = (images - images.mean(dim=(-2, -1), keepdim=True)).square()
        pixels = images.shape[-2] * images.shape[-1]
        variance = deviation.sum(dim=(-2, -1), keepdim=True) / (pixels - 1)
        return images * torch.sigmoid(deviation / (4 * (variance + self.regularizer)) + 0.5)


def make_image_prompt(config: PromptConfig | None, channels: int) -> nn.Sequential:
    """Return what a configuration does to the image, in the official order; empty for nothing."""
    layers: list[nn.Module] = []
    if isinstance(config, TCPAConfig) and config.simam:
        layers.append(SimAM())
    if isinstance(config, TCPAConfig) and config.image_prompt:
        layers.append(ConvImagePrompt(channels=channels))
    return nn.Sequential(*layers)
