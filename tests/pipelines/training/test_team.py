"""Around a training on several workers, without Ray: its config, desk, output and listeners."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError
from rich.console import Console

from pipelines.cluster.sizing import Node
from pipelines.dispatch.stopping import Stopper
from pipelines.training.config import TrainConfig
from pipelines.training.team.desk import Correspondent, Desk, Placed
from pipelines.training.team.listeners import (
    listeners_of,
    listening,
    tell_step,
    tell_validated,
)
from pipelines.training.team.metrics import TRAINING_METRICS, MeasuredTraining
from pipelines.training.team.mirror import Mirror, mirrored
from pipelines.training.validation import Scores
from storage.errors import ConfigError, StorageUnavailable
from storage.objects.protocols import Body
from storage.stores.memory import MemoryStore
from workers.training.trainer import StepReport

REPORT = StepReport(3, 1.5, (0.5, 0.6, 0.4), 0.01)
SCORES = Scores(0.4, 0.6, 0.5, 0.7, {}, 2, 9)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., TrainConfig]:
    data = {"annotations": str(tmp_path / "a.json"), "images": str(tmp_path)}
    (tmp_path / "a.json").write_text("{}")

    def make(**more: Any) -> TrainConfig:
        fields = {"name": "x", "output": str(tmp_path), "train": data, "val": data, "steps": 5}
        return TrainConfig.model_validate({**fields, "batch_size": 8, **more})

    return make


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"workers": {"count": 3}}, "8 does not split into 3"),
        ({"workers": {"count": [2, 9]}}, "9 workers for a batch_size of 8"),
        ({"workers": {"count": [3, 2]}}, r"write \[least, most\]"),
        ({"workers": {"count": -1}}, "between 0 and 4096"),
        ({"workers": {"gpus": 1}}, "set `device: cuda`"),
        ({"workers": {"count": 2}, "device": "cuda"}, "device: cuda contradicts workers.gpus: 0"),
        ({"workers": {"count": 2, "gpus": 1}, "device": "cpu"}, "contradicts workers.gpus: 1"),
    ],
)
def test_workers_that_cannot_be_are_refused_by_the_config(
    config: Callable[..., TrainConfig], more: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        config(**more)


def test_workers_and_listeners_do_not_make_it_another_training(
    config: Callable[..., TrainConfig],
) -> None:
    alone = config().fingerprint()
    assert config(workers={"count": [2, 8], "gpus": 1}).fingerprint() == alone
    assert config(report=["tensorboard"], output="s3://b/c").fingerprint() == alone


@pytest.mark.parametrize(
    ("output", "remote"),
    [
        ("runs/a", None),
        ("/runs/a", None),
        ("file:///runs/a", None),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("abfs://box@account.dfs.core.windows.net/a", "abfs://box@account.dfs.core.windows.net/a"),
    ],
)
def test_an_output_may_be_a_url(
    config: Callable[..., TrainConfig], output: str, remote: str | None
) -> None:
    assert config(output=output).remote == remote


def test_there_must_be_room_for_the_fewest_workers(config: Callable[..., TrainConfig]) -> None:
    from pipelines.training.team.ray_train import check_room, cpus_each

    nodes = [Node(4, 0), Node(2, 0)]
    assert cpus_each(config(workers={"count": 2}), nodes) == 3
    assert cpus_each(config(workers={"count": 4}), nodes) == 1
    assert cpus_each(config(workers={"count": 2, "gpus": 1}), [Node(24, 4)]) == 6
    assert cpus_each(config(workers={"count": 2}, threads=5), nodes) == 5
    check_room(config(workers={"count": [2, 8]}), nodes, 2)
    check_room(config(workers={"count": 4}), [Node(0, 0)], 9)  # an autoscaler starts them
    with pytest.raises(ConfigError, match="4 workers of 2 cores, but the cluster has room for 3"):
        check_room(config(workers={"count": 4}), nodes, 2)
    with pytest.raises(ConfigError, match="no node of the cluster has a GPU"):
        check_room(config(workers={"count": 2, "gpus": 1}), nodes, 1)
    with pytest.raises(ConfigError, match="1 cores and a GPU, but the cluster has room for 1"):
        check_room(config(workers={"count": 2, "gpus": 1}), [Node(8, 1), Node(8, 0)], 1)


def test_a_lost_peer_is_told_from_an_error_of_the_training() -> None:
    from pipelines.training.team.ray_train import of_a_lost_peer

    assert of_a_lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc:538] Read error"))
    assert of_a_lost_peer(RuntimeError("Connection closed by peer [127.0.0.1]:4711"))
    assert not of_a_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not of_a_lost_peer(ValueError("gloo"))


def test_the_leading_worker_hears_orders_and_its_words_arrive_in_order() -> None:
    desk, stopper = Desk(), Stopper()
    heard = threading.Event()

    def post(words: Sequence[Any]) -> Any:
        order = desk.post(words)
        if order:
            heard.set()
        return order

    voice = Correspondent(post, stopper, lambda: None, every_s=0.01)
    console = Console(file=voice, width=80)  # type: ignore[arg-type]  # writes and flushes
    console.print("one")
    console.print("two")
    assert not stopper.asked()
    desk.give("move")
    assert heard.wait(60)
    voice.close()
    assert (stopper.requests, stopper.reason) == (1, "move")
    desk.post([Placed("n1")])
    words = desk.take()
    assert "".join(word for word in words if isinstance(word, str)) == "one\ntwo\n"
    assert words[-1] == Placed("n1")
    assert desk.take() == []


def test_a_worker_without_a_driver_ends() -> None:
    ended = threading.Event()

    def gone(words: Sequence[Any]) -> Any:
        raise RuntimeError("the actor died")

    Correspondent(gone, Stopper(), ended.set, every_s=0.01)
    assert ended.wait(60)


class PickyStore(MemoryStore):
    """A store that refuses the first ``refusals`` puts, and remembers the order of the others."""

    def __init__(self, refusals: int = 0) -> None:
        super().__init__(uuid.uuid4().hex, "")
        self.refusals = refusals
        self.order: list[str] = []

    def put(self, key: str, body: Body) -> str:
        if self.refusals:
            self.refusals -= 1
            raise StorageUnavailable("later")
        self.order.append(key)
        return super().put(key, body)


def test_files_reach_the_store_in_the_order_in_which_they_changed(tmp_path: Path) -> None:
    store = PickyStore()
    mirror = Mirror(tmp_path, store)
    for name in ("z.safetensors", "state.pt"):
        (tmp_path / name).write_text(name)
        (tmp_path / f"{name}.partial").write_text("on its way")
    mirror.send()
    assert store.order == ["z.safetensors", "state.pt"]
    mirror.send()
    assert store.order == ["z.safetensors", "state.pt"]  # nothing changed
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "events").write_text("1")
    (tmp_path / "state.pt").rename(tmp_path / "last_state.pt")
    mirror.send()
    assert sorted(found.key for found in store.list()) == [
        "deep/events", "last_state.pt", "z.safetensors",
    ]  # fmt: skip


def test_an_output_in_a_store_is_there_again_at_the_next_start(tmp_path: Path) -> None:
    store = PickyStore()
    with mirrored(store, writes=True) as folder:
        (folder / "state.pt").write_bytes(b"step 7")
    with mirrored(store, writes=False) as other:  # another rank
        assert (other / "state.pt").read_bytes() == b"step 7"
        (other / "stray").write_text("")
    with suppress(ZeroDivisionError), mirrored(store, writes=True) as folder:
        (folder / "state.pt").write_bytes(b"step 9")
        raise ZeroDivisionError
    assert store.get("state.pt") == b"step 9"
    assert [found.key for found in store.list()] == ["state.pt"]


def test_a_refused_upload_is_tried_again_and_the_last_one_is_an_error(tmp_path: Path) -> None:
    store = PickyStore(refusals=1)
    mirror = Mirror(tmp_path, store)
    (tmp_path / "state.pt").write_text("a")
    with pytest.raises(StorageUnavailable):
        mirror.send()
    mirror.send()
    assert store.get("state.pt") == b"a"
    with pytest.raises(StorageUnavailable):
        write_state(PickyStore(refusals=99))


def write_state(store: PickyStore) -> None:
    with mirrored(store, writes=True) as folder:
        (folder / "state.pt").write_text("a")


class Tracker:
    """A listener of a user's own."""

    made: ClassVar[list[Tracker]] = []

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.config, self.folder = config, folder
        self.heard: list[object] = []
        Tracker.made.append(self)

    def step(self, report: StepReport) -> None:
        self.heard.append(report)
        raise OSError("the tracking server is away")

    def validated(self, step: int, scores: Scores) -> None:
        self.heard.append((step, scores))

    def close(self) -> None:
        self.heard.append("closed")


