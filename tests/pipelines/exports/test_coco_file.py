"""COCO's file as a whole: every byte, and a write that breaks off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.exports.coco import ANNOTATIONS, CocoExporter
from pipelines.exports.formats import ExportedImages, provenance
from pipelines.exports.place import STARTED, ExportPlace
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from storage.coco.box_lines import BoxLines
from storage.errors import AlreadyExists, StorageError, StorageFull
from storage.labels.rows import Label, LabelRow, rows_to_label_table
from storage.labels.versions import LabelVersion, read_version
from storage.objects.protocols import ObjectStore
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.pipelines.exports.labelled import Labelled, export_to
from tests.pipelines.exports.test_coco import box, image
from tests.support.faulty import FaultyStore, drop_reply
from tests.support.samples.synthetic_run import image_shard, make_run, row

NAMES = ('a "b".jpg', "ünï/😀.png", "c\\d\x7f.jpg", "plain.jpg", "empty.jpg", "x" * 300)
LABELS = (
    (Label((0, 0, 1e5, 9_999.9995), 0, 1.0, False, "model"),),
    (Label((0.0005, 0.25, 5, 6.1235), 1, None, True, "added"),
     Label((0.5, 0.5, 0.5, 0.5), 2, 0.0, False, "model")),
    (Label((1, 2, 3, 4), 2, 9.9e-5, True, "model"),),
    tuple(Label((n / 4, 0.25, 50, n + 0.75), n % 3, n / 50, n % 2 == 1, "kept") for n in range(50)),
    (),
    (Label((0, 0, 4e4, 4e4), 1, 0.5, False, "moved"),),
)  # fmt: skip


@pytest.fixture(scope="module")
def lineage() -> LabelVersion:
    """Of a version whose classes have names that JSON has to escape."""
    shard = image_shard("a.jpg")
    run = make_run(MemoryStore(), {shard: [row("a.jpg", shard.shard_id)]})
    decide_run(run, Policy(accept=0.7, reject=0.1))
    found = read_version(run.store)
    odd = tuple(replace(c, name=f'"{c.name}" — ü') for c in found.categories)
    return replace(found, categories=odd, guarantee='95 % "at least" ≥')


def rows_of(labels: Sequence[Sequence[Label]]) -> list[LabelRow]:
    when = datetime(2026, 1, 31, 12, 0, 0, 125, tzinfo=UTC)
    return [
        LabelRow(name, "0" * 16, 0, 1, f"{n:064x}", 640, 480, "model", tuple(found), 0, "m", "p",
                 None if n % 2 else 'änn "x"', when)
        for n, (name, found) in enumerate(zip(NAMES, labels, strict=False))
    ]  # fmt: skip


@pytest.mark.parametrize("labels", [LABELS, ((), ()), ()], ids=["awkward", "no box", "no image"])
@pytest.mark.parametrize("ignore_boxes", ["in", "out"])
def test_the_file_is_what_json_writes(
    ignore_boxes: Any, labels: Sequence[Sequence[Label]], lineage: LabelVersion
) -> None:
    store, rows = MemoryStore(), rows_of(labels)
    with CocoExporter(ExportPlace(store, {}, ()), lineage, ignore_boxes) as exporter:
        for at in range(0, len(rows), 4):
            add(exporter, rows[at : at + 4])
        exporter.close()
    assert store.get(ANNOTATIONS).decode() == whole(rows, lineage, ignore_boxes)


@pytest.mark.parametrize("kind", ["folder", "memory", "lost replies"])
def test_the_first_of_two_that_race_is_never_replaced(
    kind: str, lineage: LabelVersion, tmp_path: Path
) -> None:
    store: ObjectStore = open_store(str(tmp_path)) if kind == "folder" else MemoryStore()
    if kind == "lost replies":
        store = FaultyStore(store, [drop_reply("create", ANNOTATIONS)])
    first, late = (
        CocoExporter(ExportPlace(store, {}, ()), lineage, "in") for _ in ("first", "late")
    )
    with first, late:
        add(first, rows_of(LABELS))
        add(late, rows_of(LABELS[:1]))
        with pytest.raises(StorageError) if kind == "lost replies" else nullcontext():
            first.close()
        with pytest.raises(AlreadyExists, match=ANNOTATIONS):
            late.close()
    assert store.get(ANNOTATIONS).decode() == whole(rows_of(LABELS), lineage, "in")
    with CocoExporter(ExportPlace(store, {}, (ANNOTATIONS,)), lineage, "in") as again:
        add(again, rows_of(LABELS[:1]))
        again.close()
    assert store.get(ANNOTATIONS).decode() == whole(rows_of(LABELS[:1]), lineage, "in")


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_a_file_that_came_meanwhile_is_not_replaced(
    kind: str, loose: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = str(tmp_path / "out") if kind == "folder" else f"memory://{tmp_path.name}-foreign"
    close = CocoExporter.close

    def closed(exporter: CocoExporter) -> None:
        open_store(dest).put(ANNOTATIONS, b"someone's own work")
        close(exporter)

    monkeypatch.setattr(CocoExporter, "close", closed)
    with pytest.raises(AlreadyExists, match=ANNOTATIONS):
        export_to(loose, dest, "coco")  # type: ignore[arg-type] # a URL
    assert open_store(dest).get(ANNOTATIONS) == b"someone's own work"


@pytest.mark.parametrize("images", [1, 3_000], ids=["at the end", "on the way"])
def test_a_full_temporary_folder_is_said(
    images: int, lineage: LabelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CocoExporter, "_path", lambda exporter, name: Path("/dev/full"))

    def export() -> None:
        with CocoExporter(ExportPlace(MemoryStore(), {}, ()), lineage, "in") as exporter:
            add(exporter, rows_of(LABELS[:1]) * images)
            exporter.close()

    with pytest.raises(StorageFull, match="labelfleet-"):
        export()


def add(exporter: CocoExporter, rows: Sequence[LabelRow]) -> None:
    names = [one.image_id for one in rows]
    exporter.add(ExportedImages(rows_to_label_table(rows), names, [None] * len(rows)))


def whole(rows: Sequence[LabelRow], lineage: LabelVersion, ignore_boxes: str) -> str:
    classes = [
        {"id": c.official_id, "name": c.name, "supercategory": ""} for c in lineage.categories
    ]
    boxes = [(number, label) for number, r in enumerate(rows, 1) for label in rounded(r).labels]
    kept = [pair for pair in boxes if ignore_boxes == "in" or not pair[1].ignore]
    ignored = [pair for pair in boxes if pair[1].ignore]
    lists = {
        "images": [image(n, r) for n, r in enumerate(rows, 1)],
        "annotations": [box(n, i, b, outlined=True) for n, (i, b) in enumerate(kept, 1)],
        "ignore": [box(n, i, b, outlined=False) for n, (i, b) in enumerate(ignored, 1)],
    }
    head = f'{{"info": {json.dumps(provenance(lineage))},\n"categories": {json.dumps(classes)},\n'
    text = (f'"{name}": [\n{joined(found)}\n]' for name, found in lists.items())
    return f"{head}{joined(text)}}}\n"


def joined(parts: Any) -> str:
    return ",\n".join(parts)


def rounded(row: LabelRow) -> LabelRow:
    """Return a row as Arrow holds it, with numbers of 32 bits."""
    single = [
        replace(
            one,
            bbox=tuple(float(np.float32(side)) for side in one.bbox),
            score=None if one.score is None else float(np.float32(one.score)),
        )
        for one in row.labels
    ]
    return replace(row, labels=tuple(single))


@pytest.mark.parametrize("again", [False, True], ids=["first attempt", "over an earlier one's"])
@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_a_write_that_breaks_off_leaves_nothing_of_it(
    kind: str, again: bool, loose: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_to(loose, tmp_path / "whole", "coco")
    wanted = (tmp_path / "whole" / ANNOTATIONS).read_bytes()
    dest = str(tmp_path / "out") if kind == "folder" else f"memory://{tmp_path.name}-{again}"
    store: ObjectStore = open_store(dest)
    with monkeypatch.context() as patch:
        if again:
            patch.setattr(ExportPlace, "finish", broken)
            with pytest.raises(StorageError, match="it broke off"):
                export_to(loose, dest, "coco")  # type: ignore[arg-type] # a URL
        patch.setattr(BoxLines, "lines", broken)
        with pytest.raises(StorageError, match="it broke off"):
            export_to(loose, dest, "coco")  # type: ignore[arg-type] # a URL
    there = [listed.key for listed in store.list()]
    assert there == (["README.md", ANNOTATIONS, STARTED] if again else [STARTED])
    assert list(store.leftovers()) == []
    if again:
        assert store.get(ANNOTATIONS) == wanted
    export_to(loose, dest, "coco")  # type: ignore[arg-type] # a URL
    assert store.get(ANNOTATIONS) == wanted


def broken(*what: object, **how: object) -> None:
    raise StorageError("it broke off")
