"""The passes of a model through its blocks: matching, prompts of all blocks, one block at a time.

Axes: B batch, L tokens, P prompt rows, C width, N blocks, W gate words.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import blocks
from .capture import Capture
from .config import PromptConfig, Savings, TCPAConfig, VPTConfig
from .dispatch import Impl
from .forward import BlockSettings, run_block, run_block_on_tokens
from .methods.fitting import Fitting
from .methods.input_prompts import ClusterFramePrompt
from .methods.kv_prompts import E2VPTPrompts, GatedPrompts
from .methods.mapping import OutputMapping
from .methods.tuning import SideNetwork
from .ops import match_prompts, norm_match
from .prompt_kv import ParameterCache, PromptKV, StackedProjections, prompt_keys_values
from .prompts import PromptPools, TokenPrompts, ValueAffine
from .reference import random_gate, role_gate

_log = logging.getLogger("tcpa")


class Passes(Fitting):
    """The part of `PromptedViT` that runs the blocks."""

    backbone: Any
    config: PromptConfig | None
    savings: Savings
    impl: Impl
    pools: PromptPools | None
    tokens: TokenPrompts | E2VPTPrompts | GatedPrompts | None
    value_affine: ValueAffine | None
    image_prompt: nn.Sequential
    input_prompt: Any
    feature_prompt: nn.Module | None
    adapters: nn.ModuleList | None
    side: SideNetwork | None
    mapping: OutputMapping | None
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
        config = self.config
        if not isinstance(config, TCPAConfig) or config.coordination != "token":
            return 0
        return config.random_selection_epochs

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
            clustered = isinstance(self.input_prompt, ClusterFramePrompt)
            index = (self.clusters(images),) if clustered else ()
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
        config = self.config
        noise = config.token_noise if isinstance(config, TCPAConfig) and self.training else 0.0
        # Noise comes between matching and norm.
        norm = None if noise > 0 else blocks.frozen_layer_norm(self.backbone.blocks[index])
        gate, distance, normed = self._match(index, x, norm)
        if noise > 0:
            x = x + noise * torch.randn_like(x)
        capture, patches = self._capture, slice(self.backbone.num_prefix_tokens, num_tokens)
        settings = BlockSettings(
            patches=patches,
            normalize_over=config.normalize_over if isinstance(config, TCPAConfig) else "all",
            impl=self.impl,
            savings=self.savings,
            recorder=None if capture is None else capture.recorder(index, patches),
        )
        block, tokens = self.backbone.blocks[index], self.tokens
        options: dict[str, Any] = {"rope": rope, "prompts": prompts, "rows": rows}
        if self.adapters is not None:
            options["adapter"] = self.adapters[index]
        if isinstance(tokens, E2VPTPrompts) and prompts is not None:
            options["extra_keys"] = tokens.extra_keys()[index]
        if isinstance(tokens, GatedPrompts):
            options["query_scale"] = tokens.query_scale(index)
        if tokens is not None and prompts is not None and not self.savings.prompt_keys_only:
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
        if isinstance(tokens, GatedPrompts) and index + 1 < len(self.backbone.blocks):
            mixed = tokens.mix(index, x[:, num_tokens:], out[:, num_tokens:])
            out = torch.cat((out[:, :num_tokens], mixed), dim=1)
        return out, distance, gate

    def _match(
        self, index: int, x: Tensor, norm: nn.LayerNorm | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gate `[B or 1, L, W]` of a block's tokens, the match distance, and the tokens
        after `norm` where that comes with the matching.
        """
        config, pools = self.config, self.pools
        if pools is None or not isinstance(config, TCPAConfig):
            return None, None, None
        layout = {
            "lengths": (config.cls_prompt_length, config.image_prompt_length),
            "num_prefix_tokens": self.backbone.num_prefix_tokens,
        }
        num_pool = (config.cls_pool_size, config.image_pool_size)
        if config.coordination == "role":
            gate = role_gate(x.shape[1], num_pool=num_pool, device=x.device, **layout)
            return gate, None, None
        gate = None
        if self.training and self._random_selection:
            top_k = (config.cls_top_k, config.image_top_k)
            drawn = {"num_pool": num_pool, "top_k": top_k, "device": x.device}
            gate = random_gate(x.shape[0], x.shape[1], **drawn, **layout)
        keys = pools.cls_keys[index], pools.image_keys[index]
        options = {
            "cls_top_k": config.cls_top_k,
            "image_top_k": config.image_top_k,
            "selection": config.selection,
            "gate": gate,
            "impl": self.impl,
            **layout,
        }
        if norm is None:
            return *match_prompts(x, *keys, **options), None
        normed, gate, distance = norm_match(x, norm.weight, norm.bias, norm.eps, *keys, **options)
        return gate, distance, normed

    # Prompts of all blocks.

    @property
    def _is_shallow(self) -> bool:
        shallow = isinstance(self.config, VPTConfig) and not self.config.deep
        return shallow or isinstance(self.tokens, GatedPrompts)

    def _prepare_prompts(self, batch_size: int) -> tuple[Tensor | None, list[PromptKV] | None]:
        """Return the prompts of all blocks, or instead their keys and values.

        Returns:
            Prompts `[N, P, C]` or `[N, B, P, C]` where the blocks project them; else None.
            Keys and values per block where they are computed outside the blocks; else None.
        """
        source = self.pools if self.tokens is None else self.tokens
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
            if isinstance(source, E2VPTPrompts):
                both = zip(found, source.extra_keys(), strict=True)
                found = [kv.with_keys(extra) for kv, extra in both]
            return found

        if repeated or compiling:
            return None, compute()
        return None, self._kv_cache.get([source, self.value_affine, *sources], compute)
