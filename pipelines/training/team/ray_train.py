"""Ray Train around a training: start the workers, show what they say, replace the lost ones.

What a worker does is ordinary training code (``Part``), which finds its team by itself; a restart
runs it again, and it continues from the state that it finds. So Ray stores no checkpoints here.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from rich.console import Console

from pipelines.cluster.nodes import NodeWatch, announce_leaving, cluster_nodes, this_node
from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.cluster.shared_folders import check_shared_folders
from pipelines.cluster.sizing import Node
from pipelines.dispatch.metrics import RayMetrics
from pipelines.dispatch.stopping import Stopper
from pipelines.training.config import TrainConfig
from pipelines.training.stages import stages_of
from pipelines.training.summary import TrainSummary
from pipelines.training.team.desk import Correspondent, Desk, Failed, Order, Placed, Posts, Word
from pipelines.training.team.listeners import listening
from pipelines.training.team.metrics import TRAINING_METRICS, MeasuredTraining
from storage.errors import (
    ConfigError,
    Interrupted,
    LabelfleetError,
    RayLost,
    WorkerError,
    WorkerLost,
)
from storage.urls import normalise_url
from workers.actors.spot import SpotWatch, metadata_url
from workers.training.distributed import Team

_LOOK_S = 0.5
_SPOT_LOOK_S = 2.0
_SILENT_S = 60.0
_START_WITHIN_S = 600  # of a group of workers; Ray's own 60 s are short on a busy machine
# A rank waits in a collective while rank 0 validates; that a worker is lost Ray notices by itself.
_COLLECTIVE_S = 6 * 3600
_CPUS_A_GPU = 8
_ELASTIC_LOOK_S = 60.0


class Part(Protocol):
    """One process's part of a training; returns the summary when the training is done.

    Raises Interrupted when ``stopper`` asked, with everything saved.
    """

    def __call__(
        self, config: TrainConfig, *, console: Console | None, stopper: Stopper
    ) -> TrainSummary: ...


@dataclass(frozen=True, slots=True)
class Job:
    """What each worker gets.

    Attributes:
        part: a function of a module (or a partial of one): it travels by name.
        folder: that relative paths of the config start from.
        desk: handle of the driver's ``Desk``.
    """

    part: Part
    config: TrainConfig
    folder: str
    desk: Any


@dataclass(frozen=True, slots=True)
class Moved:
    """The training stopped for a node that leaves, and is to go on without it."""


def train_on_workers(
    part: Part,
    config: TrainConfig,
    *,
    console: Console | None,
    stopper: Stopper,
    address: str | None = None,
) -> TrainSummary:
    """Train on the workers that ``config.workers`` asks for.

    Args:
        part: what each worker does.
        console: shows what the leading worker prints.
        stopper: its first request ends the training after a step, with everything saved.
        address: of a Ray cluster; None: RAY_ADDRESS, else a Ray of this process alone.

    Raises:
        ConfigError: the cluster has no room for the workers, or what ``part`` raises.
        WorkerLost: workers were lost more often than ``workers.restarts``.
        RayLost: the cluster's head no longer answers.
        Interrupted: stopped on request; the same call continues.
    """
    with _settled(address), ray_cluster(address):
        cpus = cpus_each(config, cluster_nodes())
        check_room(config, cluster_nodes(), cpus)
        check_folders(config)
        desk: Any = ray.remote(num_cpus=0)(Desk).remote()
        told = config.model_copy(update={"threads": cpus})
        job = Job(part, told, str(Path.cwd()), desk)
        watch = NodeWatch()
        try:
            while True:
                outcome = _Fit(job, cpus, watch, console, stopper).outcome()
                if not isinstance(outcome, Moved):
                    return outcome
                ray.get(desk.give.remote(""))
        finally:
            watch.close()


def cpus_each(config: TrainConfig, nodes: Sequence[Node]) -> int:
    """Return the cores, and threads, of one worker."""
    if config.threads is not None:
        return config.threads
    if config.workers.gpus:
        shares = [node.cpus // node.gpus for node in nodes if node.gpus >= 1]
        return int(max(1, min([_CPUS_A_GPU, *shares])))
    cores = sum(node.cpus for node in nodes)
    largest = max((node.cpus for node in nodes), default=1)
    return int(max(1, min(largest, cores // config.workers.most)))


def check_room(config: TrainConfig, nodes: Sequence[Node], cpus: int) -> None:
    """Raise ConfigError when the fewest workers do not fit on these nodes.

    A cluster without any usable node yet is one that starts them when asked.
    """
    asked = config.workers
    if all(node.cpus < 1 for node in nodes):
        return
    if asked.gpus and all(node.gpus < 1 for node in nodes):
        raise ConfigError(
            "workers.gpus: 1, but no node of the cluster has a GPU",
            hint="set workers.gpus: 0 to train on CPUs",
        )
    room = sum(
        int(min(node.cpus // cpus, node.gpus if asked.gpus else node.cpus // cpus))
        for node in nodes
    )
    if room < asked.least:
        each = f"{cpus} cores" + (" and a GPU" if asked.gpus else "")
        raise ConfigError(
            f"workers.count: {asked.least} workers of {each}, but the cluster has room for {room}",
            hint="lower workers.count or threads, or add nodes",
        )


def check_folders(config: TrainConfig) -> None:
    """Raise ConfigError when a node cannot see a local folder that the training needs."""
    output = ""
    if config.remote is None:
        config.output.mkdir(parents=True, exist_ok=True)
        output = normalise_url(str(config.output))
    folders = _folders(config)
    for place, folder in enumerate(sorted(folders) or [""]):
        source = normalise_url(folder) if folder else ""
        check_shared_folders(source, output if place == 0 else "")


def _folders(config: TrainConfig) -> set[str]:
    """Return the places of all images and label versions, of all stages."""
    found = {str(data.images) for data in config.test.values()}
    for stage in (one.config for one in stages_of(config)):
        found.add(str(stage.val.images))
        found |= {str(one.images or one.labels) for one in stage.sources}
    return found


class _Fit:
    """One ``TorchTrainer.fit`` in a thread, with this thread showing what the workers say."""

    def __init__(
        self, job: Job, cpus: int, watch: NodeWatch, console: Console | None, stopper: Stopper
    ) -> None:
        self._job, self._cpus, self._watch = job, cpus, watch
        self._console, self._stopper = console, stopper
        self._places: set[str] = set()
        self._found: list[Any] = []
        self._ordered = False

    def outcome(self) -> TrainSummary | Moved:
        """Return how it ended; raise as ``train_on_workers`` does."""
        with tempfile.TemporaryDirectory(prefix="labelfleet-ray-train-") as folder:
            fit = threading.Thread(target=self._fit, args=(folder,), daemon=True, name="fit")
            with self._stopper.heeding():
                fit.start()
                while fit.is_alive():
                    fit.join(_LOOK_S)
                    self._look()
            self._look()
        [found] = self._found
        if isinstance(found, TrainSummary | Moved):
            return found
        if isinstance(found, LabelfleetError):
            raise found
        raise _translated(found, self._job.config.workers.restarts)

    def _look(self) -> None:
        """Show and act on the words; leave an order where the stopper or a node asks for one."""
        desk = self._job.desk
        if self._watch.silent_s() > _SILENT_S:
            raise RayLost(
                f"the Ray cluster's head has not answered for {_SILENT_S:.0f} s",
                hint="the same command continues from the last state",
            )
        try:
            words: list[Word] = ray.get(desk.take.remote(), timeout=_SILENT_S)
        except RayError as exc:
            raise RayLost(
                f"the Ray cluster no longer answers: {type(exc).__name__}",
                hint="the same command continues from the last state",
            ) from exc
        for word in words:
            if isinstance(word, Failed):
                raise word.error
            if isinstance(word, Placed):
                self._places.add(word.node_id)
            elif self._console is not None:
                self._console.print(word, end="", markup=False, highlight=False, soft_wrap=True)
        order: Order = "stop" if self._stopper.asked() else "move" if self._leaving() else ""
        if order and not self._ordered:
            self._ordered = True
            desk.give.remote(order)

    def _leaving(self) -> bool:
        nodes = self._watch.nodes or ()
        return any(node.leaving and node.node_id in self._places for node in nodes)

    def _fit(self, folder: str) -> None:
        try:
            self._found.append(_trainer(self._job, self._cpus, folder).fit().return_value)
        except BaseException as exc:  # noqa: BLE001 - a thread's border: raised by its owner
            self._found.append(exc)


def _trainer(job: Job, cpus: int, folder: str) -> Any:
    kit: Any = importlib.import_module("ray.train")  # typed as version 1 of it, which it is not
    torch_kit: Any = importlib.import_module("ray.train.torch")
    asked = job.config.workers
    gpus = bool(asked.gpus)
    return torch_kit.TorchTrainer(
        _work,
        train_loop_config={"job": job},
        torch_config=torch_kit.TorchConfig(
            backend="nccl" if gpus else "gloo", timeout_s=_COLLECTIVE_S
        ),
        scaling_config=kit.ScalingConfig(
            num_workers=asked.count,
            use_gpu=gpus,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if gpus else {})},
            elastic_resize_monitor_interval_s=_ELASTIC_LOOK_S,
        ),
        run_config=kit.RunConfig(
            name=job.config.name,
            storage_path=folder,
            failure_config=kit.FailureConfig(
                max_failures=asked.restarts, controller_failure_limit=asked.restarts
            ),
        ),
    )


def _work(settings: dict[str, Any]) -> TrainSummary | Moved | Interrupted | None:
    """Do one worker's part; its return value is that of rank 0."""
    job: Job = settings["job"]

    def post(words: Sequence[Word]) -> Order:
        order: Order = ray.get(job.desk.post.remote(list(words)))
        return order

    if Path(job.folder).is_dir():
        os.chdir(job.folder)
    _choose_device(job.config)
    post([Placed(this_node())])
    stopper, team = Stopper(), Team.joined()
    with ExitStack() as stack:
        stack.enter_context(_watching_for_notices())
        console = stack.enter_context(_reporting(job.config, team, post, stopper))
        try:
            return job.part(job.config, console=console, stopper=stopper)
        except Interrupted as exc:
            return Moved() if stopper.reason == "move" else exc
        except LabelfleetError as exc:
            post([Failed(exc)])
        except Exception as exc:  # a process border: a restart would only meet it again
            if of_a_lost_peer(exc):
                raise
            traceback.print_exc()
            line = (str(exc).strip().splitlines() or [""])[0]
            post([Failed(WorkerError(f"a worker failed: {type(exc).__name__}: {line:.300}"))])
        return None


