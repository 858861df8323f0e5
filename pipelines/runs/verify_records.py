"""verify, beside the rows: run.json, ledger, quarantine, review, label versions, the model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipelines.display.plural import counted
from pipelines.runs.drift_record import DRIFT_KEY, read_drift
from storage.errors import ArtefactError, ConfigError, ObjectNotFound, StorageError
from storage.labels.versions import (
    LABELS,
    LATEST,
    LabelVersion,
    claimed_versions,
    read_label_tables,
    read_lineage,
    read_version_file,
    versions,
)
from storage.objects.json_records import has_digest, read_record
from storage.parquet.files import read_metadata
from storage.records import STATUSES
from storage.review.answers import ANSWERS, read_answers
from storage.review.frames import read_frame
from storage.review.gold import GOLD, read_gold_record
from storage.review.kept import KEPT_KEY, read_kept
from storage.review.not_shown import NOT_SHOWN_KEY, read_not_shown
from storage.review.queue import QUEUE, read_head, read_queue
from storage.review.refreshed import REFRESHED_KEY, read_refreshed
from storage.review.settings import SETTINGS_KEY, read_settings
from storage.runs.ledger import LEDGER, entries_of, invocations, ledger_parts, part_is_whole
from storage.runs.manifest import (
    LEFT_OUT_KEY,
    QUARANTINE,
    RUN_KEY,
    Manifest,
    RunRecord,
    config_hash,
)
from workers.runtimes.artefacts import read_facts

Counts = tuple[int, ...]
Differs = Callable[[str, str], None]  # (key, what)


@dataclass(slots=True)
class RecordCheck:
    """What was found beside the rows; see ``Verification`` for the counts.

    Attributes:
        gold: sha256 of the queued gold images; none in a quick check.
    """

    manifest: Manifest
    differs: Differs
    quick: bool
    quarantined: set[str] = field(default_factory=set)
    gold: set[str] = field(default_factory=set)
    label_versions: int = 0
    queue_parts: int = 0
    answer_parts: int = 0
    model_files: int = 0
    unsealed: int = 0
    remarks: list[str] = field(default_factory=list)

    @contextmanager
    def looking_at(self, key: str) -> Iterator[None]:
        """Note what is wrong with an object inside; an outage goes on upwards."""
        try:
            yield
        except ObjectNotFound as exc:
            self.differs(key, f"missing: {exc.message}")
        except (ConfigError, ArtefactError, StorageError) as exc:
            if isinstance(exc, StorageError) and type(exc) is not StorageError:
                raise
            self.differs(key, exc.message.removeprefix(f"{key} "))

    def note_seal(self, key: str) -> None:
        """Count an object of an older version, which carries no checksum."""
        store = self.manifest.store
        if key.endswith(".parquet"):
            self.unsealed += not read_metadata(store, store.head(key))[1]
        else:
            self.unsealed += not has_digest(store.get(key))


def check_records(manifest: Manifest, differs: Differs, *, quick: bool) -> RecordCheck:
    """Check everything but listing and rows.

    Raises:
        StorageError: the output cannot be reached.
    """
    check = RecordCheck(manifest, differs, quick)
    _check_run(check)
    _check_quarantine(check)
    _check_queue(check)
    _check_answers(check)
    _check_notes(check)
    _check_gold(check)
    _check_versions(check)
    _check_model(check)
    return check


def read_ledgers(manifest: Manifest, differs: Differs) -> dict[str, Counts]:
    """Return the ledgers' counts for every shard they saw labelled; note damaged parts.

    Equal counts are one object, so that a million shards cost some 100 MB.
    """
    same: dict[Counts, Counts] = {}
    found: dict[str, Counts] = {}
    for invocation in invocations(manifest.store):
        numbers = []
        for key, raw in ledger_parts(manifest.store, invocation):
            numbers.append(key.rpartition("/")[2].removesuffix(".jsonl"))
            if not part_is_whole(raw):
                differs(key, "damaged or edited; `status` reads footers in its place")
            for entry in entries_of(raw):
                if entry.event == "shard" and entry.shard_id is not None:
                    counts = _counts(entry.counts, entry.detections)
                    if counts is not None:
                        found[str(entry.shard_id)] = same.setdefault(counts, counts)
        for missing in _gaps(numbers):
            differs(f"{LEDGER}{invocation}/", f"part {missing} is missing, but not later ones")
    return found


def _counts(counts: Any, detections: int) -> Counts | None:
    try:
        return (*(int(counts.get(status, 0)) for status in STATUSES), int(detections))
    except (AttributeError, TypeError, ValueError):
        return None  # a damaged line of an older version: the ledger is a cache


def _gaps(names: list[str]) -> list[int]:
    numbers = {int(name) for name in names if name.isascii() and name.isdigit()}
    return [n for n in range(max(numbers, default=-1) + 1) if n not in numbers]


def _check_run(check: RecordCheck) -> None:
    with check.looking_at(RUN_KEY):
        record = RunRecord.from_json(check.manifest.store.get(RUN_KEY))
        if record != check.manifest.record:
            check.differs(RUN_KEY, "it changed while it was verified")
        if config_hash(record.inference) != record.identity.config_hash:
            check.differs(RUN_KEY, "its settings are not those of its config_hash")
        check.note_seal(RUN_KEY)


def _check_quarantine(check: RecordCheck) -> None:
    check.quarantined = check.manifest.quarantined_ids()
    for shard_id in sorted(check.quarantined):
        key = f"{QUARANTINE}{shard_id}.json"
        with check.looking_at(key):
            try:
                check.manifest.quarantine_record(shard_id)
                check.note_seal(key)
            except ObjectNotFound:
                continue  # released meanwhile


def _numbered(check: RecordCheck, prefix: str) -> list[str]:
    """Return keys of a folder's numbered parts; note gaps."""
    store = check.manifest.store
    keys = [o.key for o in store.list(prefix) if o.key.endswith(".parquet")]
    for missing in _gaps([k.removeprefix(prefix).removesuffix(".parquet") for k in keys]):
        check.differs(prefix, f"part {missing} is missing, but not later ones")
    return keys


