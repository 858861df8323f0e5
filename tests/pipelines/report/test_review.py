"""The report's review section: figures of the audit, and pictures of what people corrected."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation.audit import audit_report
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from pipelines.report.corrections import Correction, choose, corrections, crop, pictures, view
from pipelines.report.review import review_section
from pipelines.routing.route import route_run
from storage.labels.versions import read_version
from storage.records import Shard, shard_id_of
from storage.review.answers import Answer, ReviewedBox, append_answers
from storage.review.queue import read_queue
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.pipelines.report.test_page import HOSTILE, Page, page_of
from tests.support.samples.review_runs import distinct_row
from tests.support.samples.synthetic_run import boxes, make_run

GREY, WHITE = (90, 90, 90), (250, 250, 250)
KEPT, THERE, WRONG, MOVED = (20, 20, 60, 60), (100, 20, 140, 60), (20, 100, 60, 140), (
    100, 100, 140, 140)  # fmt: skip
CLASSES = ("RBC", "WBC", "<b>Platelets</b>")


def photo() -> bytes:
    """Grey, 200 by 160, with a white square where something was missed."""
    image = Image.new("RGB", (200, 160), GREY)
    image.paste(WHITE, (150, 20, 180, 50))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def manifest() -> Manifest:
    """Eight images; the model's four boxes are right, absent, of another class, misplaced."""
    source = MemoryStore()
    for i in range(8):
        source.put(f"{i}.png", photo())
    listed = tuple(source.list())
    shard = Shard(shard_id_of(list(listed)), "images", listed)
    found = boxes([KEPT, THERE, WRONG, MOVED], [0.95, 0.9, 0.85, 0.8], [0, 0, 0, 1])
    rows = [
        replace(distinct_row(o.key, shard, found), width=200, height=160, offset=0, nbytes=o.nbytes)
        for o in listed
    ]
    made = make_run(MemoryStore(), {shard: rows}, classes=CLASSES, source=source.url)
    route_run(made, budget="8 images", policy=Policy(), invocation="one", audit=0.5)
    return made


def answer_all(manifest: Manifest, annotator: str = "ann") -> None:
    left = (
        ReviewedBox(KEPT, "RBC", "kept", 0.95),
        ReviewedBox(WRONG, "WBC", "relabelled", 0.85),
        ReviewedBox((115, 115, 155, 155), "WBC", "moved", 0.8),
        ReviewedBox((150, 20, 180, 50), CLASSES[2], "added", None),
    )
    append_answers(
        manifest.store,
        [
            Answer(i.image_id, i.sha256, 1, n, annotator, 30.0, datetime.now(UTC), False, left, (),
                   "m", False)
            for n, i in enumerate(read_queue(manifest.store))
        ],
    )  # fmt: skip


def test_nothing_answered_nothing_shown(manifest: Manifest) -> None:
    assert review_section(manifest, None) is None
    assert "What review was worth" not in page_of(manifest).text
    decide_run(manifest, Policy())
    assert review_section(manifest, None) is None


def test_unmerged_answers_are_reported(manifest: Manifest) -> None:
    answer_all(manifest)
    text = page_of(manifest).text
    assert "no label version holds their answers yet" in text


def test_the_page_says_what_status_says(manifest: Manifest) -> None:
    answer_all(manifest)
    decide_run(manifest, Policy())
    worth = audit_report(manifest)
    text = " ".join(page_of(manifest).text.split())
    assert worth.precision.value == 0.25
    assert "Precision 25 [" in text
    assert "recall at most 25 [" in text
    assert f"{worth.errors_per_100_images.value:.3g} [" in text
    assert f"found {worth.gain.value:.3g} [" in text
    assert "missed 4 4" in text
    assert "all 16 16" in text
    assert all(note in text for note in worth.notes)
    assert "s an image kept, % moved, % relabelled, % added, % deleted, %" in text
    assert "ann 8 30 25.0 25.0 25.0 25.0 0.0" in text


def test_each_kind_of_correction_is_shown_before_and_after(manifest: Manifest) -> None:
    answer_all(manifest)
    decide_run(manifest, Policy())
    found = corrections(manifest, read_version(manifest.store))
    assert len(found) == 8 * 4
    chosen = choose(found, 6)
    assert [c.kind for c in chosen][:4] == ["missed", "spurious", "wrong_class", "misplaced"]
    assert len({c.row.image_id for c in chosen}) == 6
    shown = pictures(manifest, open_store(manifest.record.source["url"]),
                     read_version(manifest.store), 6)  # fmt: skip
    assert [p.says for p in shown][:4] == [
        f"missed: {CLASSES[2]}", "nothing there: RBC", "RBC is WBC", "moved: WBC",
    ]  # fmt: skip
    assert all(p.before.startswith("data:image/jpeg;base64,") and p.after for p in shown)


def test_crops_show_the_place_and_the_box(manifest: Manifest) -> None:
    answer_all(manifest)
    decide_run(manifest, Policy())
    found = corrections(manifest, read_version(manifest.store))
    missed = next(c for c in found if c.kind == "missed")
    pixels = np.asarray(Image.open(io.BytesIO(photo())))
    before, after = (
        crop(pixels, missed, side, focus).astype(int)
        for side, focus in ((missed.before, missed.was), (missed.after, missed.now))
    )
    assert before.shape == after.shape == (270, 360, 3)
    x1, y1, x2, y2 = view(missed, 200, 160)
    middle = (round((35 - y1) * 270 / (y2 - y1)), round((165 - x1) * 360 / (x2 - x1)))
    assert before[middle] == pytest.approx(WHITE, abs=8)  # the crop holds what was missed
    edge = (middle[0], round((150 - x1) * 360 / (x2 - x1)))
    assert np.abs(after[edge] - before[edge]).max() > 60  # its box is drawn only after


@pytest.mark.parametrize("box", [(0, 0, 3, 3), (0, 0, 200, 160), (199, 159, 200, 160),
                                 (0, 80, 200, 82), (-5, -5, 300, 300)])  # fmt: skip
def test_views_stay_inside_the_image(manifest: Manifest, box: tuple[int, ...]) -> None:
    answer_all(manifest)
    decide_run(manifest, Policy())
    one = corrections(manifest, read_version(manifest.store))[0]
    at = replace(one.after, boxes=np.array([box] * 4, np.float64))
    x1, y1, x2, y2 = view(Correction(one.row, one.before, at, "missed", None, 0, "a"), 200, 160)
    assert 0 <= x1 < x2 <= 200
    assert 0 <= y1 < y2 <= 160


def test_a_source_that_is_gone_costs_the_pictures_only(manifest: Manifest) -> None:
    answer_all(manifest)
    decide_run(manifest, Policy())
    source = open_store(manifest.record.source["url"])
    for listed in list(source.list()):
        source.delete(listed.key)
    section = review_section(manifest, None)
    assert section is not None
    assert section.worth is not None
    assert "could be read again" in section.problem
    assert section.pictures == ()


def test_names_are_text(manifest: Manifest) -> None:
    answer_all(manifest, annotator=HOSTILE)
    decide_run(manifest, Policy())
    page = page_of(manifest)
    assert {tag for tag, _ in page.tags} & {"script", "b"} <= {"b"}
    alts = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert any(alt and alt.endswith(f"missed: {CLASSES[2]}") for alt in alts)
    assert HOSTILE in page.text
    assert isinstance(page, Page)
