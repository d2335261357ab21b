"""Generated images: every class is a formula, every image of it a random variation.

Six families of formulas give the classes; none of them knows a digit, a letter or a font.
Images are grey, `size` x `size` pixels, values in [0, 1], bright figure on a dark ground.
The class fixes the formula's coefficients (drawn once from the seed and the class's number), an
image jitters them, so that a network has to learn shape and not pixels.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

Rng = np.random.Generator


def splat(points: np.ndarray, size: int) -> np.ndarray:
    """Count points `[N, K, 2]` (x, y in [-1, 1]) bilinearly on a grid: float32 `[N, size, size]`.

    Points outside the square are dropped.
    """
    n = points.shape[0]
    position = (points + 1) * (size / 2) - 0.5
    corner = np.floor(position).astype(np.int64)
    fraction = position - corner
    grid = np.zeros(n * size * size, dtype=np.float64)
    image = np.arange(n)[:, None]
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = corner[..., 0] + dx, corner[..., 1] + dy
            weight = np.abs(1 - dx - fraction[..., 0]) * np.abs(1 - dy - fraction[..., 1])
            inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
            cell = (image * size + y) * size + x
            grid += np.bincount(cell[inside], weight[inside], minlength=grid.size)
    return grid.reshape(n, size, size).astype(np.float32)


def blur(images: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Blur images `[N, S, S]` by a Gaussian of `sigma` pixels `[N]`, with wrapped borders."""
    size = images.shape[-1]
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    gain = np.exp(-2 * (np.pi * sigma[:, None, None]) ** 2 * (fx**2 + fy**2))
    return np.fft.irfft2(np.fft.rfft2(images) * gain, s=(size, size)).astype(np.float32)


def ink(points: np.ndarray, rng: Rng, size: int, sigma: tuple[float, float]) -> np.ndarray:
    """Draw points `[N, K, 2]` with a soft pen of random width (pixels): `[N, size, size]`."""
    n = points.shape[0]
    middle = (points.max(1, keepdims=True) + points.min(1, keepdims=True)) / 2
    reach = np.abs(points - middle).max((1, 2), keepdims=True)
    fitted = (points - middle) / np.maximum(reach, 1e-6) * 0.8
    density = blur(splat(fitted, size), rng.uniform(*sigma, n))
    peak = np.quantile(density, 0.98, axis=(1, 2), keepdims=True)
    # Saturation makes a stroke evenly bright where slow and fast parts of a curve differ.
    return 1 - np.exp(-2.5 * np.maximum(density, 0) / np.maximum(peak, 1e-6))


def draw_curve(formula: Rng, rng: Rng, n: int, size: int) -> np.ndarray:
    """Lissajous-like strokes: an arc of a plane curve of three harmonics."""
    harmonic = np.arange(1, 4)[:, None]
    phase = formula.uniform(0, 2 * np.pi, (3, 2))
    amplitude = formula.normal(0, 1, (3, 2)) / harmonic
    arc = formula.uniform(0.35, 1.0) * 2 * np.pi
    t = np.linspace(0, arc, 256)[:, None, None]
    phases = phase + rng.normal(0, 0.18, (n, 1, 3, 2))
    amplitudes = amplitude + rng.normal(0, 0.12, (n, 1, 3, 2))
    points = (amplitudes * np.cos(harmonic * t + phases)).sum(2)
    return ink(points, rng, size, (0.8, 1.8))


def draw_polyline(formula: Rng, rng: Rng, n: int, size: int) -> np.ndarray:
    """Straight strokes that meet in corners, and sometimes a second stroke."""
    corners = formula.uniform(-1, 1, (formula.integers(3, 6), 2))
    lifted = formula.integers(1, len(corners)) if formula.random() < 0.4 else None
    vertices = corners + rng.normal(0, 0.12, (n, *corners.shape))
    starts, ends = vertices[:, :-1, None], vertices[:, 1:, None]
    t = np.linspace(0, 1, 64)[:, None]
    segments = starts + (ends - starts) * t
    if lifted is not None and segments.shape[1] > 1:
        segments = np.delete(segments, lifted - 1, axis=1)
    return ink(segments.reshape(n, -1, 2), rng, size, (0.8, 1.8))


