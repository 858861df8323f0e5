"""Reads of loose images from s3://: boto3, which labelfleet uses, beside obstore.

    python -m benchmarks.obstore_reads [--images 300] [--rounds 7] [--photos FOLDER]

Both read the same objects of one SeaweedFS on this machine, in turn, each under the condition of
its etag: whole images, and images by offset out of one tar, with 1 and with 8 threads. boto3 goes
through S3Store, with its retries and checks; obstore is called directly, so its side is the most
that a store on it could reach. The server takes part of the same cores; CPU time is this process's.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store as ObstoreS3

from benchmarks.photos import photo_bytes, write_tars
from benchmarks.rounds import Report, Rounds, images_per_s, parser, plain
from storage.clouds.reading import whole
from storage.objects.protocols import ObjectStore
from storage.stores.open import open_store
from tests.support.servers.s3 import ACCESS_KEY, SECRET_KEY, S3Server, credentials_env, weed_server

THREADS = (1, 8)
KINDS = ("whole images", "images by offset in a tar")


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
    report = Report("obstore_reads", "images/s", plain(options))
    rounds = Rounds()
    with weed_server() as server:
        bucket = server.fresh_bucket()
        store = open_store(f"s3://{bucket}", server.options)
        pieces = {KINDS[0]: put_images(store, photos), KINDS[1]: put_tar(store, photos)}
        sides = reading(store, obstore_client(server, bucket), pieces)
        for read in sides.values():
            read()  # connections are open from now on
        rounds.run(sides, options.rounds)
    for kind in KINDS:
        for threads in THREADS:
            name = f"{kind}, {threads} at a time"
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


def obstore_client(server: S3Server, bucket: str) -> Any:
    """Return obstore's own client of the same bucket."""
    return ObstoreS3(
        bucket,
        config={
            "endpoint": server.endpoint_url, "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY, "region": "us-east-1",
        },
        client_options={"allow_http": True},
    )  # fmt: skip


def reading(
    store: ObjectStore, client: Any, pieces: dict[str, list[Piece]]
) -> dict[str, Callable[[], float]]:
    """Return the sides: each reads every image once, checks its length, and says images/s."""

    def by_boto3(piece: Piece, ranged: bool) -> bytes:
        if not ranged:
            return store.get(piece.key, if_match=piece.etag)
        return store.get_range(piece.key, piece.offset, piece.nbytes, if_match=piece.etag)

    def by_obstore(piece: Piece, ranged: bool) -> bytes:
        asked: Any = {"if_match": f'"{piece.etag}"'}
        if ranged:
            asked["range"] = (piece.offset, piece.offset + piece.nbytes)
        return whole(obstore.get(client, piece.key, options=asked), piece.key)

    def side(
        read: Callable[[Piece, bool], bytes], found: list[Piece], ranged: bool, threads: int
    ) -> float:
        def all_of_them() -> None:
            with ThreadPoolExecutor(threads) as pool:
                lengths = pool.map(lambda piece: len(read(piece, ranged)), found)
                assert list(lengths) == [piece.nbytes for piece in found]

        return images_per_s(len(found), all_of_them)

    return {
        f"{name}, {kind}, {threads} at a time": (
            lambda r=read, k=kind, t=threads: side(r, pieces[k], k == KINDS[1], t)  # type: ignore[misc]
        )
        for kind in KINDS
        for threads in THREADS
        for name, read in (("boto3", by_boto3), ("obstore", by_obstore))
    }


if __name__ == "__main__":
    main()
