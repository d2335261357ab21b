"""What a model takes from training images outside of gradient steps: clusters, output mappings.

Axes: B batch, L tokens, J clusters, C width.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import blocks
from ..checks import require
from ..forward import BlockSettings, run_block
from .input_prompts import ClusterFramePrompt


class Fitting(nn.Module):
    """The part of `PromptedViT` that training calls before, or between, its steps."""

    backbone: Any
    savings: Any
    impl: Any
    input_prompt: Any
    mapping: Any

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
        prompt = self._cluster_prompt()
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
        prompt = self._cluster_prompt()
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

    def _cluster_prompt(self) -> ClusterFramePrompt:
        prompt = self.input_prompt
        if not isinstance(prompt, ClusterFramePrompt):
            got = type(prompt).__name__
            raise ValueError(
                f"input_prompt: got {got}, expected the frames of DAM-VP; wrap with "
                "input_prompt=DAMVPConfig()"
            )
        return prompt

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
