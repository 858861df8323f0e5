"""The round's page: teacher against student, what the labels were, what it cost. One HTML file.

It loads nothing and runs no script, as the report of a run; its layout is assets/round.html.j2.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import Markup

from pipelines.exports.model_card import model_card, read_card_facts
from pipelines.report import figures
from pipelines.report.gallery import Tile, draw_tiles
from pipelines.report.page import page_environment
from pipelines.report.scan import Pick
from pipelines.rounds.costs import costs_of
from pipelines.rounds.gain import Comparison, Gain, signed, true_boxes
from pipelines.rounds.state import StepRecord
from pipelines.rounds.work import RoundWork
from pipelines.truth.coco_truth import join_rows
from storage.coco.truth import read_truth
from storage.errors import LabelfleetError
from storage.objects.json_records import digest_of
from storage.records import AnnotationRow, Detections
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from workers.checkpoints.lineage import Ancestor, ancestors_in, is_non_commercial

PAGE_KEY = "round.html"
Fields = dict[str, Any]
_MOST_CLASSES = 30


def page_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return a digest of all other steps."""
    others = [one.to_fields() for one in work.state.all() if one.step != "page"]
    return {"steps": digest_of({"steps": others})}


def write_page(work: RoundWork, record: StepRecord) -> Fields:
    """Write the page from what the steps recorded."""
    records = [one for one in work.state.all() if one.step != "page"]
    url = render_page(work, records, time.time())
    return {"page": url, "card": _write_card(work, {one.step: one for one in records})}


def _write_card(work: RoundWork, records: Mapping[str, StepRecord]) -> str | None:
    """Write the student's model card beside it, with its figures on the held-out images."""
    student, evaluated = records.get("student"), records.get("evaluate")
    if student is None or student.status != "done":
        return None
    facts = read_card_facts(student.result["model"]["checkpoint"], work.options)
    if evaluated is not None and evaluated.status == "done":
        found = evaluated.result["student"]
        names = ("mAP", "mAP50", "mAP75", "AR")
        measured = {name: found[name] for name in names if found[name] is not None}
        facts = replace(facts, measured={"test": measured})
    key = f"{student.place}/README.md"
    work.store.put(key, model_card(facts).encode())
    return work.url(key)


def render_page(work: RoundWork, records: Sequence[StepRecord], now: float) -> str:
    """Write ``round.html`` below the output; return its URL.

    Steps that were skipped or are not done leave their sections out.
    """
    results: dict[str, Fields] = {one.step: one.result for one in records if one.status == "done"}
    compared = results.get("evaluate")
    found = Comparison.from_fields(compared["comparison"]) if compared else None
    better, worse, problem = _pictures(work, compared, found)
    environment = page_environment()
    environment.filters["signed"] = signed
    html = environment.get_template("round.html.j2").render(
        name=work.config.name,
        url=work.store.url,
        written_at=now,
        found=found,
        rows=_rows(found),
        classes_chart=_chart(found),
        curves=_curves(results),
        teacher_trained="summary" in results.get("teacher", {}),
        labels=_labels(results),
        better=better,
        worse=worse,
        problem=problem,
        costs=costs_of(records),
        steps=records,
        lineage=_lineage(results),
        compiled=results.get("compile"),
        gate=results.get("gate"),
        test=str(work.config.test.annotations),
    )  # fmt: skip
    work.store.put(PAGE_KEY, html.encode("utf-8", "backslashreplace"))
    return work.url(PAGE_KEY)


# teacher against student


def _rows(found: Comparison | None) -> list[tuple[str, list[Gain]]]:
    if found is None:
        return []
    return [
        ("all", [found.overall]),
        ("size", [g for g in found.sizes if g.objects]),
        ("class", sorted(found.classes, key=lambda g: -(g.gain or 0.0))),
    ]


def _chart(found: Comparison | None) -> Markup:
    if found is None:
        return Markup("")
    known = sorted((g for g in found.classes if g.gain is not None), key=lambda g: -(g.gain or 0.0))
    if len(known) > _MOST_CLASSES:  # those that moved most
        kept = sorted(known, key=lambda g: -abs(g.gain or 0.0))[:_MOST_CLASSES]
        known = [g for g in known if g in kept]
    shown = [("all", found.overall), *((g.name, g) for g in known)]
    return figures.differences(
        [(name, g.gain, g.low or 0.0, g.high or 0.0) for name, g in shown],
        says="gain of the student over its teacher in points of AP, with 90 % intervals",
        x_title="points of AP gained",
    )


# labels


