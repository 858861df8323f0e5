"""Fields of a wrong type in a run's records, made by hand or by another version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.report.pace import newest_pace
from pipelines.rounds.costs import gpu_seconds
from pipelines.runs.pace import measured_pace
from pipelines.runs.status import run_status, status_table
from pipelines.runs.verify import verify_run
from storage.errors import ConfigError, StorageError
from storage.runs.ledger import LEDGER
from storage.runs.manifest import LEFT_OUT_KEY, QUARANTINE, Manifest, RunRecord
from storage.stores.memory import MemoryStore
from tests.support.samples.labelled_run import label, png
from tests.support.samples.synthetic_run import record
from workers.images.preprocessing import recorded_range

WRONG = (None, True, "x", -1, float("nan"), 10**400, [None], {"a": None})


@pytest.fixture
def run() -> Manifest:
    source = MemoryStore()
    source.put("a.png", png(1))
    return label(source, MemoryStore())


def test_every_reader_of_a_ledger_gets_along_with_facts_of_a_wrong_type(run: Manifest) -> None:
    (key,) = [listed.key for listed in run.store.list(LEDGER)]
    (shard,) = [json.loads(text) for text in run.store.get(key).splitlines()[:-1]]
    for wrong in WRONG:
        facts = ("workers", "gpus", "decoders", "nms_threads", "before_s", "alive", "outcome")
        start = {"event": "start", "at": shard["at"] - 2, "note": dict.fromkeys(facts, wrong)}
        end = {**start, "event": "end", "at": shard["at"] + 1}
        of_shard = dict.fromkeys(("worker", "won", "fill", "warnings"), wrong)
        lines = [start, {**shard, "note": of_shard}, {**shard, "counts": wrong}, end]
        run.store.put(key, "".join(json.dumps(one) + "\n" for one in lines).encode())
        found = run_status(run)
        assert found.images["ok"] == 1
        assert found.invocation is not None
        assert found.invocation.state == "ended"
        json.dumps(found.to_fields(), allow_nan=False)
        status_table(found)
        pace, chart = measured_pace(run), newest_pace(run)
        assert pace is not None
        assert chart is not None
        assert gpu_seconds(run) == 0.0
        (said,) = verify_run(run, quick=True).differences
        assert key in str(said)


def _places(fields: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = fields.items() if isinstance(fields, dict) else enumerate(fields[:1])
    for name, value in inner:
        yield (*path, name)
        if isinstance(value, dict | list):
            yield from _places(value, (*path, name))


def test_a_run_json_with_a_field_of_a_wrong_type_is_a_named_error_or_does_not_matter() -> None:
    settings = {"preprocessing": {"size": [64, 64]}, "max_image_bytes": 9, "max_frames": 0}
    fields = json.loads(record(**settings).to_json())
    del fields["digest"]
    refused = set()
    for path in _places(fields):
        for wrong in WRONG:
            changed = json.loads(json.dumps(fields))
            inner = changed
            for name in path[:-1]:
                inner = inner[name]
            inner[path[-1]] = wrong
            try:
                made = RunRecord.from_json(json.dumps(changed).encode())
            except ConfigError:
                refused.add(path[:2])
            else:
                recorded_range(made.inference)
    assert refused >= {("identity", name) for name in fields["identity"]}
    assert refused >= {("source", "url"), ("created_at",), ("remarks",), ("inference",)}
    with pytest.raises(
        ConfigError, match=r"run.json cannot be read: created_at is None, not a text"
    ):
        RunRecord.from_json(json.dumps({**fields, "created_at": None}).encode())
    for said in ("x", 3, [1], ["a", "b"], {"a": 1}):
        with pytest.raises(ConfigError, match="value range"):
            recorded_range({"preprocessing": {"value_range": said}})


def test_counts_and_quarantine_records_of_a_wrong_type_are_named(run: Manifest) -> None:
    aside = {"shard_id": "ab", "key": "k", "objects": [], "errors": ["e"], "invocation": "i"}
    key = f"{QUARANTINE}ab.json"
    for name in aside:
        run.store.put(key, json.dumps({**aside, name: None}).encode())
        with pytest.raises(StorageError, match=key):
            run.quarantined()
    run.store.put(LEFT_OUT_KEY, b'{"counts": {".txt": null}}')
    with pytest.raises(StorageError, match=LEFT_OUT_KEY):
        run_status(run)
