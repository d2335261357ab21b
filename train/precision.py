"""Which precision is native to a device."""

import torch


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it natively, float32 elsewhere.

    A CPU without such instructions emulates bfloat16 and would be slower than in float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32
