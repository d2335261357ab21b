"""One forward pass of a `PromptedViT`, read downward: images, prompts, blocks, logits.

The model holds the state; these functions read it and compute. `block.py` runs one timm block,
`prompt_kv.py` projects prompts outside the blocks; the method's own file matches and `block.py`
attends, both through `ops.py`.

Axes: B batch, L tokens, P prompt rows, C width, N blocks, W gate words.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import vit
from .block import BlockSettings, PromptKV, run_block
from .dispatch import Impl, autocast_dtype, choose_impl
from .methods.modules import Match

_log = logging.getLogger("tcpa")


class Passed(NamedTuple):
    """What a pass through the blocks leaves."""

    tokens: Tensor
    """`[B, L, C]`, or the leading ones that were asked for."""
    distance: Tensor
    """Match distance, the sum over the blocks; a scalar."""
    gates: list[Tensor | None]
    """int32 `[B or 1, L, W]` of every block."""


def classify(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits `[B, classes]` of a model for images, and the match distance."""
    passed = run_blocks(model, images, head_rows(model))
    tokens = model.backbone.norm(passed.tokens)
    if model.side is None and model.feature_prompt is None:
        logits = model.backbone.forward_head(tokens)
    else:
        # Modules beside the backbone read the image too.
        feature = model.backbone.forward_head(tokens, pre_logits=True)
        for module in (model.feature_prompt, model.side):
            feature = feature if module is None else module(feature, images)
        logits = model.backbone.head(feature)
    return logits if model.mapping is None else model.mapping(logits), passed.distance


def head_rows(model: Any) -> int | None:
    """Return how many rows the last block computes; None for all."""
    saves = model.savings.last_block_head_rows
    return vit.rows_read_by_head(model.backbone) if saves else None


def run_blocks(model: Any, images: Tensor, rows: int | None) -> Passed:
    """Run the blocks on images `[B, channels, height, width]`; of the last one only `rows` rows."""
    model.require_backbone()
    vit.check_images(model.backbone, images)
    if not torch.compiler.is_compiling():
        _check_use(model)
    x, ropes = vit.embed_images(model.backbone, prompt_images(model, images))
    batch_size, num_tokens = x.shape[:2]
    source, savings, capture = model.prompt_source, model.savings, model.recording
    if capture is not None:
        capture.begin(num_tokens)
    if torch.is_grad_enabled() and not (savings.skip_input_gradient or x.requires_grad):
        x = x.requires_grad_()

    prompts = prompt_kv = None
    shallow = source is not None and source.shallow
    if source is not None and source.shallow:
        entering = source(batch_size)[0].expand(batch_size, -1, -1)
        x = torch.cat((x, entering.to(x.dtype)), dim=1)
    elif source is not None and savings.prompt_kv_once and savings.prompt_keys_only:
        prompt_kv = model.projector.project(
            model.backbone.blocks,
            source,
            model.value_affine,
            batch_size,
            stacked=savings.prompt_kv_stacked,
        )
    elif source is not None:
        prompts = source(batch_size)

    patches = slice(model.backbone.num_prefix_tokens, num_tokens)
    normalize_over = "all" if source is None else source.normalize_over
    settings = BlockSettings(patches, model.impl, savings, normalize_over)
    distance = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    gates: list[Tensor | None] = []
    recomputes = model.recomputes and torch.is_grad_enabled()
    for index, rope in enumerate(ropes):
        before = x
        arguments = (
            model,
            settings,
            index,
            x,
            None if prompts is None else prompts[index],
            None if prompt_kv is None else prompt_kv[index],
            rope,
            rows if index + 1 == len(ropes) else None,
        )
        if recomputes:
            x, delta, gate = checkpoint(_run_one, *arguments, use_reentrant=False)
        else:
            x, delta, gate = _run_one(*arguments)
        distance = distance if delta is None else distance + delta
        gates.append(gate)
        if capture is not None:
            capture.tokens(index, before, x)
    return Passed(x[:, :num_tokens] if shallow else x, distance, gates)


