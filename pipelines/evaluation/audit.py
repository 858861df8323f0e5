"""Estimate a label version's quality from answers: precision, recall, errors per minute.

Only audit answers enter precision and recall: they alone were drawn at random. Of each stratum the
answered prefix of its random order counts, so that it does not matter which images people liked to
answer first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from pipelines.evaluation.intervals import (
    UNKNOWN,
    Estimate,
    Sample,
    quotient,
    rate_estimate,
    share_estimate,
)
from pipelines.truth.compared import AnsweredImage, from_jsonl
from storage.labels.versions import LabelVersion, read_version, read_version_file
from storage.review.answers import answer_parts
from storage.review.queue import queue_parts, read_head
from storage.runs.manifest import Manifest

_LUNCH = 5.0  # lead times beyond this multiple of the median count as the multiple
_FEW = 30


@dataclass(frozen=True, slots=True)
class PartWork:
    """What people did in one part of the queue.

    Attributes:
        images: in the queue; ``answered`` and ``skipped`` of them.
        errors: corrections that the model's labels needed in the answered ones.
        minutes: of human time for those.
        errors_per_minute: with its interval.
        by_kind: errors by kind.
    """

    images: int
    answered: int
    skipped: int
    errors: int
    minutes: float
    errors_per_minute: Estimate
    by_kind: dict[str, int]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Estimates for the labels that the model and the policy of a version make.

    Attributes:
        version: which.
        images: live images that the estimates speak for; ``uncovered``: those they do not.
        sampled: audit images that enter them.
        precision, recall: of accepted labels, at IoU 0.5 with the right class.
        missed_ignored: share of missed objects that an ignore box covers: they are not taught as
            background.
        errors_per_100_images: corrections needed, estimated.
        recall_is_upper_bound: True where some people saw the predictions: what a model does not
            show, people overlook too.
        audit, value: what people did in either part; the audit is random review.
        gain: errors found per minute by value, divided by those of the audit.
        measured_time: share of answered images whose time was measured, not stated.
        notes: what a reader must know about these figures.
    """

    version: str
    images: int
    uncovered: int
    sampled: int
    precision: Estimate
    recall: Estimate
    missed_ignored: Estimate
    errors_per_100_images: Estimate
    recall_is_upper_bound: bool
    audit: PartWork
    value: PartWork
    gain: Estimate
    measured_time: float
    notes: tuple[str, ...]

    def to_fields(self) -> dict[str, Any]:
        """For machines; infinities are None, since JSON has none."""
        fields: dict[str, Any] = _finite(asdict(self))
        return fields


def audit_report(manifest: Manifest, version: str | None = None) -> AuditReport:
    """Return estimates for a label version; None: the latest.

    Raises:
        ConfigError: the version does not exist.
    """
    lineage = read_version(manifest.store, version)
    lines = from_jsonl(read_version_file(manifest.store, lineage, "answered.jsonl"))
    sizes = {
        stratum.name: stratum.images
        for key in queue_parts(manifest.store)
        for stratum in read_head(manifest.store, key).strata
    }
    report = estimate(lines, version=lineage.version, own_run=manifest.url, own_strata=sizes)
    later = _later_answers(manifest, lineage)
    return replace(report, notes=(*later, *report.notes))


def _later_answers(manifest: Manifest, lineage: LabelVersion) -> list[str]:
    """Return a note where answers of the run are not in the version; it may have moved since."""
    known = lineage.answers.get(manifest.url, () if not lineage.answers else None)
    if known is None or set(answer_parts(manifest.store)) <= set(known):
        return []
    return [
        f"answers that came, or were withdrawn, after {lineage.version} are not in these figures: "
        f"`labelfleet decide {manifest.url}` makes a version with them"
    ]


def estimate(
    lines: Sequence[AnsweredImage],
    *,
    version: str = "",
    own_run: str = "",
    own_strata: dict[str, int] | None = None,
) -> AuditReport:
    """Return estimates from the lines of an answered.jsonl.

    Args:
        lines: of one label version.
        version, own_run: names to report, and whose strata come first.
        own_strata: live images of every stratum of the own queue, those without a sample too.
    """
    strata = audit_sample([a for a in lines if a.part == "audit"], own_run)
    sampled = [a for members in strata.values() for a in members]
    seconds = _seconds(lines)
    audit_lines = [a for a in lines if a.part == "audit"]
    audit = _work(audit_lines, seconds)
    spoken = {run for run, _ in strata} or {own_run}
    of_sample = [a for a in audit_lines if a.run in spoken]
    value = _work([a for a in lines if a.part == "value"], seconds)
    covered = sum(members[0].stratum_images for members in strata.values())
    own = {name for run, name in strata if run == own_run}
    others_only = bool(strata) and not own
    uncovered = 0 if others_only else sum(
        size for name, size in (own_strata or {}).items() if name not in own
    )  # fmt: skip
    answered = [a for a in lines if a.state == "answered"]
    measured = sum(a.lead_time_s is not None for a in answered)
    upper = any(not a.blind for a in sampled)
    return AuditReport(
        version=version,
        images=covered,
        uncovered=uncovered,
        sampled=len(sampled),
        precision=_share(strata, lambda a: a.right, lambda a: a.predicted),
        recall=_share(strata, lambda a: a.right, lambda a: a.true),
        missed_ignored=_share(strata, lambda a: a.missed_ignored, lambda a: a.missed),
        errors_per_100_images=_per_100_images(strata),
        recall_is_upper_bound=upper,
        audit=audit,
        value=value,
        gain=quotient(value.errors_per_minute, audit.errors_per_minute),
        measured_time=measured / len(answered) if answered else 0.0,
        notes=tuple(_notes(len(sampled), uncovered, of_sample, upper, measured, len(answered))),
    )


