"""Draws pages of scattered handwritten digits, from the real 8×8 samples of scikit-learn.

The samples (1,797 of them, 13 writers) are those of the UCI "Optical Recognition of Handwritten
Digits" test set (E. Alpaydin, C. Kaynak, 1998, CC BY 4.0, doi 10.24432/C50P49), which
scikit-learn ships. They come in the order they were collected, so contiguous blocks share few
writers: ``SPLITS`` cuts them that way, and no sample is in two splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val", "unseen"]
SPLITS: dict[Split, range] = {
    "train": range(0, 1200),
    "val": range(1200, 1400),
    "unseen": range(1400, 1797),
}
CLASSES = tuple("0123456789")

_INKED = 0.5  # a pixel this much ink covers belongs to the digit
_GLYPH_PX = 64  # samples are enlarged to this side before they are slanted and placed
_PAGE_SIZES = ((640, 480), (480, 640), (600, 400), (512, 512), (480, 360), (560, 420))

Image = NDArray[np.uint8]
Mask = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Samples:
    """Handwriting to draw with: ``strokes`` float32 [N, 8, 8] in [0, 1], ``labels`` int64 [N]."""

    strokes: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Page:
    """One page: uint8 [H, W, 3] RGB, boxes float32 [N, 4] xyxy tight around the ink, labels [N].

    ``sources`` are the indices of the samples within their split.
    """

    pixels: Image
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    sources: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Style:
    """How a page looks; colours are RGB 0–255."""

    paper: NDArray[np.float32]
    ink: NDArray[np.float32]
    rotation_deg: float = 8.0
    blur_px: float = 0.5
    noise: float = 4.0
    stains: int = 0
    lines: Literal["none", "ruled", "grid"] = "none"


def load_samples(split: Split) -> Samples:
    """Return the split's handwriting from the copy inside scikit-learn; nothing is downloaded."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    chosen = SPLITS[split]
    strokes = (digits.images[chosen.start : chosen.stop] / 16).astype(np.float32)
    return Samples(strokes, digits.target[chosen.start : chosen.stop].astype(np.int64))


def draw_page(samples: Samples, rng: np.random.Generator, *, hard: bool = False) -> Page:
    """Draw one page. ``hard`` pages are dark, faint, noisy, blurred or turned."""
    width, height = _PAGE_SIZES[rng.integers(len(_PAGE_SIZES))]
    style = _hard_style(rng) if hard else _plain_style(rng)
    pixels = _paper(rng, width, height, style)
    boxes: list[tuple[int, int, int, int]] = []
    sources: list[int] = []
    for _ in range(int(rng.integers(3, 19))):
        source = int(rng.integers(len(samples.labels)))
        glyph = _glyph(samples.strokes[source], rng, style.rotation_deg)
        corner = _free_corner(rng, glyph.shape, (height, width), boxes)
        if corner is None:
            continue
        boxes.append(_stamp(pixels, glyph, corner, style, rng))
        sources.append(source)
    chosen = np.array(sources, np.int64)
    return Page(
        _photographed(pixels, style, rng),
        np.array(boxes, np.float32).reshape(-1, 4),
        samples.labels[chosen],
        chosen,
    )


def _plain_style(rng: np.random.Generator) -> Style:
    light = rng.uniform(195, 252)
    return Style(
        paper=_tinted(rng, light, 14),
        ink=_tinted(rng, rng.uniform(15, min(110, light - 110)), 35),
        rotation_deg=rng.uniform(0, 12),
        blur_px=rng.uniform(0, 0.9),
        noise=rng.uniform(1, 8),
        lines=rng.choice(("none", "none", "ruled", "grid")),
    )


def _hard_style(rng: np.random.Generator) -> Style:
    kind = rng.choice(("blackboard", "faint", "noisy", "turned", "stained", "blurred"))
    plain = _plain_style(rng)
    paper, ink = plain.paper, plain.ink
    if kind == "blackboard":
        paper, ink = _tinted(rng, rng.uniform(25, 70), 20), _tinted(rng, rng.uniform(175, 240), 25)
    if kind == "faint":
        ink = paper - rng.uniform(22, 45)
    return Style(
        paper=paper,
        ink=ink.astype(np.float32),
        rotation_deg=rng.uniform(25, 40) if kind == "turned" else plain.rotation_deg,
        blur_px=rng.uniform(1.8, 3.0) if kind == "blurred" else plain.blur_px,
        noise=rng.uniform(28, 48) if kind == "noisy" else plain.noise,
        stains=int(rng.integers(3, 8)) if kind == "stained" else 0,
        lines=plain.lines,
    )


def _tinted(rng: np.random.Generator, level: float, spread: float) -> NDArray[np.float32]:
    colour = level + rng.uniform(-spread, spread, 3)
    return np.clip(colour, 0, 255).astype(np.float32)


