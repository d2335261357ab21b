"""Every kernel once, forward and backward, on small awkward shapes: what compute-sanitizer runs.

compute-sanitizer --tool memcheck python tests/support/sanitize_kernels.py
"""

import torch

from tcpa import pack_gate
from tcpa.kernels import gated_attention, match_prompts, norm_match


def require_finite(*tensors):
    """What reads outside its inputs seldom stays finite."""
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def attention(device, dtype, per_sample):
    """Remainders everywhere: 19 queries, 21 keys, 35 prompts, 20 columns."""
    lead = (2,) if per_sample else ()
    q, k, v = (torch.randn(2, n, 2, 20, device=device, dtype=dtype) for n in (19, 21, 21))
    kp, vp = (torch.randn(*lead, 35, 2, 20, device=device, dtype=dtype) for _ in range(2))
    gate = pack_gate(torch.rand(2, 19, 35, device=device) < 0.3)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, kp, vp)]
    for normalize_over in ("all", "visible"):
        out = gated_attention(*leaves, gate, normalize_over=normalize_over)
        require_finite(out, *torch.autograd.grad(out.float().sum(), leaves))


def matching(device, dtype):
    """A width that fills no tile, pools of different sizes, more than one gate word."""
    x = torch.randn(3, 19, 72, device=device, dtype=dtype).requires_grad_()
    keys = [torch.randn(n, 72, device=device).requires_grad_() for n in (5, 14)]
    options = {"cls_top_k": 2, "image_top_k": 3, "lengths": (3, 2)}
    _, distance = match_prompts(x, *keys, **options)
    require_finite(distance, *torch.autograd.grad(distance, [x, *keys]))
    weight, bias = torch.randn(2, 72, device=device, dtype=dtype)
    normed, _, distance = norm_match(x, weight, bias, 1e-6, *keys, **options)
    found = torch.autograd.grad(normed.float().sum() + distance, [x, *keys])
    require_finite(normed, distance, *found)


def main() -> None:
    """Run all of it in every dtype."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The interpreter of a machine without a GPU computes bfloat16 wrongly.
    half = [torch.float16, torch.bfloat16] if device == "cuda" else [torch.float16]
    for dtype in (*half, torch.float32):
        for per_sample in (False, True):
            attention(device, dtype, per_sample)
        matching(device, dtype)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
