"""verify against an attacker who may edit anything once.

An edit is of one object: a bit, a cut, a value, two values swapped, a row or a column less, the
object gone, or another of its kind in its place. ``promised`` says what docs/operations.md promises
to notice at which level; whatever the edit, verify ends with a verdict.

``LABELFLEET_EDITS`` sets the number of edits of each kind of object (6 in the test run; 200 for
the full campaign).
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.runs.verify import verify_run
from storage.errors import LabelfleetError
from storage.parquet.files import METADATA_KEY, SealedWriter, metadata_of, opened
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.whole_run import KINDS, whole_run

EDITS = int(os.environ.get("LABELFLEET_EDITS", "6"))
LEVELS = ("quick", "default", "complete", "source")
_NEVER = ("policy.yaml",)  # a person's file
_REMOVABLE = (  # whose absence nothing else at rest contradicts
    "quarantine/", "review/settings.json", "labels/latest.json", "review/not_shown.json",
    "review/refreshed.json", "review/kept.json", "left_out.json", "report/drift.json",
)  # fmt: skip


class World:
    """A run and its source in memory, put back after each edit."""

    def __init__(self) -> None:
        self.source, self.output = MemoryStore(), MemoryStore()
        self.manifest = whole_run(self.source, self.output)
        self.objects = {o.key: self.output.get(o.key) for o in self.output.list()}

    def keys(self, kind: str) -> list[str]:
        return [key for key in self.objects if key.startswith(kind)]

    def verify(self, level: str) -> list[str]:
        """What differs; a run that cannot be opened says so in one line."""
        try:
            manifest = Manifest.open(self.output.url)
            found = verify_run(
                manifest,
                quick=level == "quick",
                complete=level == "complete",
                source=self.source if level == "source" else None,
                readers=2,
            )
        except LabelfleetError as exc:
            return [exc.message]
        return [f"{d.key}: {d.what}" for d in found.differences]

    def apply(self, edit: Edit) -> None:
        if edit.body is None:
            self.output.delete(edit.key)
        else:
            self.output.put(edit.key, edit.body)

    def restore(self) -> None:
        there = {o.key for o in self.output.list()}
        for key in there - self.objects.keys():
            self.output.delete(key)
        for key, raw in self.objects.items():
            if key not in there or self.output.get(key) != raw:
                self.output.put(key, raw)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@dataclass(frozen=True, slots=True)
class Edit:
    """What was done to ``key``; ``body`` None: it was removed."""

    key: str
    how: str
    body: bytes | None


# -- edits


def bit(rng: random.Random, key: str, raw: bytes, world: World) -> Edit | None:
    if not raw:
        return None
    at = rng.randrange(len(raw))
    return Edit(key, "bit", raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :])


def cut(rng: random.Random, key: str, raw: bytes, world: World) -> Edit | None:
    return Edit(key, "cut", raw[: rng.randrange(len(raw))]) if raw else None


def removal(rng: random.Random, key: str, raw: bytes, world: World) -> Edit:
    return Edit(key, "removal", None)


def another(rng: random.Random, key: str, raw: bytes, world: World) -> Edit | None:
    """Another object of the kind in its place."""
    folder, suffix = key.rpartition("/")[0], key.rpartition(".")[2]
    others = [
        k
        for k in world.objects
        if k != key and k.rpartition("/")[0] == folder and k.endswith(suffix)
        and world.objects[k] != raw
    ]  # fmt: skip
    return Edit(key, "another", world.objects[rng.choice(others)]) if others else None


def value(rng: random.Random, key: str, raw: bytes, world: World) -> Edit | None:
    """One value of a JSON object or of one line, the digest left as it is."""
    if key.endswith(".jsonl"):
        lines = raw.splitlines()
        if not lines:
            return None
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(_changed(rng, json.loads(lines[at]))).encode()
        return Edit(key, "value", b"\n".join(lines) + b"\n")
    if not key.endswith(".json"):
        return None
    return Edit(key, "value", json.dumps(_changed(rng, json.loads(raw)), indent=2).encode())


def _changed(rng: random.Random, node: Any) -> Any:
    if isinstance(node, dict) and node:
        name = rng.choice(sorted(node))
        return {**node, name: _changed(rng, node[name])}
    if isinstance(node, list) and node:
        at = rng.randrange(len(node))
        return [*node[:at], _changed(rng, node[at]), *node[at + 1 :]]
    if isinstance(node, bool):
        return not node
    if isinstance(node, int | float):
        return node + rng.choice([1, -1, 100])
    return f"{node}x" if isinstance(node, str) else "x"


def rows(rng: random.Random, key: str, raw: bytes, world: World) -> Edit | None:
    """A row less, a column renamed, a value changed or two swapped: written anew by pyarrow."""
    if not key.endswith(".parquet"):
        return None
    with pq.ParquetFile(io.BytesIO(raw)) as file:
        table, footer = file.read(), file.metadata.metadata.get(METADATA_KEY)
    how = rng.choice(["row", "column", "swap", "value"])
    changed = _edited(rng, table, how)
    if changed is None or changed.equals(table):
        return None
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, changed.schema, write_page_checksum=True) as writer:
        writer.write_table(changed)
        writer.add_key_value_metadata({METADATA_KEY: footer})
    return Edit(key, how, sink.getvalue())


def _edited(rng: random.Random, table: pa.Table, how: str) -> pa.Table | None:
    if how == "row" and table.num_rows:
        gone = rng.randrange(table.num_rows)
        left = [i for i in range(table.num_rows) if i != gone]
        return table.take(pa.array(left, pa.int64()))
    if how == "column":
        at = rng.randrange(table.num_columns)
        return table.rename_columns(
            [n.swapcase() if i == at else n for i, n in enumerate(table.column_names)]
        )
    at = rng.randrange(table.num_columns)
    column = table.column(at).to_pylist()
    if how == "swap" and table.num_rows > 1:
        i, j = rng.sample(range(table.num_rows), 2)
        column[i], column[j] = column[j], column[i]
    elif how == "value" and table.num_rows:
        i = rng.randrange(table.num_rows)
        if isinstance(column[i], bool | bytes) or not isinstance(column[i], int | float | str):
            return None
        column[i] = column[i] + (1 if not isinstance(column[i], str) else "x")
    else:
        return None
    try:
        array = pa.array(column, table.schema.field(at).type)
    except (pa.ArrowException, OverflowError, ValueError):
        return None
    return table.set_column(at, table.schema.field(at), array)


EDITORS: tuple[Callable[[random.Random, str, bytes, World], Edit | None], ...] = (
    bit, cut, removal, another, value, rows,
)  # fmt: skip


# -- what is promised


def promised(level: str, edit: Edit, world: World) -> bool:
    """Whether verify has to notice an edit at a level; see docs/operations.md."""
    key, raw = edit.key, world.objects[edit.key]
    if key.startswith(_NEVER):
        return False
    if edit.how == "removal":
        if key.startswith("review/gold/"):
            return level != "quick"  # the queue's rows name the images
        return not key.startswith(_REMOVABLE) and not _is_last_of_its_kind(key, world)
    if edit.body == raw or _says_the_same(edit, raw):
        return False
    if level != "quick" or not key.endswith((".parquet", ".onnx")):
        return True
    return edit.how in ("cut", "another", "row", "column", "swap", "value") and (
        key.endswith(".parquet") or edit.how == "cut"
    )


def _is_last_of_its_kind(key: str, world: World) -> bool:
    """Of numbered parts only a gap shows, unless something names the part."""
    if re.fullmatch(r"source/\d+\.parquet", key):  # the newest here lists one unlabelled tar
        return key == max(k for k in world.keys("source/") if "/parts/" not in k)
    if not key.startswith(("review/queue/", "review/answers/", "ledger/")):
        return False
    named = {k for v in ("v0001", "v0002") for k in _answers_of(world, v)}
    folder = f"{key.rpartition('/')[0]}/"
    return key == max(world.keys(folder)) and key not in named


def _answers_of(world: World, version: str) -> list[str]:
    lineage = json.loads(world.objects[f"labels/{version}/lineage.json"])
    return [key for keys in lineage["answers"].values() for key in keys]


def _says_the_same(edit: Edit, raw: bytes) -> bool:
    """A record whose values are those that it had: white space, or the digest's own name."""
    if not edit.key.endswith(".json"):
        return False
    try:
        found = json.loads(edit.body or b"")
        before = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict):
        return False
    kept = {k: v for k, v in found.items() if k in before and k != "digest"}
    return kept == {k: v for k, v in before.items() if k != "digest"} and (
        found.get("digest") in (None, before.get("digest"))
    )


