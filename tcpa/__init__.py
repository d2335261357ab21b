"""Token Coordinated Prompt Attention (TCPA, ICML 2025) for timm Vision Transformers.

Axes, the same everywhere: B batch, H heads, L tokens (prefix tokens, then patches), P prompt rows
(CLS pool, then image pool), S = L + P keys, D head dim, C = H * D width, R pool entries, N blocks,
W = ceil(P / 32) gate words.
"""

import importlib
from typing import Any

from .adapter import save_pretrained
from .build import create_model, wrap
from .capture import BlockRecord, Capture
from .config import Savings
from .dispatch import choose_impl
from .loading import from_pretrained
from .methods.adapters import AdapterTuning, AdaptFormerTuning
from .methods.autovp import AutoVPConfig
from .methods.base import InputConfig, Normalization, PromptConfig, TuningConfig
from .methods.dam_vp import DAMVPConfig
from .methods.e2vpt import E2VPTConfig
from .methods.finetune import BiasTuning, FullTuning, LastBlockTuning
from .methods.gated import GatedPromptConfig
from .methods.heads import HeadTuning, MLPHeadTuning
from .methods.lion import LIONConfig
from .methods.side import SideTuning
from .methods.tcpa import HTA_DATASETS, TCPAConfig
from .methods.vp import VPConfig
from .methods.vpt import VPTConfig
from .model import PromptedViT
from .official import load_official_state_dict, official_state_dict
from .ops import gated_attention, match_prompts, norm_match
from .provenance import __version__ as __version__
from .reference import (
    gated_attention_reference,
    match_prompts_reference,
    pack_gate,
    random_gate,
    role_gate,
    unpack_gate,
)

__all__ = [
    "HTA_DATASETS",
    "AdaptFormerTuning",
    "AdapterTuning",
    "AutoVPConfig",
    "BiasTuning",
    "BlockRecord",
    "Capture",
    "DAMVPConfig",
    "E2VPTConfig",
    "FullTuning",
    "GatedPromptConfig",
    "HeadTuning",
    "InputConfig",
    "LIONConfig",
    "LastBlockTuning",
    "MLPHeadTuning",
    "Normalization",
    "PromptConfig",
    "PromptedViT",
    "Savings",
    "SideTuning",
    "TCPAConfig",
    "TuningConfig",
    "VPConfig",
    "VPTConfig",
    "choose_impl",
    "create_model",
    "from_pretrained",
    "gated_attention",
    "gated_attention_reference",
    "load_official_state_dict",
    "match_prompts",
    "match_prompts_reference",
    "norm_match",
    "official_state_dict",
    "pack_gate",
    "random_gate",
    "role_gate",
    "save_pretrained",
    "unpack_gate",
    "wrap",
]


def __getattr__(name: str) -> Any:
    # Only when asked for: it is for notebooks and reports, not for training.
    if name == "inspect":
        return importlib.import_module(".inspect", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