def test_a_listener_of_ones_own_hears_everything_and_cannot_end_the_training(
    tmp_path: Path,
) -> None:
    made = listeners_of([f"{__name__}:Tracker"], {"name": "x"}, tmp_path)
    with listening(made):
        tell_step(REPORT)
        tell_validated(3, SCORES)
    tell_step(REPORT)  # after the block it hears nothing
    [tracker] = Tracker.made
    assert tracker.heard == [REPORT, (3, SCORES), "closed"]
    assert (tracker.config, tracker.folder) == ({"name": "x"}, tmp_path)
    with pytest.raises(ConfigError, match=r"no_such.module:x cannot be used: ModuleNotFoundError"):
        listeners_of(["no_such.module:x"], {}, tmp_path)


def test_metrics_are_declared_and_of_the_right_kind() -> None:
    told: dict[str, float] = {}

    class Sink:
        def add(self, name: str, amount: float, **tags: str) -> None:
            assert TRAINING_METRICS[name].kind == "counter"
            told[name] = told.get(name, 0) + amount

        def set(self, name: str, value: float, **tags: str) -> None:
            assert TRAINING_METRICS[name].kind == "gauge"
            assert tuple(tags) == TRAINING_METRICS[name].tags
            told[f"{name}{''.join(tags.values())}"] = value

    measured = MeasuredTraining(Sink(), workers=2, batch_size=8)
    measured.step(REPORT)
    measured.step(REPORT)
    measured.validated(3, SCORES)
    assert told["labelfleet_training_images_total"] == 16
    assert told["labelfleet_training_step"] == 3
    assert told["labelfleet_training_loss"] == 1.5
    assert told["labelfleet_training_workers"] == 2
    assert told["labelfleet_training_scoremAP"] == 0.4
    measured.close()
    assert told["labelfleet_training_workers"] == 0
