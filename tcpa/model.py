"""A frozen timm Vision Transformer with trained prompts.

`PromptedViT` is what `wrap` and `create_model` return. Nothing of timm is patched; the blocks' own
layers are called one by one (`forward.py`, `block.py`).

Axes: B batch, L tokens, P prompt rows, C width, N blocks, W gate words.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from . import forward, vit
from .adapter import save_pretrained
from .capture import Capture, capture
from .checks import require, require_bool, require_int, require_shape, require_tensor
from .config import Savings
from .dispatch import Impl
from .methods.base import Choices
from .methods.modules import Fitted, InputPrompt, PromptSource, require_clusters
from .prompt_kv import PromptProjector

MAX_EPOCH = 2**31

_owners: "weakref.WeakValueDictionary[int, PromptedViT]" = weakref.WeakValueDictionary()
"""Which model has taken over the backbone of an id."""


def _to_weight_dtype(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hand a trained layer its input in its own precision, whatever the frozen weights have."""
    weight = next(layer.parameters(), None)
    return inputs if weight is None else (inputs[0].to(weight.dtype), *inputs[1:])


class PromptedViT(nn.Module):
    """A frozen timm ViT whose tokens attend to trained prompts.

    Trained are the prompts, the optional modules and the classification head, in float32 also on a
    backbone of lower precision, and the weights that the tuning names. The backbone stays in
    evaluation mode; `train()` switches dropout, noise and random selection of the prompts.

    Attributes:
        backbone: the timm model that was taken over.
        config: the token prompts; None for none.
        input_config: what is done to the image; None for nothing.
        tuning: trainable parameters besides prompts.
        savings: work left out without changing the result.
        impl: which implementation of the operations to use.
        normalization: how images are expected to be normalised; recorded, not applied.
        pools, tokens: the prompts of all blocks, selected or not; one of them, or none.
        value_affine, image_prompt, input_prompt, feature_prompt, adapters, side, mapping: the other
            modules; None for what there is not.
    """

    pools: PromptSource | None
    tokens: PromptSource | None
    value_affine: nn.Module | None
    image_prompt: nn.Sequential
    input_prompt: InputPrompt | None
    feature_prompt: nn.Module | None
    adapters: nn.ModuleList | None
    side: nn.Module | None
    mapping: Any

    def __init__(
        self,
        backbone: nn.Module,
        choices: Choices,
        *,
        savings: Savings,
        impl: Impl,
    ) -> None:
        super().__init__()
        self.backbone = cast(Any, backbone)
        self.config, self.input_config, self.tuning, _, self.normalization = choices
        self.savings = savings
        self.impl: Impl = impl
        self.epoch = 0
        self.random_epochs = 0 if self.config is None else self.config.random_epochs
        self.selects_randomly = self.random_epochs > 0
        self.knows_epoch = False
        self.recomputes = False
        self.recording: Capture | None = None
        self.projector = PromptProjector()
        for name, module in choices.build(backbone).items():
            setattr(self, name, module)
        self._freeze()
        self.train()
        self._has_backbone = True

    def take_over(self) -> None:
        """Become the one model of the backbone: another one's head may be replaced by ours."""
        previous = _owners.get(id(self.backbone))
        if previous is not None and previous.backbone is self.backbone:
            previous._has_backbone = False
        _owners[id(self.backbone)] = self

    def require_backbone(self) -> None:
        """Raise RuntimeError if another model has taken the backbone over."""
        if not self._has_backbone:
            raise RuntimeError(
                "backbone: it was wrapped again and belongs to the newer model, whose head it may "
                "have; give each model its own, for instance wrap(copy.deepcopy(vit), ...)"
            )

    def _freeze(self) -> None:
        self.backbone.requires_grad_(not self.savings.frozen_backbone)
        for parameter in self.tuning.backbone_parameters(self.backbone).values():
            parameter.requires_grad_(True)
        self._prepare_head()

    def _prepare_head(self) -> None:
        """Make the head trainable, in float32 at least, where the frozen weights are."""
        if self.mapping is not None:
            # The head of the model's own training is what is mapped.
            for layer in vit.classifier_layers(self.backbone):
                layer.requires_grad_(not self.savings.frozen_backbone)
            return
        weight = vit.input_weight(self.backbone)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for layer in vit.classifier_layers(self.backbone):
            layer.to(device=weight.device, dtype=dtype).requires_grad_(True)
            if _to_weight_dtype not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_to_weight_dtype)

    # What is trained, and how.

    def train(self, mode: bool = True) -> Self:
        """Switch the prompts to training or evaluation; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        for layer in (*self._heads(), *self.tuning.dropout_layers(self.backbone)):
            layer.train(mode)
        self.clear_cache()
        return self

    def _heads(self) -> list[nn.Module]:
        """Return the classification layers that are trained."""
        return [] if self.mapping is not None else vit.classifier_layers(self.backbone)

    def clear_cache(self) -> None:
        """Drop what was computed from parameters, for who changes them through `.data`."""
        self.projector.clear()
        self.opened_modules = vit.opened_modules(self.backbone)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moves and conversions replace values without touching version counters.
        self.clear_cache()
        return super()._apply(fn, recurse)

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, from 0: the first `random_selection_epochs` select prompts at random.

        The random selections come from torch's global generator of the device, so `manual_seed`
        makes them reproducible.
        """
        require_int("epoch", epoch, 0, MAX_EPOCH)
        self.epoch, self.knows_epoch = epoch, True
        # A compiled model depends on this, and not on the number, which would compile every epoch.
        self.selects_randomly = epoch < self.random_epochs

    def get_extra_state(self) -> Tensor:
        """Return the epoch, int64, for `state_dict()`: a resumed run selects as it would have."""
        self.require_backbone()
        return torch.tensor(self.epoch)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the epoch from `load_state_dict()`."""
        self.require_backbone()
        if not isinstance(state, Tensor) or state.numel() != 1 or state.is_floating_point():
            raise TypeError(
                f"state_dict['_extra_state']: got {state!r}, expected the epoch, one integer in a "
                "tensor; pass what state_dict() of this model gave"
            )
        self.set_epoch(int(state))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass in place of keeping its activations."""
        require_bool("enable", enable)
        self.recomputes = enable

    def trainable_named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name: prompts, optional modules, what the tuning names
        of the backbone, classification head."""
        self.require_backbone()
        frozen = {id(p) for p in self.backbone.parameters()}
        frozen -= {id(p) for p in self.tuning.backbone_parameters(self.backbone).values()}
        for layer in self._heads():
            frozen -= {id(p) for p in layer.parameters()}
        return {name: p for name, p in self.named_parameters() if id(p) not in frozen}

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return all that training decides, by name: the trainable parameters, and what is found or
        counted beside them (prototypes, mappings, masks, running statistics)."""
        heads = {id(b) for layer in self._heads() for b in layer.buffers()}
        state = self.state_dict(keep_vars=True)
        buffers = {
            name: value
            for name, value in self.named_buffers()
            if name in state and (id(value) in heads or not name.startswith("backbone."))
        }
        return {**self.trainable_named_parameters(), **buffers}

    @torch.no_grad()
    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what `trained_tensors` of a model like this one gave; dtypes and devices stay.

        Where the number of clusters differs, so do the parameters afterwards.

        Raises:
            ValueError: a value is missing or of another shape; nothing is copied then.
        """
        self.require_backbone()
        for name, part in self.fitted_parts().items():
            part.resize_for(tensors, f"{name}.")
        targets = self.trained_tensors()
        for name, target in targets.items():
            value = tensors.get(name)
            if value is None or value.shape != target.shape:
                raise ValueError(f"no value of shape {list(target.shape)} for {name}")
        for name, target in targets.items():
            target.copy_(tensors[name])
        for part in self.fitted_parts().values():
            part.find_fitted()

    def fitted_parts(self) -> dict[str, Fitted]:
        """Return the modules some of whose values may be found in training images, by name."""
        parts = {"input_prompt": self.input_prompt, "mapping": self.mapping}
        return {name: part for name, part in parts.items() if part is not None}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters, for an optimizer."""
        return list(self.trainable_named_parameters().values())

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters, without those that pruning has taken out."""
        pruned = 0 if self.prompt_source is None else self.prompt_source.num_pruned
        return sum(p.numel() for p in self.trainable_parameters()) - pruned

    @property
    def match_weight(self) -> float:
        """Weight of the match distance in the loss."""
        return 0.0 if self.config is None else self.config.match_weight

    @property
    def implementation(self) -> tuple[str, str]:
        """What computes the attention where the model is now, and why.

        Ask under torch.autocast if the model runs under it.
        """
        return forward.implementation_on(self.backbone, self.impl)

    @property
    def prompt_source(self) -> PromptSource | None:
        """Where the token prompts come from."""
        return self.tokens if self.pools is None else self.pools

    @property
    def num_classes(self) -> int:
        """Number of classes of the logits."""
        return self.backbone.num_classes if self.mapping is None else self.mapping.num_classes

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classification head by a fresh one, which is trained.

        With 0 classes there is no head, and the model returns what it would have read.

        Raises:
            ValueError: the model's own head is kept, and its logits are mapped to classes.
        """
        require_int("num_classes", num_classes, 0)
        self.require_backbone()
        remedy = "wrap a fresh backbone with the other number of classes"
        mapped, expected = self.mapping is not None, "a model whose head is trained"
        require(not mapped, "num_classes", "a model with an output mapping", expected, remedy)
        self.backbone.reset_classifier(num_classes)
        for name in vit.classifier_names(self.backbone):
            setattr(self.backbone, name, self.tuning.make_head(getattr(self.backbone, name)))
        self._prepare_head()
        self.train(self.training)

    save_pretrained = save_pretrained

    # Forward pass.

    def forward(self, images: Tensor, *, return_distance: bool = False) -> Any:
        """Classify images.

        Args:
            images: float `[B, channels, height, width]`, normalised as `normalization` says.
            return_distance: also return the match distance.

        Returns:
            logits `[B, num_classes]`. With `return_distance` a pair of the logits and the match
            distance, a scalar: the sum over blocks of what `match_prompts` returns (0 without
            matching). The training loss is `cross_entropy + config.match_weight * distance`.

        Raises:
            TypeError, ValueError: `images` do not fit the backbone.
            RuntimeError: a module that is not called as such has got hooks, or the backbone was
                wrapped again.
        """
        require_bool("return_distance", return_distance)
        logits, distance = forward.classify(self, images)
        return (logits, distance) if return_distance else logits

    def source_logits(self, images: Tensor) -> Tensor:
        """Return the logits of the model's own head, before any output mapping, `[B, S]`."""
        passed = forward.run_blocks(self, images, forward.head_rows(self))
        return self.backbone.forward_head(self.backbone.norm(passed.tokens))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the normed tokens of the last block, `[B, L, C]`, all of them and no prompts."""
        return self.backbone.norm(forward.run_blocks(self, images, None).tokens)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens from `forward_features`, `[B, L, C]`, to logits, or to the head's input.

        Raises:
            TypeError, ValueError: `features` are no such tokens, or logits need the image too.
        """
        needs_image = self.side is not None or self.feature_prompt is not None
        got, remedy = "a model whose head also reads the image", "call model(images)"
        require(pre_logits or not needs_image, "features", got, "one whose head does not", remedy)
        tokens = require_tensor("features", features, "[B, L, C]", 3)
        expected = (*tokens.shape[:2], self.backbone.embed_dim)
        require_shape("features", tokens, expected, "B, L, C of forward_features")
        found = self.backbone.forward_head(features, pre_logits=pre_logits)
        return found if pre_logits or self.mapping is None else self.mapping(found)

    # What is found in training images, outside of gradient steps.

    @torch.no_grad()
    def plain_features(self, images: Tensor) -> Tensor:
        """Return what the head would read of the backbone without any prompt or adapter, `[B, C]`.

        Args:
            images: float `[B, channels, height, width]`.
        """
        return forward.plain_features(self, images)

    def clusters(self, images: Tensor) -> Tensor:
        """Return the cluster of each image, int64 `[B]`: the nearest prototype to its plain
        feature.

        Raises:
            ValueError: the model has no clusters.
            RuntimeError: they are not fitted yet.
        """
        return require_clusters(self.input_prompt).assign(self.plain_features(images))

    def fit_clusters(self, images: Tensor | Iterable[Tensor]) -> int:
        """Cluster training images and give each cluster a frame.

        Where the number of clusters changes, so do the parameters: create the optimizer afterwards.

        Args:
            images: `[n, channels, height, width]`, or batches of them; `num_images` of the
                configuration at most are read.

        Returns:
            The number of clusters.

        Raises:
            ValueError: the model has no clusters, there are too few images, or they make fewer than
                two clusters.
        """
        batches = images.split(64) if isinstance(images, Tensor) else images
        return require_clusters(self.input_prompt).fit_images(batches, self.plain_features)

    @torch.no_grad()
    def count_sources(self, images: Tensor, labels: Tensor) -> Tensor:
        """Count how often images of a class are taken for a source class, for `mapping.fit`.

        Args:
            images: `[B, channels, height, width]`, prompted as the model does now.
            labels: int64 `[B]`.

        Returns:
            int64 `[S, C]`.
        """
        got, remedy = "a model without output mapping", "wrap with input_prompt=AutoVPConfig(...)"
        expected = "one that maps source classes"
        require(self.mapping is not None, "mapping", got, expected, remedy)
        return self.mapping.count(self.source_logits(images), labels)

    # What blocks do.

    @torch.no_grad()
    def selection(self, images: Tensor) -> list[Tensor]:
        """Return every block's gate for the images, as evaluation selects.

        Args:
            images: float `[B, channels, height, width]`.

        Returns:
            One int32 `[B, L, W]` per block; `unpack_gate(gate, config.num_prompts)` reads it.

        Raises:
            ValueError: the method selects nothing (it is not TCPA).
        """
        source, got = self.prompt_source, type(self.config).__name__
        selects, remedy = source is not None and source.selects, "wrap with a TCPAConfig"
        require(selects, "config", got, "token prompts that are selected", remedy)
        was_training = self.training
        try:
            gates = forward.run_blocks(self.eval(), images, None).gates
        finally:
            self.train(was_training)
        return [cast(Tensor, gate).expand(len(images), -1, -1) for gate in gates]

    capture = capture
