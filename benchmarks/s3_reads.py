"""Small reads from s3://: by obstore, as labelfleet does them, beside boto3, its second choice.

    python -m benchmarks.s3_reads [--images 300] [--rounds 7] [--photos FOLDER]

Both sides go through S3Store and read the same objects of one SeaweedFS on this machine, in turn,
each under the condition of its etag: whole images and images by offset out of one tar, with 1 and
with 8 threads; and a worker labels the loose images with a detector that costs nothing. On boto3's
side S3Store finds no obstore. The server takes part of the same cores; CPU time is this process's.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from benchmarks.detectors import FreeDetector
from benchmarks.efficiency import options_for
from benchmarks.photos import photo_bytes, scratch, write_tars
from benchmarks.rounds import Report, Rounds, images_per_s, parser, plain
from benchmarks.worker import CORES, Worker
from storage.objects.protocols import ObjectStore
from storage.s3 import quick_reads
from storage.stores.open import open_store
from tests.support.servers.s3 import S3Server, credentials_env, weed_server

THREADS = (1, 8)
KINDS = ("whole images", "images by offset in a tar")
LABELLING = "labelling loose images, free detector"


@dataclass(frozen=True)
class Piece:
    """What one read asks for: an object, or a range of it."""

    key: str
    etag: str
    offset: int
    nbytes: int


def main() -> None:
    """Measure and write the report."""
    options = parser(__doc__, images=300, rounds=7).parse_args()
    os.environ.update(credentials_env())
    photos = photo_bytes(options.photos, options.images)
    report = Report("s3_reads", "images/s", plain(options))
    rounds = Rounds()
    with weed_server() as server, scratch() as folder:
        bucket = server.fresh_bucket()
        writer = open_store(f"s3://{bucket}", server.options)
        pieces = {KINDS[0]: put_images(writer, photos), KINDS[1]: put_tar(writer, photos)}
        first = pieces[KINDS[0]][0]
        sides = reading(opened(f"s3://{bucket}", server, first.key, first.etag), pieces)
        worker = Worker(FreeDetector(), options_for("cpu", CORES), Path(folder))
        loose = opened(f"s3://{bucket}/images", server, first.key.partition("/")[2], first.etag)
        for side, store in loose.items():
            sides[f"{side}, {LABELLING}"] = labelling(worker, store, len(photos))
        for measure in sides.values():
            measure()  # connections are open, and the batch size is found
        rounds.run(sides, options.rounds)
        worker.close()
    for name in [*(f"{k}, {n} at a time" for k in KINDS for n in THREADS), LABELLING]:
        report.add(
            f"obstore ÷ boto3, {name}",
            rounds.per_round(lambda row, n=name: row[f"obstore, {n}"] / row[f"boto3, {n}"]),  # type: ignore[misc]
        )
        report.add(
            f"CPU time boto3 ÷ obstore, {name}",
            rounds.per_round(
                lambda row, n=name: row[f"boto3, {n}"] / row[f"obstore, {n}"],  # type: ignore[misc]
                cpu=True,
            ),
        )
    report.values = rounds.values
    report.facts = {
        "KiB an image": round(statistics.mean(map(len, photos)) / 1024, 1),
        "ms of CPU an image": {
            name: round(1000 * statistics.median(spent) / len(photos), 2)
            for name, spent in rounds.cpu_s.items()
        },
    }
    report.write(options.out)


def put_images(store: ObjectStore, photos: list[bytes]) -> list[Piece]:
    """Store each photo as an object."""
    return [
        Piece(key := f"images/{number:06d}.jpg", store.put(key, photo), 0, len(photo))
        for number, photo in enumerate(photos)
    ]


def put_tar(store: ObjectStore, photos: list[bytes]) -> list[Piece]:
    """Store all photos as one tar; returns where each lies."""
    with tempfile.TemporaryDirectory() as folder:
        write_tars(Path(folder), photos, len(photos))
        (tar,) = Path(folder).iterdir()
        data = tar.read_bytes()
    etag = store.put("shards/all.tar", data)
    found, at = [], 0
    for photo in photos:
        at = data.index(photo, at)
        found.append(Piece("shards/all.tar", etag, at, len(photo)))
        at += len(photo)
    return found


def opened(url: str, server: S3Server, key: str, etag: str) -> dict[str, ObjectStore]:
    """Return a store as each side reads it, after its first read."""
    stores = {name: open_store(url, server.options) for name in ("obstore", "boto3")}
    with mock.patch.object(quick_reads, "obstore", None):
        stores["boto3"].get(key, if_match=etag)  # this makes its client
    return stores


def reading(
    stores: dict[str, ObjectStore], pieces: dict[str, list[Piece]]
) -> dict[str, Callable[[], float]]:
    """Return the sides: each reads every image once, checks its length, and says images/s."""

    def read(store: ObjectStore, piece: Piece, ranged: bool) -> bytes:
        if not ranged:
            return store.get(piece.key, if_match=piece.etag)
        return store.get_range(piece.key, piece.offset, piece.nbytes, if_match=piece.etag)

    def side(store: ObjectStore, kind: str, threads: int) -> float:
        found = pieces[kind]

        def all_of_them() -> None:
            with ThreadPoolExecutor(threads) as pool:
                lengths = pool.map(lambda p: len(read(store, p, kind == KINDS[1])), found)
                assert list(lengths) == [piece.nbytes for piece in found]

        return images_per_s(len(found), all_of_them)

    return {
        f"{name}, {kind}, {threads} at a time": (
            lambda s=store, k=kind, t=threads: side(s, k, t)  # type: ignore[misc]
        )
        for kind in KINDS
        for threads in THREADS
        for name, store in stores.items()
    }


def labelling(worker: Worker, store: ObjectStore, images: int) -> Callable[[], float]:
    """Return what labels all images of a store and says images/s."""
    return lambda: images_per_s(images, lambda: worker.label(store))


if __name__ == "__main__":
    main()
