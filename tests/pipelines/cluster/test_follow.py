"""One job a run: ids, attaching, races; following through lost connections; exit codes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cluster.follow import (
    Listener,
    Status,
    SubmittedJob,
    detaching,
    exit_code,
    follow,
    job_name,
    submit,
)
from storage.errors import ClusterLost, Interrupted, RunLocked

BASE = "labelfleet-cells-0123abcd"


@dataclass
class Server:
    """A job server in memory; ``script`` is what each connection to a log does."""

    known: dict[str, SubmittedJob] = field(default_factory=dict)
    rival: bool = False
    script: list[list[str | BaseException]] = field(default_factory=list)
    after: SubmittedJob = field(default_factory=lambda: SubmittedJob(BASE, "SUCCEEDED", 0))

    def jobs(self) -> list[SubmittedJob]:
        return list(self.known.values())

    def job(self, job_id: str) -> SubmittedJob:
        return self.known[job_id]

    def start(self, job_id: str) -> bool:
        assert job_id not in self.known, "an id was used twice"
        self.known[job_id] = SubmittedJob(job_id, "PENDING")
        if self.rival:  # another process was quicker
            self.rival = False
            return False
        return True

    def log(self, job_id: str) -> Iterator[str]:
        steps = self.script.pop(0)
        for step in steps:
            if isinstance(step, BaseException):
                raise step
            yield step
        if not self.script:
            self.known[job_id] = replace(self.after, job_id=job_id)


def ended(job_id: str, status: Status = "SUCCEEDED") -> SubmittedJob:
    return SubmittedJob(job_id, status, 0)


def test_the_name_is_the_runs_wherever_it_comes_from() -> None:
    assert job_name("cells", "s3://b/out") == job_name("cells", "s3://b/out")
    assert job_name("cells", "s3://b/out") != job_name("cells", "s3://b/other")
    assert job_name("cells", "s3://b/out").startswith("labelfleet-cells-")


def test_the_first_submission_takes_the_name() -> None:
    found = submit(Server(), BASE)
    assert (found.job.job_id, found.attached) == (BASE, False)


def test_one_that_does_something_else_is_not_attached_to() -> None:
    server = Server({BASE: SubmittedJob(BASE, "RUNNING", digest="one")})
    assert submit(server, BASE, "one").attached
    assert submit(server, BASE).attached
    with pytest.raises(RunLocked, match=f"{BASE} is running, with .*--limit, --strict") as refused:
        submit(server, BASE, "another")
    assert refused.value.exit_code == 75
    server.known[BASE] = SubmittedJob(BASE, "RUNNING")  # of an earlier version
    assert submit(server, BASE, "another").attached


def test_a_running_one_is_attached_to() -> None:
    server = Server({BASE: ended(BASE), f"{BASE}-2": SubmittedJob(f"{BASE}-2", "RUNNING")})
    found = submit(server, BASE)
    assert (found.job.job_id, found.attached) == (f"{BASE}-2", True)
    assert len(server.known) == 2


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_a_finished_one_gets_a_new_suffix(status: Status) -> None:
    server = Server({BASE: ended(BASE, status), f"{BASE}-9": ended(f"{BASE}-9", status)})
    assert submit(server, BASE).job.job_id == f"{BASE}-10"


def test_other_runs_do_not_count() -> None:
    others = (f"{BASE}-old", f"{BASE}-02", f"x{BASE}", f"{BASE}0", "raysubmit_1")
    server = Server({name: SubmittedJob(name, "RUNNING") for name in others})
    assert submit(server, BASE).job.job_id == BASE


def test_of_two_submissions_at_once_one_starts_and_one_attaches() -> None:
    server = Server(rival=True)
    found = submit(server, BASE)
    assert (found.job.job_id, found.attached) == (BASE, True)
    assert len(server.known) == 1


@given(st.lists(st.sampled_from(["submit", "end"]), max_size=30))
def test_never_two_at_once_and_no_id_twice(steps: list[str]) -> None:
    server = Server()
    for step in steps:
        if step == "submit":
            submit(server, BASE)
        else:
            server.known = {i: ended(i) for i in server.known}
        assert sum(not job.ended for job in server.known.values()) <= 1


class Heard:
    """What was shown; time passes only during a sleep."""

    def __init__(self) -> None:
        self.text, self.now_s = "", 0.0

    def show(self, piece: str) -> None:
        self.text += piece

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def followed(server: Server) -> tuple[SubmittedJob, str]:
    server.known.setdefault(BASE, SubmittedJob(BASE, "RUNNING"))
    heard = Heard()
    with detaching(BASE, again="submit again", stop="stop it"):
        job = follow(
            server, BASE, Listener(heard.show, heard.show, "submit again"),
            sleep=heard.sleep, clock=lambda: heard.now_s,
        )  # fmt: skip
    return job, heard.text


def test_it_is_followed_to_its_end() -> None:
    server = Server(script=[["a", "", "b"]], after=SubmittedJob(BASE, "FAILED", 75))
    job, text = followed(server)
    assert (text, exit_code(job)) == ("ab", 75)


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    st.text(min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(0, 40), max_size=4)), max_size=5),
)
def test_each_character_is_shown_once_however_often_the_connection_breaks(
    text: str, breaks: list[tuple[int, list[int]]]
) -> None:
    lost = ClusterLost("gone")
    script: list[list[str | BaseException]] = [
        [*pieces(text[: at % (len(text) + 1)], cuts), lost] for at, cuts in breaks
    ]
    _, shown = followed(Server(script=[*script, [text]]))
    assert shown == text


def test_a_log_that_ends_before_its_job_is_taken_up_again() -> None:
    assert followed(Server(script=[["a"], ["a"], ["ab"]]))[1] == "ab"


def test_a_job_that_ended_behind_a_silent_connection_is_noticed() -> None:
    server = Server({BASE: ended(BASE)}, script=[["a", "", "never reached"], []])
    assert followed(server)[1] == "a"


def test_a_server_that_stays_away_is_given_up_with_the_way_back() -> None:
    with pytest.raises(ClusterLost, match="no answer about") as lost:
        followed(Server(script=[[ClusterLost("refused")]] * 400))
    assert "submit again" in str(lost.value)


def test_ctrl_c_detaches_and_says_how_to_come_back_and_how_to_stop_it() -> None:
    with pytest.raises(Interrupted) as detached:
        followed(Server(script=[["a", KeyboardInterrupt()]]))
    assert detached.value.exit_code == 130
    for words in ("goes on", "submit again", "stop it"):
        assert words in str(detached.value)


def test_ctrl_c_detaches_even_where_python_dropped_its_exception() -> None:
    presses = iter([False, True])
    server = Server({BASE: SubmittedJob(BASE, "RUNNING")}, script=[["a", "b", "never reached"]])
    shown: list[str] = []
    to = Listener(shown.append, shown.append, "submit again", left=lambda: next(presses))
    with pytest.raises(Interrupted), detaching(BASE, again="submit again", stop="stop it"):
        follow(server, BASE, to)
    assert shown == ["a"]


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", 75, 75), ("FAILED", 130, 130),
     ("FAILED", -9, 137), ("FAILED", None, 1), ("FAILED", 0, 1), ("STOPPED", None, 130)],
)  # fmt: skip
def test_the_exit_code_is_the_jobs(status: Status, driver: int | None, code: int) -> None:
    assert exit_code(SubmittedJob(BASE, status, driver)) == code
