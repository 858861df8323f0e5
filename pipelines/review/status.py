"""``labelfleet review status``: count queued, pushed and answered images, and estimate the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from statistics import median
from typing import Any

from pipelines.evaluation.annotators import PeopleReport, people_report
from pipelines.evaluation.audit import AuditReport, audit_report
from pipelines.label_studio.client import LabelStudio
from pipelines.label_studio.connect import open_server
from pipelines.review.tasks import queued
from pipelines.review.withdrawals import given_in, last_project, not_kept
from storage.errors import LabelfleetError
from storage.labels.versions import versions
from storage.review.answers import Answer, read_answers, standing
from storage.review.gold import read_gold
from storage.review.settings import ReviewSettings
from storage.runs.manifest import Manifest

_ENOUGH_TIMED = 20  # answers with a lead time


@dataclass(frozen=True, slots=True)
class ReviewStatus:
    """How far a review is.

    Attributes:
        project, url: where people look.
        queued: images routed to be shown; ``audit`` of them drawn at random.
        pushed: of those, in a project that the run was pushed to; ``touched``: answered, skipped
            or begun there. None where it was not asked, see ``problem``.
        answered, skipped: images, as pulled. ``waiting``: touched there and not pulled.
        people: who answered.
        minutes: of human time expected for the queue; ``minutes_left`` for what is open.
        last_answer: of those that were pulled.
        problem: why Label Studio could not be asked, or which project is gone; else ''.
        worth: estimates for the latest label version; None before there is one.
        figures: by annotator, and how often predicted boxes were left as they were; None before
            there is an answer.
        pace: human time that was measured over what routing expected; 1 where too few answers
            have a lead time. ``minutes_left`` counts at that pace.
    """

    project: str
    url: str
    queued: int
    audit: int
    pushed: int | None
    touched: int | None
    answered: int
    skipped: int
    waiting: int
    people: int
    minutes: float
    minutes_left: float
    last_answer: datetime | None
    problem: str
    worth: AuditReport | None
    figures: PeopleReport | None = None
    pace: float = 1.0

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        fields = asdict(self)
        fields["last_answer"] = self.last_answer.isoformat() if self.last_answer else None
        fields["worth"] = self.worth.to_fields() if self.worth else None
        fields["figures"] = self.figures.to_fields() if self.figures else None
        return fields


def ask_status(manifest: Manifest, settings: ReviewSettings) -> ReviewStatus:
    """Count, including Label Studio's figures if it answers and a token is set."""
    try:
        with open_server(settings.url) as server:
            return review_status(manifest, settings, server)
    except LabelfleetError as exc:
        return replace(review_status(manifest, settings, None), problem=exc.message)


def review_status(
    manifest: Manifest, settings: ReviewSettings, server: LabelStudio | None
) -> ReviewStatus:
    """Count. ``server`` None: use only the run's own records."""
    wanted = {q.item.sha256: q.item for q in queued(manifest)}
    answers = [a for a in standing(read_answers(manifest.store)) if a.sha256 in wanted]
    answered = {a.sha256 for a in answers if not a.skipped}
    skipped = {a.sha256 for a in answers} - answered
    there, problem = None, "Label Studio was not asked"
    if server is not None:
        fresh = not_kept(manifest, standing(read_answers(manifest.store)))
        there, problem = _there(server, settings, set(wanted), fresh)
    touched = {key for key, begun in (there or {}).items() if begun}
    done = answered | skipped | touched
    pace = learned_pace(answers, {key: item.seconds for key, item in wanted.items()})
    return ReviewStatus(
        project=settings.project,
        url=settings.url,
        queued=len(wanted),
        audit=sum(item.part == "audit" for item in wanted.values()),
        pushed=None if there is None else len(there),
        touched=None if there is None else len(touched),
        answered=len(answered),
        skipped=len(skipped),
        waiting=len(touched - answered - skipped),
        people=len({a.annotator for a in answers}),
        minutes=sum(item.seconds for item in wanted.values()) / 60,
        minutes_left=pace * sum(i.seconds for key, i in wanted.items() if key not in done) / 60,
        last_answer=max((a.submitted_at for a in answers), default=None),
        problem=problem,
        worth=audit_report(manifest) if versions(manifest.store) else None,
        figures=people_report(answers, read_gold(manifest.store)) if answers else None,
        pace=pace,
    )


def learned_pace(answers: Sequence[Answer], expected_s: Mapping[str, float]) -> float:
    """Measured over expected human time; 1 below 20 answers with a lead time.

    A lead time counts an open tab over lunch as work, so ratios beyond three times their median
    are left out.

    Args:
        answers: those that stand.
        expected_s: seconds that routing expected, by sha256.
    """
    timed = [(a.lead_time_s, expected_s[a.sha256]) for a in answers
             if a.lead_time_s and not a.skipped and expected_s.get(a.sha256)]  # fmt: skip
    if len(timed) < _ENOUGH_TIMED:
        return 1.0
    middle = median(took / expected for took, expected in timed)
    kept = [(took, expected) for took, expected in timed if took <= 3 * middle * expected]
    return sum(took for took, _ in kept) / sum(expected for _, expected in kept)


def _there(
    server: LabelStudio, settings: ReviewSettings, wanted: set[str], answers: Sequence[Answer]
) -> tuple[dict[str, bool], str]:
    """Return the keys in the run's projects, whether each was touched there, and what is gone.

    An earlier project that is gone counts as such while ``answers`` holds some of it: those that
    count, less those that a person kept.
    """
    titled = server.find_project(settings.project)
    now = titled or last_project(server, settings)
    there = {} if now is None else {now.project_id: now}
    gone = [settings.project] if now is None and settings.project_id else []
    for number, title in settings.projects.items():
        if int(number) in (settings.project_id, *there):
            continue
        earlier = server.project(int(number))
        if earlier is None:
            gone += [title] if given_in(answers, int(number)) else []
        else:
            there[earlier.project_id] = earlier
    found: dict[str, bool] = {}
    for project_id in there:
        for ref in server.task_refs(project_id):
            if ref.key in wanted:
                found[ref.key] = ref.touched or found.get(ref.key, False)
    names = ", ".join(repr(title) for title in gone)
    problems = [f"no longer there: {names}; see `labelfleet review pull`"] if gone else []
    if titled is None and now is not None:
        problems.append(f"the project {settings.project!r} is called {now.title!r} now")
    return found, "; ".join(problems)