# -- tests


def test_before_any_edit_only_the_quarantined_tar_differs(world: World) -> None:
    for level in ("quick", "default", "source"):
        assert world.verify(level) == [], level
    (left,) = world.verify("complete")
    assert "quarantined: tars/poison.tar" in left


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_promise_is_kept_and_nothing_ends_it(world: World, kind: str) -> None:
    rng = random.Random(zlib.crc32(kind.encode()))
    keys = world.keys(kind)
    assert keys
    before = {level: set(world.verify(level)) for level in LEVELS}
    noticed = 0
    for number in range(EDITS):
        key = rng.choice(keys)
        edit = EDITORS[number % len(EDITORS)](rng, key, world.objects[key], world)
        edit = edit or bit(rng, key, world.objects[key], world) or removal(rng, key, b"", world)
        world.apply(edit)
        try:
            for level in ("quick", "default", rng.choice(("complete", "source"))):
                found = set(world.verify(level)) - before[level]
                noticed += bool(found)
                if promised(level, edit, world):
                    assert found, (level, edit.key, edit.how)
        finally:
            world.restore()
    assert noticed or kind in _NEVER


FORGED = ("sha256", "nbytes", "width", "offset")


@pytest.mark.parametrize("column", FORGED)
def test_a_forged_seal_is_unmasked_by_the_source_alone(world: World, column: str) -> None:
    for key in world.keys("annotations/"):
        with opened(world.objects[key], key) as file:
            table, footer = file.read(), metadata_of(file, key)
        ok = [i for i, s in enumerate(table.column("status").to_pylist()) if s == "ok"]
        if not ok:
            continue
        values = table.column(column).to_pylist()
        values[ok[0]] = "ab" * 32 if column == "sha256" else values[ok[0]] + 1
        at = table.schema.get_field_index(column)
        column_type = table.schema.field(at)
        forged = table.set_column(at, column_type, pa.array(values, column_type.type))
        with tempfile.TemporaryDirectory() as folder:
            writer = SealedWriter(Path(folder) / "x", table.schema)
            writer.write(forged)
            writer.finish(footer)
            world.output.put(key, Path(folder) / "x")
        assert world.verify("default") == []
        (found,) = world.verify("source")
        assert "than the row" in found
        world.restore()
        return
