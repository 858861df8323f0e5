"""Picture what people corrected: the place of each correction before and after it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import supervision as sv
from numpy.typing import NDArray

from pipelines.display.palette import PALETTE
from pipelines.policy.box_batch import box_batch
from pipelines.policy.policy import Policy
from pipelines.report.pictures import jpeg_uri
from pipelines.routing.audit_draw import random_key
from pipelines.truth.compared import from_jsonl
from pipelines.truth.matching import pair
from pipelines.truth.settle import Settled, Settling, settle
from pipelines.truth.usable import usable_answers
from storage.errors import LabelfleetError
from storage.labels.versions import LabelVersion, read_version_file
from storage.objects.protocols import ObjectStore
from storage.records import AnnotationRow
from storage.review.queue import read_queue
from storage.runs.annotation_rows import table_to_rows
from storage.runs.image_bytes import read_images
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest
from workers.images.decode import decode
from workers.images.preprocessing import ValueRange, recorded_range

KINDS = ("missed", "spurious", "wrong_class", "misplaced")
_WIDE, _HIGH = 360, 270  # of a picture, pixels
_AROUND = 1.6  # sides of the crop, in those of what was corrected
_LEAST = 0.25  # of the image's shorter side: a tiny box needs its surroundings
_MAX_PIXELS = 200_000_000
_QUALITY = 82
_DEAR = 40  # images looked through for one of each kind; they are read whole

Boxes = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Labels:
    """Boxes of one image: float64 [N, 4] xyxy pixels and class ids int64 [N]."""

    boxes: Boxes
    ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Correction:
    """One thing that a person corrected.

    Attributes:
        row: the image; ``before``: the model's labels, ``after``: the person's.
        kind: one of ``KINDS``. ``was``, ``now``: index into before and after; None: nothing there.
        annotator: who.
    """

    row: AnnotationRow
    before: Labels
    after: Labels
    kind: str
    was: int | None
    now: int | None
    annotator: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A correction to be shown; ``before`` and ``after`` are data: URIs, '' where there is none."""

    image_id: str
    annotator: str
    says: str
    before: str
    after: str
    problem: str = ""


def pictures(
    manifest: Manifest, source: ObjectStore, lineage: LabelVersion, n: int = 12
) -> list[Picture]:
    """Pick up to ``n`` corrections, kinds in turn, of different images; deterministic."""
    chosen = choose(corrections(manifest, lineage), n)
    by_image = {c.row.image_id: c for c in chosen}
    names = [c.name for c in lineage.categories]
    value_range = recorded_range(manifest.record.inference)
    drawn = {
        row.image_id: draw_correction(by_image[row.image_id], raw, names, value_range)
        for row, raw in read_images(manifest, source, [c.row for c in chosen])
    }
    return [drawn[c.row.image_id] for c in chosen]


def choose(found: Sequence[Correction], n: int) -> list[Correction]:
    """``n`` of them, kinds in turn, at most one an image."""
    taken: dict[str, Correction] = {}
    left = {kind: [c for c in found if c.kind == kind] for kind in KINDS}
    for kind in itertools.islice(itertools.cycle(KINDS), n * len(KINDS)):
        fresh = (c for c in left[kind] if c.row.image_id not in taken)
        if len(taken) < n and (correction := next(fresh, None)) is not None:
            taken[correction.row.image_id] = correction
    return list(taken.values())


def corrections(manifest: Manifest, lineage: LabelVersion) -> list[Correction]:
    """Corrections of images that the version's answers changed, images in a random order."""
    raw = read_version_file(manifest.store, lineage, "answered.jsonl")
    wrong = {line.image_id for line in from_jsonl(raw) if line.state == "answered" and line.errors}
    order = sorted(wrong, key=lambda image_id: random_key(0, image_id))[:_DEAR]
    settling: Settling = "agreement" if lineage.settling == "agreement" else "latest"
    parts = lineage.answers.get(manifest.url, [])
    book = settle(usable_answers([manifest], {manifest.url: parts}).answers, settling)
    policy = Policy.from_yaml(
        read_version_file(manifest.store, lineage, "policy.yaml"),
        where=f"{lineage.version}/policy.yaml",
    )
    thresholds = policy.thresholds(lineage.categories)
    names = [c.name for c in lineage.categories]
    found = []
    for row, table in _rows(manifest, set(order)):
        settled = book.settled.get(row.sha256)
        if settled is not None and row.status == "ok":
            batch = box_batch(table, thresholds)
            before = Labels(
                batch.boxes[batch.accepted].astype(np.float64),
                batch.category_ids[batch.accepted].astype(np.int64),
            )
            found += list(_of_image(row, before, settled, names))
    place = {image_id: i for i, image_id in enumerate(order)}
    return sorted(found, key=lambda c: place[c.row.image_id])


def _rows(manifest: Manifest, image_ids: set[str]) -> Iterator[tuple[AnnotationRow, pa.Table]]:
    """Yield rows of queued images, each also as a table; only shards that have some are read."""
    queue = read_queue(manifest.store, hidden=True)
    shards = {item.shard_id for item in queue if item.image_id in image_ids}
    wanted = pa.array(sorted(image_ids), pa.string())
    for _, table in live_tables(manifest, only=shards):
        chosen = table.filter(pc.is_in(table.column("image_id"), wanted))
        yield from ((row, chosen.slice(i, 1)) for i, row in enumerate(table_to_rows(chosen)))


