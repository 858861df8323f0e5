"""Joining a Ray cluster, or starting a private one on this machine for as long as the run lasts."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from pipelines.dispatch.stopping import keeping_signal_handlers
from storage.errors import ConfigError, RayLost

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
        with keeping_signal_handlers():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, RayError) as exc:
        first_line = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise ConfigError(
            f"the Ray cluster at {address} cannot be joined: {first_line}",
            hint="check --address (or RAY_ADDRESS), and RAY_AUTH_TOKEN where the cluster wants "
            "one; without an address a local Ray is started",
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
    set_before = os.environ.get(variable)
    os.environ[variable] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[variable]
        if set_before is not None:
            os.environ[variable] = set_before


@contextmanager
def _local() -> Iterator[None]:
    # Ray puts unix sockets below it, whose paths may have 107 bytes: it must be short.
    folder = tempfile.mkdtemp(prefix="lf-", dir="/tmp")
    try:
        with _loopback_only():
            _start(folder)
            yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _private_token() -> None:
    """Ray's token, readable by this user alone; Ray would write it for everybody to read."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    folder = Path.home() / ".ray"
    with contextlib.suppress(OSError):  # a home that cannot be written: Ray says what it needs
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".labelfleet-") as made:
            made.write(secrets.token_hex(32))
            made.flush()
            with contextlib.suppress(FileExistsError):  # whole at once: others start at this moment
                os.link(made.name, folder / "auth_token")
        (folder / "auth_token").chmod(0o600)


def _start(folder: str) -> None:
    try:
        with keeping_signal_handlers():
            _init_local(folder)
    except Exception as exc:  # Ray says with a bare Exception that it took longer than 30 s
        raise RayLost(
            f"Ray could not be started on this machine: {str(exc).splitlines()[0]}",
            hint="it may be too busy, or /tmp full; run the same command again",
        ) from exc


def _init_local(folder: str) -> None:
    _private_token()
    ray.init(
        num_cpus=len(os.sched_getaffinity(0)),
        address="local",  # RAY_ADDRESS would win over no address at all
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=folder,
    )
