"""The passes of a model through its blocks: matching, prompts of all blocks, one block at a time.

Axes: B batch, L tokens, P prompt rows, C width, N blocks, W gate words.
"""

import functools
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import blocks
from .capture import Capture
from .checks import require
from .config import Savings
from .dispatch import Impl
from .forward import BlockSettings, run_block, run_block_on_tokens
from .methods.base import InputPrompt, Match, PromptConfig, PromptSource, require_clusters
from .prompt_kv import ParameterCache, PromptKV, StackedProjections, prompt_keys_values

_log = logging.getLogger("tcpa")


class Passes(nn.Module):
    """The part of `PromptedViT` that runs the blocks."""

    backbone: Any
    config: PromptConfig | None
    savings: Savings
    impl: Impl
    pools: PromptSource | None
    tokens: PromptSource | None
    value_affine: nn.Module | None
    image_prompt: nn.Sequential
    input_prompt: InputPrompt | None
    feature_prompt: nn.Module | None
    adapters: nn.ModuleList | None
    side: nn.Module | None
    mapping: Any
    _random_selection: bool
    _knows_epoch: bool
    _recompute: bool
    _capture: Capture | None
    _kv_cache: ParameterCache[list[PromptKV]]
    _stack_cache: ParameterCache[StackedProjections | None]

    def require_backbone(self) -> None:
        """Raise RuntimeError if another model has taken the backbone over."""
        raise NotImplementedError

    @property
    def _random_epochs(self) -> int:
        return 0 if self.config is None else self.config.random_epochs

    @property
    def prompt_source(self) -> PromptSource | None:
        """Where the token prompts come from."""
        return self.tokens if self.pools is None else self.pools

    @torch.no_grad()
    def plain_features(self, images: Tensor) -> Tensor:
        """Return what the head would read of the backbone without any prompt or adapter, `[B, C]`.

        Args:
            images: float `[B, channels, height, width]`.
        """
        backbone = self.backbone
        blocks.check_images(backbone, images)
        x, ropes = blocks.embed_images(backbone, images)
        patches = slice(backbone.num_prefix_tokens, x.shape[1])
        settings = BlockSettings(patches=patches, impl=self.impl, savings=self.savings)
        rows = blocks.rows_read_by_head(backbone) if self.savings.last_block_head_rows else None
        for index, (block, rope) in enumerate(zip(backbone.blocks, ropes, strict=True)):
            last = index + 1 == len(ropes)
            x = run_block(block, x, settings, rope=rope, rows=rows if last else None)
        return backbone.forward_head(backbone.norm(x), pre_logits=True)

    def clusters(self, images: Tensor) -> Tensor:
        """Return the cluster of each image, int64 `[B]`: the nearest prototype to its plain
        feature.

        Raises:
            ValueError: the model has no clusters.
            RuntimeError: they are not fitted yet.
        """
        prompt = require_clusters(self.input_prompt)
        return prompt.assign(self.plain_features(images))

    def fit_clusters(self, images: Tensor | Iterable[Tensor]) -> int:
        """Cluster training images and give each cluster a frame.

        Where the number of clusters changes, so do the parameters: create the optimiser afterwards.

        Args:
            images: `[n, channels, height, width]`, or batches of them; `num_images` of the
                configuration at most are read.

        Returns:
            The number of clusters.

        Raises:
            ValueError: the model has no clusters, there are too few images, or they make fewer than
                two clusters.

        Source:
            DAM-VP (CVPR 2023): the first 1000 augmented, shuffled training images.
        """
        prompt = require_clusters(self.input_prompt)
        limit = prompt.config.num_images
        found: list[Tensor] = []
        count = 0
        for batch in images.split(64) if isinstance(images, Tensor) else images:
            found.append(self.plain_features(batch[: limit - count]).float())
            count += len(found[-1])
            if count == limit:
                break
        features = torch.cat(found) if found else torch.zeros(0, self.backbone.embed_dim)
        prompt.fit(features)
        return prompt.num_frames

    @torch.no_grad()
    def count_sources(self, images: Tensor, labels: Tensor) -> Tensor:
        """Count how often images of a class are taken for a source class, for `mapping.fit`.

        Args:
            images: `[B, channels, height, width]`, prompted as the model does now.
            labels: int64 `[B]`.

        Returns:
            int64 `[S, C]`.
        """
        mapping = self.mapping
        got, remedy = "a model without output mapping", "wrap with input_prompt=AutoVPConfig(...)"
        require(mapping is not None, "mapping", got, "one that maps source classes", remedy)
        guesses = self.source_logits(images).argmax(1)
        places = guesses * mapping.num_classes + labels
        counts = torch.bincount(places, minlength=mapping.num_sources * mapping.num_classes)
        return counts.view(mapping.num_sources, mapping.num_classes)

    def source_logits(self, images: Tensor) -> Tensor:
        """Return the logits of the model's own head, before any mapping, `[B, S]`."""
        raise NotImplementedError

    def _run_blocks(
        self, images: Tensor, head_rows: int | None
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Return the last block's tokens (the first `head_rows` if given), distance and gates."""
        self.require_backbone()
        blocks.check_images(self.backbone, images)
        if not torch.compiler.is_compiling():
            self._check_use()
        x, ropes = blocks.embed_images(self.backbone, self._prompt_images(images))
        if self._capture is not None:
            self._capture.begin(x.shape[1])
        if torch.is_grad_enabled() and not (self.savings.skip_input_gradient or x.requires_grad):
            x = x.requires_grad_()
        num_tokens, last = x.shape[1], len(ropes) - 1
        prompts, prompt_kv = self._prepare_prompts(x.shape[0])
        if prompts is not None and self._is_shallow:
            shallow = prompts[0].expand(x.shape[0], -1, -1)
            x, prompts = torch.cat((x, shallow.to(x.dtype)), dim=1), None
        distance = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        gates: list[Tensor | None] = []
        for index, rope in enumerate(ropes):
            block = functools.partial(
                self._block,
                index,
                num_tokens=num_tokens,
                rope=rope,
                rows=head_rows if index == last else None,
            )
            block_prompts = None if prompts is None else prompts[index]
            block_kv = None if prompt_kv is None else prompt_kv[index]
            before = x
            if self._recompute and torch.is_grad_enabled():
                x, delta, gate = checkpoint(block, x, block_prompts, block_kv, use_reentrant=False)
            else:
                x, delta, gate = block(x, block_prompts, block_kv)
            distance = distance if delta is None else distance + delta
            gates.append(gate)
            if self._capture is not None:
                self._capture.tokens(index, before, x)
        return (x[:, :num_tokens] if self._is_shallow else x), distance, gates

    def _prompt_images(self, images: Tensor) -> Tensor:
        """Do to the images what is done to them before anything else."""
        if self.input_prompt is not None:
            index = (self.clusters(images),) if self.input_prompt.clustered else ()
            images = self.input_prompt(images, *index)
        return self.image_prompt(images)

    def _check_use(self) -> None:
        """Speak up where a mistake would go unnoticed."""
        hooked = blocks.uncalled_hooks(self.backbone)
        if hooked:
            raise RuntimeError(
                f"hooks on {', '.join(hooked)} would not be called: tcpa calls the layers of a "
                "block one by one; put them on a block's norm2, mlp or attn.proj, or remove them"
            )
        if self.training and self._random_epochs and not self._knows_epoch:
            self._knows_epoch = True
            _log.warning(
                "training without set_epoch: every step selects its prompts at random; call "
                "model.set_epoch(epoch) at the start of each epoch (random until epoch %d)",
                self._random_epochs,
            )

    def _block(
        self,
        index: int,
        x: Tensor,
        prompts: Tensor | None,
        prompt_kv: PromptKV | None,
        *,
        num_tokens: int,
        rope: Tensor | None,
        rows: int | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Match, add noise and run one block; return its tokens, match distance and gate."""
        source = self.prompt_source
        noise = 0.0 if source is None else source.noise
        # Noise comes between matching and norm.
        norm = None if noise > 0 else blocks.frozen_layer_norm(self.backbone.blocks[index])
        gate, distance, normed = Match()
        if source is not None:
            draw = self.training and self._random_selection
            gate, distance, normed = source.match(index, x, norm, draw=draw, impl=self.impl)
        if noise > 0:
            x = x + noise * torch.randn_like(x)
        capture, patches = self._capture, slice(self.backbone.num_prefix_tokens, num_tokens)
        settings = BlockSettings(
            patches=patches,
            normalize_over="all" if source is None else source.normalize_over,
            impl=self.impl,
            savings=self.savings,
            recorder=None if capture is None else capture.recorder(index, patches),
        )
        block = self.backbone.blocks[index]
        options: dict[str, Any] = {"rope": rope, "prompts": prompts, "rows": rows}
        if self.adapters is not None:
            options["adapter"] = self.adapters[index]
        if source is not None:
            extra = None if prompts is None else source.extra_keys()
            options["extra_keys"] = None if extra is None else extra[index]
            options["query_scale"] = source.query_scale(index)
        if self.tokens is not None and prompts is not None and not self.savings.prompt_keys_only:
            return run_block_on_tokens(block, x, settings, **options), distance, gate
        out = run_block(
            block,
            x,
            settings,
            prompt_kv=prompt_kv,
            value_affine=self.value_affine,
            gate=gate,
            normed=normed,
            **options,
        )
        if source is not None and source.shallow:
            out = source.after_block(index, x, out, num_tokens)
        return out, distance, gate

    # Prompts of all blocks.

    @property
    def _is_shallow(self) -> bool:
        return self.prompt_source is not None and self.prompt_source.shallow

    def _prepare_prompts(self, batch_size: int) -> tuple[Tensor | None, list[PromptKV] | None]:
        """Return the prompts of all blocks, or instead their keys and values.

        Returns:
            Prompts `[N, P, C]` or `[N, B, P, C]` where the blocks project them; else None.
            Keys and values per block where they are computed outside the blocks; else None.
        """
        source = self.prompt_source
        if source is None:
            return None, None
        outside = self.savings.prompt_kv_once and self.savings.prompt_keys_only
        if self._is_shallow or not outside:
            return source(batch_size), None

        layers = self.backbone.blocks
        sources = [module for block in layers for module in (block.norm1, block.attn)]

        compiling = torch.compiler.is_compiling()
        repeated = self.training or torch.is_grad_enabled()

        def compute() -> list[PromptKV]:
            prompts, stacked = source(batch_size), None
            # A compiler has no use for what is kept from call to call.
            together = self.savings.prompt_kv_stacked and prompts.ndim == 3
            if repeated and together and not compiling:
                stacked = self._stack_cache.get(sources, lambda: StackedProjections.of(layers))
            if stacked is not None:
                found = stacked.project(layers, prompts, self.value_affine)
            else:
                pairs = zip(layers, prompts, strict=True)
                found = [prompt_keys_values(one, rows, self.value_affine) for one, rows in pairs]
            extra = source.extra_keys()
            if extra is not None:
                found = [kv.with_keys(one) for kv, one in zip(found, extra, strict=True)]
            return found

        if repeated or compiling:
            return None, compute()
        return None, self._kv_cache.get([source, self.value_affine, *sources], compute)
