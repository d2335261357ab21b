"""Estimate a training step from FLOPs, bytes and the ceilings of a device; nothing is measured.

Usage: tcpa-bench roofline [--method NAME] [--gpu NAME | --results FILE | --tflops N --tbytes N]
[sizes] [--vary NAME [--values N ...]] [--json FILE]

Every operation takes at least max(FLOPs / rate, bytes / bandwidth) of the attainable ceilings; a
step takes the sum, an epoch of CUB-200 (5,394 training and 5,794 test images) its steps. What is
not counted, gaps between kernels above all, comes on top; see `costs/model.py` for what is.

Several GPUs (`--gpus`): each has a batch of its own and the gradients of the trained values,
float32, are summed by a ring all-reduce that hides behind nothing:

    2 (n - 1) / n * 4 bytes * trained values / link bandwidth.
"""

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from tcpa import Savings

from ..cli import UsageError, command, require, require_writable, write_results
from .costs.estimate import change, estimate, operation_rows
from .costs.workload import Method, Workload
from .hardware import DATASHEETS, Ceilings, assumed, measured
from .harness.case import BACKBONES
from .harness.results import load
from .providers.step import INPUT_PROMPTS
from .roofline_text import format_estimate, format_methods, format_operations, format_variation

_PLAIN = Savings.none()
FORMS: dict[str, tuple[Method, Savings]] = {
    "tcpa": ("tcpa", Savings()),
    "official": ("tcpa", _PLAIN),
    "official-frozen": ("tcpa", dataclasses.replace(_PLAIN, frozen_backbone=True)),
    "vpt-deep": ("vpt-deep", Savings()),
    "vpt-deep-tokens": ("vpt-deep", dataclasses.replace(Savings(), prompt_keys_only=False)),
    "vfpt": ("vfpt", Savings()),
    "linear": ("linear", Savings()),
    "linear-backward": ("linear", dataclasses.replace(Savings(), skip_input_gradient=False)),
}
"""Methods as this library runs them, and TCPA as the official code does: with the prompts of every
sample in the projections, dense masks and, unless frozen, weight gradients. VPT-deep also with
prompts that are tokens of the blocks, the frozen backbone also with the gradients of all tokens."""

VALUES = {
    "tokens": (50, 197, 257, 577, 785, 1025),
    "prompts": (0, 10, 36, 64, 100, 256),
    "top-k": (1, 5, 10, 18),
    "batch": (1, 8, 32, 128, 512),
    "depth": (6, 12, 24, 32),
    "gpus": (1, 2, 4, 8, 16, 32),
}
"""What `--vary` can change, and the values that it takes by default."""


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="tcpa-bench roofline", description=summary)
    parser.add_argument("--method", choices=FORMS, default="tcpa")
    parser.add_argument("--backbone", choices=BACKBONES, default="b16")
    parser.add_argument("--image", type=int, default=224, help="height and width, pixels")
    parser.add_argument("--depth", type=int, help="blocks; the backbone's own by default")
    parser.add_argument("--prompts", type=int, default=36, help="prompt rows of a block, P")
    parser.add_argument(
        "--top-k", type=int, help="entries of a pool that a token sees; costs nothing"
    )
    parser.add_argument("--per-sample", action="store_true", help="prompts of their own per sample")
    parser.add_argument("--image-prompt", action="store_true", help="with the convolutional prompt")
    parser.add_argument(
        "--input-prompt", choices=INPUT_PROMPTS, help="with this other prompt on the image"
    )
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128, help="images a step and GPU")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--gpu", default="h200", help=f"one of {', '.join(DATASHEETS)}")
    parser.add_argument("--flops-share", type=float, default=0.8, help="attainable, assumed")
    parser.add_argument("--bandwidth-share", type=float, default=0.9, help="attainable, assumed")
    parser.add_argument("--tflops", type=float, help="attainable TFLOP/s, in place of --gpu")
    parser.add_argument("--tbytes", type=float, help="attainable TB/s, in place of --gpu")
    parser.add_argument("--results", type=Path, help="take the ceilings measured in this file")
    parser.add_argument("--gpus", type=int, default=1, help="how many work together")
    parser.add_argument(
        "--link-gbytes", type=float, default=50.0, help="GB/s between GPUs, assumed"
    )
    parser.add_argument("--vary", choices=VALUES, help="print how the cost grows with this")
    parser.add_argument("--values", type=int, nargs="+", help="values for --vary")
    parser.add_argument("--json", type=Path, help="also write the estimate to this file")
    return parser


