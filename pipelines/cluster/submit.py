"""Submit a run, a training or a round to a Ray cluster's job server, which starts its command."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import queue
import re
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from pipelines.cluster.bundle import CONFIG_NAME, Bundle
from pipelines.cluster.follow import (
    Listener,
    Submission,
    SubmittedJob,
    detaching,
    exit_code,
    follow,
    job_name,
    submit,
)
from storage.errors import ClusterLost, ConfigError, LabelfleetError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Seconds that a stopped job has to finish the shards in flight; Ray's own 3 would kill it.
STOP_WAIT_S = 120
_QUIET_S = 20.0
_TRIES = 5  # for a request whose connection broke: a busy head drops some
_HEAD_AWAY = re.compile(r"Request failed with status code (50[234])\b")
# Sent with status 500 until the head's own agent is up, on a cold or busy cluster.
_NO_AGENT = "No available agent"
_AGENT_WITHIN_S = 300.0
# Its name in the job's metadata; "digest", of earlier versions, left out files, --limit and --env.
_DIGEST = "content_digest"
_NO_SUCH_COMMAND = 127  # a shell's exit code for it
# Where Ray itself looks, and where it would overrule an address that was given.
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_HOW_TO_SIGN_IN = (
    "give the one it was started with: RAY_AUTH_TOKEN_PATH=file (a mounted secret), "
    "RAY_AUTH_TOKEN, or the file ~/.ray/auth_token"
)


@dataclass(frozen=True, slots=True)
class Submitted:
    """The result of a submission; ``exit_code`` is None while the job runs."""

    submission_id: str
    address: str
    output: str
    attached: bool
    status: str
    exit_code: int | None

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a job is to do.

    Attributes:
        bundle: the run, from ``bundle_run``.
        command: what follows ``labelfleet run CONFIG`` (or ``train``, ``round``) there.
        environment: variables for the job; already checked for secrets.
    """

    bundle: Bundle
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """16 hex of sha256 over all of it."""
        means = [self.bundle.digest, list(self.command), sorted(self.environment.items())]
        return hashlib.sha256(json.dumps(means).encode()).hexdigest()[:16]


def submit_run(
    request: JobRequest, listener: Listener, *, address: str | None, wait: bool
) -> Submitted:
    """Start a run's job on a cluster, or attach to the one that is running.

    Args:
        address: of the job server; None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else this machine.
        wait: follow it to its end.

    Raises:
        ConfigError: the address has no job server, or the server wants another token.
        RunLocked: a job of this run is under way that does something else.
        Interrupted: Ctrl-C while following; the job goes on.
        LabelfleetError: the server refused.
    """
    url = job_server_url(address)
    server = RayJobs(url, request)
    output = request.bundle.output
    found = submit(server, job_name(request.bundle.config.name, output), request.digest)
    job = found.job
    stop = f"ray job stop --address {url} {job.job_id}"
    with detaching(job.job_id, again=listener.again, stop=stop):
        listener.note(_said(found, url))
        if wait:
            job = follow(server, job.job_id, listener)
    if wait and job.exit_code is None and job.message:
        listener.note(job.message.strip().splitlines()[-1])
    if job.exit_code == _NO_SUCH_COMMAND:
        listener.note("`labelfleet` is not on the PATH of the cluster's head; see ray_cluster.yaml")
    code = exit_code(job) if job.ended else None
    return Submitted(job.job_id, url, output, found.attached, job.status, code)


def _said(found: Submission, url: str) -> str:
    job = found.job
    if not found.attached:
        return f"submitted {job.job_id} to {url}"
    return f"{job.job_id} is {job.status.lower()} already at {url}: attached to it"


def job_server_url(address: str | None) -> str:
    """Return the job server's URL, which is not the address that ``run --address`` takes.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster but not its job server.
    """
    given = address or next((os.environ[n] for n in _ADDRESSES if os.environ.get(n)), None)
    if given is None:
        return DEFAULT_ADDRESS
    if given.startswith(("http://", "https://")):
        return given.rstrip("/")
    host, colon, port = given.rpartition(":")
    if "://" in given or not (colon and host and port.isdigit()) or port == "6379":
        raise ConfigError(
            f"{given} is not a job server",
            hint="give its URL, such as --address http://head:8265: the port of Ray's dashboard",
        )
    return f"http://{given}"