def _paper(rng: np.random.Generator, width: int, height: int, style: Style) -> NDArray[np.float32]:
    """Draw paper with uneven light, fibres and lines: float32 [H, W, 3]."""
    light = cv2.resize(
        rng.normal(0, 7, (3, 4)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    fibre = rng.normal(0, 2.5, (height // 2, width // 2)).astype(np.float32)
    texture = light + cv2.resize(fibre, (width, height), interpolation=cv2.INTER_LINEAR)
    pixels = np.asarray(style.paper[None, None] + texture[..., None], np.float32)
    _rule(pixels, style, rng)
    for _ in range(style.stains):
        _stain(pixels, rng)
    return pixels


def _rule(pixels: NDArray[np.float32], style: Style, rng: np.random.Generator) -> None:
    if style.lines == "none":
        return
    pitch = int(rng.integers(22, 48))
    start = int(rng.integers(pitch))
    tint = style.paper + (style.ink - style.paper) * rng.uniform(0.15, 0.45)
    colour = np.clip(tint + rng.uniform(-15, 25, 3), 0, 255)
    pixels[start::pitch] = colour
    if style.lines == "grid":
        pixels[:, start::pitch] = colour


def _stain(pixels: NDArray[np.float32], rng: np.random.Generator) -> None:
    height, width = pixels.shape[:2]
    mask = np.zeros((height, width), np.float32)
    centre = (int(rng.integers(width)), int(rng.integers(height)))
    axes = (int(rng.integers(20, 110)), int(rng.integers(20, 110)))
    thickness = -1 if rng.random() < 0.6 else int(rng.integers(4, 14))
    cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, thickness)
    cv2.GaussianBlur(mask, (0, 0), 3.0, dst=mask)
    colour = rng.uniform((60, 40, 20), (170, 120, 90)).astype(np.float32)
    pixels += (colour - pixels) * mask[..., None] * rng.uniform(0.35, 0.65)


def _glyph(stroke: NDArray[np.float32], rng: np.random.Generator, rotation_deg: float) -> Mask:
    """Draw one digit as ink coverage float32 [h, w] in [0, 1], cut tight around its ink."""
    side = float(np.exp(rng.uniform(np.log(26), np.log(104))))
    padded = np.pad(stroke, 2)
    large = cv2.resize(padded, (_GLYPH_PX, _GLYPH_PX), interpolation=cv2.INTER_CUBIC)
    thin = rng.uniform(0.36, 0.54)  # where the stroke's edge is cut: pen width
    sharp = np.clip((large - thin) / 0.22, 0, 1).astype(np.float32)
    angle = np.deg2rad(rng.uniform(-rotation_deg, rotation_deg))
    size = side / (_GLYPH_PX * 8 / 12)  # the sample is 8 of the 12 padded cells
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[rng.uniform(0.75, 1.15), rng.uniform(-0.3, 0.3)], [0, 1]])
    matrix = turn @ slant * size
    canvas = int(side * 2.4)
    offset = np.full(2, canvas / 2) - matrix @ np.full(2, _GLYPH_PX / 2)
    drawn = cv2.warpAffine(sharp, np.column_stack([matrix, offset]), (canvas, canvas))
    return _cut(np.asarray(drawn, np.float32))


def _cut(mask: Mask) -> Mask:
    rows, columns = np.where(mask > _INKED)
    return mask[int(rows.min()) : int(rows.max()) + 1, int(columns.min()) : int(columns.max()) + 1]


def _free_corner(
    rng: np.random.Generator,
    glyph: tuple[int, ...],
    page: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
) -> tuple[int, int] | None:
    """Find the top-left (x, y) where the glyph hardly overlaps a neighbour; None without room."""
    for _ in range(20):
        x = int(rng.integers(2, page[1] - glyph[1] - 2))
        y = int(rng.integers(2, page[0] - glyph[0] - 2))
        box = (x, y, x + glyph[1], y + glyph[0])
        if all(_shared(box, other) <= 0.06 for other in taken):
            return x, y
    return None


def _shared(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over the smaller area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width * height / smaller


def _stamp(
    pixels: NDArray[np.float32],
    glyph: Mask,
    corner: tuple[int, int],
    style: Style,
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Ink the glyph onto the page and return its box, xyxy."""
    x, y = corner
    height, width = glyph.shape
    under = pixels[y : y + height, x : x + width]
    ink = np.clip(style.ink + rng.uniform(-12, 12, 3), 0, 255).astype(np.float32)
    opacity = rng.uniform(0.8, 1.0)
    under += (ink - under) * (glyph * opacity)[..., None]
    return x, y, x + width, y + height


def _photographed(pixels: NDArray[np.float32], style: Style, rng: np.random.Generator) -> Image:
    """Add blur and sensor noise; return uint8."""
    if style.blur_px > 0.2:
        cv2.GaussianBlur(pixels, (0, 0), style.blur_px, dst=pixels)
    noisy = pixels + rng.normal(0, style.noise, pixels.shape).astype(np.float32)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