def _check(options: argparse.Namespace) -> None:
    least = {"image": BACKBONES[options.backbone].patch, "prompts": 0, "top_k": 0}
    for name in ("image", "depth", "prompts", "top_k", "classes", "batch", "gpus"):
        value, low = getattr(options, name), least.get(name, 1)
        option = f"--{name.replace('_', '-')}"
        require(value is None or value >= low, option, value, f"at least {low}", "raise it")
    for name in ("flops_share", "bandwidth_share"):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        require(0 < value <= 1, option, value, "a share above 0, at most 1", "correct it")
    for name in ("tflops", "tbytes", "link_gbytes"):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        right = value is None or 0 < value < math.inf
        require(right, option, value, "a positive number", "correct it")
    both = (options.tflops is None) == (options.tbytes is None)
    got = f"--tflops {options.tflops}, --tbytes {options.tbytes}"
    require(both, "ceilings", got, "both", "give the other one as well")
    require(options.values is None or options.vary, "--values", options.values, "--vary", "add it")
    for value in options.values or ():
        low = least.get((options.vary or "").replace("-", "_"), 1)
        require(value >= low, "--values", value, f"at least {low}", "raise it")
    chosen = list(options.values or ()) if options.vary == "top-k" else []
    for value in [*chosen, options.top_k or 0]:
        pool = _pool(options)
        require(value <= pool, "--top-k", value, f"at most {pool}, a pool's entries", "lower it")


def _pool(options: argparse.Namespace) -> int:
    """Return the entries of the CLS pool: half of the prompts, one row each."""
    return options.prompts // 2


def _values(options: argparse.Namespace) -> list[int]:
    """Return what `--vary` goes through."""
    if not options.vary:
        return []
    known = VALUES[options.vary]
    fitting = [v for v in known if options.vary != "top-k" or v <= _pool(options)]
    return options.values or fitting


def _ceilings(options: argparse.Namespace) -> Ceilings:
    if options.results is not None:
        found = measured(load(options.results, "--results"), options.dtype)
        if not found:
            raise UsageError(
                f"--results: {options.results} has no ceilings in {options.dtype}; expected rows "
                "of the ceilings: `tcpa-bench ops` measures them; or use --gpu"
            )
        return found[-1]
    if options.tflops is not None:
        return Ceilings("given", options.tflops * 1e12, options.tbytes * 1e12, "GIVEN by hand")
    shares = {"flops_share": options.flops_share, "bandwidth_share": options.bandwidth_share}
    return assumed(options.gpu, options.dtype, **shares)


def _workload(options: argparse.Namespace, name: str) -> Workload:
    vit, (method, savings) = BACKBONES[options.backbone], FORMS[name]
    return Workload(
        method=method,
        vit=vit if options.depth is None else dataclasses.replace(vit, depth=options.depth),
        patches=(options.image // vit.patch) ** 2,
        prompts=0 if method == "linear" else options.prompts,
        batch=options.batch,
        dtype=options.dtype,
        # The official code drops prompt elements of every sample by itself.
        per_sample=options.per_sample or name.startswith("official"),
        classes=options.classes,
        image_prompt=options.image_prompt and method == "tcpa",
        input_prompt=INPUT_PROMPTS[options.input_prompt] if options.input_prompt else None,
        savings=savings,
    )


@command("tcpa-bench roofline")
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(argv)
    _check(options)
    if options.json is not None:
        require_writable(options.json, "--json")
    ceilings, work = _ceilings(options), _workload(options, options.method)
    several = {"gpus": options.gpus, "link": options.link_gbytes * 1e9}
    rows, found = operation_rows(work, ceilings), estimate(work, ceilings, **several)
    methods = {
        name: estimate(_workload(options, name), ceilings, **several)
        for name in dict.fromkeys((options.method, *FORMS))
    }
    varied = {}
    for value in _values(options):
        count = value if options.vary == "gpus" else options.gpus
        varied[value] = estimate(
            change(work, options.vary, value), ceilings, gpus=count, link=several["link"]
        )
    print(format_operations(options.method, work, ceilings, rows))
    print(format_estimate(work, ceilings, found, **several))
    print(format_methods(methods))
    if varied:
        print(format_variation(options.vary, varied))
    if options.json is not None:
        answer = {
            "label": "estimate, not a measurement",
            "method": options.method,
            "workload": asdict(work),
            "ceilings": asdict(ceilings),
            "gpus": options.gpus,
            "operations": rows,
            "estimate": asdict(found),
            "methods": {name: asdict(value) for name, value in methods.items()},
            "vary": options.vary,
            "varied": {str(value): asdict(each) for value, each in varied.items()},
        }
        write_results(options.json, json.dumps(answer, indent=1) + "\n", "--json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
