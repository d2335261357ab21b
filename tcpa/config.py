"""Configurations of the prompt methods and of the exact savings: frozen data, checked on
creation."""

from dataclasses import dataclass
from typing import Literal, Self

from .checks import require, require_bool, require_choice, require_int, require_number
from .methods.token_config import E2VPTConfig, GatedPromptConfig

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
class TCPAConfig:
    """Token Coordinated Prompt Attention (ICML 2025, arXiv 2505.02406).

    The defaults are the settings of the official scripts.
    """

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
            require(
                top_k <= size or self.coordination == "role" or size == 0,
                f"{pool}_top_k",
                top_k,
                f"at most {pool}_pool_size={size}",
                "lower the top-k or enlarge the pool",
            )
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

    @classmethod
    def official(cls, dataset: str) -> Self:
        """Return the settings of the official script of an HTA dataset.

        Args:
            dataset: one of `HTA_DATASETS`, the official names.

        Source:
            The scripts sh/VFPT_TCPA_*.sh of the official repository.
        """
        require_choice("dataset", dataset, HTA_DATASETS)
        pool = 16 if dataset == "stanford_dogs" else 18
        return cls(cls_pool_size=pool, image_pool_size=pool, image_prompt=dataset == "cub")

    @classmethod
    def paper(cls) -> Self:
        """Return the settings that the paper states: VPT + TCPA, N_c = 10, N_i = 20, lambda = 0.5.

        The paper gives no K (the scripts' 10 is kept, so that prefix tokens see their whole pool),
        and mentions neither dropout nor random selection (both off). Its Eq. 10 taken literally
        would be `selection="farthest"`; the text means the nearest.
        """
        return cls(
            cls_pool_size=10,
            image_pool_size=20,
            prompt_transform="identity",
            prompt_dropout=0.0,
            random_selection_epochs=0,
            match_weight=0.5,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VPTConfig:
    """Visual Prompt Tuning, shallow or deep (ECCV 2022), and Visual Fourier Prompts (NeurIPS
    2024)."""

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
    def num_prompts(self) -> int:
        """P, the prompt rows of one block."""
        return self.length

    @classmethod
    def vfpt(cls, length: int = 10, fourier_fraction: float = 0.5) -> Self:
        """Return VFPT: VPT-Deep of which a fraction of the tokens goes through the transform."""
        return cls(length=length, fourier_fraction=fourier_fraction, dropout=0.1)

    @classmethod
    def official_vfpt(cls) -> Self:
        """Return the VFPT baseline of the official code: 10 tokens, all transformed, U(-1, 1)."""
        return cls(length=10, fourier_fraction=1.0, dropout=0.1, init="uniform")


PromptConfig = TCPAConfig | VPTConfig | E2VPTConfig | GatedPromptConfig

TOKEN_PROMPTS: dict[str, type[PromptConfig]] = {
    "tcpa": TCPAConfig,
    "vpt": VPTConfig,
    "e2vpt": E2VPTConfig,
    "gated": GatedPromptConfig,
}
"""Name under which token prompts are saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Savings:
    """Work that the model leaves out without changing what it computes; each can be switched off.

    Every saving equals the plain form to 1e-12 in float64. With all of them off the model does what
    the official code does, at its cost.
    """

    frozen_backbone: bool = True
    """Compute no weight gradients of the backbone."""

    prompt_keys_only: bool = True
    """Prompts have keys and values, but no query, attention row or MLP (their outputs are
    unused)."""

    prompt_kv_once: bool = True
    """Project the prompts of all blocks outside the blocks: once a batch when the batch shares
    them, once a model when nothing is trained, instead of once a sample in every block."""

    prompt_kv_stacked: bool = True
    """Where they are projected once, and alike, do it with one product for all blocks."""

    last_block_head_rows: bool = True
    """The last block computes only the tokens that the head reads."""

    skip_input_gradient: bool = True
    """Compute no token gradients in the first block, unless the image is prompted."""

    gate_bits: bool = True
    """Keep the selection as one bit per prompt, never as a dense `[B, H, L, S]` mask."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            require_bool(name, getattr(self, name))

    @classmethod
    def none(cls) -> Self:
        """Return the plain computation."""
        return cls(**dict.fromkeys(cls.__slots__, False))
