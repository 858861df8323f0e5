"""The run's record at its output: run.json, the commits, the quarantine, what was left out.

The existence of an annotation object is the only commit of its shard. This module handles layout
and conditional puts; storage/runs/listing.py knows which shards exist, storage/runs/ledger.py what
each invocation saw.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from storage.errors import (
    AlreadyExists,
    ConfigError,
    NotAtomic,
    ObjectNotFound,
    RunMismatch,
    StorageError,
)
from storage.objects.json_records import json_record, parse_record, read_record
from storage.objects.prefetch import in_order
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.records import Category, RunIdentity, Shard, StoredObject
from storage.runs.annotations import ShardFooter, read_footer
from storage.stores.open import open_store
from storage.urls import distinct_ends, numbered

RUN_KEY = "run.json"
LEFT_OUT_KEY = "left_out.json"
ANNOTATIONS = "annotations/"
QUARANTINE = "quarantine/"
_SETTINGS = {  # of `inference`, those that readers of a run rely on
    "preprocessing": (dict,), "score_floor": (float, int), "max_image_bytes": (int,),
    "max_frames": (int,), "device": (str,), "runtime": (str,), "precision": (str,),
    "artefact": (dict,),
}  # fmt: skip
_HEX = "0123456789abcdef"
_REMOVE = "delete it; the next run tries the shard again, and records what fails"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The contents of run.json.

    Attributes:
        identity: repeated in every annotation object.
        source: url, kind, include, exclude, shard_size: where the images are.
        inference: every setting that moves a box; a run never mixes two of them.
        created_at: ISO 8601, UTC.
        remarks: notes for people on how the model was interpreted.
    """

    identity: RunIdentity
    source: dict[str, Any]
    inference: dict[str, Any]
    created_at: str
    remarks: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """Canonical JSON, readable by people."""
        return json_record({"version": 1, **asdict(self)})

    @staticmethod
    def from_json(raw: bytes) -> RunRecord:
        """Parse ``to_json``'s bytes. Raises ConfigError if they are not a run.json of ours."""
        try:
            return parse_record(raw, RUN_KEY, _run_record)
        except StorageError as exc:
            raise ConfigError(
                exc.message,
                hint="the output is not a labelfleet run, or its run.json was damaged or edited: "
                "restore it, or choose another output; an edit that is meant needs its `digest` "
                "removed",
            ) from exc


def _run_record(fields: dict[str, Any]) -> RunRecord:
    if fields.pop("version") != 1:
        raise ConfigError("run.json was written by a newer labelfleet", hint="update it")
    identity = fields.pop("identity")
    categories = tuple(Category(**c) for c in identity.pop("categories"))
    remarks = tuple(str(text) for text in fields.pop("remarks", ()))
    made = RunIdentity(**identity, categories=categories)
    record = RunRecord(identity=made, remarks=remarks, **fields)
    _check_types(record)
    return record


def _check_types(record: RunRecord) -> None:
    """Raise TypeError or ValueError where a field is not what its readers rely on."""
    texts = {"created_at": record.created_at, "source.url": record.source["url"]}
    texts |= {name: one for name, one in asdict(record.identity).items() if name != "categories"}
    for number, one in enumerate(record.identity.categories):
        texts[f"the name of class {number}"] = one.name
        if (type(one.id), type(one.official_id), one.id) != (int, int, number):
            raise ValueError(f"class {number} has the ids {one.id!r:.40}, {one.official_id!r:.40}")
    moved_from = record.source.get("moved_from", ())
    texts |= {f"source.moved_from {number}": url for number, url in enumerate(moved_from)}
    for name, value in texts.items():
        if type(value) is not str:
            raise TypeError(f"{name} is {value!r:.40}, not a text")
    if type(record.inference) is not dict:
        raise TypeError(f"inference is {record.inference!r:.40}, not an object")
    for name, kinds in _SETTINGS.items():
        value = record.inference.get(name)
        if value is not None and type(value) not in kinds:
            raise TypeError(f"inference.{name} is {value!r:.40}")
    artefact = record.inference.get("artefact")
    if artefact is not None and not all(
        type(artefact.get(name)) is str
        for name in ("url" if "url" in artefact else "key", "sha256")
    ):
        raise TypeError(f"inference.artefact is {artefact!r:.40}, without url or key, or sha256")


