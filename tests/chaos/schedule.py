"""What goes wrong in one run, by a seed: blows to workers, trouble in storage, a driver that dies.

The seed decides what happens, how often and at which request; which of several threads sends that
request is the machine's business, so two runs of one seed resemble each other and are not equal.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tests.support.servers.proxy import Rule

Blow = Literal["SIGKILL", "SIGSEGV", "SIGABRT", "SIGTERM", "pause", "SIGSTOP", "no memory"]
Outage = Literal["down", "full", "credentials expired"]

_BLOWS: dict[Blow, float] = {
    "SIGKILL": 5, "SIGSEGV": 2, "SIGABRT": 1, "SIGTERM": 1, "pause": 2, "SIGSTOP": 1,
    "no memory": 2,
}  # fmt: skip
_TROUBLE = (
    "500", "503 SlowDown", "lost reply", "closed", "reset", "cut", "slow", "late", "done, then 500",
    "timeout", "stale listing",
)  # fmt: skip
_TIMEOUTS = 2  # a schedule, since each costs the client seconds of waiting
REQUESTS = 110  # that an undisturbed run sends, about


@dataclass(frozen=True, slots=True)
class Schedule:
    """One seed's plan. Moments are counted in requests to the storage.

    Attributes:
        blows: (when, what, which of the live workers).
        share: of all requests that meet trouble.
        trouble: of which kinds.
        outage: (when, what): from then on all requests of its kind fail, until the driver gave up.
        crash_at: when the driver dies, once; None: it lives.
    """

    seed: int
    blows: tuple[tuple[int, Blow, int], ...]
    share: float
    trouble: tuple[str, ...]
    outage: tuple[int, Outage] | None
    crash_at: int | None


def schedule(seed: int) -> Schedule:
    """The plan of a seed."""
    rng = random.Random(seed)
    count = rng.choices([0, 1, 2, 3], [3, 5, 3, 1])[0]
    kinds = rng.choices(list(_BLOWS), list(_BLOWS.values()), k=count)
    outages: list[Outage] = ["down", "full", "credentials expired"]
    return Schedule(
        seed,
        tuple((rng.randrange(5, REQUESTS), kind, rng.randrange(2)) for kind in kinds),
        share=rng.choice([0.0, 0.03, 0.08, 0.15]),
        trouble=tuple(rng.sample(_TROUBLE, k=rng.randint(2, len(_TROUBLE)))),
        outage=(rng.randrange(REQUESTS), rng.choice(outages)) if rng.random() < 0.3 else None,
        crash_at=rng.randrange(20, REQUESTS) if rng.random() < 0.25 else None,
    )


@dataclass
class Trouble:
    """A schedule at work: asked by the proxy for each request, under the proxy's guard.

    Attributes:
        strike: carries out a blow; says whether there was a worker to hit.
        met: what happened, by kind.
        crashing: the driver is to die now.
    """

    plan: Schedule
    strike: Callable[[Blow, int], bool]
    requests: int = 0
    met: Counter[str] = field(default_factory=Counter)
    crashing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.plan.seed + 1_000_000)
        self._blows = sorted(self.plan.blows, key=lambda blow: blow[0])
        self._crash_at = self.plan.crash_at
        self._outage = self.plan.outage
        self._ongoing = False

    def heal(self) -> None:
        """The fault was fixed: the outage is over, and does not come again."""
        if self._ongoing:
            self._outage, self._ongoing = None, False
        self.crashing.clear()

    def __call__(self, method: str, path: str) -> Rule | None:
        self.requests += 1
        while self._blows and self.requests >= self._blows[0][0]:
            _, kind, who = self._blows.pop(0)
            self.met[kind] += self.strike(kind, who)
        if self._crash_at is not None and self.requests >= self._crash_at:
            self._crash_at = None
            self.met["driver crash"] += 1
            self.crashing.set()
        if self._outage is not None and self.requests >= self._outage[0]:
            return self._failing(self._outage[1], method)
        if self._rng.random() >= self.plan.share:
            return None
        return self._trouble(method, path)

    def _failing(self, outage: Outage, method: str) -> Rule | None:
        if outage == "full" and method != "PUT":
            return None
        self.met[outage] += not self._ongoing
        self._ongoing = True
        if outage == "full":
            return Rule("answer", method, status=507, code="InsufficientStorage")
        if outage == "down":
            return Rule("answer", method, status=503, code="ServiceUnavailable")
        return Rule("answer", method, status=403, code="ExpiredToken")

    def _trouble(self, method: str, path: str) -> Rule | None:
        listing = method == "GET" and "list-type=2" in path
        kind = self._rng.choice(self.plan.trouble)
        if kind == "stale listing" and not listing:
            return None
        if kind == "cut" and method != "GET":
            return None
        if kind == "timeout" and self.met[kind] >= _TIMEOUTS:
            return None
        self.met[kind] += 1
        match kind:
            case "500":
                return Rule("answer", method, status=500, code="InternalError")
            case "503 SlowDown":
                return Rule("answer", method, status=503, code="SlowDown")
            case "lost reply":
                return Rule("drop_reply", method)
            case "closed":
                return Rule("close", method)
            case "reset":
                return Rule("reset", method)
            case "cut":
                return Rule("cut", method, keep_bytes=self._rng.choice([0, 7, 600, 5000]))
            case "slow":
                return Rule("delay", method, delay_s=0.3)
            case "late":
                return Rule("late", method, delay_s=self._rng.choice([0.1, 1.0]))
            case "done, then 500":
                return Rule("answer_after", method, status=500, code="InternalError")
            case "timeout":
                return Rule("hang", method)
        return Rule("stale", method)
