"""What it takes to plan and to resume a run of very many shards, without labelling any.

    python benchmarks/plan_scale.py [--shards 100000] [--store local|weed] [--json FILE]

Makes a source of many tiny tars and a run over it, on a local disk or on a SeaweedFS of its own;
then, each in a process of its own, once it has imported what it needs:

    plan     labelfleet plan, before there is a run
    first    list the source, write the listing, find what is to do
    resume   the same again, with half of the shards committed and in the ledger
    status   labelfleet status on that

Memory is the process's peak; the half that is committed has objects of a few bytes, since a resume
only lists them. ``--loose`` takes images in groups of 1,000 instead of tars.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STEPS = ("plan", "first", "resume", "status")
GROUP = 1000


@dataclass(frozen=True)
class Place:
    """Where source and output lie, and how many shards there are."""

    source: str
    output: str
    shards: int
    loose: bool


def in_folder(name: str) -> str:
    """Some hundred folders, as data sets have them."""
    return f"{hash_of(name) % 100:02d}/{name}"


def hash_of(name: str) -> int:
    """Stable over processes."""
    return sum(i * ord(c) for i, c in enumerate(name, 1))


def fill_source(place: Place) -> None:
    """Tiny objects; what is in them is never looked at, save for three sampled tars."""
    from storage.stores.open import open_store
    from tests.support.samples.tar_samples import tar_of

    store = open_store(place.source)
    tar = tar_of(("a.jpg", b"x"))
    if place.loose:
        keys = [in_folder(f"{i:09d}.jpg") for i in range(place.shards * GROUP)]
    else:
        keys = [in_folder(f"{i:07d}.tar") for i in range(place.shards)]
    put_all(store, keys, tar if not place.loose else b"x")


def put_all(store, keys: list[str], body: bytes) -> None:  # type: ignore[no-untyped-def]
    """Put the same bytes under many keys: on a local disk as files, without an fsync each."""
    if store.url.startswith("file:"):
        root = Path(store.url.removeprefix("file://"))
        for folder in {(root / key).parent for key in keys}:
            folder.mkdir(parents=True, exist_ok=True)
        for key in keys:
            (root / key).write_bytes(body)
        return
    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(lambda key: store.put(key, body), keys, chunksize=64):
            pass


def commit_half(place: Place) -> None:
    """Every other live shard gets an object, and an entry in the ledger."""
    from storage.runs.ledger import LedgerEntry, LedgerWriter
    from storage.runs.listing import Listing
    from storage.runs.manifest import annotation_key
    from storage.stores.open import open_store

    store = open_store(place.output)
    half = list(Listing(store).live_ids())[::2]
    put_all(store, [annotation_key(shard_id) for shard_id in half], b"PAR1")
    ledger = LedgerWriter(store, "20260131T120000Z-000000")
    for i, shard_id in enumerate(half):
        seconds = {"fetch": 1.0, "decode": 2.0, "infer": 3.0, "write": 0.1}
        ledger.write(LedgerEntry("shard", 1e9 + i / 100, shard_id, {"ok": 999}, 9999, seconds))
    ledger.flush()


def measure(step: str, place: Place) -> dict[str, float]:
    """One step, in this process."""
    from pipelines.config.run_config import RunConfig
    from pipelines.config.yaml_files import parse_config
    from pipelines.labelling.open_run import OpenRun
    from pipelines.labelling.plan import plan_run
    from pipelines.labelling.work import find_work
    from pipelines.runs.status import run_status
    from storage.runs.manifest import Manifest
    from storage.stores.open import open_store
    from tests.support.samples.synthetic_run import record

    fields = {
        "name": "scale",
        "source": {"url": place.source, "shard_size": GROUP},
        "output": place.output,
        "model": {"checkpoint": "unused.pth"},
    }
    config = parse_config(RunConfig, fields, where="plan_scale")
    loaded_mib = peak_mib()
    began, cpu = time.perf_counter(), time.process_time()
    if step == "plan":
        assert plan_run(config).shards == place.shards
    elif step == "status":
        status = run_status(Manifest.open(place.output))
        assert status.committed == place.shards // 2
    else:
        output = open_store(place.output)
        manifest = Manifest.create_or_continue(output, record(source=place.source))
        run = OpenRun(manifest, open_store(place.source), None)  # type: ignore[arg-type]
        work = find_work(run, config, None)
        left = place.shards if step == "first" else place.shards // 2
        assert work.total == left == sum(1 for _ in work.shards)
    seconds = time.perf_counter() - began
    cpu_s = time.process_time() - cpu
    return {"seconds": seconds, "cpu_s": cpu_s, "loaded_mib": loaded_mib, "peak_mib": peak_mib()}


def peak_mib() -> float:
    """Return the process's peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.contextmanager
def place_of(kind: str, shards: int, loose: bool) -> Iterator[Place]:
    """An empty place on the chosen store, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="plan-scale-") as folder:
        if kind == "local":
            yield Place(f"file://{folder}/in", f"file://{folder}/out", shards, loose)
            return
        from tests.support.servers.s3 import weed_server

        with weed_server() as server:
            os.environ.update(server.env())
            bucket = server.fresh_bucket()
            yield Place(f"s3://{bucket}/in", f"s3://{bucket}/out", shards, loose)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--store", choices=["local", "weed"], default="local")
    parser.add_argument("--loose", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(measure(given.step, Place(**json.loads(given.place)))))
        return
    found: dict[str, object] = {"store": given.store, "shards": given.shards, "loose": given.loose}
    with place_of(given.store, given.shards, given.loose) as place:
        began = time.perf_counter()
        fill_source(place)
        print(f"the source is there after {time.perf_counter() - began:.0f} s", flush=True)
        for step in STEPS:
            if step == "resume":
                commit_half(place)
            command = [sys.executable, __file__, "--step", step, "--place"]
            done = subprocess.run(
                [*command, json.dumps(asdict(place))], check=True, stdout=subprocess.PIPE
            )
            figures = json.loads(done.stdout.splitlines()[-1])
            found[step] = {name: round(value, 2) for name, value in figures.items()}
            print(f"{step:8}{figures['seconds']:8.2f} s", end="")
            print(f"{figures['cpu_s']:8.2f} CPU s{figures['peak_mib']:8.0f} MiB", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
