"""Review on a real Label Studio: push, people answer, pull, decide; nothing twice or lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from pipelines.label_studio.client import KEY, LabelStudio
from pipelines.label_studio.serving import choose_serving
from pipelines.labels.decide import decide_run
from pipelines.review.pull import pull_run
from pipelines.review.push import PushOptions, PushSummary, push_run
from pipelines.routing.route import route_run
from storage.errors import ReviewError
from storage.labels.rows import label_rows
from storage.labels.versions import read_label_tables
from storage.objects.protocols import StorageOptions
from storage.records import Detections
from storage.review.answers import read_answers
from storage.review.queue import read_queue
from storage.review.settings import ReviewSettings
from storage.runs.listing import Listing
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.support.samples.review_samples import POLICY, SIZE, loose_run, routed, three_boxes
from tests.support.samples.synthetic_run import boxes, commit_rows, list_shards, record
from tests.support.servers.label_studio import LabelStudioServer

pytestmark = pytest.mark.slow


@pytest.fixture
def place(label_studio: LabelStudioServer) -> Path:
    """A folder of this test's own that Label Studio may serve from."""
    return label_studio.folder / uuid4().hex


@pytest.fixture
def manifest(place: Path) -> Manifest:
    """Twelve images, all routed."""
    source, output = open_store(str(place / "source")), open_store(str(place / "run"))
    return routed(loose_run(source, output, 12))


@pytest.fixture
def settings(label_studio: LabelStudioServer) -> ReviewSettings:
    return ReviewSettings(label_studio.url, f"test {uuid4().hex}")


def push(
    manifest: Manifest, server: LabelStudio, settings: ReviewSettings, **options: Any
) -> PushSummary:
    source = open_store(manifest.record.source["url"])
    serving = choose_serving(manifest.store, StorageOptions())
    return push_run(
        manifest, server, settings, source=source, serving=serving, options=PushOptions(**options)
    )


def tasks_of(server: LabelStudio, settings: ReviewSettings) -> list[dict[str, Any]]:
    """Whole tasks of the project."""
    project = server.find_project(settings.project)
    assert project is not None
    fields = "id,data,predictions,result,model_version,score,annotations,drafts"
    return list(server.tasks(project.project_id, include=fields, whole=True))


def answer(person: httpx.Client, task: dict[str, Any], result: Any, **fields: Any) -> None:
    reply = person.post(f"/api/tasks/{task['id']}/annotations/", json={"result": result, **fields})
    reply.raise_for_status()


def test_push_makes_one_task_an_image_in_the_order_of_the_queue(
    manifest: Manifest, label_studio: LabelStudioServer, settings: ReviewSettings
) -> None:
    server = label_studio.client()
    pushed = push(manifest, server, settings)
    assert (pushed.created, pushed.not_shown) == (12, {})
    tasks = tasks_of(server, settings)
    queue = list(read_queue(manifest.store))
    assert [t["data"][KEY] for t in tasks] == [item.sha256 for item in queue]
    for task in tasks:
        (prediction,) = task["predictions"]
        assert prediction["model_version"] == "cells-abababababab"
        labels = [r["value"]["rectanglelabels"] for r in prediction["result"]]
        assert labels == [["RBC"], ["WBC"]]  # the third box is below `reject`
        at = int(task["data"]["image_id"].removesuffix(".jpg"))
        box = three_boxes(at).boxes[0]
        value = prediction["result"][0]["value"]
        width, height = SIZE
        assert value["x"] == pytest.approx(100 * box[0] / width)
        assert value["y"] + value["height"] == pytest.approx(100 * box[3] / height)


def test_people_see_the_pixels_that_were_labelled(
    manifest: Manifest, label_studio: LabelStudioServer, settings: ReviewSettings
) -> None:
    server = label_studio.client()
    push(manifest, server, settings)
    source = open_store(manifest.record.source["url"])
    project = server.find_project(settings.project)
    assert project is not None
    for task in tasks_of(server, settings):
        shown = server.image_bytes(project.project_id, task["data"]["image"])
        assert shown == source.get(task["data"]["image_id"])


def test_pushing_again_adds_nothing(
    manifest: Manifest, label_studio: LabelStudioServer, settings: ReviewSettings
) -> None:
    server = label_studio.client()
    push(manifest, server, settings)
    before = tasks_of(server, settings)
    again = push(manifest, server, settings)
    assert (again.created, again.there, again.predicted) == (0, 12, 0)
    assert tasks_of(server, settings) == before