class RayJobs:
    """Ray's job server, as a ``JobServer``.

    Args:
        url: where it answers.
        request: what ``start`` starts.
    """

    def __init__(self, url: str, request: JobRequest) -> None:
        self._url, self._request = url, request
        self._client = self._connect()

    def jobs(self) -> list[SubmittedJob]:
        """Return every job that was submitted to the cluster."""
        return [_job(info) for info in self._ask(self._client.list_jobs) if info.submission_id]

    def job(self, job_id: str) -> SubmittedJob:
        """Return one of them."""
        return _job(self._ask(partial(self._client.get_job_info, job_id)))

    def start(self, job_id: str) -> bool:
        """Submit the bundle under this id; return False when the id is taken."""
        bundle, command = self._request.bundle, self._request.command
        config = bundle.url or CONFIG_NAME
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **self._request.environment}
        with tempfile.TemporaryDirectory(prefix="labelfleet-submit-") as folder:
            bundle.write(Path(folder))
            where = {} if bundle.url else {"working_dir": folder}
            try:
                self._ask(
                    partial(
                        self._client.submit_job,
                        entrypoint=shlex.join(["labelfleet", bundle.command, config, *command]),
                        submission_id=job_id,
                        runtime_env={**where, "env_vars": variables},
                        metadata={"run": bundle.config.name, _DIGEST: self._request.digest},
                    )
                )
            except LabelfleetError as exc:
                if "already exists" in exc.message:
                    return False
                raise
        return True

    def log(self, job_id: str) -> Iterator[str]:
        """Yield its output from the beginning; '' after every 20 quiet seconds."""
        heard: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
        # In a thread of its own, so that Ctrl-C and silence are noticed at once.
        threading.Thread(target=self._tail, args=(job_id, heard.put), daemon=True).start()
        while True:
            try:
                piece = heard.get(timeout=_QUIET_S)
            except queue.Empty:
                piece = ""
            if piece is None:
                return
            if isinstance(piece, Exception):
                raise ClusterLost(f"the log broke off: {piece}") from piece
            yield piece

    def _tail(self, job_id: str, put: Callable[[str | Exception | None], None]) -> None:
        async def tail() -> None:
            async for piece in self._client.tail_job_logs(job_id):
                put(piece)

        try:
            asyncio.run(tail())
            put(None)
        except Exception as exc:  # noqa: BLE001  # the thread's border: told to its reader
            put(exc)

    def _connect(self) -> Any:
        from ray.job_submission import JobSubmissionClient  # a second to import

        # Its notes on packages would appear between the lines of the job.
        for name in ("ray", *(kind.__module__ for kind in JobSubmissionClient.__mro__)):
            logging.getLogger(name).setLevel(logging.WARNING)
        headers = auth_headers()
        with _address_settled(), self._asking(first=True):
            return JobSubmissionClient(self._url, headers=headers)

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Send a request, retrying when the connection breaks; an id is never submitted twice."""
        with self._asking():
            return patient()(call)

    @contextmanager
    def _asking(self, first: bool = False) -> Iterator[None]:
        """Translate Ray's and requests' errors."""
        from ray.exceptions import AuthenticationError
        from requests.exceptions import RequestException

        try:
            yield
        except AuthenticationError as exc:
            wants = "another token" if "Forbidden" in str(exc) else "a token"
            raise ConfigError(
                f"the cluster at {self._url} wants {wants}", hint=_HOW_TO_SIGN_IN
            ) from None
        except (ConnectionError, RequestException) as exc:
            if first:
                raise ConfigError(
                    f"no job server answers at {self._url}",
                    hint="its port is that of Ray's dashboard, 8265, open on the head's loopback "
                    "only: `ray dashboard ray_cluster.yaml`, `kubectl port-forward` or "
                    "`ssh -L 8265:127.0.0.1:8265 HEAD` bring it here",
                ) from exc
            raise ClusterLost(f"{self._url} does not answer: {type(exc).__name__}") from exc
        except (RuntimeError, ValueError) as exc:  # what Ray makes of every other answer
            raise refusal(self._url, exc) from exc


def patient(sleep: Callable[[float], None] = time.sleep) -> Retrying:
    """Return the retries: a few over a broken connection, five minutes' worth without an agent."""
    from requests.exceptions import RequestException

    def worth_it(exc: BaseException) -> bool:
        return isinstance(exc, ConnectionError | RequestException) or _NO_AGENT in str(exc)

    def enough(state: RetryCallState) -> bool:
        failed = state.outcome.exception() if state.outcome else None
        if _NO_AGENT in str(failed):
            return state.idle_for > _AGENT_WITHIN_S
        return state.attempt_number >= _TRIES

    return Retrying(
        retry=retry_if_exception(worth_it),
        stop=enough,
        wait=wait_exponential(multiplier=0.5, max=5),
        sleep=sleep,
        reraise=True,
    )


def refusal(url: str, exc: Exception) -> LabelfleetError:
    """Translate an error of Ray's client; a proxy without its head (50x) is a lost cluster."""
    if away := _HEAD_AWAY.match(str(exc)):
        return ClusterLost(f"{url} does not answer: HTTP {away[1]}")
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    return LabelfleetError(f"the job server at {url}: {lines[-1]}")


@contextmanager
def _address_settled() -> Iterator[None]:
    """Hide the environment's addresses: Ray would let them overrule the one that was given."""
    hidden = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def auth_headers() -> dict[str, str]:
    """Return the token that Ray would use here as a header, or no header without a token.

    Read by us, since Ray settles whether to send it once, when it is imported, and then ignores a
    token whose mode is not set.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names no readable file.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token, place = os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not token and place:
        try:
            token = Path(place).read_text()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(
                f"RAY_AUTH_TOKEN_PATH does not name a readable file: {place}", hint=_HOW_TO_SIGN_IN
            ) from exc
    with suppress(OSError, RuntimeError, UnicodeDecodeError):  # no home, or nothing to read there
        token = token or (Path.home() / ".ray" / "auth_token").read_text()
    return {"Authorization": f"Bearer {token.strip()}"} if token and token.strip() else {}


def _job(info: Any) -> SubmittedJob:
    metadata = info.metadata or {}
    return SubmittedJob(
        job_id=info.submission_id,
        status=info.status.value,
        exit_code=info.driver_exit_code,
        message=info.message or "",
        digest=metadata.get(_DIGEST, ""),
    )
