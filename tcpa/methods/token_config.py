"""Configurations of token prompts besides those of `config`: E2VPT and gated prompts."""

from dataclasses import dataclass

from ..checks import require_int, require_number


@dataclass(frozen=True, kw_only=True, slots=True)
class E2VPTConfig:
    """Prompt tokens in front of every block, and prompts that are keys and values (ICCV 2023).

    Tokens, and segments of tokens, can be pruned; see `PromptedViT.prune_prompts`.
    """

    length: int = 5
    """Prompt tokens of a block (T)."""

    kv_length: int = 5
    """Key-value prompts of a block (t): `[H, D]` each, used as key and as value after the
    projection."""

    segments: int = 16
    """Equal parts of a token that pruning can zero; the width must be a multiple of it."""

    dropout: float = 0.1
    """Probability with which training zeroes an element of a token, per sample."""

    def __post_init__(self) -> None:
        for name in ("length", "kv_length", "segments"):
            require_int(name, getattr(self, name), 1)
        require_number("dropout", self.dropout, 0.0, 1.0)

    @property
    def num_prompts(self) -> int:
        """P, the prompt rows of one block: tokens and key-value prompts."""
        return self.length + self.kv_length


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedPromptConfig:
    """VPT-Shallow whose prompts a gate per block mixes with what the block made of them, and a
    temperature per block for the attention (Yoo et al., ICML 2023)."""

    length: int = 100
    """Prompt tokens."""

    gate_init: float = 10.0
    """The gates start from sigmoid(-gate_init), so that blocks hardly change the prompts."""

    dropout: float = 0.1
    """Probability with which training zeroes a prompt element, per sample."""

    def __post_init__(self) -> None:
        require_int("length", self.length, 1)
        require_number("gate_init", self.gate_init, 0.0)
        require_number("dropout", self.dropout, 0.0, 1.0)

    @property
    def num_prompts(self) -> int:
        """P, the prompt tokens."""
        return self.length
