"""A private Ray on this machine, for as long as a run lasts.

It listens on loopback only, and keeps its sockets, logs and token in a folder that only this user
may enter.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_delay,
    wait_exponential,
)

from pipelines.dispatch.stopping import keeping_signal_handlers
from storage.errors import LabelfleetError, RayLost

# The least that Ray takes for its object store; pixels never enter it.
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
_PREFIX = "lf-"
_OWNER = "owner"  # locked for as long as the process that made the folder lives
_START_WITHIN_S = 300.0
_END_WITHIN_S = 30.0
_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"  # noqa: S105 - the name of a variable

# Ray reads its token once a process, so all local Rays of a process share the first one's.
_read: list[str] = []

log = logging.getLogger("labelfleet")


@contextmanager
def local_ray() -> Iterator[None]:
    """Start a Ray, and end it with the context.

    Raises:
        RayLost: it did not start within five minutes.
    """
    with private_folder() as folder, private_token(folder), loopback_only():
        try:
            start_patiently(lambda: _init(folder / "ray"))
            yield
        finally:
            end_ray()


def start_patiently(
    start: Callable[[], object],
    *,
    sleep: Callable[[float], None] = time.sleep,
    within_s: float = _START_WITHIN_S,
) -> None:
    """Start Ray, retrying while it fails: on a busy machine it gives up after 30 s by itself.

    Args:
        start: connects, or raises.
        sleep: for the pauses in between.
        within_s: no further attempt is made after this time.
    """
    patient = Retrying(
        retry=retry_if_exception(_worth_another_try),
        stop=stop_after_delay(within_s),
        wait=wait_exponential(multiplier=2, max=30),
        before_sleep=_start_again,
        sleep=sleep,
        reraise=True,
    )
    try:
        patient(start)
    except LabelfleetError:
        raise
    except Exception as exc:  # Ray's border: see above
        raise RayLost(
            f"Ray could not be started on this machine: {_first_line(exc)}",
            hint="check whether /tmp is full or memory is short, then run the same command again",
        ) from exc


def _worth_another_try(exc: BaseException) -> bool:
    """Whether it may be a timeout, which Ray reports as a bare Exception; Ctrl-C is none."""
    return isinstance(exc, Exception) and not isinstance(
        exc, ValueError | OSError | LabelfleetError
    )


def _start_again(state: RetryCallState) -> None:
    failed = state.outcome.exception() if state.outcome else None
    log.warning("Ray did not start (%s); trying again", _first_line(failed))
    end_ray()


def _first_line(exc: BaseException | None) -> str:
    return next(iter(str(exc).splitlines()), "") or type(exc).__name__


def _init(folder: Path) -> None:
    with keeping_signal_handlers():
        ray.init(
            num_cpus=len(os.sched_getaffinity(0)),
            address="local",  # without an address, Ray would use RAY_ADDRESS
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder),
        )


def end_ray(within_s: float = _END_WITHIN_S) -> None:
    """Disconnect from Ray, and end the one that this process started.

    ``ray.shutdown`` waits without limit for a raylet that does not answer. Past ``within_s`` the
    processes of our own Ray are killed; a cluster that was joined is left as it is.
    """
    processes = _own_processes()
    ender = threading.Thread(target=_shut_down, daemon=True, name="ray-end")
    ender.start()
    ender.join(within_s)
    if ender.is_alive():
        log.warning("Ray has not ended within %.0f s and is left to itself", within_s)
        for pid in processes:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        ender.join(within_s if processes else 0)
    if ender.is_alive():  # it would wait once more when this process exits
        atexit.unregister(ray_worker.shutdown)


def _shut_down() -> None:
    try:
        ray.shutdown()
    except Exception as exc:  # noqa: BLE001 - a thread's border; what is left of Ray is killed
        log.debug("ray.shutdown failed: %s", exc)


def _own_processes() -> list[int]:
    """Process ids of the Ray that this process started; empty where it joined one."""
    node: Any = ray_worker._global_node
    if node is None:
        return []
    return [info.process.pid for infos in node.all_processes.values() for info in infos]


@contextmanager
def messages_logged() -> Iterator[None]:
    """Log what Ray reports of its cluster, such as a worker that died; stdout is the command's.

    ``log_to_driver=False`` is for the output of workers alone, and there is no public way to ask
    for the rest: Ray prints it to stdout.
    """
    before = ray_worker.print_to_stdstream

    def to_log(data: dict[str, Any], ignore_prefix: bool) -> None:
        for line in data["lines"]:
            log.info("Ray reports: %s", line)

    ray_worker.print_to_stdstream = to_log
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = before


@contextmanager
def private_folder(parent: Path = Path("/tmp")) -> Iterator[Path]:  # noqa: S108 - see below
    """Make a folder that only this user may enter; remove it, and those of killed processes.

    Ray makes its own folder world-writable (mode 0777), so it must lie inside this one. It holds
    unix sockets, whose paths may have 107 bytes: TMPDIR can be too long for that.
    """
    sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    owner = _new_file(folder / _OWNER)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(owner)
        shutil.rmtree(folder, ignore_errors=True)


def _new_file(path: Path) -> int:
    """Return a descriptor of a file that was not there, for this user alone; a link is refused."""
    flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def sweep(parent: Path) -> None:
    """Remove the folders of this user's processes that were killed."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or already gone
            if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
                continue
            owner = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(owner)


@contextmanager
def private_token(folder: Path) -> Iterator[None]:
    """Make Ray use a token that only this user can read, in a folder of ours.

    An existing token is left alone: in the environment, or at ~/.ray/auth_token, where Ray itself
    would look. Ray's own would be written there world-readable, or not at all where the home
    folder does not exist or cannot be written.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get(_TOKEN_PATH):
        yield
        return
    at_home = _token_at_home()
    if not _read:
        _read.append(at_home or secrets.token_hex(32))
    if at_home == _read[0]:
        yield
        return
    path = folder / "token"
    with os.fdopen(_new_file(path), "w") as file:
        file.write(_read[0])
    os.environ[_TOKEN_PATH] = str(path)
    try:
        yield
    finally:
        del os.environ[_TOKEN_PATH]


def _token_at_home() -> str:
    """Return the token at ~/.ray/auth_token; '' where there is none of ours."""
    try:
        path = Path.home() / ".ray" / "auth_token"
        token = path.read_text().strip()
        if token:
            path.chmod(0o600)  # an earlier Ray may have written it world-readable
    except (OSError, RuntimeError, UnicodeDecodeError):  # no home, nothing there, not ours
        return ""
    return token


@contextmanager
def loopback_only() -> Iterator[None]:
    """Make Ray bind its servers to loopback, as it does on Windows and macOS.

    There is no public way to ask for it on Linux (``_node_ip_address="127.0.0.1"`` is resolved to
    the machine's own address). The variable is for Ray's processes, the constant for this one.
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
