"""What the fuzzers start from: small whole files of every kind that is read from outside."""

from __future__ import annotations

import functools
import io
import json
import tarfile
import tempfile
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from storage.review.answers import Answer, DeletedBox, ReviewedBox, append_answers
from storage.review.queue import QueueHead, Reason, ReviewItem, Stratum, write_queue
from storage.runs.manifest import RUN_KEY, Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.image_samples import PLAIN, RGB, encode, picture
from tests.support.samples.synthetic_run import (
    CLASSES,
    boxes,
    commit_rows,
    image_shard,
    list_shards,
    record,
    row,
    tar_shard,
)
from tests.support.samples.tar_samples import tar_of


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """Return every format and colour model that is labelled, and the odder things those formats can
    do."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "said"
    frames = [Image.fromarray(picture(20, 30, seed)) for seed in range(3)]
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    large = Image.fromarray(picture(240, 320))
    odd = [
        encode(RGB, "JPEG", exif=exif),
        encode(large, "JPEG", progressive=True, exif=exif),
        encode(RGB, "WEBP", exif=exif),
        encode(RGB, "PNG", exif=exif),
        encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        encode(deep, "PNG"),
        encode(deep, "TIFF"),
        encode(RGB.convert("F"), "TIFF"),
        encode(RGB.convert("LAB"), "TIFF"),
        encode(RGB, "TIFF", compression="tiff_lzw", tiffinfo={278: 5}),
        encode(large, "TIFF", compression="packbits"),
    ]
    return (*PLAIN.values(), *odd)


@functools.cache
def tars() -> tuple[bytes, ...]:
    """Return shards as different programs write them, with links, long names and empty members."""
    some = list(pictures())[:: len(pictures()) // 6]
    members = [(f"d/{i}.jpg", body) for i, body in enumerate(some)]
    link = ("l.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})
    long = ("n" * 180 + "/x.png", some[1])
    odd = ("d/0.jpg", some[0]), ("ü\udcff.jpg", some[2]), ("notes.txt", b"text" * 300)
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    plain = [tar_of(*members, tar_format=f) for f in formats]
    return (
        *plain,
        tar_of(*members[:2], link, *odd, long, tar_format=tarfile.GNU_FORMAT),
        tar_of(*members[:2], long, link, *odd, tar_format=tarfile.PAX_FORMAT),
        tar_of(*[(f"{i}.png", some[1]) for i in range(30)]),
        plain[0] + plain[2],
    )


@functools.cache
def zips() -> tuple[bytes, ...]:
    """Stored, deflated, and the two rarely used compressions."""
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    made = []
    for kind in kinds:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", kind) as archive:
            for i, body in enumerate(list(pictures())[::9]):
                archive.writestr(f"d/{i}.jpg", body)
            archive.writestr("notes.txt", "text")
        made.append(file.getvalue())
    return tuple(made)


CONFIG = """\
name: cells
source: {url: /data/photos, kind: auto, include: ["*.jpg"], exclude: [], shard_size: 16}
output: /data/out
model:
  checkpoint: /models/x.pth
  name: yolo_nas_s
  classes: [RBC, WBC, "Platelets"]
  image_size: [480, 640]
  score_floor: 0.05
workers: &w {count: 2, gpus: auto, cpus: 1.5}
policy: {accept: 0.7, reject: 0.1}
review: {url: "http://localhost:8080", project: cells, budget: 240 minutes, audit: 0.2}
storage: {endpoint_url: "http://127.0.0.1:9000", attempts: 3}
max_pixels: 1000000
notify: https://hooks.example/x
max_hours: 2.5
"""


@functools.cache
def run_objects() -> dict[str, bytes]:
    """Return a small run's objects by key: run.json, listing, annotations, queue, answers."""
    store = MemoryStore()
    manifest = Manifest.create_or_continue(store, record())
    first, second = tar_shard("a.tar"), image_shard("1.jpg", "2.jpg", "3.jpg")
    list_shards(store, [first, second])
    some = boxes([(1, 2, 30, 40), (5, 5, 9, 9)], [0.9, 0.3], [0, 2])
    commit_rows(manifest, first, [row(f"a.tar/{i}.jpg", first.shard_id, some) for i in range(40)])
    commit_rows(
        manifest, second,
        [row("1.jpg", second.shard_id), row("2.jpg", second.shard_id, status="missing", error="no"),
         row("3.jpg", second.shard_id, some)],
    )  # fmt: skip
    manifest.set_aside(tar_shard("c.tar"), ["poison"], "i")
    write_queue(store, 0, _HEAD, [_item(i) for i in range(9)])
    append_answers(store, [_answer(i) for i in range(9)])
    return {listed.key: store.get(listed.key) for listed in store.list()}


