"""A small labelled run over real image files, for tests of review."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from pipelines.policy.policy import Policy
from pipelines.routing.cost import Budget
from pipelines.routing.route import route
from pipelines.routing.survey import RouteOptions
from storage.objects.protocols import ObjectStore
from storage.records import AnnotationRow, Detections, Shard, Xyxy, shard_id_of
from storage.runs.manifest import Manifest
from tests.support.samples.synthetic_run import boxes, make_run, row

POLICY = Policy(accept=0.7, reject=0.1)
SIZE = (320, 240)
COLORS = ((220, 30, 30), (30, 140, 60), (40, 60, 200))


def picture(
    drawn: Sequence[Xyxy], *, size: tuple[int, int] = SIZE, orientation: int = 1, seed: int = 0
) -> bytes:
    """Return a JPEG with filled rectangles at ``drawn``, in pixels of the upright image.

    With an EXIF orientation the stored pixels are turned the other way, as a camera does it.
    """
    rng = np.random.default_rng(seed)
    noise = rng.integers(200, 240, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    for at, box in enumerate(drawn):
        x1, y1, x2, y2 = box
        fill = COLORS[at % len(COLORS)]
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=fill)
    exif = Image.Exif()
    if orientation != 1:
        turned = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
                  3: Image.Transpose.ROTATE_180}[orientation]  # fmt: skip
        image = image.transpose(turned)
        exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, exif=exif)
    return out.getvalue()


def three_boxes(at: int) -> Detections:
    """One box to accept, one to ask about, one that the policy rejects; different per image."""
    shift = float(at % 40)
    return boxes(
        [(20 + shift, 30, 100 + shift, 90), (150, 100 + shift, 220, 180 + shift), (5, 5, 15, 15)],
        [0.95 - at / 1e4, 0.4, 0.06],
        [0, 1, 2],
    )


def loose_run(
    source: ObjectStore,
    output: ObjectStore,
    count: int,
    *,
    found: Callable[[int], Detections] = three_boxes,
    orientation: int = 1,
    first: int = 0,
) -> Manifest:
    """Return a run over ``count`` JPEGs that are really there, labelled as ``found`` says."""
    rows = {}
    for at in range(first, first + count):
        detections = found(at)
        drawn = [tuple(map(float, box)) for box in detections.boxes[:2]]
        raw = picture(drawn, orientation=orientation, seed=at)  # type: ignore[arg-type]
        key = f"{at:05d}.jpg"
        source.put(key, raw)
        rows[key] = _row(key, raw, detections)
    return committed_run(source, output, rows)


def committed_run(
    source: ObjectStore, output: ObjectStore, rows: dict[str, AnnotationRow]
) -> Manifest:
    """Return a run whose rows are those of the objects in ``source``, all in one shard."""
    listed = tuple(o for o in source.list() if o.key in rows)
    shard = Shard(shard_id_of(listed), "images", listed)
    placed = [replace(rows[o.key], shard_id=shard.shard_id) for o in listed]
    return make_run(output, {shard: placed}, source=source.url)


def _row(key: str, raw: bytes, detections: Detections) -> AnnotationRow:
    digest = hashlib.sha256(raw).hexdigest()
    made = row(key, "0" * 16, detections, size=SIZE, nbytes=len(raw))
    return replace(made, sha256=digest, phash=int(digest[:16], 16))


def routed(manifest: Manifest, budget: str = "1000 images", *, audit: float = 0.2) -> Manifest:
    """Return the same run, after one routing that shows everything from ``reject`` up."""
    route(manifest, POLICY, "i1", RouteOptions(Budget.parse(budget), audit))
    return manifest
