"""The records of a round: what is repeated, what goes on, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest

from pipelines.rounds.round import Selection, selection_of
from pipelines.rounds.state import STEPS, RoundState, StepRecord, differing
from storage.errors import ConfigError, StorageError
from storage.stores.memory import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def finished(state: RoundState, inputs: Mapping[str, object]) -> StepRecord:
    record = state.begin("label", inputs)
    done = StepRecord("label", "done", record.attempt, record.inputs, {"run": record.place}, 2.0)
    state.write(done)
    return done


def test_a_done_step_is_not_begun_again(store: MemoryStore) -> None:
    state = RoundState(store)
    done = finished(state, {"teacher": "a", "pool": {"url": "x"}})
    assert RoundState(store).begin("label", {"pool": {"url": "x"}, "teacher": "a"}) == done
    assert state.result("label") == {"run": "label"}


def test_a_step_that_was_killed_goes_on_at_the_same_place(store: MemoryStore) -> None:
    first = RoundState(store).begin("student", {"steps": 4})
    again = RoundState(store).begin("student", {"steps": 4})
    assert again == first
    assert (again.status, again.attempt, again.place) == ("begun", 1, "student")


@pytest.mark.parametrize("done", [True, False])
def test_changed_inputs_are_named_and_need_to_be_confirmed(store: MemoryStore, done: bool) -> None:
    state = RoundState(store)
    before = {"teacher": "a", "pool": {"url": "x", "include": ["*.png"]}}
    finished(state, before) if done else state.begin("label", before)
    changed = {"teacher": "b", "pool": {"url": "x", "include": ["*.jpg"]}}
    with pytest.raises(ConfigError, match=r"teacher, pool\.include") as refused:
        state.begin("label", changed)
    assert "--again label" in (refused.value.hint or "")
    record = state.begin("label", changed, "changed")
    assert (record.attempt, record.place, record.status) == (2, "label-2", "begun")
    assert RoundState(store).begin("label", changed).attempt == 2


def test_again_repeats_a_step_whose_inputs_are_the_same(store: MemoryStore) -> None:
    state = RoundState(store)
    finished(state, {"teacher": "a"})
    assert state.begin("label", {"teacher": "a"}, "changed").status == "done"
    record = state.begin("label", {"teacher": "a"}, "always")
    assert (record.attempt, record.status, record.seconds) == (2, "begun", 0.0)


def test_a_step_that_was_skipped_may_be_taken_later(store: MemoryStore) -> None:
    state = RoundState(store)
    state.write(StepRecord("gate", "skipped", 1, {}, reason="no gate"))
    assert state.read("gate") is not None
    record = state.begin("gate", {})
    assert (record.attempt, record.status) == (1, "begun")


def test_a_skip_does_not_lose_the_places_that_earlier_attempts_wrote_to(
    store: MemoryStore,
) -> None:
    state = RoundState(store)
    state.begin("label", {"teacher": "a"})
    second = state.begin("label", {"teacher": "a"}, "always")
    state.skip("label", "skip lists label")
    skipped = state.read("label")
    assert skipped is not None
    assert (skipped.status, skipped.over, skipped.reason) == ("skipped", True, "skip lists label")
    same = state.begin("label", {"teacher": "a"})
    assert (same.place, same.status, same.reason) == (second.place, "begun", "")
    kept = state.read("label")
    assert kept is not None
    assert not kept.over  # killed now, it is still under way
    state.skip("label", "skip lists label")
    assert state.begin("label", {"teacher": "b"}).place == "label-3"


def test_a_skip_leaves_a_step_that_is_done(store: MemoryStore) -> None:
    state = RoundState(store)
    state.write(replace(state.begin("label", {}), status="done", result={"run": "x"}))
    state.skip("label", "skip lists label")
    assert state.result("label") == {"run": "x"}


def test_an_unfinished_step_has_no_result(store: MemoryStore) -> None:
    state = RoundState(store)
    with pytest.raises(ConfigError, match="teacher of this round is not done"):
        state.result("teacher")
    state.begin("teacher", {"a": 1})
    with pytest.raises(ConfigError, match="not done"):
        state.result("teacher")


def test_a_record_that_was_edited_is_refused(store: MemoryStore) -> None:
    state = RoundState(store)
    finished(state, {"teacher": "a"})
    fields = json.loads(store.get("state/label.json"))
    store.put("state/label.json", json.dumps({**fields, "seconds": 1.0}).encode())
    with pytest.raises(StorageError, match="checksum"):
        state.read("label")
    fields.pop("digest")
    store.put("state/label.json", json.dumps({**fields, "status": "odd"}).encode())
    with pytest.raises(StorageError, match="odd"):
        state.read("label")


def test_differences_are_told_by_their_dotted_names() -> None:
    old = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "gone": None}
    assert differing(old, {"a": 1, "b": {"c": 3, "d": [1, 2]}, "new": 0}) == ["b.c", "new"]
    assert differing(old, {"a": 1.0, "b": {"c": 2, "d": (1, 2)}}) == ["a"]


def test_a_command_names_steps() -> None:
    assert Selection().steps() == STEPS
    assert selection_of(None, "label", ()).steps() == ("teacher", "gate", "label")
    again = selection_of(None, "student", ["decide"])
    assert again == Selection(None, "student", ("decide",))
    with pytest.raises(ConfigError, match="no step 'lable'"):
        selection_of(None, "lable", ())
    with pytest.raises(ConfigError, match="contradict"):
        selection_of("label", "fit", ())