def _check_queue(check: RecordCheck) -> None:
    store = check.manifest.store
    for key in _numbered(check, QUEUE):
        check.queue_parts += 1
        with check.looking_at(key):
            head = read_head(store, key)
            check.note_seal(key)
            if not check.quick:
                queued = read_queue(store, [key], hidden=True)
                check.gold.update(item.sha256 for item in queued if item.part == "gold")
            if head.frame:
                with check.looking_at(head.frame):
                    read_frame(store, head.frame)
                    check.note_seal(head.frame)


def _check_notes(check: RecordCheck) -> None:
    """The single records that a run may have, each if it is there."""
    manifest, store = check.manifest, check.manifest.store
    readers: dict[str, Callable[[], object]] = {
        SETTINGS_KEY: lambda: read_settings(store),
        KEPT_KEY: lambda: read_kept(store),
        REFRESHED_KEY: lambda: read_refreshed(store),
        NOT_SHOWN_KEY: lambda: read_not_shown(store),
        LEFT_OUT_KEY: manifest.left_out,
        DRIFT_KEY: lambda: read_drift(store),
    }
    for key, read in readers.items():
        with check.looking_at(key):
            try:
                store.head(key)
            except ObjectNotFound:
                continue
            read()
            check.note_seal(key)


def _check_gold(check: RecordCheck) -> None:
    """Gold records are whole, and say what is true of every gold image in the queue."""
    known: set[str] = set()
    for listed in check.manifest.store.list(GOLD):
        with check.looking_at(listed.key):
            known |= read_gold_record(check.manifest.store, listed.key).keys()
            check.note_seal(listed.key)
    if lacking := check.gold - known:
        what = f"{counted(len(lacking), 'queued gold image')} without known boxes"
        check.differs(GOLD, f"{what}, such as {min(lacking)}")


def _check_answers(check: RecordCheck) -> None:
    store = check.manifest.store
    for key in _numbered(check, ANSWERS):
        check.answer_parts += 1
        with check.looking_at(key):
            check.note_seal(key)
            if not check.quick:
                for _ in read_answers(store, [key]):
                    pass


