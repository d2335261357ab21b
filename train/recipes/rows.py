"""Every row of the paper's tables: three choices, how its authors train it, and from where that is
known.

A method is one line of choices: what is done to the image, which tokens are prompts, what else is
trained. Where no source states how a method is trained, its recipe is that of the official TCPA
scripts, and `Method.note` says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import tcpa

from .training import (
    PLAIN,
    Group,
    Training,
    dam_vp_sgd,
    vpt_adamw,
    vpt_sgd,
)

VPT = "KMnP/vpt 4410440"
TCPA = "zhoujiahuan1991/ICML2025-TCPA dce8b3a"
DAM_VP = "shikiw/DAM-VP dec5821"
GRID = "the source chooses rate and decay per dataset on validation images; ours are middle values "
GRID += "of its grids"
UNPUBLISHED = "unpublished; those of vfpt+tcpa were taken"
BACKBONE = "its source uses the original JAX weights of the ViT-B/16"

GOLDEN = "outputs and gradients of the official TCPA code, kept in tests/golden"

Prompts = Callable[[str], tcpa.PromptConfig | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One row."""

    label: str
    """Name as the papers write it."""
    source: str
    """Repository and commit, or paper, of the method and its settings."""
    prompts: Prompts = lambda dataset: None
    """Token prompts on a dataset."""
    input_prompt: tcpa.InputConfig | None = None
    tuning: tcpa.TuningConfig = field(default_factory=tcpa.HeadTuning)
    training: Training | None = None
    """None: that of the official TCPA scripts."""
    note: str = ""
    """What no source says, with what was taken instead and why."""
    parity: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe that repeat a bug of the source, for `--parity`."""
    verified: str = ""
    """Against what the implementation was compared."""


def token_prompts(fourier: bool) -> tcpa.VPTConfig:
    """The VFPT baseline of the official code; without its transform it is VPT-Deep."""
    config = tcpa.VPTConfig.official_vfpt()
    return config if fourier else replace(config, fourier_fraction=0.0, init="xavier")


def coordinated(transform: str, *, image_prompt: bool | None = None) -> Prompts:
    """Return TCPA's pools, as the official script of a dataset has them."""

    def of(dataset: str) -> tcpa.TCPAConfig:
        official = dataset in tcpa.HTA_DATASETS
        config = tcpa.TCPAConfig.official(dataset) if official else tcpa.TCPAConfig()
        own = config.image_prompt if image_prompt is None else image_prompt
        return replace(config, prompt_transform=transform, image_prompt=own)

    return of


def always(config: tcpa.PromptConfig) -> Prompts:
    """Return the same prompts on every dataset."""
    return lambda dataset: config


PRIOR = tcpa.HeadTuning(head="prior")
NO_DECAY = Group(pattern=r"bias$|norm", weight_decay=0.0)
ON_IMAGES = coordinated("identity", image_prompt=False)
WITH_TCPA = (
    f"hyper-parameters {UNPUBLISHED}, in one AdamW group with the prompt on the image; pools "
    "without Fourier transform and a linear head, which the paper does not state either"
)

