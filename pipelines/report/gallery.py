"""The report's pictures: read images from the source and draw boxes on thumbnails."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import supervision as sv
from numpy.typing import NDArray
from PIL import ImageFont

from pipelines.display.palette import PALETTE, color_of
from pipelines.report.pictures import jpeg_uri
from pipelines.report.scan import SHOWN_SCORE, Pick
from storage.errors import LabelfleetError
from storage.objects.protocols import ObjectStore
from storage.records import Detections
from storage.runs.image_bytes import fetch_images
from storage.runs.manifest import Manifest
from workers.images.decode import decode
from workers.images.preprocessing import recorded_range

LONGEST_PX = 640
_SMALLEST_PX = 320  # smaller images are enlarged, or their labels would hide them
_JPEG_QUALITY = 82
_MAX_PIXELS = 200_000_000
_DRAWERS = 4
_SURE = 0.5  # boxes below it are drawn thinner


@dataclass(frozen=True, slots=True)
class Tile:
    """One picture of the gallery.

    Attributes:
        pick: the image.
        shown: boxes drawn.
        jpeg: data: URI; None where ``problem`` says why the picture is missing.
    """

    pick: Pick
    shown: int
    jpeg: str | None
    problem: str | None


def draw_tiles(manifest: Manifest, source: ObjectStore, picks: Sequence[Pick]) -> dict[str, Tile]:
    """Return the tiles by image_id; for an unreadable image the tile says why."""
    names = [c.name for c in manifest.record.identity.categories]
    fetched = fetch_images(manifest, source, [p.row for p in picks])
    value_range = recorded_range(manifest.record.inference)

    def tile(pick: Pick) -> Tile:
        d = pick.row.detections
        shown = int((d.scores >= SHOWN_SCORE).sum())
        raw = fetched[pick.row.image_id]
        try:
            if isinstance(raw, LabelfleetError):
                raise raw
            pixels = decode(raw, max_pixels=_MAX_PIXELS, value_range=value_range).pixels
            return Tile(pick, shown, jpeg_uri(draw(pixels, d, names), _JPEG_QUALITY), None)
        except LabelfleetError as exc:
            return Tile(pick, shown, None, exc.message)

    with ThreadPoolExecutor(_DRAWERS) as pool:
        return {t.pick.row.image_id: t for t in pool.map(tile, picks)}


def draw(
    pixels: NDArray[np.uint8], detections: Detections, names: Sequence[str]
) -> NDArray[np.uint8]:
    """Return a thumbnail with boxes of SHOWN_SCORE and more, and labels where there is room.

    Args:
        pixels: uint8 [H, W, 3], RGB, upright.
        detections: boxes in its pixels, highest score first.
        names: by category id.

    Returns:
        uint8 [h, w, 3], RGB, its longest side at most LONGEST_PX.
    """
    scene, scale = _thumbnail(pixels)
    bgr = np.ascontiguousarray(scene[:, :, ::-1])
    d = detections
    colors = sv.ColorPalette.from_hex(list(PALETTE))
    unsure = (d.scores >= SHOWN_SCORE) & (d.scores < _SURE)
    for part, thickness in ((unsure, 2), (d.scores >= _SURE, 4)):
        if part.any():
            annotator = sv.BoxAnnotator(colors, thickness=thickness)
            bgr = annotator.annotate(bgr, _for_supervision(d, part, scale))
    labels = _labels_with_room(d, scale, names, bgr.shape[1])
    if labels:
        labelled = _for_supervision(d, np.array(list(labels)), scale)
        bgr = _label_annotator(colors).annotate(bgr, labelled, list(labels.values()))
    return np.ascontiguousarray(bgr[:, :, ::-1])


def _for_supervision(d: Detections, which: NDArray[Any], scale: float) -> sv.Detections:
    return sv.Detections(
        xyxy=d.boxes[which] * scale,
        confidence=d.scores[which],
        class_id=d.category_ids[which].astype(int),
    )


def _thumbnail(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
    height, width = pixels.shape[:2]
    longest = max(height, width)
    scale = min(1.0, LONGEST_PX / longest) if longest > _SMALLEST_PX else _SMALLEST_PX / longest
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = cv2.resize(pixels, size, interpolation=how) if scale != 1 else pixels.copy()
    return np.asarray(small, np.uint8), scale


_FONT_PX, _PADDING_PX = 17, 4


def _font_path() -> str:
    """DejaVu Sans as matplotlib ships it: class names need not be ASCII."""
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def _label_annotator(colors: sv.ColorPalette) -> Any:
    on_color = sv.ColorPalette.from_hex([_readable_on(c) for c in PALETTE])
    return sv.RichLabelAnnotator(
        color=colors, text_color=on_color, font_path=_font_path(), font_size=_FONT_PX,
        text_padding=_PADDING_PX,
        smart_position=True,  # inside the picture, at its borders too
    )  # fmt: skip


def _readable_on(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def _labels_with_room(
    d: Detections, scale: float, names: Sequence[str], width_px: int
) -> dict[int, str]:
    """Return the labels by index of their box, of those that hide no label of a higher score."""
    font = ImageFont.truetype(_font_path(), _FONT_PX)
    labels: dict[int, str] = {}
    taken: list[tuple[float, float, float, float]] = []
    for i in np.flatnonzero(d.scores >= SHOWN_SCORE):
        name = names[d.category_ids[i]]
        text = f"{name if len(name) <= 24 else f'{name[:23]}…'} {d.scores[i]:.2f}"
        place = _label_place(d.boxes[i] * scale, font.getlength(text), width_px)
        if not any(_overlap(place, other) for other in taken):
            taken.append(place)
            labels[int(i)] = text
    return labels


def _label_place(
    box: NDArray[np.float32], text_px: float, width_px: int
) -> tuple[float, float, float, float]:
    wide, high = text_px + 2 * _PADDING_PX, _FONT_PX + 2 * _PADDING_PX
    x1 = float(min(box[0], max(0.0, width_px - wide)))
    y2 = float(max(box[1], high))
    return x1, y2 - high, x1 + wide, y2


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def legend(classes: Iterable[int], names: Sequence[str]) -> list[tuple[str, str]]:
    """(name, colour) of classes, by id."""
    return [(names[k], color_of(k)) for k in sorted(set(classes))]