def _of_image(
    row: AnnotationRow, before: Labels, settled: Settled, names: Sequence[str]
) -> Iterator[Correction]:
    boxes = [box for box in settled.answer.boxes if box.category in names]
    after = Labels(
        np.array([box.bbox for box in boxes], np.float64).reshape(-1, 4),
        np.array([names.index(box.category) for box in boxes], np.int64),
    )
    found = pair(before.boxes, before.ids, after.boxes, after.ids)
    changed: list[tuple[str, int | None, int | None]] = []
    changed += [("missed", None, int(i)) for i in found.missed]
    changed += [("spurious", int(i), None) for i in found.spurious]
    for kind, pairs in (("wrong_class", found.wrong_class), ("misplaced", found.misplaced)):
        changed += [(kind, int(i), int(j)) for i, j in zip(*pairs, strict=True)]
    for kind, was, now in changed:
        yield Correction(row, before, after, kind, was, now, settled.answer.annotator)


def _says(c: Correction, names: Sequence[str]) -> str:
    was = names[c.before.ids[c.was]] if c.was is not None else ""
    now = names[c.after.ids[c.now]] if c.now is not None else ""
    return {
        "missed": f"missed: {now}",
        "spurious": f"nothing there: {was}",
        "wrong_class": f"{was} is {now}",
        "misplaced": f"moved: {now}",
    }[c.kind]


def draw_correction(
    c: Correction,
    raw: bytes | LabelfleetError,
    names: Sequence[str],
    value_range: ValueRange = "full",
) -> Picture:
    """Return one correction in pictures, or why there are none.

    Args:
        raw: the image's bytes.
        value_range: as in the run, for samples of more than 8 bits.
    """
    says = _says(c, names)
    try:
        if isinstance(raw, LabelfleetError):
            raise raw
        pixels = decode(raw, max_pixels=_MAX_PIXELS, value_range=value_range).pixels
        before = jpeg_uri(crop(pixels, c, c.before, c.was), _QUALITY)
        after = jpeg_uri(crop(pixels, c, c.after, c.now), _QUALITY)
    except LabelfleetError as exc:
        return Picture(c.row.image_id, c.annotator, says, "", "", exc.message)
    return Picture(c.row.image_id, c.annotator, says, before, after)


def crop(
    pixels: NDArray[np.uint8], c: Correction, labels: Labels, focus: int | None
) -> NDArray[np.uint8]:
    """Return the place of a correction with one side's labels, the one in question drawn thicker.

    Args:
        pixels: uint8 [H, W, 3], RGB, upright.
        labels, focus: what to draw, and which of them is in question.

    Returns:
        uint8 [_HIGH, _WIDE, 3], RGB.
    """
    x1, y1, x2, y2 = view(c, pixels.shape[1], pixels.shape[0])
    here = pixels[y1:y2, x1:x2]
    how = cv2.INTER_AREA if here.shape[1] > _WIDE else cv2.INTER_CUBIC
    resized = np.asarray(cv2.resize(here, (_WIDE, _HIGH), interpolation=how), np.uint8)
    scene = np.ascontiguousarray(resized[:, :, ::-1])
    scale = np.array([_WIDE / (x2 - x1), _HIGH / (y2 - y1)] * 2)
    boxes = (labels.boxes - np.array([x1, y1, x1, y1])) * scale
    colors = sv.ColorPalette.from_hex(list(PALETTE))
    at = np.arange(len(boxes))
    for which, thickness in ((at != focus, 2), (at == focus, 5)):
        if which.any():
            drawn = sv.Detections(xyxy=boxes[which], class_id=labels.ids[which].astype(int))
            scene = sv.BoxAnnotator(colors, thickness=thickness).annotate(scene, drawn)
    return np.ascontiguousarray(scene[:, :, ::-1])


def view(c: Correction, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the part of an image to show: around the correction, 4:3, inside the image."""
    boxes = [c.before.boxes[c.was]] if c.was is not None else []
    boxes += [c.after.boxes[c.now]] if c.now is not None else []
    hull = np.array([np.min(boxes, axis=0)[:2], np.max(boxes, axis=0)[2:]])
    (wide, high), (x, y) = hull[1] - hull[0], hull.mean(axis=0)
    least = _LEAST * min(width, height)
    side = max(_AROUND * wide / _WIDE, _AROUND * high / _HIGH, least / _HIGH)
    side = min(side, width / _WIDE, height / _HIGH)
    half_w, half_h = side * _WIDE / 2, side * _HIGH / 2
    x = float(np.clip(x, half_w, max(half_w, width - half_w)))
    y = float(np.clip(y, half_h, max(half_h, height - half_h)))
    x1, y1 = max(0, int(x - half_w)), max(0, int(y - half_h))
    x2, y2 = min(width, max(x1 + 1, int(x + half_w))), min(height, max(y1 + 1, int(y + half_h)))
    return x1, y1, x2, y2