Strata = dict[tuple[str, str], list[AnsweredImage]]


def audit_sample(audit: Sequence[AnsweredImage], own_run: str) -> Strata:
    """By (run, stratum) the answered images of the answered prefix; strata without any left out.

    An image that was skipped or could not be shown is passed over, as one that is gone; the first
    open one ends the prefix. Where several runs' queues held audits of the same images, one run's
    speak: the own ones if there are any answers, else those of the run with most.
    """
    by_run: dict[str, Strata] = defaultdict(dict)
    members: Strata = defaultdict(list)
    for line in audit:
        members[line.run, line.stratum].append(line)
    for (run, stratum), lines in members.items():
        prefix = []
        for line in sorted(lines, key=lambda a: a.audit_rank):
            if line.state == "open" or line.bulk:
                break
            if line.state == "answered":
                prefix.append(line)
        if prefix:
            by_run[run][run, stratum] = prefix
    if not by_run:
        return {}
    most = max(by_run, key=lambda run: sum(len(p) for p in by_run[run].values()))
    return by_run[own_run if own_run in by_run else most]


Count = Callable[[AnsweredImage], float]


def _samples(strata: Strata, x: Count, y: Count) -> list[Sample]:
    return [
        Sample(
            members[0].stratum_images,
            np.array([x(a) for a in members], np.float64),
            np.array([y(a) for a in members], np.float64),
        )
        for members in strata.values()
    ]


def _share(strata: Strata, x: Count, y: Count) -> Estimate:
    return share_estimate(_samples(strata, x, y)) if strata else UNKNOWN


def _per_100_images(strata: Strata) -> Estimate:
    rate = rate_estimate(_samples(strata, lambda a: a.errors, lambda _: 1.0))
    value = None if rate.value is None else 100 * rate.value
    return Estimate(value, 100 * rate.low, 100 * rate.high)


def _seconds(lines: Sequence[AnsweredImage]) -> Count:
    """Return human seconds of an image: measured, less breaks, else as routing expected."""
    times = [a.lead_time_s for a in lines if a.state == "answered" and a.lead_time_s]
    limit = _LUNCH * median(times) if times else 0.0

    def seconds(line: AnsweredImage) -> float:
        return min(line.lead_time_s, limit) if line.lead_time_s else line.expected_s

    return seconds


def _work(lines: Sequence[AnsweredImage], seconds: Count) -> PartWork:
    answered = [a for a in lines if a.state == "answered" and not a.bulk]
    errors = np.array([a.errors for a in answered], np.float64)
    minutes = np.array([seconds(a) / 60 for a in answered], np.float64)
    # What was reviewed is all there is to speak of, but as a sample of what such review finds.
    sample = [Sample(10**9, errors, minutes)] if answered else []
    kinds = ("missed", "spurious", "misplaced", "wrong_class")
    return PartWork(
        images=len(lines),
        answered=len(answered),
        skipped=sum(a.state == "skipped" for a in lines),
        errors=int(errors.sum()),
        minutes=float(minutes.sum()),
        errors_per_minute=rate_estimate(sample),
        by_kind={kind: sum(int(getattr(a, kind)) for a in answered) for kind in kinds},
    )


def _notes(
    sampled: int,
    uncovered: int,
    audit: Sequence[AnsweredImage],
    upper: bool,
    measured: int,
    answered: int,
) -> list[str]:
    """Return what a reader must know; ``audit`` are the audit images of the run that is sampled."""
    notes = []
    skipped = sum(a.state == "skipped" for a in audit)
    bulk = sum(a.bulk for a in audit)
    waiting = sum(a.state == "answered" for a in audit) - bulk - sampled
    if not sampled:
        notes.append("no audit answer counts yet: nothing can be said about the labels")
    elif sampled < _FEW:
        notes.append(
            f"only {sampled} audit images: the intervals are wide, and hold from {_FEW} on"
        )
    if sampled and uncovered:
        notes.append(f"{uncovered} live images have no audit answer yet that speaks for them")
    if skipped:
        notes.append(
            f"{skipped} audit images were skipped; if those are the hard ones, the figures flatter"
        )
    if bulk:
        notes.append(f"{bulk} audit images were accepted in bulk, and count as not answered")
    if waiting > 0:
        notes.append(f"{waiting} audit answers wait for those before them in random order")
    if upper and sampled:
        notes.append("people saw the predictions: recall is an upper bound (see audit_blind)")
    if measured < answered:
        notes.append(
            f"time is stated, not measured, for {answered - measured} of {answered} answers"
        )
    return notes


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