def prompt_images(model: Any, images: Tensor) -> Tensor:
    """Do to the images what is done to them before anything else."""
    prompt = model.input_prompt
    if prompt is not None:
        images = prompt(images, model.clusters(images)) if prompt.clustered else prompt(images)
    return model.image_prompt(images)


def _run_one(
    model: Any,
    settings: BlockSettings,
    index: int,
    x: Tensor,
    prompts: Tensor | None,
    prompt_kv: PromptKV | None,
    rope: Tensor | None,
    rows: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Match, add noise and run one block; return its tokens, match distance and gate."""
    block, source, capture = model.backbone.blocks[index], model.prompt_source, model.recording
    matched, options = Match(), {}
    if source is not None:
        noise = source.noise
        if source.selects:
            # Noise comes between matching and norm.
            norm = None if noise > 0 else vit.frozen_layer_norm(block)
            draw = model.training and model.selects_randomly
            matched = source.match(index, x, norm, draw=draw, impl=model.impl)
        if noise > 0:
            x = x + noise * torch.randn_like(x)
        options["query_scale"] = source.query_scale(index)
        extra = None if prompts is None else source.extra_keys()
        options["extra_keys"] = None if extra is None else extra[index]
    if model.adapters is not None:
        options["adapter"] = model.adapters[index]
    if capture is not None:
        options["recorder"] = capture.recorder(index, settings.patches)
    plain = source is not None and not (source.selects or settings.savings.prompt_keys_only)
    if prompts is not None and plain:
        # Plain VPT-Deep: prompts are tokens of the block, and dropped after it.
        joined = torch.cat((x, prompts.expand(len(x), -1, -1).to(x.dtype)), dim=1)
        out = run_block(block, joined, settings, rope=rope, **options)
        return out[:, : x.shape[1] if rows is None else rows], None, None
    out = run_block(
        block,
        x,
        settings,
        rope=rope,
        rows=rows,
        normed=matched.normed,
        prompts=prompts,
        prompt_kv=prompt_kv,
        value_affine=model.value_affine,
        gate=matched.gate,
        **options,
    )
    if source is not None and source.shallow:
        out = source.after_block(index, x, out, settings.patches.stop)
    return out, matched.distance, matched.gate


def plain_features(model: Any, images: Tensor) -> Tensor:
    """Return what the head would read of the backbone without any prompt or adapter, `[B, C]`."""
    backbone = model.backbone
    vit.check_images(backbone, images)
    x, ropes = vit.embed_images(backbone, images)
    patches = slice(backbone.num_prefix_tokens, x.shape[1])
    settings = BlockSettings(patches, model.impl, model.savings)
    for index, (block, rope) in enumerate(zip(backbone.blocks, ropes, strict=True)):
        rows = head_rows(model) if index + 1 == len(ropes) else None
        x = run_block(block, x, settings, rope=rope, rows=rows)
    return backbone.forward_head(backbone.norm(x), pre_logits=True)


def implementation_on(backbone: Any, impl: Impl) -> tuple[str, str]:
    """Say what computes the attention on a backbone where it is now, and why; see `choose_impl`."""
    weight = vit.input_weight(backbone)
    dtype = autocast_dtype(weight.device) or weight.dtype
    num_tokens = backbone.num_prefix_tokens + backbone.patch_embed.num_patches
    return choose_impl(impl, weight.device, dtype=dtype, num_tokens=num_tokens)


def _check_use(model: Any) -> None:
    """Speak up where a mistake would go unnoticed."""
    hooked = vit.hooked(model.opened_modules)
    if hooked:
        raise RuntimeError(
            f"hooks on {', '.join(hooked)} would not be called: tcpa calls the layers of a "
            "block one by one; put them on a block's norm2, mlp or attn.proj, or remove them"
        )
    if model.training and model.random_epochs and not model.knows_epoch:
        model.knows_epoch = True
        _log.warning(
            "training without set_epoch: every step selects its prompts at random; call "
            "model.set_epoch(epoch) at the start of each epoch (random until epoch %d)",
            model.random_epochs,
        )
