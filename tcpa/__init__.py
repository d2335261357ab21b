"""Token Coordinated Prompt Attention (TCPA, ICML 2025) for timm Vision Transformers.

Axes, the same everywhere: B batch, H heads, L tokens (prefix tokens, then patches), P prompt rows
(CLS pool, then image pool), S = L + P keys, D head dim, C = H * D width, R pool entries, N blocks,
W = ceil(P / 32) gate words.
"""

from .build import create_model, wrap
from .config import HTA_DATASETS, PromptConfig, Savings, TCPAConfig, VPTConfig
from .model import Normalization, PromptedViT
from .ops import gated_attention, match_prompts
from .reference import (
    gated_attention_reference,
    match_prompts_reference,
    pack_gate,
    random_gate,
    role_gate,
    unpack_gate,
)

__version__ = "0.1.0"

__all__ = [
    "HTA_DATASETS",
    "Normalization",
    "PromptConfig",
    "PromptedViT",
    "Savings",
    "TCPAConfig",
    "VPTConfig",
    "create_model",
    "gated_attention",
    "gated_attention_reference",
    "match_prompts",
    "match_prompts_reference",
    "pack_gate",
    "random_gate",
    "role_gate",
    "unpack_gate",
    "wrap",
]
