"""What is fuzzed: bytes from outside go in, rows or an error of ours come out, nothing else.

A target's ``case(seed)`` is the same bytes for the same seed, on any machine with the same
libraries; ``run`` feeds them to the product's own reader, checks what must hold whatever the bytes
say, and returns what became of them in a word.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import ConfigError, LabelfleetError, SourceError, SourceTruncated
from storage.objects.protocols import StorageOptions
from storage.records import AnnotationRow, Detections, ImageRecord, StoredObject
from storage.review.answers import read_answers
from storage.review.queue import read_head, read_queue
from storage.runs.annotation_rows import rows_to_table, table_to_rows, validate_row
from storage.runs.annotations import read_footer, read_identity, read_rows
from storage.runs.ledger import invocations, read_ledger
from storage.runs.listing import Listing
from storage.runs.manifest import RunRecord
from storage.shards.reading import read_shard
from storage.shards.selecting import tar_shards
from storage.stores.memory import MemoryStore
from tests.support.fuzz import seeds as seeds
from tests.support.fuzz.mutations import ANY, mutated
from tests.support.fuzz.pictures import picture_mutations
from tests.support.fuzz.strict import compare, newer_case
from tests.support.fuzz.tars import TAR, squeezed
from tests.support.samples.review_samples import loose_run, routed
from workers.images.prepare import OpenedImage, open_image
from workers.images.preprocessing import Preprocessing

MAX_PIXELS = 2_000_000
MAX_IMAGE_BYTES = 1 << 20
_PREPROCESSING = Preprocessing(size=(64, 64), resize_to=(64, 64))
_SHARD = "0" * 16


@dataclass(frozen=True, slots=True)
class Target:
    """One reader under fire.

    Attributes:
        cases: of a whole campaign.
        case: seed to bytes.
        run: bytes to a word; raises only what would be a bug.
    """

    name: str
    cases: int
    case: Callable[[int], bytes]
    run: Callable[[bytes, int], str]


# pictures and tars


def _case_image(seed: int) -> bytes:
    rng = random.Random(seed)
    whole = rng.choice(seeds.pictures())
    return mutated(rng, whole, picture_mutations(whole), seeds.pictures())


def _row_of(record: ImageRecord) -> AnnotationRow:
    opened = open_image(record, _SHARD, _PREPROCESSING, MAX_PIXELS)
    if not isinstance(opened, OpenedImage):
        return opened
    placed = opened.place(_PREPROCESSING, np.empty((64, 64, 3), np.uint8))
    return placed if isinstance(placed, AnnotationRow) else opened.row(Detections.empty())


def _check_rows(rows: Sequence[AnnotationRow]) -> None:
    """They can be written, and come back as they were."""
    for row in rows:
        validate_row(row, 3)
    back = list(table_to_rows(rows_to_table(rows)))
    plain = [(r.image_id, r.status, r.error, r.sha256, r.width, r.height) for r in rows]
    assert plain == [(r.image_id, r.status, r.error, r.sha256, r.width, r.height) for r in back]


def _run_image(data: bytes, seed: int) -> str:
    row = _row_of(ImageRecord("x.jpg", 0, len(data), data))
    assert row.sha256 == hashlib.sha256(data).hexdigest()
    assert row.width * row.height <= MAX_PIXELS or row.status != "ok"
    _check_rows([row])
    return row.status


def _case_tar(seed: int) -> bytes:
    rng = random.Random(seed)
    data = mutated(rng, rng.choice(seeds.tars()), TAR, seeds.tars())
    if rng.random() < 0.25:
        data = squeezed(rng, data)
        if rng.random() < 0.5:
            data = rng.choice(ANY)(rng, data)
    return data


def _run_tar(data: bytes, seed: int) -> str:
    store = MemoryStore()
    store.put("s.tar", data)
    (shard,) = tar_shards(store.list())
    found: list[ImageRecord] = []
    ended = "whole"
    try:
        found.extend(read_shard(store, shard, max_image_bytes=MAX_IMAGE_BYTES))
    except SourceTruncated:
        ended = "truncated"
    except SourceError:
        ended = "no tar"
    found = found or _stream(store, shard)
    ids = [record.image_id for record in found]
    assert len(set(ids)) == len(ids), "an id twice"
    _check_intact(data, found)
    rows = [_row_of(record) for record in found]
    assert len(rows) == len(found)
    _check_rows(rows or [_row_of(ImageRecord("x", 0, 0, b""))])
    return ended


def _stream(store: MemoryStore, shard: Any) -> list[ImageRecord]:
    """Return what ``extend`` threw away with the exception: the records before it."""
    found: list[ImageRecord] = []
    try:
        for record in read_shard(store, shard, max_image_bytes=MAX_IMAGE_BYTES):
            found.append(record)
    except SourceError:
        pass
    return found


@functools.cache
def _members(whole: bytes) -> tuple[tuple[int, bytes], ...]:
    """(where it ends, body) of every image of an undamaged tar, in order."""
    store = MemoryStore()
    store.put("s.tar", whole)
    (shard,) = tar_shards(store.list())
    records = read_shard(store, shard, max_image_bytes=MAX_IMAGE_BYTES)
    return tuple(
        ((r.offset or 0) + -(-r.nbytes // 512) * 512, r.data) for r in records if r.data is not None
    )


def _check_intact(data: bytes, found: Sequence[ImageRecord]) -> None:
    """Every image that lies before the first changed byte is there, byte for byte."""
    if data[:2] == b"\x1f\x8b":
        return
    given = Counter(r.data for r in found if r.data is not None)
    for whole in seeds.tars():
        if data[:512] != whole[:512]:
            continue
        same = next((i for i, (a, b) in enumerate(zip(data, whole, strict=False)) if a != b),
                    min(len(data), len(whole)))  # fmt: skip
        wanted = Counter(body for end, body in _members(whole) if end <= same)
        assert not wanted - given, "an image before the damage was lost"


# zips, configs, lists


def _case_zip(seed: int) -> bytes:
    rng = random.Random(seed)
    return mutated(rng, rng.choice(seeds.zips()), ANY, seeds.zips())


def _run_zip(data: bytes, seed: int) -> str:
    from pipelines.ingest.entries import survey
    from pipelines.ingest.ingest import Sizes, pack
    from pipelines.ingest.sources import open_source

    source, dest = MemoryStore(), MemoryStore()
    source.put("x.zip", data)
    try:
        opened = open_source(f"{source.url}/x.zip", StorageOptions(), max_image_bytes=1 << 20)
        done = pack(opened, dest, "x", Sizes(max_image_bytes=1 << 20))
    except LabelfleetError as exc:
        return type(exc).__name__
    assert done.images + done.errors == survey(opened).entries
    return "packed with errors" if done.errors else "packed"


def _case_text(whole: Sequence[bytes], seed: int) -> bytes:
    rng = random.Random(seed)
    data = rng.choice(whole)
    hostile = (b"&a [*a,*a]", b"<<: *w", b"!!python/object/apply:os.system [id]", b"[" * 3000,
               b"{a: " * 2000, b"2026-13-45", b"1e999", b".nan", b"!!int x", b"? [a]\n: b", b"\0",
               b"9" * 5000, b"!!binary %", b"\xff", b"\xed\xa0\x80", b"\"\\uD800\"", b"'", b"*w",
               b"!!timestamp 1", b"!!set {a}", b"true", b"0x", b"1:99:99", b"&w &w")  # fmt: skip
    if rng.random() < 0.6:
        at = rng.randrange(len(data) + 1)
        return data[:at] + rng.choice(hostile) + data[at + rng.choice((0, 1, 9)) :]
    return mutated(rng, data, ANY)


def _run_config(data: bytes, seed: int) -> str:
    from pipelines.config.run_config import load_config

    store = MemoryStore()
    store.put("c.yaml", data)
    try:
        load_config(f"{store.url}/c.yaml")
    except ConfigError as exc:
        return "refused" if "hooks.example" not in exc.message else "SECRET"
    return "read"


def _run_keys(data: bytes, seed: int) -> str:
    from pipelines.config.keys import read_keys

    store = MemoryStore()
    name = "k.parquet" if seed % 2 and data.startswith(b"PAR1") else "k.csv"
    store.put(name, data)
    try:
        read_keys(f"{store.url}/{name}", StorageOptions())
    except LabelfleetError:
        return "refused"
    return "read"


# a run's own objects


def _case_object(prefixes: Sequence[str], seed: int) -> bytes:
    """``key\\n`` and then the object's bytes, damaged."""
    rng = random.Random(seed)
    keys = [key for key in seeds.run_objects() if key.startswith(tuple(prefixes))]
    key = rng.choice(keys)
    return key.encode() + b"\n" + mutated(rng, seeds.run_objects()[key], ANY)