def of_a_lost_peer(exc: BaseException) -> bool:
    """Return whether torch says that another worker went away."""
    from torch.distributed import DistError

    signs = ("gloo", "nccl", "connection reset", "connection closed", "broken pipe")
    said = str(exc).lower()
    return isinstance(exc, DistError) or (
        isinstance(exc, RuntimeError) and any(sign in said for sign in signs)
    )


def _choose_device(config: TrainConfig) -> None:
    import torch

    if not config.workers.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    from ray.train.torch import get_device

    torch.cuda.set_device(get_device())


@contextmanager
def _reporting(
    config: TrainConfig, team: Team, post: Posts, stopper: Stopper
) -> Iterator[Console | None]:
    """Yield the leading worker's console, and let Prometheus hear of its steps."""
    if not team.leads:
        yield None
        return
    voice = Correspondent(post, stopper, orphaned=lambda: os._exit(1))
    sink = RayMetrics(config.name, TRAINING_METRICS)
    measured = MeasuredTraining(sink, workers=team.size, batch_size=config.batch_size)
    try:
        with listening([measured]):
            yield Console(file=voice, width=200, force_terminal=False)  # type: ignore[arg-type]  # writes and flushes, as rich wants
    finally:
        voice.close()


@contextmanager
def _watching_for_notices() -> Iterator[None]:
    """Tell Ray when this node is about to be reclaimed; the driver then moves the training."""
    url = metadata_url(os.environ)
    if not url:
        yield
        return
    spot, ended = SpotWatch(url), threading.Event()

    def watch() -> None:
        while not ended.wait(_SPOT_LOOK_S):
            if (notice := spot.notice) is not None:
                announce_leaving(this_node(), f"spot {notice.action}", notice.within_s)
                return

    threading.Thread(target=watch, daemon=True, name="spot").start()
    try:
        yield
    finally:
        ended.set()
        spot.close()


def _translated(found: BaseException | None, restarts: int) -> LabelfleetError:
    if found is None:
        return WorkerLost("a worker ended without a result", hint="the same command continues")
    if isinstance(found, RayError):
        return RayLost(
            f"Ray ended the training: {type(found).__name__}", hint="the same command continues"
        )
    lines = [line for line in str(found).strip().splitlines() if line.strip()]
    return WorkerLost(
        f"the training was given up after {restarts} restarts: {(lines or [''])[-1]:.300}",
        hint="the same command continues from the last state",
    )


@contextmanager
def _settled(address: str | None) -> Iterator[None]:
    """Settle what Ray Train reads from the environment of the driver."""
    wanted = {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # the config's paths are relative to where we are
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_START_WITHIN_S),
    }
    joined = address or os.environ.get("RAY_ADDRESS")
    if not joined or joined == "local":
        wanted["GLOO_SOCKET_IFNAME"] = "lo"  # as the rest of a local Ray
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
