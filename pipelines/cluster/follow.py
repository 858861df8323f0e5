"""One job per run: choosing its id, attaching to a running one, following it to its end.

Independent of Ray: the job server is a Protocol, implemented in pipelines/cluster/submit.py.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from storage.errors import ClusterLost, Interrupted, LabelfleetError, RunLocked

Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
# Do not give up at once when a head is being replaced or a laptop slept.
_SILENCE_S = 300.0
_RACES = 10


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told of a job.

    Attributes:
        note: gets lines about the submission, for people.
        show: gets the job's output, piece by piece.
        again: the command that attaches again, for messages.
        left: whether Ctrl-C was pressed; the job goes on. Python drops a KeyboardInterrupt that it
            raises in a destructor or a callback of an import, so the exception is not enough.
    """

    note: Callable[[str], None]
    show: Callable[[str], None]
    again: str
    left: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """A job as its server describes it.

    Attributes:
        exit_code: of its command, once it has one.
        digest: of what it does; '' where an earlier version submitted it.
    """

    job_id: str
    status: Status
    exit_code: int | None = None
    message: str = ""
    digest: str = ""

    @property
    def ended(self) -> bool:
        """Whether the job has ended."""
        return self.status in _ENDED


class JobServer(Protocol):
    """What submitting needs of a cluster's job server."""

    def jobs(self) -> Sequence[SubmittedJob]: ...

    def job(self, job_id: str) -> SubmittedJob: ...

    def start(self, job_id: str) -> bool:
        """Return False when another submission took the id in between."""

    def log(self, job_id: str) -> Iterator[str]:
        """Yield pieces of its output from the beginning to its end; '' while it is quiet.

        Raises ClusterLost when the connection breaks.
        """


@dataclass(frozen=True, slots=True)
class Submission:
    """A run's job; ``attached`` when it ran already."""

    job: SubmittedJob
    attached: bool


def job_name(name: str, output: str) -> str:
    """Return the id of a run's first job, which does not depend on where it is submitted from."""
    place = hashlib.sha256(output.encode()).hexdigest()[:8]
    return f"labelfleet-{name}-{place}"


def submit(server: JobServer, base: str, digest: str = "") -> Submission:
    """Start the run's job, or attach to the one that has not ended.

    Two concurrent submissions choose the same id; the server accepts one and the other attaches.

    Args:
        server: where it runs.
        base: the id of the run's first job.
        digest: of what the job is to do; '' attaches to any, and any attaches to a job without one.

    Raises:
        RunLocked: a job of this run is under way that does something else.
        LabelfleetError: the server refused.
    """
    for _ in range(_RACES):
        mine = {_number(job.job_id, base): job for job in server.jobs()}
        mine.pop(None, None)
        alive = next((job for job in mine.values() if not job.ended), None)
        if alive is not None:
            _refuse_another(alive, digest)
            return Submission(alive, attached=True)
        number = max((n for n in mine if n is not None), default=0) + 1
        job_id = base if number == 1 else f"{base}-{number}"
        if server.start(job_id):
            return Submission(server.job(job_id), attached=False)
    raise LabelfleetError(f"{_RACES} ids in a row for {base} were taken by others")


def _refuse_another(job: SubmittedJob, digest: str) -> None:
    if digest and job.digest and job.digest != digest:
        raise RunLocked(
            f"{job.job_id} is {job.status.lower()}, with another config, checkpoint or other file, "
            "--limit, --strict or --env",
            hint="submit again when it has ended, or stop it first: `ray job stop "
            f"{job.job_id}`; the new job continues from what is committed",
        )


def _number(job_id: str, base: str) -> int | None:
    """Return an id's position among this run's jobs, from 1; None for another run's."""
    found = re.fullmatch(re.escape(base) + r"(?:-([1-9]\d*))?", job_id)
    return None if found is None else int(found[1] or 1)


def follow(
    server: JobServer,
    job_id: str,
    listener: Listener,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> SubmittedJob:
    """Show the job's output until it ends. A broken connection is resumed.

    Args:
        server: where it runs.
        job_id: which.
        listener: gets the output piece by piece, each piece once.

    Raises:
        ClusterLost: no answer for five minutes; the job may still be running.
        KeyboardInterrupt: ``listener.left`` says so.
    """
    seen, heard_s = 0, clock()
    while True:
        try:
            for piece in _unseen(server.log(job_id), seen):
                if listener.left():
                    raise KeyboardInterrupt
                if not piece and server.job(job_id).ended:
                    break
                seen, heard_s = seen + len(piece), clock()
                listener.show(piece)
            job = server.job(job_id)
            if job.ended:
                return job
            heard_s = clock()
        except ClusterLost as exc:
            if clock() - heard_s > _SILENCE_S:
                raise ClusterLost(
                    f"no answer about {job_id} for {_SILENCE_S:.0f} s: {exc.message}",
                    hint=f"it may still be running; to check: {listener.again}",
                ) from exc
        if listener.left():
            raise KeyboardInterrupt
        sleep(1.0)


@contextmanager
def detaching(job_id: str, *, again: str, stop: str) -> Iterator[None]:
    """Leave the job running on Ctrl-C. Raises Interrupted, naming the commands to continue."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"detached from {job_id}, which goes on",
            hint=f"to follow it again: {again}\n  -> to stop it: {stop}",
        ) from None


def _unseen(pieces: Iterator[str], seen: int) -> Iterator[str]:
    """Yield what follows the first ``seen`` characters: a log always starts at its beginning."""
    for piece in pieces:
        if piece and seen >= len(piece):
            seen -= len(piece)
        elif piece and seen:
            yield piece[seen:]
            seen = 0
        else:
            yield piece


def exit_code(job: SubmittedJob) -> int:
    """Return the exit code that a shell would have seen, had it started the run."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return 130
    if job.exit_code is None:
        return 1
    return 128 - job.exit_code if job.exit_code < 0 else job.exit_code or 1
