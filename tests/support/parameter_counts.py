"""Trainable parameters of every row of the tables, by the formulas of the papers."""

LION = (3 * 3 * 9 + 3 * 3 * 9 + 3) + (64 * 64 + 64 * (3 * 64) + 64 + 64 * 768 + 768 * 64 + 768)
POOLS = 2 * (12 * 18 * 768) * 2
COUNTS = {
    "full": 85_798_656,
    "linear": 0,
    "partial-1": 7_087_872 + 2 * 768,
    "mlp-3": 2 * (768 * 768 + 768 + 2 * 768),
    "bias": 12 * (768 + 2304 + 768 + 768 + 3072 + 768) + 2 * 768,
    "sidetune": 2_469_696 + 9216 * 768 + 1,
    "adapter": 12 * (768 * 96 + 96 + 96 * 768 + 768),
    "adaptformer": 12 * (768 * 64 + 64 + 64 * 768 + 768),
    "e2vpt": 12 * 5 * 768 + 12 * 12 * 5 * 64,
    "lion": LION,
    "gated-prompt": 100 * 768 + 11 + 12,
    "vp": 69_840,
    "vpt-shallow": 10 * 768,
    "vpt-deep": 12 * 10 * 768,
    "dam-vp": 16 * 69_840,
    "autovp": 3 * 224 * 224,
    "vfpt": 12 * 10 * 768,
    "vp+tcpa": 69_840 + POOLS,
    "vpt+tcpa": POOLS,
    "dam-vp+tcpa": 16 * 69_840 + POOLS,
    "autovp+tcpa": 3 * 224 * 224 + POOLS,
    "vfpt+tcpa": POOLS,
}
"""Trainable parameters without the head of a ViT-B/16, by the formulas of the papers."""
