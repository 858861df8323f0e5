"""Join a Ray cluster, or start a private one on this machine for as long as the run lasts."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from pipelines.cluster.local_ray import end_ray, local_ray, messages_logged
from pipelines.dispatch.stopping import keeping_signal_handlers
from storage.errors import ConfigError

_held: list[bool] = []  # not empty inside a ``ray_cluster`` of this process


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connect to ``address`` (or RAY_ADDRESS, as inside a submitted job), else start a local Ray.

    A local Ray listens on loopback only, has no dashboard, and ends with the context. Inside
    another such context its Ray is used, and stays: several runs then share one.

    Raises:
        ConfigError: there is no cluster at that address, or the process has another Ray.
        RayLost: a local Ray could not be started.
    """
    if _held:
        yield
        return
    if ray.is_initialized():  # a program's own; a failed start of ours would shut it down
        raise ConfigError(
            "this process is connected to a Ray of its own already",
            hint="call `ray.shutdown()` first, or label in another process",
        )
    with messages_logged(), _opened(address):
        _held.append(True)
        try:
            yield
        finally:
            _held.clear()


@contextmanager
def _opened(address: str | None) -> Iterator[None]:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The pool hears of every failed call; Ray would print a page of traceback for each as well.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        with _joined(address):
            yield
    else:
        with local_ray():
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
        end_ray()


def _knock(address: str) -> None:
    """Refuse an address where nothing listens: Ray would try for minutes."""
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
