"""By annotator: pace, what became of boxes, agreement with others and with gold."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from pipelines.evaluation.annotators import people_report
from pipelines.review.status import learned_pace
from pipelines.review.view import render_people
from pipelines.truth.settle import settle
from storage.review.answers import (
    Answer,
    DeletedBox,
    Origin,
    ReviewedBox,
    append_answers,
    read_answers,
)
from storage.review.gold import GoldImage
from storage.stores.memory import MemoryStore

LEFT, RIGHT = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 10.0)


def answered(
    who: str,
    image: str,
    boxes: list[tuple[tuple[float, float, float, float], str, Origin]],
    *,
    seconds: float | None = 20.0,
    deleted: tuple[str, ...] = (),
    gold: bool = False,
    skipped: bool = False,
) -> Answer:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=len(who) + len(boxes))
    return Answer(
        image_id=image, sha256=image, task_id=1, annotation_id=abs(hash((who, image))) % 2**31,
        annotator=who, lead_time_s=seconds, submitted_at=at, skipped=skipped,
        boxes=tuple(ReviewedBox(b, c, o, None if o == "added" else 0.5) for b, c, o in boxes),
        deleted=tuple(DeletedBox(RIGHT, c, 0.3) for c in deleted),
        model_version="m", was_blind=False, ground_truth=gold,
    )  # fmt: skip


ANSWERS = [
    answered("ann", "1", [(LEFT, "RBC", "kept"), (RIGHT, "WBC", "added")], seconds=10.0),
    answered("ann", "2", [(LEFT, "RBC", "moved")], seconds=30.0, deleted=("WBC",)),
    answered("bob", "1", [(LEFT, "RBC", "kept")], seconds=40.0),
    answered("bob", "3", [], skipped=True),
    answered("eve", "1", [(LEFT, "RBC", "kept"), (RIGHT, "WBC", "added")], gold=True),
]


def test_pace_shares_and_errors() -> None:
    report = people_report(ANSWERS)
    ann, bob, eve = report.people
    assert (ann.name, ann.images, ann.seconds) == ("ann", 2, 20.0)
    assert ann.boxes == {"kept": 1, "moved": 1, "relabelled": 0, "added": 1, "deleted": 1}
    assert ann.share("kept") == pytest.approx(1 / 4)
    assert (bob.images, bob.skipped) == (1, 1)
    # ann against bob: 1 of (2 + 1) / 2 boxes; against eve: all. bob against eve likewise 2 / 3.
    assert ann.error_others == pytest.approx(1 - 2 * 3 / 7)
    assert ann.error_gold == pytest.approx(0.0)
    assert bob.error_gold == pytest.approx(1 / 3)
    assert eve.error_gold is None  # no other answer has a star


def test_agreement_and_accept_rates() -> None:
    report = people_report(ANSWERS)
    found = {(a.one, a.other): (a.images, round(a.share, 3)) for a in report.agreement}
    assert found == {
        ("ann", "bob"): (1, 0.667),
        ("ann", "eve"): (1, 1.0),
        ("bob", "eve"): (1, 0.667),
    }
    assert [(r.category, r.shown, r.kept) for r in report.classes] == [("RBC", 4, 3), ("WBC", 1, 0)]


def test_bulk_answers_are_counted_and_enter_no_accept_rate() -> None:
    bulk = answered("zoe", "9", [(LEFT, "RBC", "kept")], seconds=None)
    report = people_report([*ANSWERS, bulk])
    assert report.people[-1].bulk == 1
    assert report.classes[0].shown == 4
    console = Console(width=200)
    with console.capture() as shown:
        for part in render_people(report):
            console.print(part)
    assert "accepted in bulk, unlooked at: 1 answer" in shown.get()
    assert "75%" in shown.get()


def test_the_star_is_kept_and_wins() -> None:
    store = MemoryStore()
    append_answers(store, ANSWERS)
    assert [a.ground_truth for a in read_answers(store)] == [False] * 4 + [True]
    later = answered("someone late", "1", [(LEFT, "WBC", "relabelled")])
    assert later.submitted_at > ANSWERS[-1].submitted_at
    assert settle([*ANSWERS, later]).settled["1"].answer.annotator == "eve"
    assert settle([*ANSWERS[:-1], later]).settled["1"].answer.annotator == "someone late"


def test_minutes_left_go_at_the_measured_pace() -> None:
    expected = {str(n): 10.0 for n in range(30)}
    slow = [answered("ann", str(n), [(LEFT, "RBC", "moved")], seconds=25.0) for n in range(30)]
    assert learned_pace(slow, expected) == pytest.approx(2.5)
    lunch = [*slow[:29], answered("ann", "29", [(LEFT, "RBC", "moved")], seconds=4000.0)]
    assert learned_pace(lunch, expected) == pytest.approx(2.5)
    assert learned_pace(slow[:19], expected) == 1.0


def test_gold_images_measure_everyone_against_what_is_known() -> None:
    middle = (20.0, 0.0, 30.0, 10.0)
    gold = {
        "1": GoldImage("truth", ((LEFT, "RBC"), (RIGHT, "WBC"))),
        "2": GoldImage("truth", ((LEFT, "RBC"),), regions=((middle, ""), (RIGHT, "RBC"))),
        "9": GoldImage("answers", ((LEFT, "RBC"),)),  # nobody answered it yet
    }
    answers = [
        answered("ann", "1", [(LEFT, "RBC", "kept"), (RIGHT, "WBC", "added")]),
        answered("ann", "2", [(LEFT, "RBC", "kept"), (middle, "WBC", "added")]),  # unjudged
        answered("bob", "1", [(LEFT, "RBC", "kept"), (RIGHT, "RBC", "kept")]),  # wrong class
        answered("bob", "2", [(LEFT, "RBC", "kept"), (RIGHT, "WBC", "added")]),  # one too many
        answered("cat", "3", [(LEFT, "RBC", "kept")]),
    ]
    ann, bob, cat = people_report(answers, gold).people
    assert (ann.gold_images, ann.error_gold) == (2, 0.0)
    assert bob.gold_images == 2
    assert bob.error_gold == pytest.approx(1 - 2 * (1 + 1) / ((2 + 2) + (2 + 1)))
    assert (cat.gold_images, cat.error_gold) == (0, None)
    # Without the records, only stars are gold.
    assert people_report(answers).people[0].error_gold is None
