"""What `tcpa-bench roofline` prints; every figure is labelled as an estimate."""

from typing import Any

from .costs.estimate import TEST_IMAGES, TRAIN_IMAGES, Estimate
from .costs.workload import Workload
from .hardware import Ceilings
from .harness.results import number

TOP_K = """\
The top-k changes no product and no tensor: the softmax covers all P prompts, and what a token sees
is one bit for each of them."""


def format_operations(
    name: str, work: Workload, ceilings: Ceilings, rows: list[dict[str, Any]]
) -> str:
    """Return the table of the operations of one training step."""
    prompts = f"{work.prompts} prompt rows" + (" per sample" if work.per_sample else "")
    size = f"width {work.vit.width}, {work.vit.depth} blocks, {work.tokens} tokens, {prompts}"
    whole = sum(row["seconds"] for row in rows)
    lines = [
        f"ESTIMATE, not a measurement: one training step, {name}",
        f"{size}, batch {work.batch}, {work.dtype}",
        f"ceilings of {ceilings.device}: {number(ceilings.flops / 1e12)} TFLOP/s, "
        f"{number(ceilings.bandwidth / 1e12)} TB/s",
        f"  {ceilings.source}",
        "",
        f"{'operation':<28}{'pass':<10}{'calls':>5}{'GFLOP':>10}{'MB':>10}{'FLOP/B':>8}"
        f"{'ms >=':>9}{'share':>7}  bound by",
    ]
    for row in rows:
        intensity = row["flops"] / row["bytes"] if row["bytes"] else 0.0
        lines.append(
            f"{row['operation']:<28}{row['direction']:<10}{row['calls']:>5}"
            f"{row['flops'] / 1e9:>10.1f}{row['bytes'] / 1e6:>10.1f}{intensity:>8.0f}"
            f"{row['seconds'] * 1e3:>9.3f}{row['seconds'] / whole:>7.1%}  {row['limit']}"
        )
    return "\n".join(lines) + "\n"


def format_estimate(
    work: Workload, ceilings: Ceilings, found: Estimate, *, gpus: int, link: float
) -> str:
    """Return what the step, an epoch and several GPUs cost."""
    model_flops = found.train_flops - found.repeated_flops
    computing = found.train_step - found.all_reduce
    share = model_flops / computing / ceilings.flops
    lines = [
        f"training step    estimate {found.train_step * 1e3:8.2f} ms   "
        f"{found.train_flops / 1e12:.2f} TFLOP ({found.repeated_flops / 1e12:.2f} of them scores "
        f"made again), {found.train_bytes / 1e9:.1f} GB; {share:.0%} of the FLOP/s ceiling",
        f"evaluation step  estimate {found.eval_step * 1e3:8.2f} ms",
        f"throughput       estimate {found.images_per_second:8.0f} images/s trained",
        f"epoch of CUB     estimate {found.train_epoch:8.2f} s for {TRAIN_IMAGES:,} training images"
        f", {found.eval_epoch:.2f} s for {TEST_IMAGES:,} test images",
        f"input            estimate {found.input_bytes_per_second / 1e6:8.0f} MB/s of 8-bit pixels",
    ]
    if gpus > 1:
        lines.append(
            f"{gpus} GPUs           estimate {found.all_reduce * 1e3:8.2f} ms a step for the ring "
            f"all-reduce of {found.gradient_bytes / 1e6:.1f} MB at {link / 1e9:.0f} GB/s (assumed)"
        )
    return "\n".join(lines) + "\n"


_HEADER = (
    f"{'TFLOP':>8}{'GB':>8}{'train ms':>10}{'ratio':>7}{'eval ms':>9}{'images/s':>10}"
    f"{'epoch s':>9}{'reduce ms':>11}{'MB/s':>8}"
)


def format_methods(methods: dict[str, Estimate]) -> str:
    """Return the comparison of the methods."""
    return _table("methods (estimates)", list(methods.items()))


def format_variation(name: str, varied: dict[int, Estimate]) -> str:
    """Return how the cost grows with one size."""
    table = _table(f"{name} (estimates)", [(str(value), each) for value, each in varied.items()])
    return f"{table}{TOP_K}\n" if name == "top-k" else table


def _table(title: str, rows: list[tuple[str, Estimate]]) -> str:
    first = rows[0][1].train_step
    lines = [f"{title:<21}{_HEADER}"]
    for name, each in rows:
        lines.append(
            f"{name:<21}{each.train_flops / 1e12:>8.2f}{each.train_bytes / 1e9:>8.1f}"
            f"{each.train_step * 1e3:>10.2f}{each.train_step / first:>7.2f}"
            f"{each.eval_step * 1e3:>9.2f}{each.images_per_second:>10.0f}"
            f"{each.train_epoch:>9.2f}{each.all_reduce * 1e3:>11.3f}"
            f"{each.input_bytes_per_second / 1e6:>8.0f}"
        )
    return "\n".join(lines) + "\n"