METHODS: dict[str, Method] = {
    "full": Method(
        label="Full",
        source=VPT,
        tuning=tcpa.FullTuning(head="prior", dropout=0.1),
        training=vpt_adamw(
            learning_rate=1e-4,
            weight_decay=0.01,
            epsilon=1e-6,
            groups=(NO_DECAY,),
            warmup_fraction=0.05,
            batch_size=384,
            weight_decay_grid=(0.01,),
        ),
        note=f"{GRID}; {BACKBONE}",
    ),
    "linear": Method(
        label="Linear",
        source=VPT,
        tuning=PRIOR,
        training=vpt_sgd(batch_size=1024),
        note=f"{GRID}; {BACKBONE}",
    ),
    "partial-1": Method(
        label="Partial-1",
        source=VPT,
        tuning=tcpa.LastBlockTuning(head="prior"),
        training=vpt_adamw(),
        note="the code states no optimiser; AdamW on the grid of its full tuning, whose weights "
        f"these are a part of; {BACKBONE}",
    ),
    "mlp-3": Method(
        label="MLP-3",
        source=VPT,
        tuning=tcpa.MLPHeadTuning(),
        training=vpt_sgd(learning_rate=0.1),
        note=f"two hidden layers: the code has no configuration that says how it counts; {GRID}",
    ),
    "bias": Method(
        label="Bias",
        source=VPT,
        tuning=tcpa.BiasTuning(head="prior"),
        training=vpt_adamw(),
        note="the code states no optimiser; AdamW on the grid of its full tuning, whose weights "
        f"these are a part of; {BACKBONE}",
    ),
    "sidetune": Method(
        label="Sidetune",
        source=VPT,
        tuning=tcpa.SideTuning(head="prior"),
        training=vpt_sgd(learning_rate=0.1),
        note=f"{GRID}; {BACKBONE}",
    ),
    "adapter": Method(
        label="Adapter",
        source=VPT,
        tuning=tcpa.AdapterTuning(head="prior"),
        training=vpt_adamw(),
        note="the code states no optimiser: AdamW on the grid of its full tuning; corrected: "
        "adapters do not start from zeros alone, from which only their last biases could be "
        "trained",
        parity={"tuning": tcpa.AdapterTuning(head="prior", zero_init=True)},
    ),
    "adaptformer": Method(
        label="AdaptFormer",
        source="ShoufaChen/AdaptFormer",
        tuning=tcpa.AdaptFormerTuning(),
        training=Training(
            optimizer="SGD",
            momentum=0.9,
            learning_rate=0.1,
            rate_batch=256,
            weight_decay=0.0,
            batch_size=512,
            **PLAIN,
        ),
        note="its source states one rate for all datasets",
    ),
    "e2vpt": Method(
        label="E2VPT",
        source="ChengHan111/E2VPT",
        prompts=always(tcpa.E2VPTConfig()),
        tuning=PRIOR,
        training=vpt_sgd(),
        note=f"{GRID}; pruning is asked for with --prune-tokens and --prune-segments",
    ),
    "lion": Method(
        label="LION",
        source="its abstract (AAAI 2024); no code is public",
        input_prompt=tcpa.LIONConfig(critical_share=0.9),
        verified="nothing: there is no code to compare with",
        note="unverified: equations and hyper-parameters were not at hand; the layers are ours, "
        f"and the hyper-parameters {UNPUBLISHED}",
    ),
    "gated-prompt": Method(
        label="Gated prompts (Yoo et al.)",
        source="ryongithub/GatedPromptTuning",
        prompts=always(tcpa.GatedPromptConfig()),
        tuning=PRIOR,
        training=vpt_sgd(batch_size=64, weight_decay=0.0, weight_decay_grid=(0.0,)),
        note=f"{GRID}; published for MAE and MoCo-v3 alone; the batch is VPT's for long prompts",
    ),
    "vp": Method(
        label="VP",
        source="hjbahng/visual_prompting; head-tuned as in " + DAM_VP,
        input_prompt=tcpa.VPConfig(),
        training=dam_vp_sgd(learning_rate=40.0, weight_decay=0.0, epochs=100, augment=False),
        note="the original has no head and trains 1000 epochs, for other backbones; its rate for "
        "the frame and DAM-VP's for the head were taken, as the row of the tables is head-tuned by "
        "unpublished settings",
    ),
    "vpt-shallow": Method(
        label="VPT-Shallow",
        source=VPT,
        prompts=always(tcpa.VPTConfig(length=10, deep=False, dropout=0.1)),
        tuning=PRIOR,
        training=vpt_sgd(),
        note=f"{GRID}, and so is the prompt length of 10; {BACKBONE}",
    ),
    "vpt-deep": Method(
        label="VPT-Deep",
        source=VPT,
        prompts=always(token_prompts(fourier=False)),
        tuning=PRIOR,
        training=vpt_sgd(),
        note=f"{GRID}, and so is the prompt length of 10; {BACKBONE}",
        verified=f"{GOLDEN}, its Fourier transform taken out",
    ),
    "dam-vp": Method(
        label="DAM-VP",
        source=DAM_VP,
        input_prompt=tcpa.DAMVPConfig(),
        training=dam_vp_sgd(),
        note="rates and decays per dataset are in tables that were not at hand: the rate of its "
        "meta-training was taken; 16 clusters, since its threshold is for features that timm's "
        "models do not have; corrected: momentum acts, and the head keeps its own rate",
        parity={
            "momentum": 0.0,
            "groups": (Group(pattern=r"^backbone\.head", weight_decay=0.0),),
        },
    ),
    "autovp": Method(
        label="AutoVP",
        source="IBM/AutoVP",
        input_prompt=tcpa.AutoVPConfig(),
        training=Training(
            optimizer="Adam",
            learning_rate=1e-3,
            weight_decay=0.0,
            schedule="steps",
            warmup_fraction=0.0,
            milestones=(0.5, 0.72),
            epochs=200,
            augment=False,
            **PLAIN,
        ),
        note="the source has no ViT of ImageNet-21k: its settings for other backbones, with a "
        "linear head on the feature in place of its mapping of logits; the row of the tables used "
        "CLIP",
    ),
    "vfpt": Method(
        label="VFPT",
        source=f"{TCPA} (models/VFPT.py)",
        prompts=always(token_prompts(fourier=True)),
        note=f"hyper-parameters of vfpt are {UNPUBLISHED}; runtsang/VFPT itself takes VPT's grids",
        verified=GOLDEN,
    ),
    "vp+tcpa": Method(
        label="VP+TCPA",
        source=f"{TCPA}; hjbahng/visual_prompting",
        prompts=ON_IMAGES,
        input_prompt=tcpa.VPConfig(),
        note=WITH_TCPA,
    ),
    "vpt+tcpa": Method(
        label="VPT+TCPA",
        source=f"{TCPA}, without the Fourier transform",
        prompts=coordinated("identity"),
        note=f"hyper-parameters of vpt+tcpa are {UNPUBLISHED}",
        verified=f"{GOLDEN}, its Fourier transform taken out",
    ),
    "dam-vp+tcpa": Method(
        label="DAM-VP+TCPA",
        source=f"{TCPA}; {DAM_VP}",
        prompts=ON_IMAGES,
        input_prompt=tcpa.DAMVPConfig(),
        note=WITH_TCPA,
    ),
    "autovp+tcpa": Method(
        label="AutoVP+TCPA",
        source=f"{TCPA}; IBM/AutoVP",
        prompts=ON_IMAGES,
        input_prompt=tcpa.AutoVPConfig(),
        note=WITH_TCPA,
    ),
    "vfpt+tcpa": Method(
        label="VFPT+TCPA",
        source=f"{TCPA} (sh/VFPT_TCPA_*.sh)",
        prompts=coordinated("fourier"),
        verified=GOLDEN,
    ),
}
"""Method -> its row, in the order of the tables."""
