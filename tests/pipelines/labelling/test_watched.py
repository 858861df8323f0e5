"""The comparison at the end of a run may fail in any way; the run's labels are committed."""

from __future__ import annotations

import pytest

from pipelines.dispatch.tally import Tally, Unwatched
from pipelines.labelling.run import watched
from storage.errors import LabelfleetError, StorageError
from storage.stores.memory import MemoryStore
from tests.support.samples.synthetic_run import image_shard, make_run, row


class Notes(Unwatched):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Damaged(MemoryStore):
    """Raises on every read once it is damaged."""

    error: Exception | None = None

    def get(self, key: str) -> bytes:
        if self.error is not None:
            raise self.error
        return super().get(key)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("shard_id"), "KeyError: 'shard_id'"),
        (ValueError("bad digits"), "ValueError: bad digits"),
        (StorageError("no answer", hint="try again"), "no answer"),
    ],
)
def test_a_comparison_that_fails_is_a_note(error: Exception, said: str) -> None:
    store, shard = Damaged(), image_shard("a.jpg")
    manifest = make_run(store, {shard: [row("a.jpg", shard.shard_id)]})
    store.error = error
    notes, tally = Notes(), Tally()
    tally.shards = 1
    assert watched(manifest, tally, notes) == ""
    assert notes.said == [f"the run could not be compared with itself: {said}"]
    assert isinstance(error, LabelfleetError) == ("Error:" not in said)