def _check_versions(check: RecordCheck) -> None:
    store = check.manifest.store
    there = versions(store)
    for version in there:
        check.label_versions += 1
        with check.looking_at(f"{LABELS}{version}/lineage.json"):
            lineage = read_lineage(store, version)
            check.note_seal(f"{LABELS}{version}/lineage.json")
            _check_version(check, lineage)
    for version in sorted(claimed_versions(store) - set(there)):
        prefix = f"{LABELS}{version}/"
        names = {o.key.removeprefix(prefix) for o in store.list(prefix)}
        if "answered.jsonl" in names:
            what = "missing, while the rest of the version is there; `gc` removes the rest"
            check.differs(f"{prefix}lineage.json", what)
    if there:
        with check.looking_at(LATEST):
            named = str(read_record(store, LATEST)["version"])
            check.note_seal(LATEST)
            if named not in there:
                check.differs(LATEST, f"it names {named!r:.40}, which does not exist")
            elif named != there[-1]:
                check.remarks.append(f"{LATEST} names {named}; the newest version is {there[-1]}")


def _check_version(check: RecordCheck, lineage: LabelVersion) -> None:
    store, prefix = check.manifest.store, lineage.prefix
    with check.looking_at(f"{prefix}claim.json"):
        claim = read_record(store, f"{prefix}claim.json")
        if claim.keys() - {"version", "attempt"} or claim.get("attempt") != lineage.attempt:
            check.differs(f"{prefix}claim.json", "it is not the claim of the version's writer")
    for name in sorted({"policy.yaml", "answered.jsonl", *lineage.files}):
        with check.looking_at(f"{prefix}{name}"):
            read_version_file(store, lineage, name)
    for key in lineage.answers.get(check.manifest.url, []):
        with check.looking_at(key):
            store.head(key)
    for part in lineage.parts:
        with check.looking_at(part.key):
            if not re.fullmatch(rf"{prefix}part-\d+\.parquet", part.key):
                raise StorageError(f"{prefix}lineage.json names {part.key!r:.80} as a part")
            rows = _rows_of(check, lineage, part.key)
            if rows is not None and rows != part.rows:
                check.differs(part.key, f"it has {rows} rows, the lineage says {part.rows}")
            check.note_seal(part.key)
    said = sum(n for name, n in lineage.counts.items() if name in ("images_model", "images_human"))
    if said != sum(part.rows for part in lineage.parts):
        check.differs(f"{prefix}lineage.json", "its counts are not those of its parts")


def _rows_of(check: RecordCheck, lineage: LabelVersion, key: str) -> int | None:
    """Return the rows of one part; None in a quick check, which reads the footer alone."""
    store = check.manifest.store
    if check.quick:
        read_metadata(store, store.head(key))
        return None
    return sum(int(table.num_rows) for table in read_label_tables(store, lineage, only=key))


def _check_model(check: RecordCheck) -> None:
    """The artefact below the run, by the digest in run.json."""
    place = check.manifest.record.inference.get("artefact")
    if not isinstance(place, dict) or not isinstance(key := place.get("key"), str):
        return
    store = check.manifest.store
    with check.looking_at(key):
        text = store.get(key)
        if hashlib.sha256(text).hexdigest() != place.get("sha256"):
            check.differs(key, "it is not the artefact that the run was created with")
            return
        folder = key.rpartition("/")[0]
        for part in read_facts(text, key)["files"].values():
            check.model_files += 1
            _check_model_file(check, f"{folder}/{part['object']}", part)


def _check_model_file(check: RecordCheck, key: str, part: dict[str, Any]) -> None:
    store = check.manifest.store
    with check.looking_at(key):
        if store.head(key).nbytes != part["nbytes"]:
            check.differs(
                key, f"its size is not the {part['nbytes']} bytes that artefact.json says"
            )
        elif not check.quick:
            digest = hashlib.sha256()
            with store.stream(key) as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            if digest.hexdigest() != part["sha256"]:
                check.differs(key, "its checksum is not the one in artefact.json")
