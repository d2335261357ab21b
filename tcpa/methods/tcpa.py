"""Token Coordinated Prompt Attention: pools that tokens select from, and what its official code
does to values and images.

Axes: B batch, L tokens, P prompt rows of a block, R pool entries, C width, N blocks.
"""

import logging
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from .. import vit
from ..checks import require, require_bool, require_choice, require_int, require_number
from ..dispatch import Impl
from ..ops import match_prompts_unchecked, norm_match_unchecked
from ..reference import random_gate, role_gate
from .base import Choices, Modules, PromptConfig
from .modules import Match, PromptSource
from .vpt import drop_elements, fourier_transform

_log = logging.getLogger("tcpa")

HTA_DATASETS = (
    "dtd",
    "cub",
    "nabirds",
    "stanford_dogs",
    "flower102",
    "food101",
    "cifar100",
    "cifar10",
    "gtsrb",
    "svhn",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TCPAConfig(PromptConfig):
    """Token Coordinated Prompt Attention (ICML 2025, arXiv 2505.02406).

    The defaults are the settings of the official scripts.
    """

    name: ClassVar[str] = "tcpa"
    dropout_setting: ClassVar[str] = "prompt_dropout"

    cls_pool_size: int = 18
    """Entries of the CLS pool (R_cls). A model without prefix tokens has no CLS pool."""

    image_pool_size: int = 18
    """Entries of the image pool (R_image)."""

    cls_prompt_length: int = 1
    """Prompt rows per entry of the CLS pool."""

    image_prompt_length: int = 1
    """Prompt rows per entry of the image pool."""

    cls_top_k: int = 10
    """Entries of the CLS pool that each prefix token sees."""

    image_top_k: int = 10
    """Entries of the image pool that each patch token sees."""

    coordination: Literal["token", "role"] = "token"
    """"token": every token selects its prompts (R-TCPA + T-TCPA). "role": R-TCPA alone, every token
    sees the whole pool of its role; keys and top-k are then unused and the distance is 0 (and
    DistributedDataParallel needs find_unused_parameters=True)."""

    selection: Literal["nearest", "farthest"] = "nearest"
    """"nearest": largest cosine similarity (official code). "farthest": Eq. 10 taken literally."""

    normalize_over: Literal["all", "visible"] = "all"
    """"all": every prompt stays in the softmax denominator (Eq. 12-13, official code). "visible":
    the softmax covers only what the token sees (Eq. 6-7)."""

    prompt_transform: Literal["fourier", "identity"] = "fourier"
    """"fourier": VFPT + TCPA, real part of the 2-D discrete Fourier transform over prompt rows and
    channels. "identity": VPT + TCPA."""

    fourier_scope: Literal["joint", "pool"] = "joint"
    """Rows that one Fourier transform covers: both pools (official code) or each pool by itself."""

    prompt_dropout: float = 0.1
    """Probability with which training zeroes a prompt element, before the transform."""

    prompt_dropout_shared: bool = False
    """Share one dropout mask over the batch. False (official code): one mask per sample."""

    random_selection_epochs: int = 10
    """First epochs of training in which every token sees random prompts; see `set_epoch`."""

    match_weight: float = 0.01
    """Weight of the match distance in the loss."""

    image_prompt: bool = False
    """Add a convolutional prompt to the image: two 11 x 11 convolutions, 6,547 parameters
    (official CUB script; not in the paper)."""

    value_affine: bool = False
    """Scale and shift the values of every prompt row by parameters shared by all blocks (official
    flag ADVP, off in all scripts)."""

    simam: bool = False
    """Weight the image by a parameter-free attention before anything else (official flag, off)."""

    token_noise: float = 0.0
    """Standard deviation of the Gaussian noise that training adds to all tokens and prompts after
    the matching, in every block (official flag random_prompt: 0.001; off)."""

    def __post_init__(self) -> None:
        for name in ("cls_pool_size", "image_pool_size", "random_selection_epochs"):
            require_int(name, getattr(self, name), 0)
        for name in ("cls_prompt_length", "image_prompt_length"):
            require_int(name, getattr(self, name), 1)
        for pool in ("cls", "image"):
            size, top_k = getattr(self, f"{pool}_pool_size"), getattr(self, f"{pool}_top_k")
            require_int(f"{pool}_top_k", top_k, 0)
            fits = top_k <= size or self.coordination == "role" or size == 0
            bound, remedy = f"at most {pool}_pool_size={size}", "lower it or enlarge the pool"
            require(fits, f"{pool}_top_k", top_k, bound, remedy)
        require_choice("coordination", self.coordination, ("token", "role"))
        require_choice("selection", self.selection, ("nearest", "farthest"))
        require_choice("normalize_over", self.normalize_over, ("all", "visible"))
        require_choice("prompt_transform", self.prompt_transform, ("fourier", "identity"))
        require_choice("fourier_scope", self.fourier_scope, ("joint", "pool"))
        require_number("prompt_dropout", self.prompt_dropout, 0.0, 1.0)
        require_number("match_weight", self.match_weight, 0.0)
        require_number("token_noise", self.token_noise, 0.0)
        for name in ("prompt_dropout_shared", "image_prompt", "value_affine", "simam"):
            require_bool(name, getattr(self, name))

    @property
    def cls_rows(self) -> int:
        """Prompt rows of the CLS pool."""
        return self.cls_pool_size * self.cls_prompt_length

    @property
    def num_prompts(self) -> int:
        """P, the prompt rows of one block, both pools."""
        return self.cls_rows + self.image_pool_size * self.image_prompt_length

    @property
    def num_pool(self) -> tuple[int, int]:
        """Entries of the CLS pool and of the image pool."""
        return self.cls_pool_size, self.image_pool_size

    @property
    def lengths(self) -> tuple[int, int]:
        """Prompt rows per entry of the CLS pool and of the image pool."""
        return self.cls_prompt_length, self.image_prompt_length

    @property
    def random_epochs(self) -> int:
        return self.random_selection_epochs if self.coordination == "token" else 0

    @property
    def finds_unused_parameters(self) -> bool:
        return self.coordination == "role"

    def describe(self) -> str:
        kind = "Fourier " if self.prompt_transform == "fourier" else ""
        entries = f"{self.cls_pool_size} + {self.image_pool_size}"
        return f"{kind}TCPA {entries}, top {self.cls_top_k}, {self.image_top_k}"

    @property
    def label(self) -> str:
        return "TCPA" if self.coordination == "token" else "R-TCPA"

    def why_nothing_is_selected(self) -> str | None:
        if self.coordination == "token":
            return None
        return "coordination='role', where every token sees the whole pool of its role"

    def on_image(self) -> str | None:
        return "convolutions" if self.image_prompt else None

    def fit_to(self, backbone: Any) -> Self:
        """Drop the CLS pool on a model without prefix tokens; nothing could select from it."""
        if backbone.num_prefix_tokens > 0 or self.cls_pool_size == 0:
            return self
        _log.info("the backbone has no prefix tokens: the CLS pool is dropped")
        return self.replace(cls_pool_size=0, cls_top_k=0)

    def resized(self, rows: int) -> Self:
        sizes = {"cls": rows // 2, "image": rows - rows // 2}
        pools = {f"{pool}_pool_size": size for pool, size in sizes.items()}
        top_k = {f"{p}_top_k": min(getattr(self, f"{p}_top_k"), n) for p, n in sizes.items()}
        return self.replace(**pools, **top_k, prompt_dropout=0.0)

    def build(self, backbone: Any, choices: Choices) -> Modules:
        made: Modules = {"pools": PromptPools(self, backbone)}
        if self.value_affine:
            made["value_affine"] = ValueAffine(self.num_prompts, backbone)
        layers: list[nn.Module] = [SimAM()] if self.simam else []
        if self.image_prompt:
            layers.append(ConvImagePrompt(vit.input_channels(backbone)))
        return made | {"image_prompt": nn.Sequential(*layers)}

    @classmethod
    def official(cls, dataset: str) -> Self:
        """Return the settings of the official script, sh/VFPT_TCPA_*.sh, of one of
        `HTA_DATASETS`."""
        require_choice("dataset", dataset, HTA_DATASETS)
        pool = 16 if dataset == "stanford_dogs" else 18
        return cls(cls_pool_size=pool, image_pool_size=pool, image_prompt=dataset == "cub")

    @classmethod
    def paper(cls) -> Self:
        """Return the settings that the paper states: VPT + TCPA, N_c = 10, N_i = 20, lambda = 0.5.

        It gives no K (the scripts' 10 is kept: prefix tokens see their whole pool), neither dropout
        nor random selection (both off). Eq. 10 taken literally would be `selection="farthest"`.
        """
        return cls(
            cls_pool_size=10,
            image_pool_size=20,
            prompt_transform="identity",
            prompt_dropout=0.0,
            random_selection_epochs=0,
            match_weight=0.5,
        )


class PromptPools(PromptSource):
    """The CLS pool and the image pool of every block: keys to match, prompts to attend to, all of
    which start from U(-1, 1)."""

    selects = True

    def __init__(self, config: TCPAConfig, backbone: Any) -> None:
        super().__init__()
        self.config, self.normalize_over = config, config.normalize_over
        prefix = backbone.num_prefix_tokens
        self.layout: dict[str, Any] = {"lengths": config.lengths, "num_prefix_tokens": prefix}
        depth, width = len(backbone.blocks), backbone.embed_dim
        cls_pool, image_pool = config.num_pool
        self.cls_keys = nn.Parameter(torch.empty(depth, cls_pool, width))
        cls_length, image_length = config.lengths
        self.cls_prompts = nn.Parameter(torch.empty(depth, cls_pool, cls_length, width))
        self.image_keys = nn.Parameter(torch.empty(depth, image_pool, width))
        self.image_prompts = nn.Parameter(torch.empty(depth, image_pool, image_length, width))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1.0, 1.0)

    @property
    def noise(self) -> float:
        return self.config.token_noise if self.training else 0.0

    def forward(self, batch_size: int) -> Tensor:
        """Return the prompts of all blocks, rows of the CLS pool first; dropout per sample, or
        noise, gives every sample its own."""
        config = self.config
        rows = torch.cat((self.cls_prompts.flatten(1, 2), self.image_prompts.flatten(1, 2)), dim=1)
        shared = config.prompt_dropout_shared
        prompts = drop_elements(rows, config.prompt_dropout, batch_size, self.training, shared)
        if config.prompt_transform == "fourier":
            prompts = self._transform(prompts)
        if self.noise > 0:
            if prompts.ndim == 3:
                prompts = prompts.unsqueeze(1).expand(-1, batch_size, -1, -1)
            prompts = prompts + self.noise * torch.randn_like(prompts)
        return prompts

    def _transform(self, prompts: Tensor) -> Tensor:
        if self.config.fourier_scope == "joint":
            return fourier_transform(prompts)
        cls_rows = self.config.cls_rows
        pools = (prompts[..., :cls_rows, :], prompts[..., cls_rows:, :])
        return torch.cat([fourier_transform(pool) for pool in pools], dim=-2)

    def match(
        self, index: int, x: Tensor, norm: nn.LayerNorm | None, *, draw: bool, impl: Impl
    ) -> Match:
        config, gate, layout = self.config, None, self.layout
        if config.coordination == "role":
            gate = role_gate(x.shape[1], num_pool=config.num_pool, device=x.device, **layout)
            return Match(gate)
        if draw:
            top_k = (config.cls_top_k, config.image_top_k)
            drawn = {"num_pool": config.num_pool, "top_k": top_k, "device": x.device}
            gate = random_gate(x.shape[0], x.shape[1], **drawn, **layout)
        keys = self.cls_keys[index], self.image_keys[index]
        options: dict[str, Any] = {
            "cls_top_k": config.cls_top_k,
            "image_top_k": config.image_top_k,
            "selection": config.selection,
            "gate": gate,
            "impl": impl,
            **layout,
        }
        if norm is None:
            return Match(*match_prompts_unchecked(x, *keys, **options))
        affine = norm.weight, norm.bias, norm.eps
        normed, gate, distance = norm_match_unchecked(x, *affine, *keys, **options)
        return Match(gate, distance, normed)


class ValueAffine(nn.Module):
    """Scale and shift the values of every prompt row, shared by all blocks (official flag ADVP)."""

    def __init__(self, num_prompts: int, backbone: Any) -> None:
        super().__init__()
        attn = backbone.blocks[0].attn
        width = attn.num_heads * attn.head_dim
        self.scale = nn.Parameter(torch.empty(1, num_prompts, width))
        self.shift = nn.Parameter(torch.empty(1, num_prompts, width))
        # Near the identity: 1 + 0.1 z and 0.1 z with Kaiming-normal z.
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
