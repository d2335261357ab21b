"""FLOPs and bytes of every operation of one step of a prompted ViT, from formulas.

A multiply-add counts as two FLOPs, and only matrix products and convolutions count: what LayerNorm,
softmax, GELU and the Fourier transform of the prompts add is below 1 % and waits for memory anyway.

Bytes are what has to cross the memory bus at least: every input read once, every output written
once, with bias, residual and GELU in the product before them. GELU's backward reads what fc1 wrote.
Only the dense form of gated attention is counted pass by pass, because its intermediate tensors are
what it costs.

The loss, the images' way to the device and the time between kernels are not counted.
"""

from collections.abc import Iterator
from dataclasses import replace

from tcpa import DAMVPConfig

from .block import BlockCost
from .operations import Cost
from .workload import (
    CHANNELS,
    IMAGE_PROMPT_HIDDEN,
    IMAGE_PROMPT_KERNEL,
    Operation,
    Workload,
    linear,
    weight_gradient,
)


def step(work: Workload, *, train: bool) -> list[Operation]:
    """Return the operations of one training step or one evaluation step, in order.

    An evaluation step keeps the prompts' keys and values of the step before, as the model does.
    """
    blocks = [BlockCost(work, index, train=train) for index in range(work.vit.depth)]
    last = blocks[-1]
    operations = [*_embed(work), *_prepare(work, train)]
    operations += [operation for block in blocks for operation in block.forward()]
    operations += _classify(work, last)
    if not train:
        return operations
    operations += _classify_backward(work, last)
    operations += [operation for block in reversed(blocks) for operation in block.backward()]
    return [*operations, *_prepare_backward(work), *_embed_backward(work), _update(work)]


def _patches(work: Workload) -> Cost:
    """Return the work of the patch embedding: a product with every patch as a row."""
    rows, inputs = work.batch * work.patches, CHANNELS * work.vit.patch**2
    return linear(rows, inputs, work.vit.width, work.item)


def _image_convolution(work: Workload) -> Cost:
    """Return the work of one of the image prompt's two convolutions."""
    pixels, channels = work.batch * work.pixels, CHANNELS + IMAGE_PROMPT_HIDDEN
    flops = 2.0 * pixels * IMAGE_PROMPT_KERNEL**2 * CHANNELS * IMAGE_PROMPT_HIDDEN
    return Cost(flops, float(pixels * channels * work.item))


def _features(work: Workload) -> Iterator[Operation]:
    """What DAM-VP computes of every image before it is prompted: the feature of the plain ViT."""
    plain = replace(work, method="linear", prompts=0, entries=None, input_prompt=None)
    yield Operation("features: patch embedding", None, "forward", _patches(plain))
    blocks = [BlockCost(plain, index, train=False) for index in range(work.vit.depth)]
    for block in blocks:
        for operation in block.forward():
            yield replace(operation, name=f"features: {operation.name}", block=None)
    stream = float(work.batch * blocks[-1].rows * work.vit.width * work.item)
    yield Operation("features: last norm", None, "forward", Cost(0.0, 2 * stream))


def _embed(work: Workload) -> Iterator[Operation]:
    if isinstance(work.input_prompt, DAMVPConfig):
        yield from _features(work)
    if work.input_prompt is not None:
        moved = 2.0 * CHANNELS * work.batch * work.pixels * work.item
        yield Operation("prompt on the image", None, "forward", Cost(0.0, moved))
    if work.image_prompt:
        yield Operation("image prompt", None, "forward", _image_convolution(work).times(2))
    yield Operation("patch embedding", None, "forward", _patches(work))


def _embed_backward(work: Workload) -> Iterator[Operation]:
    if work.image_prompt or work.input_prompt is not None:
        yield Operation("patch embedding", None, "backward", _patches(work))
    if work.image_prompt:
        # Weights of both convolutions, and the activations between them; images have no gradient.
        yield Operation("image prompt", None, "backward", _image_convolution(work).times(3))
    if work.input_prompt is not None:
        # The gradient of the border is read, and its sum written.
        moved = CHANNELS * work.batch * work.border * work.item + 4 * work.border_trained
        yield Operation("prompt on the image", None, "backward", Cost(0.0, float(moved)))
    if not work.savings.frozen_backbone:
        sizes = work.batch * work.patches, CHANNELS * work.vit.patch**2, work.vit.width
        cost = weight_gradient(*sizes, work.item)
        yield Operation("patch embedding, weights", None, "backward", cost)


def _prompt_bytes(work: Workload, train: bool) -> float:
    """Dropout, transform and norm of the prompts of all blocks: each reads and writes them.

    They are float32 until the norm, whose output has the step's dtype. Where prompts are rows of a
    block, its norm counts them.
    """
    keys_only = work.savings.prompt_keys_only
    once = work.savings.prompt_kv_once and keys_only
    if work.prompts == 0 or (once and not train):
        return 0.0
    own = train and work.per_sample
    transformed = work.method in ("tcpa", "vfpt")
    made = (work.batch if own else 1) * (4 * own + 8 * transformed)
    normed = (work.batch if own or not once else 1) * (4 + work.item) * keys_only
    return float(work.vit.depth * work.prompts * work.vit.width * (made + normed))


def _prepare(work: Workload, train: bool) -> Iterator[Operation]:
    moved = _prompt_bytes(work, train)
    if moved:
        yield Operation("prompts", None, "forward", Cost(0.0, moved))


def _prepare_backward(work: Workload) -> Iterator[Operation]:
    moved = _prompt_bytes(work, train=True)
    if moved:
        yield Operation("prompts", None, "backward", Cost(0.0, moved))


def _classify(work: Workload, last: BlockCost) -> Iterator[Operation]:
    """The last norm, over the rows that the last block computed, and the head."""
    stream = float(work.batch * last.rows * work.vit.width * work.item)
    yield Operation("last norm", None, "forward", Cost(0.0, 2 * stream))
    head = linear(work.batch, work.vit.width, work.classes, work.item)
    yield Operation("head", None, "forward", head)


def _classify_backward(work: Workload, last: BlockCost) -> Iterator[Operation]:
    sizes = work.batch, work.vit.width, work.classes, work.item
    yield Operation("head, weights", None, "backward", weight_gradient(*sizes))
    if last.has_gradient:
        yield Operation("head", None, "backward", linear(*sizes))
        stream = float(work.batch * last.rows * work.vit.width * work.item)
        yield Operation("last norm", None, "backward", Cost(0.0, 3 * stream))


def _update(work: Workload) -> Operation:
    """AdamW on float32 values: value, gradient and two moments read, three of them written."""
    return Operation("AdamW", None, "update", Cost(0.0, 28.0 * work.trained))