def _run_object(case: bytes, seed: int) -> str:
    name, _, data = case.partition(b"\n")
    key = name.decode()
    store = MemoryStore()
    for other, whole in seeds.run_objects().items():
        store.put(other, whole)
    store.put(key, data)
    try:
        _read_object(store, key, data)
    except LabelfleetError as exc:
        return type(exc).__name__
    return "read"


def _read_object(store: MemoryStore, key: str, data: bytes) -> None:
    if key.startswith("annotations/"):
        problems = []
        for read in (
            lambda: read_footer(store, StoredObject(key, len(data), "")),
            lambda: read_identity(store, key),
            lambda: _check_rows_loosely(read_rows(store, key)),
        ):
            try:
                read()
            except LabelfleetError as exc:
                problems.append(exc)
        if problems:
            raise problems[0]
    elif key.startswith("source/"):
        listing = Listing(store)
        listing.dropped()
        list(listing.live_shards())
        listing.refresh([], lambda objects: tar_shards(objects))
    elif key.startswith("review/queue/"):
        read_head(store, key)
        list(read_queue(store, hidden=True))
    elif key.startswith("review/answers/"):
        list(read_answers(store))
    elif key == seeds.RUN_RECORD:
        RunRecord.from_json(data)
    else:
        for name in invocations(store):
            list(read_ledger(store, name))