def test_what_three_people_do_comes_back_once_and_becomes_labels(
    manifest: Manifest, label_studio: LabelStudioServer, settings: ReviewSettings
) -> None:
    server = label_studio.client()
    push(manifest, server, settings)
    tasks = tasks_of(server, settings)
    ann, ben, cem = (label_studio.person(f"{n}{uuid4().hex[:6]}") for n in ("ann", "ben", "cem"))
    shown = [t["predictions"][0]["result"] for t in tasks]
    corner = {"x": 0, "y": 0, "width": 10, "height": 10, "rotation": 0}
    moved = {**shown[1][0], "value": {**shown[1][0]["value"], "width": 40}}
    wbc = {**shown[2][0], "value": {**shown[2][0]["value"], "rectanglelabels": ["WBC"]}}
    drawn = {**shown[3][0], "id": "hand", "value": {**corner, "rectanglelabels": ["Platelets"]}}
    bare = {**shown[4][0], "id": "bare", "value": corner}
    answer(ann, tasks[0], shown[0], lead_time=3.5)
    answer(ann, tasks[1], [moved, shown[1][1]], lead_time=9)
    answer(ben, tasks[2], [wbc])
    answer(ben, tasks[3], [*shown[3], drawn])
    answer(cem, tasks[4], [bare])
    answer(cem, tasks[5], [], was_cancelled=True)
    answer(cem, tasks[0], [])

    pulled = pull_run(manifest, server, settings)
    assert (pulled.answers, pulled.skipped, pulled.images, pulled.people) == (7, 1, 6, 3)
    assert (pulled.kept, pulled.moved, pulled.relabelled, pulled.added) == (5, 1, 1, 1)
    assert (pulled.deleted, pulled.unusable) == (5, 1)  # wbc's second box, task 4's, cem's
    assert pull_run(manifest, server, settings).answers == 0
    assert pull_run(manifest, server, settings, everything=True).answers == 0

    found = {(a.task_id, a.annotator[:3]): a for a in read_answers(manifest.store)}
    assert found[tasks[0]["id"], "ann"].lead_time_s == 3.5
    assert found[tasks[5]["id"], "cem"].skipped
    assert found[tasks[1]["id"], "ann"].boxes[0].bbox[2] == pytest.approx(
        found[tasks[1]["id"], "ann"].boxes[0].bbox[0] + 0.4 * SIZE[0]
    )
    lineage = decide_run(manifest, POLICY)
    tables = read_label_tables(manifest.store, lineage)
    rows = {r.sha256: r for table in tables for r in label_rows(table)}
    sources = Counter(row.source for row in rows.values())
    assert sources == {"human": 4, "model": 8}
    of = [rows[t["data"][KEY]] for t in tasks]
    assert of[0].labels == ()  # cem answered last
    assert [x.origin for x in of[1].labels] == ["moved", "kept"]
    assert [x.origin for x in of[2].labels] == ["relabelled"]
    assert of[4].source == "model"  # a box without a label settles nothing
    assert of[5].source == "model"


def test_an_edited_answer_comes_again_and_others_do_not(
    manifest: Manifest, label_studio: LabelStudioServer, settings: ReviewSettings
) -> None:
    server = label_studio.client()
    push(manifest, server, settings)
    tasks = tasks_of(server, settings)
    ann = label_studio.person(f"ann{uuid4().hex[:6]}")
    for task in tasks[:3]:
        answer(ann, task, task["predictions"][0]["result"])
    pull_run(manifest, server, settings)
    (annotation,) = tasks_of(server, settings)[1]["annotations"]
    ann.patch(f"/api/annotations/{annotation['id']}/", json={"result": []}).raise_for_status()
    assert pull_run(manifest, server, settings).answers == 1
    last = list(read_answers(manifest.store))[-1]
    assert (last.annotation_id, last.boxes) == (annotation["id"], ())


def test_an_untouched_twin_is_deleted_and_an_answered_one_never(
    manifest: Manifest, label_studio: LabelStudioServer, settings: ReviewSettings
) -> None:
    server = label_studio.client()
    push(manifest, server, settings)
    tasks = tasks_of(server, settings)
    project = server.find_project(settings.project)
    assert project is not None
    server.import_tasks(project.project_id, [{"data": task["data"]} for task in tasks[:4]])
    ann = label_studio.person(f"ann{uuid4().hex[:6]}")
    twins = tasks_of(server, settings)[12:]
    answer(ann, twins[0], [])  # the younger one was answered: the older goes
    answer(ann, tasks[1], [])
    for task in (twins[2], tasks[2]):
        answer(ann, task, [])  # both: both stay
    assert pull_run(manifest, server, settings).twins_deleted == 3
    left = {t["id"] for t in tasks_of(server, settings)}
    everyone = {t["id"] for t in [*tasks, *twins]}
    assert everyone - left == {tasks[0]["id"], twins[1]["id"], twins[3]["id"]}
    assert len(list(read_answers(manifest.store))) == 4