@dataclass(frozen=True, slots=True)
class LabelFacts:
    """What the labels were.

    Attributes:
        rows: (class, accepted from the machine, from people, ignored), most frequent first.
        human_share: of the images, that people answered.
    """

    version: str
    counts: Mapping[str, int]
    rows: tuple[tuple[str, int, int, int], ...]
    human_share: float
    guarantee: str
    not_proven: str
    human_minutes: float
    fit: Mapping[str, Any] | None


def _labels(results: Mapping[str, Fields]) -> LabelFacts | None:
    decided = results.get("decide")
    if decided is None:
        return None
    rows = [
        (name, one["model"], one["human"], one["ignored"])
        for name, one in decided["by_class"].items()
    ]
    counts = decided["counts"]
    images = counts["images_model"] + counts["images_human"]
    return LabelFacts(
        version=decided["version"],
        counts=counts,
        rows=tuple(sorted(rows, key=lambda row: -(row[1] + row[2]))),
        human_share=counts["images_human"] / max(1, images),
        guarantee=decided["guarantee"],
        not_proven=decided["not_proven"],
        human_minutes=float(results.get("pull", {}).get("human_minutes", 0.0)),
        fit=results.get("fit"),
    )


# curves


def _curves(results: Mapping[str, Fields]) -> list[tuple[str, Markup]]:
    told = {who: results.get(who, {}).get("summary") for who in ("teacher", "student")}
    known = {who: one["history"] for who, one in told.items() if one}
    made = []
    for title, at, times in (("mAP on the validation set", 2, 100.0), ("loss", 1, 1.0)):
        series = [(who, [(h[0], times * h[at]) for h in history]) for who, history in known.items()]
        if series:
            says = f"{title} by step of {' and '.join(known)}"
            made.append((title, figures.lines(series, says=says, x_title="step")))
    return made


# lineage


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where the student comes from, and what that allows."""

    licence: str
    non_commercial: bool
    unstated: tuple[str, ...]
    ancestors: tuple[Ancestor, ...]


def _lineage(results: Mapping[str, Fields]) -> Lineage | None:
    student = results.get("student")
    if student is None:
        return None
    ancestors = ancestors_in(student.get("provenance"))
    licence = student["licence"] or "unstated"
    return Lineage(
        licence,
        is_non_commercial(licence),
        tuple(a.name for a in ancestors if a.licence in ("", "unstated")),
        tuple(ancestors),
    )


# pictures


@dataclass(frozen=True, slots=True)
class Triple:
    """One image: what is there, what the teacher saw, what the student saw."""

    name: str
    tiles: tuple[tuple[str, Tile], ...]


def _pictures(
    work: RoundWork, compared: Fields | None, found: Comparison | None
) -> tuple[list[Triple], list[Triple], str | None]:
    if compared is None or found is None:
        return [], [], None
    try:
        triples = _triples(work, compared["runs"], (*found.better, *found.worse))
    except LabelfleetError as exc:
        return [], [], exc.message
    return (
        [triples[n] for n in found.better if n in triples],
        [triples[n] for n in found.worse if n in triples],
        None,
    )


def _triples(work: RoundWork, runs: Mapping[str, str], names: Sequence[str]) -> dict[str, Triple]:
    manifests = {who: Manifest.open(url, work.options) for who, url in runs.items()}
    rows = {
        who: {r.image_id: r for r in live_rows(manifest) if r.image_id in set(names)}
        for who, manifest in manifests.items()
    }
    columns = {"truth": (manifests["teacher"], _with_truth(work, rows["teacher"], manifests))}
    columns |= {who: (manifests[who], rows[who]) for who in ("teacher", "student")}
    drawn = {}
    for who, (manifest, of_who) in columns.items():
        source = open_store(str(manifest.record.source["url"]), work.options)
        drawn[who] = draw_tiles(manifest, source, [Pick(row, None) for row in of_who.values()])
    return {
        name: Triple(name, tuple((who, tiles[name]) for who, tiles in drawn.items()))
        for name in names
        if all(name in tiles for tiles in drawn.values())
    }


def _with_truth(
    work: RoundWork, rows: Mapping[str, AnnotationRow], manifests: Mapping[str, Manifest]
) -> dict[str, AnnotationRow]:
    """Return the rows with the true boxes in place of the model's."""
    truth = read_truth(work.config.test.annotations)
    names = [c.name for c in manifests["teacher"].record.identity.categories]
    join = join_rows(truth, ((image_id, "") for image_id in rows))
    made = {}
    for image_id, row in rows.items():
        boxes, ids = true_boxes(truth, join.image_of_row[image_id], names)
        true = replace(
            Detections.empty(0),
            boxes=boxes.astype(np.float32),
            scores=np.ones(len(boxes), np.float32),
            category_ids=ids.astype(np.int16),
        )
        made[image_id] = replace(row, detections=true)
    return made
