"""How a run's frozen listing grows with loose images: bytes, pace and memory an image.

    python benchmarks/listing_scale.py [--images 4000000] [--json FILE]

The images exist by name only: a listing of made-up keys and S3-like etags goes through
``Listing.refresh``, once new and once unchanged, in groups of 1,000, into a folder on the local
disk. Memory is the process's, read along the way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.config.source import group_shards
from storage.records import StoredObject
from storage.runs.listing import Listing
from storage.stores.local import LocalStore


def rss_mib() -> float:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def made_up(images: int) -> Iterator[StoredObject]:
    """Yield that many images, made on demand."""
    for i in range(images):
        etag = hashlib.md5(i.to_bytes(8), usedforsecurity=False).hexdigest()
        yield StoredObject(f"images/{i // 10000:06d}/{etag[:12]}-{i:09d}.jpg", 150_000, etag)


def ordered(images: int) -> Iterator[StoredObject]:
    """In the order of their keys: within a folder names begin with a hash, so sort folder-wise."""
    folder: list[StoredObject] = []
    for listed in made_up(images):
        if folder and listed.key[:13] != folder[0].key[:13]:
            yield from sorted(folder, key=lambda o: o.key)
            folder = []
        folder.append(listed)
    yield from sorted(folder, key=lambda o: o.key)


def refresh(store: LocalStore, images: int) -> tuple[float, float]:
    """Return seconds and the most memory of one refresh."""
    most = 0.0

    def watched() -> Iterator[StoredObject]:
        nonlocal most
        for i, listed in enumerate(ordered(images)):
            if i % 50_000 == 0:
                most = max(most, rss_mib())
            yield listed

    began = time.perf_counter()
    Listing(store).refresh(watched(), lambda objects: group_shards(objects, 1000))
    return time.perf_counter() - began, max(most, rss_mib())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4_000_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, object] = {"images": given.images, "start_mib": round(rss_mib(), 1)}
    with tempfile.TemporaryDirectory(prefix="listing-scale-") as folder:
        store = LocalStore(folder)
        for step in ("new", "unchanged"):
            seconds, most = refresh(store, given.images)
            found[step] = {
                "images_per_s": round(given.images / seconds),
                "seconds": round(seconds, 1),
                "most_mib": round(most, 1),
            }
        parts = list(store.list("source/"))
        found["parts"] = len(parts)
        found["bytes_an_image"] = round(sum(o.nbytes for o in parts) / given.images, 1)
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
