"""LabelPool on a real Ray: whatever happens to a worker's process, the pool has another one."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from ray.actor import ActorMethod

from pipelines.labelling.open_run import open_run, refresh_listing
from storage.errors import CheckpointError, StorageError
from storage.records import Shard, StoredObject
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.shards.selecting import tar_shards
from tests.support.patience import patient
from tests.support.ray.bright_actor import bright_actor
from tests.support.samples.image_samples import encode
from tests.support.samples.tiny_run import fill_folder, run_config
from workers.actors.actor import LabelActor
from workers.actors.events import (
    Event,
    ShardDone,
    ShardError,
    StartFailed,
    WorkerGone,
    WorkerReady,
)
from workers.actors.pool import LabelPool, PoolSize
from workers.spec import LabellerOptions, WorkerSpec

pytestmark = pytest.mark.slow
_LIMIT_S = 240


@dataclass
class Bench:
    """A run of 12 images in 3 shards, and what its workers are told."""

    manifest: Manifest
    shards: list[Shard]
    spec: WorkerSpec
    source: Path

    @contextmanager
    def pool(
        self,
        *,
        count: int = 1,
        hang_after_s: float = 200,
        actor: type[LabelActor] = LabelActor,
        **spec: object,
    ) -> Iterator[Loop]:
        told = replace(self.spec, **spec)  # type: ignore[arg-type]  # by name
        size = PoolSize(count, 0, 0.5)
        made = LabelPool(told, size, depth=3, hang_after_s=hang_after_s, actor=actor)
        made.start()
        try:
            yield Loop(made)
        finally:
            made.close()


class Loop:
    """Collects a pool's events until one that is waited for."""

    def __init__(self, pool: LabelPool) -> None:
        self.pool = pool
        self.seen: list[Event] = []

    def until(self, done: Callable[[], bool]) -> None:
        limit = time.monotonic() + patient(_LIMIT_S)
        while not done():
            assert time.monotonic() < limit, f"waited {_LIMIT_S} s; seen: {self.seen}"
            self.seen.extend(self.pool.events(timeout_s=0.2))

    def all(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.seen if isinstance(event, kind)]

    def ready(self, count: int = 1) -> list[WorkerReady]:
        """The first ``count`` workers that became ready."""
        self.until(lambda: len(self.all(WorkerReady)) >= count)
        return [e for e in self.seen if isinstance(e, WorkerReady)][:count]


@pytest.fixture
def bench(tmp_path: Path, nano_checkpoint: Path, local_ray: dict[str, str]) -> Bench:
    fill_folder(tmp_path / "in", 12)
    return opened(tmp_path, nano_checkpoint)


def opened(folder: Path, checkpoint: Path) -> Bench:
    """A run over what lies in ``folder/in``."""
    config = run_config(folder / "in", folder / "out", checkpoint)
    run = open_run(config, cuda=False)
    listing, _ = refresh_listing(run, config)
    spec = WorkerSpec(run.model, run.source.url, run.manifest.url, options=LabellerOptions(1, 4))
    return Bench(run.manifest, list(listing.live_shards()), spec, folder / "in")