RUN_RECORD = RUN_KEY
_HEAD = QueueHead(
    invocation="i", made_at="2026-01-31T12:00:00+00:00", seed=7, budget="500 images", audit=0.2,
    cost={"per_image_s": 7.8}, policy={"accept": 0.7, "reject": 0.1}, model_sha256="ab" * 32,
    strata=(Stratum("i", 1000, 100),),
)  # fmt: skip


def _item(i: int) -> ReviewItem:
    return ReviewItem(
        f"a.tar/{i}.jpg", "0" * 16, 512, 1000, f"{i:064x}", i, 320, 240, i, "audit", i % 2 == 0,
        "i", i, 0.1, 1.5, 7.0, (Reason("audit", 1.0),),
    )  # fmt: skip


def _answer(i: int) -> Answer:
    return Answer(
        f"a.tar/{i}.jpg", f"{i:064x}", i, i, "a@example.org", 3.5,
        datetime(2026, 1, 31, 12, i, tzinfo=UTC), False,
        (ReviewedBox((1.0, 2.0, 3.0, 4.0), "RBC", "kept", 0.5),),
        (DeletedBox((1.0, 2.0, 3.0, 4.0), "WBC", 0.25),), "m", False,
    )  # fmt: skip


def task(number: int, sha256: str) -> dict[str, Any]:
    """Return a task as Label Studio gives it back: a prediction, an answer, a skip."""

    def region(name: str, label: str, x: float) -> dict[str, Any]:
        return {
            "id": name, "from_name": "label", "to_name": "image", "type": "rectanglelabels",
            "original_width": 320, "original_height": 240, "image_rotation": 0, "score": 0.5,
            "origin": "prediction",
            "value": {"x": x, "y": 10.0, "width": 20.0, "height": 5.0, "rotation": 0,
                      "rectanglelabels": [label]},
        }  # fmt: skip

    def annotation(offset: int, *, cancelled: bool = False) -> dict[str, Any]:
        return {
            "id": 10 * number + offset, "completed_by": 1, "was_cancelled": cancelled,
            "lead_time": 12.5, "updated_at": "2026-01-31T12:00:00.123456Z",
            "parent_prediction": number,
            "result": [region("box0", "WBC", 5.0), region("n", "RBC", 1)],
        }  # fmt: skip

    return {
        "id": number,
        "data": {"image": "s3://b/x.jpg", "labelfleet_key": sha256, "image_id": "x.jpg"},
        "annotations": [annotation(0), annotation(1, cancelled=True)],
        "predictions": [
            {"id": number, "model_version": "m", "result": [region("box0", "RBC", 5.0)]}
        ],
        "total_annotations": 1, "cancelled_annotations": 1, "drafts": [],
    }  # fmt: skip


@functools.cache
def checkpoints() -> dict[str, tuple[bytes, ...]]:
    """Whole checkpoints by suffix: torch's zip and legacy containers, safetensors."""
    from tests.support.samples.checkpoint_samples import NAMES, saved, weights
    from workers.checkpoints.description import Description
    from workers.checkpoints.file import save_checkpoint
    from workers.images.preprocessing import Preprocessing

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pth"
        said = {"net": weights(), "processing_params": {"class_names": list(NAMES), "iou": 0.6}}
        plain = [saved(path, said, legacy=legacy).read_bytes() for legacy in (False, True)]
        own = Path(folder) / "x.safetensors"
        save_checkpoint(
            own,
            weights(),
            Description(
                name="yolo_nas_s",
                arch_params=None,
                classes=NAMES,
                preprocessing=Preprocessing(size=(64, 64), resize_to=(64, 64)),
                licence="MIT",
                training={"epochs": 1},
            ),
        )
        return {".pth": tuple(plain), ".safetensors": (own.read_bytes(),)}


LISTS = (
    b"key\na.jpg\nb/c.jpg\n\xc3\xbc.jpg\n",
    b'id,key,x\n1,a.jpg,3\n2,"b,c.jpg",4\n',
    b"\xef\xbb\xbfa.jpg\nb.jpg\n",
    json.dumps({"key": ["a.jpg"]}).encode(),
)
CLASS_NAMES = CLASSES
