"""Select the answers that count for a run, in the run's classes; set the others aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from storage.review.answers import Answer, DeletedBox, ReviewedBox, read_answers, standing
from storage.review.gold import read_gold
from storage.review.settings import read_settings
from storage.runs.manifest import Manifest


@dataclass(frozen=True, slots=True)
class SetAside:
    """An answer that settles nothing, where to find it, and why.

    Attributes:
        image_id, sha256, task_id, annotation_id, annotator: as in the answer.
        why: ``unknown class smudge``, or what cannot become a box.
    """

    image_id: str
    sha256: str
    task_id: int
    annotation_id: int
    annotator: str
    why: str

    def __str__(self) -> str:
        return f"task {self.task_id} ({self.image_id}) by {self.annotator}: {self.why}"

    def to_fields(self) -> dict[str, str | int]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class UsableAnswers:
    """Answers by what becomes of them.

    Attributes:
        answers: every class of theirs is one of the run's; those with something that cannot become
            a box are among them, and ``settle`` passes over them.
        set_aside: answers that settle nothing, by task.
    """

    answers: list[Answer]
    set_aside: list[SetAside]


def usable_answers(
    runs: Sequence[Manifest], parts: Mapping[str, Sequence[str]] | None = None
) -> UsableAnswers:
    """Return the answers of several runs that stand, with their classes as the first run has them.

    ``review.classes`` of the first run renames classes or drops their boxes. An answer that names
    a class which the run then still lacks is set aside whole: it would be an answer with a hole.

    Answers to gold images that another of the runs had settled before only measure people: they
    are left out while that run's answer stands.

    Args:
        runs: the run that labels are made for, then others whose answers count too.
        parts: keys of the answers' parts by the run's URL; None: all.
    """
    records = [
        list(read_answers(run.store, None if parts is None else parts.get(run.url, ())))
        for run in runs
    ]
    records = _without_checks(runs, records)
    settings = read_settings(runs[0].store)
    names = {c.name for c in runs[0].record.identity.categories}
    return in_classes(standing(*records), names, settings.classes if settings else {})


def _without_checks(
    runs: Sequence[Manifest], records: Sequence[Sequence[Answer]]
) -> list[list[Answer]]:
    """Leave out each run's answers to gold images that answers of the other runs had settled."""
    gold = [
        {sha256 for sha256, image in read_gold(run.store).items() if image.source == "answers"}
        for run in runs
    ]
    if not any(gold):
        return [list(own) for own in records]
    settled = {
        answer.sha256
        for checks, own in zip(gold, records, strict=True)
        for answer in standing(own)
        if answer.sha256 not in checks and not (answer.skipped or answer.unusable)
    }
    return [
        [answer for answer in own if answer.sha256 not in checks & settled]
        for checks, own in zip(gold, records, strict=True)
    ]


def in_classes(
    answers: Iterable[Answer], names: set[str], renamed: Mapping[str, str | None]
) -> UsableAnswers:
    """Rename classes, drop the boxes of those renamed to None, and set aside the rest."""
    usable, aside = [], []
    for answer in answers:
        made = _renamed(answer, renamed)
        unknown = sorted({box.category for box in made.boxes} - names)
        if unknown:
            aside.append(_set_aside(made, f"unknown class {', '.join(unknown)}"))
            continue
        if made.unusable:
            aside.append(_set_aside(made, told(made.unusable)))
        usable.append(made)
    return UsableAnswers(usable, sorted(aside, key=lambda a: (a.task_id, a.annotation_id)))


def told(unusable: Sequence[str]) -> str:
    """Return what cannot become a box, counted by kind."""
    kinds = sorted(Counter(unusable).items())
    return ", ".join(f"{n} {kind}" if n > 1 else kind for kind, n in kinds)


def _set_aside(answer: Answer, why: str) -> SetAside:
    return SetAside(
        image_id=answer.image_id,
        sha256=answer.sha256,
        task_id=answer.task_id,
        annotation_id=answer.annotation_id,
        annotator=answer.annotator,
        why=why,
    )


def _renamed(answer: Answer, renamed: Mapping[str, str | None]) -> Answer:
    if not renamed:
        return answer
    boxes, deleted = list[ReviewedBox](), list[DeletedBox]()
    for box in answer.boxes:
        if (name := renamed.get(box.category, box.category)) is not None:
            boxes.append(replace(box, category=name))
    for gone in answer.deleted:
        if (name := renamed.get(gone.category, gone.category)) is not None:
            deleted.append(replace(gone, category=name))
    return replace(answer, boxes=tuple(boxes), deleted=tuple(deleted))