@dataclass(frozen=True, slots=True)
class Commit:
    """How an attempt to commit ended; ``won``: this attempt's rows are the shard's."""

    shard_id: str
    won: bool
    footer: ShardFooter


class Manifest:
    """One run at its output URL. Thread-safe and picklable, as its store is."""

    def __init__(self, store: ObjectStore, record: RunRecord) -> None:
        self.store = store
        self.record = record

    @property
    def url(self) -> str:
        """The run's output URL."""
        return self.store.url

    @staticmethod
    def open(url: str, options: StorageOptions | None = None) -> Manifest:
        """Open an existing run. Raises ConfigError if there is none."""
        store = open_store(url, options)
        try:
            return Manifest(store, RunRecord.from_json(store.get(RUN_KEY)))
        except ObjectNotFound as exc:
            raise ConfigError(
                f"no run at {store.url}: it has no run.json",
                hint="give the `output` of a run; `labelfleet run CONFIG` creates one",
            ) from exc

    @staticmethod
    def create_or_continue(store: ObjectStore, record: RunRecord) -> Manifest:
        """Create the run, or continue the existing one.

        Raises:
            RunMismatch: the existing run has another inference config or source; the message
                names the keys.
            NotAtomic: the store cannot hold a run.
        """
        if not store.atomic_create:
            raise NotAtomic(
                f"{store.url} cannot create objects atomically, so two writers could mix labels",
                hint="use an output on file://, s3://, gs:// or az://",
            )
        try:
            store.create(RUN_KEY, record.to_json())
            return Manifest(store, record)
        except AlreadyExists:
            existing = RunRecord.from_json(store.get(RUN_KEY))
        refuse_mismatch(store.url, existing, record)
        return Manifest(store, existing)

    def committed(self) -> set[str]:
        """Return the ids of committed shards, listed in parallel by their first hex digit."""

        def listed(digit: str) -> list[str]:
            keys = (o.key for o in self.store.list(f"{ANNOTATIONS}{digit}"))
            return [shard_id_of_key(key) for key in keys if key.endswith(".parquet")]

        return set().union(*in_order(_HEX, listed, readers=len(_HEX)))

    def annotation_objects(self) -> Iterator[StoredObject]:
        """Yield every annotation object, live or not, ordered by key."""

        def listed(digit: str) -> list[StoredObject]:
            return [
                o for o in self.store.list(f"{ANNOTATIONS}{digit}") if o.key.endswith(".parquet")
            ]

        with closing(in_order(_HEX, listed, readers=len(_HEX))) as parts:
            for part in parts:
                yield from part

    def commit(self, footer: ShardFooter, spool: Path) -> Commit:
        """Commit a shard's rows by one conditional put.

        The attempt id in the footer distinguishes a rival's object from our own after a lost
        reply.
        """
        key = annotation_key(footer.shard_id)
        try:
            self.store.create(key, spool)
            return Commit(footer.shard_id, True, footer)
        except AlreadyExists:
            winner = self.footer(footer.shard_id)
            return Commit(footer.shard_id, winner.attempt == footer.attempt, winner)

    def footer(self, shard_id: str) -> ShardFooter:
        """Return the footer of a shard. Raises ObjectNotFound if it is not committed."""
        return read_footer(self.store, self.store.head(annotation_key(shard_id)))

    def move_source(self, url: str) -> None:
        """Record a new URL of the source. The caller holds the lock."""
        before = list(self.record.source.get("moved_from", ()))
        if self.record.source["url"] != url:
            before.append(self.record.source["url"])
        source = {**self.record.source, "url": url, "moved_from": before}
        self.record = replace(self.record, source=source)
        self.store.put(RUN_KEY, self.record.to_json())

    def note_left_out(self, counts: Mapping[str, int]) -> None:
        """Record what the newest listing skipped, by reason."""
        if dict(counts) != self.left_out():
            self.store.put(LEFT_OUT_KEY, json_record({"counts": dict(counts)}))

    def left_out(self) -> dict[str, int]:
        """Return what the newest listing skipped, by reason; empty if that was not recorded."""
        try:
            return read_record(self.store, LEFT_OUT_KEY, _left_out)
        except ObjectNotFound:
            return {}

    def set_aside(self, shard: Shard, errors: list[str], invocation: str) -> None:
        """Record a shard that failed its last attempt."""
        body = {
            "shard_id": shard.shard_id,
            "key": shard.key,
            "objects": [{"key": o.key, "nbytes": o.nbytes, "etag": o.etag} for o in shard.objects],
            "errors": errors,
            "invocation": invocation,
        }
        self.store.put(f"{QUARANTINE}{shard.shard_id}.json", json_record(body))

    def quarantined_ids(self) -> set[str]:
        """Return the ids of quarantined shards, without reading their records."""
        keys = (o.key for o in self.store.list(QUARANTINE) if o.key.endswith(".json"))
        return {key.removeprefix(QUARANTINE).removesuffix(".json") for key in keys}

    def quarantined(self) -> dict[str, dict[str, Any]]:
        """Quarantine records by shard id. Raises StorageError when one is damaged."""
        return {
            shard_id: self.quarantine_record(shard_id)
            for shard_id in sorted(self.quarantined_ids())
        }

    def quarantine_record(self, shard_id: str) -> dict[str, Any]:
        """Return one quarantine record. Raises ObjectNotFound; StorageError when it is damaged."""
        key = f"{QUARANTINE}{shard_id}.json"
        record = read_record(self.store, key, _quarantine_record)
        if record["shard_id"] != shard_id:
            raise StorageError(f"{key} is the record of shard {record['shard_id']}", hint=_REMOVE)
        return record

    def release(self, shard_id: str) -> None:
        """Remove a quarantine record: the shard was labelled after all."""
        self.store.delete(f"{QUARANTINE}{shard_id}.json")


