"""The report's section on review: what the audit says of the labels, and what people corrected."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from pipelines.evaluation.annotators import PeopleReport, people_report
from pipelines.evaluation.audit import AuditReport, PartWork, audit_report
from pipelines.evaluation.intervals import Estimate
from pipelines.report import figures
from pipelines.report.corrections import KINDS, Picture, pictures
from storage.errors import LabelfleetError
from storage.labels.versions import read_version, versions
from storage.objects.protocols import StorageOptions
from storage.review.answers import answer_parts, read_answers, standing
from storage.review.gold import read_gold
from storage.runs.manifest import Manifest
from storage.stores.open import open_store

_KIND_NAMES = {
    "missed": "missed", "spurious": "nothing there", "wrong_class": "wrong class",
    "misplaced": "misplaced",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReviewSection:
    """What the page shows.

    Attributes:
        worth: estimates of the latest label version; None: answers exist, but no version yet.
        guarantee: the proven statement on that version's accepted boxes; '' without one.
        shares, rates: charts of precision and recall, and of errors found a minute.
        kinds: (name, errors found by value, at random).
        pictures: corrections; ``problem``: why there are none.
        people: figures by annotator.
    """

    worth: AuditReport | None
    guarantee: str = ""
    shares: Markup | None = None
    rates: Markup | None = None
    kinds: tuple[tuple[str, int, int], ...] = ()
    pictures: tuple[Picture, ...] = ()
    problem: str = ""
    people: PeopleReport | None = None


def review_section(manifest: Manifest, options: StorageOptions | None) -> ReviewSection | None:
    """Return the section; None without answers and without a guarantee.

    A source out of reach costs only the pictures.
    """
    answered = bool(answer_parts(manifest.store))
    if not versions(manifest.store):
        return ReviewSection(None) if answered else None
    worth, guarantee = audit_report(manifest), read_version(manifest.store).guarantee
    if not worth.audit.answered and not worth.value.answered:
        return ReviewSection(None, guarantee) if answered or guarantee else None
    shown, problem = _pictures(manifest, options)
    return ReviewSection(
        worth=worth,
        guarantee=guarantee,
        shares=_shares(worth),
        rates=_rates(worth.value, worth.audit),
        kinds=tuple(
            (_KIND_NAMES[kind], worth.value.by_kind[kind], worth.audit.by_kind[kind])
            for kind in KINDS
        ),
        pictures=tuple(shown),
        problem=problem,
        people=people_report(standing(read_answers(manifest.store)), read_gold(manifest.store)),
    )


def _pictures(manifest: Manifest, options: StorageOptions | None) -> tuple[list[Picture], str]:
    try:
        source = open_store(manifest.record.source["url"], options)
        shown = pictures(manifest, source, read_version(manifest.store))
    except LabelfleetError as exc:
        return [], exc.message
    problems = [picture.problem for picture in shown]
    if problems and all(problems):
        return [], f"none of the images could be read again, such as: {problems[0]}"
    return shown, ""


def _shares(worth: AuditReport) -> Markup:
    recall = "recall (at most)" if worth.recall_is_upper_bound else "recall"
    rows = [_row("precision", worth.precision), _row(recall, worth.recall)]
    return figures.whiskers(
        rows, top=1.0, x_title="share of boxes",
        says=f"precision {worth.precision} and recall {worth.recall} of accepted labels",
    )  # fmt: skip


def _rates(value: PartWork, audit: PartWork) -> Markup:
    rows = [_row("by value", value.errors_per_minute), _row("at random", audit.errors_per_minute)]
    return figures.whiskers(
        rows, x_title="errors found a minute",
        says=f"errors found a minute: {value.errors_per_minute} by value, "
        f"{audit.errors_per_minute} at random",
    )  # fmt: skip


def _row(label: str, estimate: Estimate) -> tuple[str, float | None, float, float]:
    return label, estimate.value, estimate.low, estimate.high