def gone(pid: int) -> bool:
    """No such process, or only its entry until its parent looks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until_gone(pid: int) -> None:
    limit = time.monotonic() + patient(_LIMIT_S)
    while not gone(pid):
        assert time.monotonic() < limit, f"process {pid} still lives"
        time.sleep(0.1)


def label(loop: Loop, worker: str, shard: Shard) -> None:
    """One shard on one worker, to its end."""
    loop.pool.submit(worker, shard, f"attempt-{shard.shard_id}-{len(loop.seen)}")
    before = len(loop.all(ShardDone))
    loop.until(lambda: len(loop.all(ShardDone)) > before)


def test_every_shard_given_is_committed_and_no_process_is_left(bench: Bench) -> None:
    run = f"logged-{os.getpid()}"  # Ray's logs hold the lines of other tests, too
    with bench.pool(count=2, run=run, log_format="json") as loop:
        first, second = loop.ready(2)
        assert loop.pool.alive == 2
        assert first.facts.pid != second.facts.pid
        loop.pool.submit(first.worker, bench.shards[0], "a")
        loop.pool.submit(first.worker, bench.shards[1], "b")
        loop.pool.submit(second.worker, bench.shards[2], "c")
        loop.until(lambda: len(loop.all(ShardDone)) == 3)
    assert bench.manifest.committed() == {shard.shard_id for shard in bench.shards}
    counts = [e.commit.footer.counts for e in loop.seen if isinstance(e, ShardDone)]
    assert sum(count["ok"] for count in counts) == 12
    for ready in (first, second):
        wait_until_gone(ready.facts.pid)
    assert loop.pool.alive == 0
    said = [line for line in worker_log_lines() if line.get("run") == run and "shard" in line]
    assert {line["shard"] for line in said} == {shard.shard_id for shard in bench.shards}
    assert {line["attempt"] for line in said} == {"a", "b", "c"}


def test_a_worker_is_asked_to_end_when_nothing_else_runs_on_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray 2.60 aborts a process, now and then, that is told to end while it has another call."""
    calls: list[object] = []
    running_then: list[list[object]] = []
    remote = ActorMethod._remote

    def noted(method: ActorMethod, *args: object, **options: object) -> object:
        call = remote(method, *args, **options)
        if method._method_name == "__ray_terminate__":
            running_then.append(ray.wait(calls, num_returns=len(calls), timeout=0)[1])
        else:
            calls.append(call)
        return call

    with bench.pool(count=2, actor=bright_actor(pause_s=0.2)) as loop:
        first, second = loop.ready(2)
        monkeypatch.setattr(ActorMethod, "_remote", noted)
        loop.pool.submit(first.worker, bench.shards[0], "a")
        loop.pool.submit(second.worker, bench.shards[1], "b")
        loop.pool.events(timeout_s=0)
    assert running_then == [[], []]
    for ready in (first, second):
        wait_until_gone(ready.facts.pid)


