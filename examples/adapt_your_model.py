"""Adapt a timm Vision Transformer of your own to a folder of images, and see what its prompts do.

    python examples/adapt_your_model.py --images photos --model vit_small_patch16_224

`photos` holds a folder for every class. Run it as a script, or cell by cell in an editor that knows
`# %%`. Needs `pip install 'tcpa[train,plot]'`.
"""

# %% What to adapt, to what
import argparse
import copy
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import tcpa
from tcpa import inspect
from tcpa.cli import UsageError
from tcpa.train.data.batches import Batches
from tcpa.train.data.cached import open_cached
from tcpa.train.data.crops import Transform

parser = argparse.ArgumentParser(description="Adapt a timm ViT to a folder of images.")
parser.add_argument("--images", type=Path, required=True, help="folder with a folder per class")
parser.add_argument("--model", default="vit_small_patch16_224", help="timm model name")
parser.add_argument("--output", type=Path, default=Path("adapted"), help="adapter and figures")
parser.add_argument("--epochs", type=int, default=5, help="passes over the training images")
parser.add_argument("--batch-size", type=int, default=32, help="images of a step")
parser.add_argument("--random-weights", action="store_true", help="no download; to try this out")
# In a notebook: options = parser.parse_args(["--images", "photos"])
options = parser.parse_args()
if options.epochs < 1 or options.batch_size < 1:
    parser.error("--epochs and --batch-size: expected 1 or more")

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)

# %% The backbone, and TCPA on it
try:
    backbone = timm.create_model(options.model, pretrained=not options.random_weights)
except Exception as error:  # What timm and the hub raise differs from case to case.
    parser.error(f"--model: timm cannot create {options.model!r} ({error}); see timm.list_models()")
# What timm says of the model: size of the images, and how they are normalised.
wanted = timm.data.resolve_model_data_config(backbone)
size = wanted["input_size"][-1]
colours = {"mean": wanted["mean"], "std": wanted["std"]}

# %% The images: decoded once into a cache beside the folder, a part of each class held out
try:
    parts = {
        name: open_cached("folder", options.images, name, resize=round(size * 8 / 7))
        for name in ("train", "val", "test")
    }
except UsageError as error:
    parser.error(f"--images: {error}")
batches = {
    name: Batches(
        part,
        batch_size=options.batch_size,
        transform=Transform(train=name == "train", crop=size, **colours),
        device=device,
        seed=0,
        shuffle=name == "train",
    )
    for name, part in parts.items()
}
classes = parts["train"].class_names
print(f"{len(classes)} classes: {', '.join(classes)}")
print(", ".join(f"{source.num_images} {name} images" for name, source in batches.items()))

# %% Wrap: the backbone is frozen, pools of prompts and a head for these classes are trained
untouched = copy.deepcopy(backbone)
try:
    model = tcpa.wrap(
        backbone,
        tcpa.TCPAConfig(random_selection_epochs=1),
        num_classes=len(classes),
        normalization=(colours["mean"], colours["std"]),
    ).to(device)
except (TypeError, ValueError) as error:
    parser.error(f"--model {options.model}: {error}")
total = sum(parameter.numel() for parameter in model.parameters())
print(f"{model.num_trainable:,} of {total:,} values are trained; attention: {model.implementation}")


# %% Train a few epochs; the test images are read once, at the end
@torch.no_grad()
def accuracy(network: torch.nn.Module, source: Batches) -> float:
    """Return top-1 accuracy on a part of the images, percent."""
    network.eval()
    right = sum((network(b.images).argmax(1) == b.labels).sum().item() for b in source.epoch(0))
    return 100 * right / source.num_images


optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.005, weight_decay=0.1)
steps = options.epochs * len(batches["train"])
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=steps)
for epoch in range(options.epochs):
    model.train()
    model.set_epoch(epoch)
    losses = []
    for batch in batches["train"].epoch(epoch):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, distance = model(batch.images, return_distance=True)
        loss = F.cross_entropy(logits.float(), batch.labels) + model.config.match_weight * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    held_out = accuracy(model, batches["val"])
    print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, {held_out:.1f} % on val")
print(f"{accuracy(model, batches['test']):.1f} % on {batches['test'].num_images} test images")

# %% Inspect: which prompts the patches choose, and where the class token looks
shown = next(iter(batches["test"].epoch(0))).images[:8]
found = inspect.selections(model, shown)
usage, overlap = inspect.usage(found), inspect.overlap(found)
for block, (dead, bits, alike) in enumerate(
    zip(usage.dead, usage.entropy, overlap.neighbours, strict=True), start=1
):
    print(
        f"block {block}: {dead} of {found.num_pool[1]} prompts unused, entropy {bits:.2f} bits, "
        f"overlap of neighbouring patches {alike:.2f} (by chance {overlap.chance:.2f})"
    )
maps = inspect.attention_maps(model, shown[:1])
mean, std = (torch.tensor(colours[name]).view(3, 1, 1) for name in ("mean", "std"))
pixels = (shown[0].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
last = len(model.backbone.blocks) - 1
figures = {
    "selection.png": inspect.draw_selection(
        pixels, found.image[last, 0], found.grid, found.num_pool[1]
    ),
    "usage.png": inspect.draw_usage(usage.seen),
    "attention.png": inspect.draw_attention(pixels, maps.patches()[last, 0, 0, 0]),
}
options.output.mkdir(parents=True, exist_ok=True)
for name, figure in figures.items():
    figure.savefig(options.output / name, dpi=140)

# %% Look deeper: everything that one pass computed, without changing its result
with model.capture() as record, torch.no_grad():
    model(shown)
first = record[0]
print(f"block 1: attention {list(first.attention.shape)}, gate {list(first.gate.shape)}")

# %% Save what was trained, and load it into a backbone as it was
model.save_pretrained(options.output / "adapter")
loaded = tcpa.from_pretrained(options.output / "adapter", backbone=untouched).to(device)
with torch.no_grad():
    same = torch.equal(loaded.eval()(shown), model.eval()(shown))
print(f"{options.output} holds {', '.join(figures)} and adapter/; reloaded: same logits: {same}")