def _quarantine_record(fields: dict[str, Any]) -> dict[str, Any]:
    found = {name: fields[name] for name in ("shard_id", "key", "objects", "errors", "invocation")}
    texts = [found["shard_id"], found["key"], found["invocation"], *found["errors"]]
    texts += [one["key"] for one in found["objects"]]
    if any(type(text) is not str for text in texts):
        raise TypeError("a key or an error is not a text")
    return found


def _left_out(fields: dict[str, Any]) -> dict[str, int]:
    counts = dict(fields["counts"])
    if any(type(count) is not int for count in counts.values()):
        raise TypeError("a count is not a whole number")
    return counts


def annotation_key(shard_id: str) -> str:
    """Return the key of a shard's annotation object."""
    return f"{ANNOTATIONS}{shard_id}.parquet"


def shard_id_of_key(key: str) -> str:
    """Return the shard id in an annotation object's key."""
    return key.removeprefix(ANNOTATIONS).removesuffix(".parquet")


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differing(a, b, f"{path}{key}.")
        elif a != b:
            yield f"{path}{key} ({a!r} there, {b!r} now)"


def _classes(record: RunRecord) -> dict[str, Any]:
    return {"classes": [c.name for c in record.identity.categories]}


def refuse_mismatch(url: str, existing: RunRecord, wanted: RunRecord) -> None:
    """Raise RunMismatch where a run may not go on as ``wanted``; the message names the keys."""
    there, now = existing.source["url"], wanted.source["url"]
    moved = list(_differing({"source.url": there}, {"source.url": now}))
    differing = [
        *moved,
        *_differing(_classes(existing), _classes(wanted)),
        # Through JSON, since tuples come back as lists.
        *_differing(existing.inference, json.loads(json.dumps(wanted.inference))),
    ]
    if differing:
        hint = "one run never mixes two models or settings: choose another `output`"
        if differing == moved:
            move = shlex.join(["labelfleet", "relocate", url, now])
            hint = f"if the same images lie there now: `{move}`; otherwise choose another `output`"
        raise RunMismatch(f"{url} holds a run that differs in: {'; '.join(differing)}", hint=hint)


def distinct_names(runs: Sequence[Manifest]) -> list[str]:
    """Return the runs' names for people, with the end of its place where two have one name.

    All of them differ, and none holds a secret.
    """
    names = [run.record.identity.name for run in runs]
    shown = []
    for at, name in enumerate(names):
        same = [n for n, other in enumerate(names) if other == name]
        ends = distinct_ends([runs[n].url for n in same])
        shown.append(name if len(same) == 1 else f"{name} at {ends[same.index(at)]}")
    return numbered(shown)


def config_hash(settings: dict[str, Any]) -> str:
    """Return 16 hex digits of sha256 over the canonical JSON of a run's inference settings."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