def worker_log_lines() -> Iterator[dict[str, object]]:
    """What workers wrote as JSON into Ray's worker logs."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    for file in logs.glob("worker-*.err"):
        for line in file.read_text().splitlines():
            if line.startswith("{"):
                yield json.loads(line)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_killed_worker_is_reported_and_replaced(bench: Bench, blow: signal.Signals) -> None:
    with bench.pool(actor=bright_actor()) as loop:
        (ready,) = loop.ready()
        os.kill(ready.facts.pid, blow)
        loop.pool.submit(ready.worker, bench.shards[0], "a")
        loop.until(lambda: bool(loop.all(WorkerGone)))
        (lost,) = (e for e in loop.seen if isinstance(e, WorkerGone))
        assert (lost.worker, lost.blameless) == (ready.worker, False)
        _, other = loop.ready(2)
        assert other.worker != ready.worker
        assert other.facts.pid != ready.facts.pid
        label(loop, other.worker, bench.shards[0])
        assert loop.pool.alive == 1


def test_while_one_worker_reloads_the_others_go_on(bench: Bench, tmp_path: Path) -> None:
    loading = tmp_path / "loading"
    with bench.pool(count=2, actor=bright_actor(load_while=loading)) as loop:
        first, second = loop.ready(2)
        loading.touch()
        os.kill(first.facts.pid, signal.SIGKILL)
        loop.pool.submit(first.worker, bench.shards[0], "a")
        loop.until(lambda: bool(loop.all(WorkerGone)))
        for shard in bench.shards:
            label(loop, second.worker, shard)
        assert len(loop.all(WorkerReady)) == 2
        loading.unlink()
        assert len(loop.ready(3)) == 3
        assert loop.pool.alive == 2


def test_a_worker_without_memory_is_replaced_and_blames_no_image(
    tmp_path: Path, nano_checkpoint: Path, local_ray: dict[str, str]
) -> None:
    fill_folder(tmp_path / "in", 3)
    (tmp_path / "in" / "large.png").write_bytes(
        encode(Image.fromarray(np.full((5000, 5000, 3), 90, np.uint8)), "PNG")
    )
    bench = opened(tmp_path, nano_checkpoint)
    (shard,) = bench.shards
    with bench.pool(actor=bright_actor()) as loop:
        (ready,) = loop.ready()
        pages = int(Path(f"/proc/{ready.facts.pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (70 << 20)  # the image takes 75 MB, twice
        resource.prlimit(ready.facts.pid, resource.RLIMIT_AS, (limit, limit))
        loop.pool.submit(ready.worker, shard, "a")
        # The worker goes; or the attempt, where it was a thread's stack that found no room.
        loop.until(lambda: bool(loop.all(WorkerGone) or loop.all(ShardError)))
        assert not loop.all(ShardDone)
        if not loop.all(WorkerGone):
            loop.pool.replace(ready.worker, "short of memory")
        _, other = loop.ready(2)
        label(loop, other.worker, shard)
    assert {row.image_id: row.status for row in live_rows(bench.manifest)} == {
        "large.png": "ok", "page-0000.png": "ok", "page-0001.png": "ok", "page-0002.png": "ok",
    }  # fmt: skip


def test_a_pool_grows_and_withdraws_only_what_is_not_ready(bench: Bench) -> None:
    with bench.pool(actor=bright_actor()) as loop:
        (first,) = loop.ready()
        loop.pool.resize(2)
        loop.ready(2)
        loop.pool.resize(8)  # more than there is room for
        loop.until(lambda: loop.pool.alive > 2)
        ready = loop.pool.alive
        loop.pool.resize(1)
        limit = time.monotonic() + 3
        loop.until(lambda: time.monotonic() > limit)
        assert ready <= loop.pool.alive <= ready + 1  # one may just have become ready
        assert first.worker in loop.pool.places()
        label(loop, first.worker, bench.shards[0])


def test_a_worker_that_stands_still_is_replaced(bench: Bench) -> None:
    with bench.pool(hang_after_s=patient(6), actor=bright_actor()) as loop:
        (ready,) = loop.ready()
        os.kill(ready.facts.pid, signal.SIGSTOP)
        try:
            loop.pool.submit(ready.worker, bench.shards[0], "a")
            loop.until(lambda: bool(loop.all(WorkerGone)))
            (lost,) = (e for e in loop.seen if isinstance(e, WorkerGone))
            assert "no image finished" in lost.reason
            _, other = loop.ready(2)
            label(loop, other.worker, bench.shards[0])
            wait_until_gone(ready.facts.pid)  # else it would keep its memory, and its GPU
        finally:
            if not gone(ready.facts.pid):
                os.kill(ready.facts.pid, signal.SIGKILL)


def test_an_idle_worker_does_not_count_as_hung(bench: Bench) -> None:
    with bench.pool(hang_after_s=2, actor=bright_actor()) as loop:
        (ready,) = loop.ready()
        limit = time.monotonic() + 5
        loop.until(lambda: time.monotonic() > limit)
        assert not loop.all(WorkerGone)
        assert gone(ready.facts.pid) is False


def test_a_model_that_cannot_load_is_a_start_failure_with_its_own_error(bench: Bench) -> None:
    broken = replace(bench.spec.model, checkpoint=str(bench.source / "none.safetensors"))
    with bench.pool(model=replace(broken, sha256="0" * 64)) as loop:
        loop.until(lambda: len(loop.all(StartFailed)) >= 2)  # the pool goes on trying
        errors = [e.error for e in loop.seen if isinstance(e, StartFailed)]
    assert {type(error) for error in errors} == {CheckpointError}
    assert "none.safetensors" in errors[0].message
    assert not loop.all(WorkerReady)


def test_an_error_keeps_class_message_and_hint_across_the_border(bench: Bench) -> None:
    (listed,) = tar_shards([StoredObject("../up.tar", 10_240, "1")])  # no store takes such a key
    with bench.pool() as loop:
        (ready,) = loop.ready()
        loop.pool.submit(ready.worker, listed, "a")
        loop.until(lambda: bool(loop.all(ShardError)))
        (failed,) = (e for e in loop.seen if isinstance(e, ShardError))
        assert (failed.worker, failed.shard_id) == (ready.worker, listed.shard_id)
        assert type(failed.error) is StorageError
        assert failed.error.message.startswith(f"shard {listed.shard_id} (../up.tar): ")
        assert failed.error.hint == "rename the object"
        label(loop, ready.worker, bench.shards[0])  # the worker goes on
