"""How long a filter of ``labelfleet browse`` takes to its first paint, on a synthetic run.

    python -m benchmarks.browse [--images 200000] [--boxes 8] [--chromium]

Makes the run's Parquet, builds the page's tables, and times each filter twice: the reply over HTTP,
and, with --chromium, from the change of a field to the first tile on the screen.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import httpx
import numpy as np

from pipelines.browse.index import build_index, find_sources
from storage.errors import LabelfleetError
from storage.objects.protocols import StorageOptions
from storage.records import AnnotationRow, Shard
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.support.samples.synthetic_run import image_shard, make_run, random_boxes, row

FILTERS = {
    "everything": {},
    "a class": {"class": "WBC"},
    "a class and a score": {"class": "WBC", "low": "0.9"},
    "part of a name": {"text": "77"},
    "near duplicates": {"view": "twins"},
    "most boxes": {"order": "boxes"},
    "SQL": {"sql": "SELECT n FROM boxes GROUP BY n HAVING count(*) > 9"},
}
_SHARD = 2_000


def synthetic(folder: Path, images: int, boxes: int) -> Manifest:
    """A run of rows without images: what is timed is the tables."""
    rng = np.random.default_rng(0)
    shards: dict[Shard, list[AnnotationRow]] = {}
    for first in range(0, images, _SHARD):
        keys = [
            f"{at // 10_000:03}/{at:07}.jpg" for at in range(first, min(images, first + _SHARD))
        ]
        shard = image_shard(*keys)
        shards[shard] = list(_rows(rng, keys, shard.shard_id, boxes))
    return make_run(open_store(str(folder / "run")), shards, source=str(folder / "source"))


def _rows(
    rng: np.random.Generator, keys: list[str], shard_id: str, boxes: int
) -> Iterator[AnnotationRow]:
    from dataclasses import replace

    for key in keys:
        digest = hashlib.sha256(key.encode()).hexdigest()
        found = random_boxes(rng, int(rng.poisson(boxes)), 640, 480)
        phash = int(digest[:16], 16) if rng.random() > 0.02 else 12345
        yield replace(row(key, shard_id, found), sha256=digest, phash=phash)


def painted(address: str, told: dict[str, str]) -> float:
    """Seconds from setting the address to the first tile, in headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,900"):
        options.add_argument(argument)
    service = webdriver.ChromeService(str(shutil.which("chromedriver")))
    with webdriver.Chrome(options=options, service=service) as page:
        page.set_script_timeout(60)
        page.get(address)
        page.execute_async_script(_UNTIL_DRAWN, "")
        return float(page.execute_async_script(_UNTIL_DRAWN, urlencode(told)))


_UNTIL_DRAWN = """
const [hash, done] = arguments, began = performance.now();
document.getElementById("count").textContent = "";
if (hash) location.hash = hash; else window.dispatchEvent(new Event("hashchange"));
const look = () => {
  const drawn = document.querySelector(".tile, #table tr");
  if (document.getElementById("count").textContent && drawn)
    requestAnimationFrame(() => done((performance.now() - began) / 1000));
  else setTimeout(look, 5);
};
look();
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--boxes", type=int, default=8)
    parser.add_argument("--chromium", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = synthetic(folder, asked.images, asked.boxes)
        (folder / "source").mkdir()
        (folder / "index").mkdir()
        began = time.perf_counter()
        path = build_index(find_sources(run, None, None), folder / "index")
        print(
            f"{asked.images:,} images: tables in {time.perf_counter() - began:.1f} s, "
            f"{path.stat().st_size / 1e6:.0f} MB"
        )
        address = _served(run)
        with httpx.Client(follow_redirects=True) as client:
            client.get(address)
            base = address.partition("/?")[0]
            print("| filter | reply, s | first paint, s |\n|---|---|---|")
            for name, told in FILTERS.items():
                began = time.perf_counter()
                reply = client.get(f"{base}/api/images", params={**told, "limit": 120}, timeout=60)
                took = time.perf_counter() - began
                reply.raise_for_status()
                paint = f"{painted(address, told):.2f}" if asked.chromium else ""
                print(f"| {name} ({reply.json()['total']:,}) | {took:.2f} | {paint} |")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def _served(run: Manifest) -> str:
    """The address of a page served by a thread that ends with the process."""
    from pipelines.browse.serve import browse

    said: list[str] = []
    told = threading.Event()

    def say(address: str) -> None:
        said.append(address)
        told.set()

    def serve() -> None:
        try:
            browse(run, StorageOptions(), version=None, other=None, port=0, say=say)
        except LabelfleetError as exc:
            said.append(str(exc))
            told.set()

    threading.Thread(target=serve, daemon=True).start()
    told.wait()
    return said[0]


if __name__ == "__main__":
    main()