def draw_branches(formula: Rng, rng: Rng, n: int, size: int) -> np.ndarray:
    """Branching strokes, as an L-system draws them: each tip splits, turns and shrinks."""
    turns = formula.uniform(-1.3, 1.3, formula.integers(2, 4))
    shrink = formula.uniform(0.5, 0.85, len(turns))
    tip = np.zeros((n, 1, 2))
    angle = formula.uniform(0, 2 * np.pi) + rng.normal(0, 0.1, (n, 1))
    length = np.ones((n, 1))
    t = np.linspace(0, 1, 24)[:, None]
    strokes = []
    for _ in range(4):
        step = length[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        strokes.append((tip[:, :, None] + step[:, :, None] * t).reshape(n, -1, 2))
        tip = np.repeat(tip + step, len(turns), axis=1)
        jitter = rng.normal(0, 0.1, (n, angle.shape[1], len(turns)))
        angle = (angle[..., None] + turns + jitter).reshape(n, -1)
        length = (length[..., None] * shrink).reshape(n, -1)
    return ink(np.concatenate(strokes, axis=1), rng, size, (0.5, 1.1))


def draw_fractal(formula: Rng, rng: Rng, n: int, size: int) -> np.ndarray:
    """Attractor of a random system of affine contractions, by 64 parallel chaos games."""
    maps = formula.integers(2, 5)
    left, right = (_rotations(formula.uniform(0, 2 * np.pi, maps)) for _ in range(2))
    scale = formula.uniform(0.25, 0.85, (maps, 1, 2))
    linear = (left * scale) @ right + rng.normal(0, 0.04, (n, maps, 2, 2))
    shift = formula.uniform(-1, 1, (maps, 2)) + rng.normal(0, 0.08, (n, maps, 2))
    share = np.abs(np.linalg.det((left * scale) @ right)) + 0.05
    image = np.arange(n)[:, None]
    points = np.zeros((n, 64, 2))
    orbit = []
    for step in range(48):
        choice = rng.choice(maps, (n, 64), p=share / share.sum())
        points = np.einsum("nkij,nkj->nki", linear[image, choice], points) + shift[image, choice]
        # The jitter may push a map over the edge of contraction: keep the orbit bounded.
        points = np.clip(points, -6, 6)
        if step >= 12:
            orbit.append(points)
    return ink(np.concatenate(orbit, axis=1), rng, size, (0.4, 0.9))


def draw_texture(formula: Rng, rng: Rng, n: int, size: int) -> np.ndarray:
    """Sum of three plane waves under a soft window, with random phases."""
    cycles, angle = formula.uniform(0.7, 4.5, 3), formula.uniform(0, np.pi, 3)
    amplitude, sharpness = formula.uniform(0.3, 1, 3), formula.uniform(1, 6)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    turned = (angle + rng.normal(0, 0.12, (n, 3)))[..., None, None]
    stretched = (cycles * rng.uniform(0.9, 1.1, (n, 3)))[..., None, None]
    phase = rng.uniform(0, 2 * np.pi, (n, 3, 1, 1))
    wave = np.cos(np.pi * stretched * (x * np.cos(turned) + y * np.sin(turned)) + phase)
    total = (amplitude[:, None, None] * wave).sum(1) / amplitude.sum()
    window = np.exp(-(x**2 + y**2) / (2 * formula.uniform(0.4, 1.2) ** 2))
    return window / (1 + np.exp(-sharpness * total))


def draw_automaton(rule: int, formula: Rng, rng: Rng, n: int, size: int) -> np.ndarray:
    """Space-time picture of an elementary cellular automaton, cells of 2 x 2 pixels.

    `rule` is the automaton's number, 0..255, and the whole formula of the class.
    """
    cells = size // 2
    # A ring wider than the picture, of odd length: additive rules die on a power of two.
    row = (rng.random((n, 3 * cells - 1)) < 0.5).astype(np.int64)
    rows = []
    for step in range(cells + 8):
        code = 4 * np.roll(row, 1, axis=1) + 2 * row + np.roll(row, -1, axis=1)
        row = (rule >> code) & 1
        if step >= 8:
            rows.append(row[:, :cells])
    picture = np.stack(rows, axis=1).repeat(2, axis=1).repeat(2, axis=2)
    return blur(picture.astype(np.float32), rng.uniform(0.4, 0.9, n))


def _rotations(angle: np.ndarray) -> np.ndarray:
    """Rotation matrices `[M, 2, 2]` of angles `[M]` in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


Draw = Callable[[Rng, Rng, int, int], np.ndarray]

LIVE_RULES = (22, 30, 45, 54, 60, 73, 90, 105, 110, 150)
"""Automata that neither die out nor freeze, so that a class is never a blank image."""

FAMILIES: dict[str, list[Draw]] = {
    "curve": [draw_curve] * 44,
    "polyline": [draw_polyline] * 28,
    "branches": [draw_branches] * 16,
    "fractal": [draw_fractal] * 16,
    "texture": [draw_texture] * 14,
    "automaton": [partial(draw_automaton, rule) for rule in LIVE_RULES],
}
"""Family name -> how to draw each of its classes."""

NUM_CLASSES = sum(len(draws) for draws in FAMILIES.values())


def generate(
    per_class: int, *, seed: int, split: int = 0, size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `per_class` images of every class.

    Args:
        per_class: images of each class.
        seed: chooses the formulas; the same seed gives the same classes and images.
        split: another split gives other images of the same classes.
        size: height and width in pixels.

    Returns:
        uint8 images `[NUM_CLASSES * per_class, size, size]`, class after class, and int64
        labels of the same length.
    """
    draws = [draw for family in FAMILIES.values() for draw in family]
    images = []
    for label, draw in enumerate(draws):
        formula = np.random.default_rng([seed, label])
        variation = np.random.default_rng([seed, label, 1 + split])
        picture = draw(formula, variation, per_class, size)
        images.append((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    return np.concatenate(images), np.repeat(np.arange(len(draws)), per_class)
