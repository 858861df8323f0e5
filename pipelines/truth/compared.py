"""Compare answers with the model's labels, image by image: the input of every estimate.

``labels/<version>/answered.jsonl`` holds one line for every image of the version that is in a
review queue or has an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.truth.bulk import accepted_in_bulk
from pipelines.truth.matching import Corrections, compare, covered
from pipelines.truth.settle import AnswerBook, Settled
from storage.errors import StorageError
from storage.review.queue import ReviewItem, queue_parts, read_head, read_queue
from storage.runs.manifest import Manifest


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """An image's place in the queue of one run.

    Attributes:
        item: as routed.
        stratum_images: live images of its stratum when it was last drawn from.
        run: URL of the run whose queue it is.
    """

    item: ReviewItem
    stratum_images: int
    run: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredImage(Corrections):
    """One image, its place in the queue, and the corrections that the model's labels needed.

    Corrections are those of accepted boxes against the answer; 0 unless answered.

    Attributes:
        image_id, sha256: the image in this version.
        part: ``audit``, ``value``, or ``other`` (answered, but in no queue that was read).
        run, stratum, stratum_images, audit_rank: as in the queue; '' and -1 for ``other``.
        expected_s: human seconds that routing expected.
        state: ``answered``, ``skipped``, ``not_shown`` (the last push could not) or ``open``.
        blind: the person saw no predictions.
        lead_time_s: seconds the person took, where known.
        missed_ignored: of the missed, those that an ignore box covers with IoU >= 0.5.
        bulk: the predictions were accepted in bulk, see ``bulk``: no audit answer.
    """

    image_id: str
    sha256: str
    part: str
    run: str
    stratum: str
    stratum_images: int
    audit_rank: int
    expected_s: float
    state: str
    blind: bool = False
    lead_time_s: float | None = None
    missed_ignored: int = 0
    bulk: bool = False


def queue_entries(runs: Iterable[Manifest]) -> dict[str, list[QueueEntry]]:
    """Queue items of several runs by sha256; audit items first, then in the order given."""
    found: dict[str, list[QueueEntry]] = {}
    for run in runs:
        keys = queue_parts(run.store)
        sizes = {s.name: s.images for key in keys for s in read_head(run.store, key).strata}
        for item in read_queue(run.store, keys, hidden=True):
            entry = QueueEntry(item, sizes[item.stratum], run.url)
            found.setdefault(item.sha256, []).append(entry)
    return found


class QueuePlaces:
    """Find the places of an image in the queues; each place is returned once.

    An audit samples images by name, so in the run's own queue the name must fit; another run may
    have held the same pixels under another name.
    """

    def __init__(self, runs: Sequence[Manifest]) -> None:
        self._own = runs[0].url if runs else ""
        self._entries = queue_entries(runs)

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._entries

    def take(self, image_id: str, sha256: str) -> list[QueueEntry]:
        """At most one place by run: the audit's, if it has several."""
        entries = self._entries.get(sha256, [])
        taken: dict[str, QueueEntry] = {}
        for entry in sorted(entries, key=lambda e: e.item.part != "audit"):
            fits = entry.item.image_id == image_id or entry.run != self._own
            if fits and entry.run not in taken:
                taken[entry.run] = entry
        for entry in taken.values():
            entries.remove(entry)
        return list(taken.values())


def describe(
    image_id: str,
    sha256: str,
    places: Sequence[QueueEntry],
    book: AnswerBook,
    model: ModelLabels,
    names: Sequence[str],
) -> list[AnsweredImage]:
    """Describe one image: a line for each place, or one without a place if it has an answer.

    Args:
        image_id, sha256: the image in this version.
        places: from ``QueuePlaces.take``.
        book: the answers.
        model: what the policy makes of the model's boxes.
        names: class names by category id.
    """
    settled = book.settled.get(sha256)
    if settled is None:
        state = "skipped" if sha256 in book.skipped else "open"
        if state == "open" and sha256 in book.not_shown:
            state = "not_shown"
        return [_line(image_id, sha256, place, state) for place in places]
    found = model.against(settled, names)
    known: Sequence[QueueEntry | None] = places or [None]
    blank = [_line(image_id, sha256, place, "answered") for place in known]
    return [replace(line, **found) for line in blank]


@dataclass(frozen=True, slots=True)
class ModelLabels:
    """One image's accepted and ignored boxes, highest score first.

    Attributes:
        boxes: float32 [N, 4] xyxy; ``category_ids`` int16 [N] of the accepted.
        ignored: float32 [M, 4] xyxy.
    """

    boxes: NDArray[np.float32]
    category_ids: NDArray[np.int16]
    ignored: NDArray[np.float32]

    def against(self, settled: Settled, names: Sequence[str]) -> dict[str, Any]:
        """Return the fields of ``AnsweredImage`` that an answer fills."""
        answer = settled.answer
        truth = np.array([box.bbox for box in answer.boxes], np.float64).reshape(-1, 4)
        ids = np.array([names.index(box.category) for box in answer.boxes], np.int64)
        disputed = np.array([box.bbox for box in settled.disputed], np.float64).reshape(-1, 4)
        hidden = np.array(answer.hidden, np.float64).reshape(-1, 4)
        # People disagree about them, or did not judge them: neither right nor wrong.
        judged = ~covered(self.boxes, disputed)
        judged &= ~covered(self.boxes, hidden) | covered(self.boxes, truth)
        boxes, category_ids = self.boxes[judged], self.category_ids[judged]
        found = compare(boxes, category_ids, truth, ids)
        unseen = ~covered(truth, boxes) & covered(truth, self.ignored)
        return {
            **asdict(found),
            "missed_ignored": min(int(unseen.sum()), found.missed),
            "blind": answer.was_blind,
            "lead_time_s": answer.lead_time_s,
            "bulk": accepted_in_bulk(answer),
        }


def _line(image_id: str, sha256: str, place: QueueEntry | None, state: str) -> AnsweredImage:
    if place is None:
        return AnsweredImage(
            image_id=image_id,
            sha256=sha256,
            part="other",
            run="",
            stratum="",
            stratum_images=0,
            audit_rank=-1,
            expected_s=0.0,
            state=state,
        )
    item = place.item
    return AnsweredImage(
        image_id=image_id,
        sha256=sha256,
        part=item.part,
        run=place.run,
        stratum=item.stratum,
        stratum_images=place.stratum_images,
        audit_rank=item.audit_rank,
        expected_s=item.seconds,
        state=state,
    )


def to_jsonl(images: Sequence[AnsweredImage]) -> bytes:
    """Return one JSON object a line."""
    return "".join(json.dumps(asdict(image)) + "\n" for image in images).encode()


def from_jsonl(raw: bytes) -> list[AnsweredImage]:
    """Read what ``to_jsonl`` wrote. Raises StorageError when it is damaged."""
    try:
        return [AnsweredImage(**json.loads(line)) for line in raw.splitlines()]
    except (ValueError, TypeError) as exc:
        raise StorageError(f"an answered.jsonl cannot be read: {exc}") from exc