def _check_rows_loosely(rows: Iterator[AnnotationRow]) -> None:
    for row in rows:
        assert isinstance(row.image_id, str)


# answers and checkpoints


@functools.cache
def _reviewed() -> Any:
    return routed(loose_run(MemoryStore(), MemoryStore(), 3))


class Replies:
    """A Label Studio that answers what it is told to."""

    url = "http://127.0.0.1:1"

    def __init__(self, tasks: Any) -> None:
        self._tasks = tasks

    def get(self, path: str, params: Any = None) -> Any:
        replies: dict[str, Any] = {
            "/api/version": {"release": "1.23.2"},
            "/api/users": [{"id": 1, "email": "a@example.org"}],
            "/api/projects": {"results": [{"id": 1, "title": "cells"}], "next": None},
            "/api/tasks": {"tasks": self._tasks},
        }
        return replies.get(path, {})

    def send(self, *given: Any, **more: Any) -> Any:
        return {}

    def sleep(self, seconds: float) -> None:
        pass


_HOSTILE = (
    None, True, -1, 0, 1 << 70, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "\0",
    "<script>", [], [[]], {}, {"a": 1}, "9" * 5000, [None], "2026-99-99", "x" * 100_000, -0.5,
)  # fmt: skip


def _case_answers(seed: int) -> bytes:
    from pipelines.review.tasks import queued

    rng = random.Random(seed)
    items = queued(_reviewed())
    tasks: Any = [seeds.task(i + 1, q.item.sha256) for i, q in enumerate(items)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = list(_places(tasks))
        holder, name = rng.choice(places)
        if rng.random() < 0.2:
            del holder[name]
        else:
            holder[name] = rng.choice(_HOSTILE)
    return json.dumps(tasks).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inner in list(pairs):
        yield value, name
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _run_answers(data: bytes, seed: int) -> str:
    from pipelines.label_studio.client import LabelStudio
    from pipelines.review.pull import pull_run
    from storage.review.settings import ReviewSettings
    from storage.runs.manifest import Manifest

    store = MemoryStore()
    for listed in _reviewed().store.list():
        store.put(listed.key, _reviewed().store.get(listed.key))
    manifest = Manifest(store, _reviewed().record)
    server = LabelStudio(Replies(json.loads(data)))  # type: ignore[arg-type]  # its verbs suffice
    try:
        done = pull_run(manifest, server, ReviewSettings(project="cells"))
    except LabelfleetError as exc:
        return type(exc).__name__
    assert len(list(read_answers(store))) == done.answers
    return "pulled"


def _case_checkpoint(seed: int) -> bytes:
    rng = random.Random(seed)
    suffix = rng.choice(sorted(seeds.checkpoints()))
    whole = rng.choice(seeds.checkpoints()[suffix])
    return suffix.encode() + b"\n" + mutated(rng, whole, ANY, seeds.checkpoints()[suffix])


def _run_checkpoint(case: bytes, seed: int) -> str:
    from workers.checkpoints.file import read_checkpoint

    suffix, _, data = case.partition(b"\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix.decode()}"
        path.write_bytes(data)
        try:
            read_checkpoint(path).load_state_dict()
        except LabelfleetError as exc:
            return type(exc).__name__ if "\n" not in exc.message else "SEVERAL LINES"
    return "read"


TARGETS = {
    target.name: target
    for target in (
        Target("images", 10_000, _case_image, _run_image),
        Target("pictures strict", 10_000, _case_image, lambda data, _: compare(data)),
        Target("newer pictures strict", 2_000, newer_case, lambda data, _: compare(data)),
        Target("tars", 2_000, _case_tar, _run_tar),
        Target("zips", 1_000, _case_zip, _run_zip),
        Target("configs", 3_000, lambda s: _case_text((seeds.CONFIG.encode(),), s), _run_config),
        Target("key lists", 1_000, lambda s: _case_text(seeds.LISTS, s), _run_keys),
        Target("annotations", 2_000, lambda s: _case_object(("annotations/",), s), _run_object),
        Target("listings", 1_000, lambda s: _case_object(("source/",), s), _run_object),
        Target("queues and answers", 1_500, lambda s: _case_object(("review/",), s), _run_object),
        Target("run records", 1_000, lambda s: _case_object((seeds.RUN_RECORD,), s), _run_object),
        Target("pulled answers", 1_500, _case_answers, _run_answers),
        Target("checkpoints", 2_000, _case_checkpoint, _run_checkpoint),
    )
}
