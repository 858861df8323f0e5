"""Summarise an invocation for people, machines and a webhook."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from pipelines.config.run_config import RunConfig
from pipelines.dispatch.drive import Outcome
from pipelines.dispatch.tally import Tally
from pipelines.runs.status import RunStatus
from storage.urls import normalise_url

log = logging.getLogger("labelfleet")


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The state of a run after one invocation; counts cover the whole run unless noted.

    Attributes:
        images, ok, undecodable, too_large, unsupported, missing, not_finite: rows, all and by
            status.
        detections: boxes above the score floor.
        shards: committed. ``left``: listed and not yet committed. ``quarantined``: set aside.
        seconds, new_images, new_shards: of this invocation, start-up included.
        startup_s: the part of ``seconds`` before its first worker was ready.
        images_per_s: of this invocation from then to its last commit, as `status`, `plan` and the
            report have it; 0 where it labelled nothing.
        routed: images drawn for people to see, in this invocation.
        truncated: tars that ended in the middle, with the reason.
        left_out: what the listing of the source passed over, by suffix or reason.
        outcome: ``done``, or ``stopped`` on request with work left.
        exit_code: of the process, see ``exit_codes``.
        drift: how later images differ from the first ones, if this invocation found out; else ''.
        max_bad_share: the config's, which the exit code depends on.
    """

    images: int
    ok: int
    undecodable: int
    too_large: int
    unsupported: int
    missing: int
    not_finite: int
    detections: int
    shards: int
    left: int
    quarantined: int
    new_images: int
    new_shards: int
    seconds: float
    images_per_s: float
    output: str
    outcome: Outcome
    exit_code: int = 0
    startup_s: float = 0.0
    routed: int = 0
    max_bad_share: float = 1.0
    drift: str = ""
    truncated: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def summarise(
    status: RunStatus,
    tally: Tally,
    outcome: Outcome,
    began_s: float,
    config: RunConfig,
    routed: int = 0,
) -> RunSummary:
    """Sum up the run, with what this invocation added."""
    seconds = time.monotonic() - began_s
    counts = status.images
    images_per_s, startup_s = _pace(status, tally, seconds)
    return RunSummary(
        images=sum(counts.values()),
        ok=counts["ok"],
        undecodable=counts["undecodable"],
        too_large=counts["too_large"],
        unsupported=counts["unsupported"],
        missing=counts["missing"],
        not_finite=counts["not_finite"],
        detections=status.detections,
        shards=status.committed,
        left=status.left,
        quarantined=status.quarantined,
        new_images=tally.images,
        new_shards=tally.shards,
        seconds=round(seconds, 2),
        startup_s=round(startup_s, 2),
        images_per_s=round(images_per_s, 2),
        output=normalise_url(config.output),
        outcome=outcome,
        routed=routed,
        max_bad_share=config.max_bad_share,
        truncated=tally.truncated,
        left_out=status.left_out,
    )


def _pace(status: RunStatus, tally: Tally, seconds: float) -> tuple[float, float]:
    """Return images/s and the seconds before it: the ledger's, or the loop's where that failed."""
    if not tally.images:
        return 0.0, 0.0
    ledger = status.invocation
    if ledger is None or ledger.images != tally.images or not ledger.images_per_s:
        return tally.images_per_s, max(0.0, seconds - tally.working_s)
    return ledger.images_per_s, min(seconds, ledger.startup_s)


def notify(config: RunConfig, summary: RunSummary) -> None:
    """Post the summary to the webhook, if any; its failure is logged and does not fail the run."""
    if config.notify is None:
        return
    try:
        httpx.post(
            config.notify.get_secret_value(), json=summary.to_fields(), timeout=10
        ).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
        log.warning("notify: the webhook failed: %s", type(exc).__name__)
