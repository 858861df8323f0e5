"""Joining a Ray cluster, or starting a private one on this machine for as long as the run lasts."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants

from pipelines.sizing import Node
from storage.errors import ConfigError

# What Ray needs at least for its object store; pixels never enter it.
_OBJECT_STORE_BYTES = 80 * 1024 * 1024


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connect to ``address`` (or RAY_ADDRESS, as inside a submitted job), else start a local Ray.

    A local Ray listens on loopback only, has no dashboard, and ends with the context.

    Raises:
        ConfigError: there is no cluster at that address.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        with _joined(address):
            yield
    else:
        with _local():
            yield


@contextmanager
def _joined(address: str) -> Iterator[None]:
    _knock(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as exc:
        first_line = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise ConfigError(
            f"no Ray cluster at {address}: {first_line}",
            hint="check --address (or RAY_ADDRESS); without it a local Ray is started",
        ) from exc
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ray itself tries for minutes before it says that nobody is there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # `auto`, or a form that Ray knows better
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as exc:
        raise ConfigError(
            f"no Ray cluster at {address}: {exc.strerror or exc}",
            hint="check --address (or RAY_ADDRESS); without it a local Ray is started",
        ) from exc


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray binds its servers to loopback where it knows the machine is no part of a cluster.

    It decides so by this switch, which it sets by itself on Windows and macOS only; there is no
    public way to ask for it on Linux (``_node_ip_address="127.0.0.1"`` is resolved to the
    machine's own address). The variable is for Ray's processes, the constant for this one.
    """
    variable, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    os.environ[variable] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[variable]


@contextmanager
def _local() -> Iterator[None]:
    # Ray puts unix sockets below it, whose paths may have 107 bytes: it must be short.
    folder = tempfile.mkdtemp(prefix="lf-", dir="/tmp")
    try:
        with _loopback_only():
            _init_local(folder)
            yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _init_local(folder: str) -> None:
    ray.init(
        num_cpus=len(os.sched_getaffinity(0)),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=folder,
    )


def cluster_nodes() -> list[Node]:
    """The alive nodes of the cluster this process is connected to."""
    return [
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]  # Ray has none
        if node["Alive"]
    ]