def test_a_second_round_adds_its_boxes_where_there_is_no_answer(
    place: Path, manifest: Manifest, label_studio: LabelStudioServer, settings: ReviewSettings
) -> None:
    """The same images under a new checkpoint, into the same project."""
    server = label_studio.client()
    push(manifest, server, settings)
    tasks = tasks_of(server, settings)
    ann = label_studio.person(f"ann{uuid4().hex[:6]}")
    answer(ann, tasks[0], [])
    pull_run(manifest, server, settings)

    def better(at: int) -> Detections:
        return boxes([three_boxes(at).boxes[0]], [0.99], [0])

    rebuilt = rerun(manifest, place / "round2", better)
    again = push(routed(rebuilt), server, settings)
    assert (again.created, again.there, again.predicted) == (0, 12, 11)
    assert push(rebuilt, server, settings).predicted == 0
    versions = [[p["model_version"] for p in t["predictions"]] for t in tasks_of(server, settings)]
    assert list(map(len, versions)) == [2] * 12  # the answered one keeps its boxes under both names
    project = server.find_project(settings.project)
    assert project is not None
    assert project.model_version == "cells-cdcdcdcdcdcd"
    assert pull_run(rebuilt, server, settings).answers == 1  # the first round's, by its pixels
    decided = decide_run(rebuilt, POLICY, answers_from=[manifest])
    assert decided.counts["images_human"] == 1


def test_answers_older_than_the_last_pull_come_once_their_image_is_queued(
    place: Path, manifest: Manifest, label_studio: LabelStudioServer, settings: ReviewSettings
) -> None:
    """The first round has an answer to what the second one queues only later."""
    server = label_studio.client()
    push(manifest, server, settings)
    ann = label_studio.person(f"ann{uuid4().hex[:6]}")
    for task in tasks_of(server, settings):
        answer(ann, task, task["predictions"][0]["result"])
    second = rerun(manifest, place / "later", three_boxes)
    route_run(second, budget="3 images", policy=POLICY, invocation="one", audit=1.0)
    none = timedelta(0)
    assert pull_run(second, server, settings, margin=none).answers == 3
    route_run(second, budget="4 images", policy=POLICY, invocation="two", audit=1.0)
    assert pull_run(second, server, settings, margin=none).answers == 4
    assert pull_run(second, server, settings, margin=none).answers == 0
    assert pull_run(second, server, settings).answers == 0


def rerun(manifest: Manifest, folder: Path, found: Any) -> Manifest:
    """Another model's run over the same source."""
    output = open_store(str(folder))
    made = record(source=manifest.record.source["url"])
    identity = replace(made.identity, model_sha256="cd" * 32)
    second = Manifest.create_or_continue(output, replace(made, identity=identity))
    shards = list(Listing(manifest.store).live_shards())
    list_shards(output, shards)
    rows = [
        replace(r, detections=found(int(r.image_id.removesuffix(".jpg"))))
        for r in live_rows(manifest)
    ]
    for shard in shards:
        commit_rows(second, shard, [r for r in rows if r.shard_id == shard.shard_id])
    return second


def test_blind_audit_images_have_no_boxes_and_say_so_when_answered(
    manifest: Manifest, label_studio: LabelStudioServer, settings: ReviewSettings
) -> None:
    server = label_studio.client()
    blind = replace(settings, audit_blind=True)
    push(manifest, server, blind)
    audit = {item.sha256 for item in read_queue(manifest.store) if item.part == "audit"}
    assert audit
    tasks = tasks_of(server, blind)
    assert {t["data"][KEY] for t in tasks if not t["predictions"]} == audit
    assert push(manifest, server, blind).predicted == 0  # and stay blind
    ann = label_studio.person(f"ann{uuid4().hex[:6]}")
    for task in tasks:
        answer(ann, task, [])
    pull_run(manifest, server, blind)
    assert {a.sha256 for a in read_answers(manifest.store) if a.was_blind} == audit


@pytest.fixture
def plain_project(label_studio: LabelStudioServer, settings: ReviewSettings) -> LabelStudio:
    """A project whose interface knows only one of the classes."""
    server = label_studio.client()
    config = (
        '<View><Image name="img" value="$picture"/><RectangleLabels name="what" toName="img">'
        '<Label value="RBC"/></RectangleLabels></View>'
    )
    server.create_project(settings.project, config)
    return server


def test_an_interface_that_lacks_a_class_is_said_before_anything_is_pushed(
    manifest: Manifest, plain_project: LabelStudio, settings: ReviewSettings
) -> None:
    with pytest.raises(ReviewError, match="lacks WBC, Platelets") as caught:
        push(manifest, plain_project, settings)
    assert '<Label value="WBC"/>' in str(caught.value.hint)
    assert tasks_of(plain_project, settings) == []


def test_a_project_that_is_there_is_adopted_with_its_own_names(
    manifest: Manifest, plain_project: LabelStudio, settings: ReviewSettings
) -> None:
    project = plain_project.find_project(settings.project)
    assert project is not None
    labels = "".join(f'<Label value="{name}"/>' for name in ("Platelets", "RBC", "WBC", "Other"))
    plain_project.update_project(
        project.project_id,
        label_config='<View><Image name="img" value="$picture"/>'
        f'<RectangleLabels name="what" toName="img">{labels}</RectangleLabels></View>',
    )
    push(manifest, plain_project, settings)
    for task in tasks_of(plain_project, settings):
        assert task["data"]["picture"].startswith("/data/local-files/")
        names = {(r["from_name"], r["to_name"]) for r in task["predictions"][0]["result"]}
        assert names == {("what", "img")}
