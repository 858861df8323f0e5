"""Work that changes after it was pulled, and rounds of one project, on a real Label Studio."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

import pipelines
from pipelines.cli.main import main
from pipelines.label_studio.client import KEY, LabelStudio
from pipelines.label_studio.regions import read_results
from pipelines.label_studio.token import VARIABLE
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import ClassThresholds, Policy, prior
from pipelines.review.pull import pull_run
from pipelines.review.refresh import refresh_run
from pipelines.review.rounds import earlier_runs, join_round, refresh_rounds
from pipelines.review.status import review_status
from pipelines.review.withdrawals import Chosen, retract
from pipelines.routing.cost import Budget
from pipelines.routing.route import route, route_run
from pipelines.routing.survey import RouteOptions
from pipelines.truth.matching import covered, iou_matrix
from storage.errors import ReviewError
from storage.labels.rows import LabelRow, label_rows
from storage.labels.versions import LabelVersion, read_label_tables
from storage.records import Detections
from storage.review.answers import read_answers, standing
from storage.review.queue import ReviewItem, read_queue
from storage.review.settings import ReviewSettings, read_settings, write_settings
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.e2e.test_review import answer, push, rerun, tasks_of
from tests.support.patience import patient
from tests.support.samples.review_samples import POLICY, loose_run, routed, three_boxes
from tests.support.samples.synthetic_run import boxes
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


@pytest.fixture
def server(label_studio: LabelStudioServer) -> LabelStudio:
    return label_studio.client()


@pytest.fixture
def ann(label_studio: LabelStudioServer) -> httpx.Client:
    return label_studio.person(f"ann{uuid4().hex[:6]}")


def human(manifest: Manifest) -> int:
    """Images that `decide` takes from people."""
    return decide_run(manifest, POLICY).counts["images_human"]


def annotations(task: dict[str, Any]) -> list[int]:
    return [annotation["id"] for annotation in task["annotations"]]


def test_work_that_was_deleted_or_skipped_after_a_pull_no_longer_counts(
    manifest: Manifest, server: LabelStudio, settings: ReviewSettings, ann: httpx.Client
) -> None:
    push(manifest, server, settings)
    for task in tasks_of(server, settings)[:8]:
        answer(ann, task, task["predictions"][0]["result"])
    assert pull_run(manifest, server, settings).answers == 8
    assert human(manifest) == 8
    tasks = tasks_of(server, settings)
    (first,), (second,) = annotations(tasks[0]), annotations(tasks[1])
    ann.delete(f"/api/annotations/{first}/").raise_for_status()
    ann.patch(f"/api/annotations/{second}/", json={"was_cancelled": True}).raise_for_status()
    server.delete_task(tasks[2]["id"])
    pulled = pull_run(manifest, server, settings)
    assert (pulled.withdrawn, pulled.answers, pulled.skipped) == (2, 1, 1)
    assert human(manifest) == 5
    reasons = [a.withdrawn for a in read_answers(manifest.store) if a.withdrawn]
    assert sorted(reasons) == ["deleted", "task deleted"]
    assert pull_run(manifest, server, settings).withdrawn == 0
    ann.patch(f"/api/annotations/{second}/", json={"was_cancelled": False}).raise_for_status()
    assert pull_run(manifest, server, settings).answers == 1
    assert human(manifest) == 6


def test_most_answers_gone_at_once_are_not_believed_until_someone_says_so(
    manifest: Manifest, server: LabelStudio, settings: ReviewSettings, ann: httpx.Client
) -> None:
    push(manifest, server, settings)
    for task in tasks_of(server, settings)[:8]:
        answer(ann, task, [])
    pull_run(manifest, server, settings)
    for task in tasks_of(server, settings)[:7]:
        server.delete_task(task["id"])
    pulled = pull_run(manifest, server, settings)
    assert (pulled.withdrawn, pulled.held_back) == (0, 7)
    assert human(manifest) == 8
    assert pull_run(manifest, server, settings, deletions="withdraw").withdrawn == 7
    assert human(manifest) == 1


def test_a_deleted_project_is_told_from_a_renamed_one(
    manifest: Manifest, server: LabelStudio, settings: ReviewSettings, ann: httpx.Client
) -> None:
    push(manifest, server, settings)
    project = server.find_project(settings.project)
    assert project is not None
    known = replace(settings, project_id=project.project_id)
    for task in tasks_of(server, settings)[:4]:
        answer(ann, task, [])
    pull_run(manifest, server, known)
    server.update_project(project.project_id, title=f"{settings.project[:40]} II")
    with pytest.raises(ReviewError, match="is called"):
        pull_run(manifest, server, known)
    with pytest.raises(ReviewError, match="is called"):  # and no second project is suggested
        push(manifest, server, known, create=False)
    with pytest.raises(ReviewError, match="is called"):
        refresh_run(manifest, server, known, Policy())
    told = review_status(manifest, known, server)
    assert "is called" in told.problem
    assert (told.pushed, told.touched) == (told.queued, 4)
    first = Chosen(task=next(read_answers(manifest.store)).task_id)
    assert retract(manifest, first, server, known).deleted_there == 1
    server.http.send("DELETE", f"/api/projects/{project.project_id}")
    with pytest.raises(ReviewError, match="3 answers from it still count"):
        pull_run(manifest, server, known)
    assert pull_run(manifest, server, known, deletions="keep").kept_on == 3
    assert pull_run(manifest, server, known).whole
    assert human(manifest) == 3
    assert pull_run(manifest, server, known, deletions="withdraw").withdrawn == 3
    assert pull_run(manifest, server, known).whole
    assert human(manifest) == 0


def test_retracted_answers_open_their_tasks_again(
    manifest: Manifest, server: LabelStudio, settings: ReviewSettings,
    ann: httpx.Client, label_studio: LabelStudioServer,
) -> None:  # fmt: skip
    push(manifest, server, settings)
    ben = label_studio.person(f"ben{uuid4().hex[:6]}")
    tasks = tasks_of(server, settings)
    for task in tasks[:4]:
        answer(ann, task, [])
    answer(ben, tasks[4], [])
    pull_run(manifest, server, settings)
    name = next(a.annotator for a in read_answers(manifest.store) if a.annotator[:3] == "ann")
    by_task = retract(manifest, Chosen(task=tasks[4]["id"]), server, settings)
    assert (by_task.answers, by_task.deleted_there) == (1, 1)
    by_person = retract(manifest, Chosen(annotator=name), server, settings)
    assert (by_person.answers, by_person.images, by_person.deleted_there) == (4, 4, 4)
    assert standing(read_answers(manifest.store)) == []
    assert not any(task["annotations"] for task in tasks_of(server, settings))
    assert pull_run(manifest, server, settings).withdrawn == 0
    answer(ben, tasks[0], [])
    assert pull_run(manifest, server, settings).answers == 1
    assert human(manifest) == 1
    with pytest.raises(ReviewError, match="no answer"):
        retract(manifest, Chosen(annotator="nobody"), server, settings)


def test_a_retraction_that_leaves_label_studio_alone_is_not_undone_by_the_next_pull(
    manifest: Manifest, server: LabelStudio, settings: ReviewSettings, ann: httpx.Client
) -> None:
    push(manifest, server, settings)
    task = tasks_of(server, settings)[0]
    answer(ann, task, [])
    pull_run(manifest, server, settings)
    assert retract(manifest, Chosen(task=task["id"]), None, settings).not_reopened == 1
    assert pull_run(manifest, server, settings, everything=True).answers == 0
    assert human(manifest) == 0


def test_polygons_become_boxes_and_points_settle_nothing(
    manifest: Manifest, server: LabelStudio, settings: ReviewSettings, ann: httpx.Client
) -> None:
    shapes = "".join(
        f'<{kind}Labels name="{kind}" toName="image"><Label value="RBC"/></{kind}Labels>'
        for kind in ("Polygon", "KeyPoint")
    )
    config = (
        '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
        '<Label value="RBC"/><Label value="WBC"/><Label value="Platelets"/></RectangleLabels>'
        f"{shapes}</View>"
    )
    server.create_project(settings.project, config)
    push(manifest, server, settings)
    tasks = tasks_of(server, settings)
    common = {"to_name": "image", "original_width": 320, "original_height": 240, "id": "a"}
    corners = [[10, 10], [60, 20], [30, 50]]
    polygon = {**common, "from_name": "Polygon", "type": "polygonlabels",
               "value": {"points": corners, "closed": True, "polygonlabels": ["RBC"]}}  # fmt: skip
    point = {**common, "from_name": "KeyPoint", "type": "keypointlabels",
             "value": {"x": 5, "y": 5, "width": 1, "keypointlabels": ["RBC"]}}  # fmt: skip
    answer(ann, tasks[0], [polygon])
    answer(ann, tasks[1], [point])
    pulled = pull_run(manifest, server, settings)
    assert (pulled.answers, pulled.unusable) == (2, 1)
    assert f"task {tasks[1]['id']} ({tasks[1]['data']['image_id']})" in pulled.set_aside[0]
    assert "keypointlabels" in pulled.set_aside[0]
    boxes = {a.task_id: a.boxes for a in read_answers(manifest.store)}
    assert boxes[tasks[0]["id"]][0].bbox == pytest.approx((32, 24, 192, 120))
    version = decide_run(manifest, POLICY)
    assert (version.counts["images_human"], version.counts["answers_set_aside"]) == (1, 1)


def test_a_task_that_a_colleague_began_is_never_deleted(
    manifest: Manifest, server: LabelStudio, settings: ReviewSettings, ann: httpx.Client
) -> None:
    """Drafts of others are invisible in a list of tasks."""
    push(manifest, server, settings)
    tasks = tasks_of(server, settings)
    project = server.find_project(settings.project)
    assert project is not None
    server.import_tasks(project.project_id, [{"data": task["data"]} for task in tasks[:2]])
    twins = tasks_of(server, settings)[12:]
    draft = {"result": tasks[0]["predictions"][0]["result"], "lead_time": 1}
    ann.post(f"/api/tasks/{twins[0]['id']}/drafts", json=draft).raise_for_status()
    begun = [ref.task_id for ref in server.task_refs(project.project_id) if ref.touched]
    assert begun == [twins[0]["id"]]
    assert server.is_touched(twins[0]["id"])
    assert pull_run(manifest, server, settings).twins_deleted == 2
    left = {task["id"] for task in tasks_of(server, settings)}
    assert twins[0]["id"] in left  # the untouched older twin went instead
    assert {t["data"][KEY] for t in tasks} == {t["data"][KEY] for t in tasks_of(server, settings)}


def one_box(at: int) -> Detections:
    """What a better model finds: the first box alone."""
    return boxes([three_boxes(at).boxes[0]], [0.99], [0])


def stream(person: httpx.Client, server: LabelStudio, settings: ReviewSettings) -> dict[str, Any]:
    """The next task as Label Studio's page gets it to be labelled."""
    project = server.find_project(settings.project)
    assert project is not None
    reply = person.get(f"/api/projects/{project.project_id}/next")
    reply.raise_for_status()
    task: dict[str, Any] = reply.json()
    return task


def test_open_tasks_of_the_first_round_keep_showing_their_boxes_in_the_second(
    place: Path, manifest: Manifest, server: LabelStudio, settings: ReviewSettings,
    ann: httpx.Client,
) -> None:  # fmt: skip
    """Run B queues 3 of A's 12 images into A's project."""
    push(manifest, server, settings)
    second = rerun(manifest, place / "second", one_box)
    route_run(second, budget="3 images", policy=POLICY, invocation="b", audit=0.0)
    queue_b = {item.sha256 for item in read_queue(second.store)}
    assert len(queue_b) == 3
    pushed = push(second, server, settings)
    assert (pushed.created, pushed.there, pushed.predicted, pushed.kept_shown) == (0, 3, 3, 9)
    again = push(second, server, settings)
    assert (again.predicted, again.kept_shown) == (0, 0)
    seen = {}
    for _ in range(12):
        task = stream(ann, server, settings)
        (prediction,) = task["predictions"]
        key = task["data"][KEY]
        seen[key] = len(prediction["result"])
        fields = {"parent_prediction": prediction["id"]} if key in queue_b else {}
        answer(ann, task, [], **fields)
    assert seen == {item.sha256: 1 if item.sha256 in queue_b else 2 for item in queue(manifest)}
    pull_run(manifest, server, settings)
    shown = {a.sha256: (a.model_version, len(a.deleted)) for a in read_answers(manifest.store)}
    assert shown == {
        key: ("cells-cdcdcdcdcdcd", 1) if key in queue_b else ("cells-abababababab", 2)
        for key in seen
    }


def queue(manifest: Manifest) -> list[ReviewItem]:
    return list(read_queue(manifest.store))


def test_rounds_know_each_other_and_answered_images_are_not_pushed_again(
    place: Path, manifest: Manifest, server: LabelStudio, settings: ReviewSettings,
    ann: httpx.Client,
) -> None:  # fmt: skip
    push(manifest, server, settings)
    write_settings(manifest.store, join_round(manifest, server, settings))
    for task in tasks_of(server, settings)[:9]:
        answer(ann, task, task["predictions"][0]["result"])
    pull_run(manifest, server, settings)
    second = routed(rerun(manifest, place / "second", one_box))
    push(second, server, settings)
    write_settings(second.store, join_round(second, server, settings))
    assert [run.url for run in earlier_runs(second)] == [manifest.url]
    assert earlier_runs(manifest) == []  # the first round has not looked since
    refresh_rounds(manifest, server)  # as every pull does
    assert [run.url for run in earlier_runs(manifest)] == [second.url]

    elsewhere = replace(settings, project=f"test {uuid4().hex}")  # a new project, or a mistyped one
    pushed = push(second, server, elsewhere, earlier=earlier_runs(second))
    assert (pushed.created, pushed.answered_before) == (3, 9)
    assert push(second, server, elsewhere, again=True).created == 9
    decided = decide_run(second, POLICY, answers_from=earlier_runs(second))
    assert decided.counts["images_human"] == 9
    retract(manifest, Chosen(image="00003.jpg"), None, settings)
    assert decide_run(second, POLICY, answers_from=earlier_runs(second)).counts[
        "images_human"
    ] == 9 - any(a.image_id == "00003.jpg" for a in read_answers(manifest.store))

    shutil.rmtree(place / "run")
    with pytest.raises(ReviewError, match=r"the earlier round .* cannot be read"):
        earlier_runs(second)


def test_a_refresh_shows_other_boxes_closes_what_no_longer_pays_and_keeps_the_audit(
    place: Path, server: LabelStudio, settings: ReviewSettings, ann: httpx.Client
) -> None:
    """Two policies that each find the other half of 24 images worth a look."""
    source, output = open_store(str(place / "source")), open_store(str(place / "run"))
    run = loose_run(source, output, 24, found=one_unsure_box)

    def wants(other: str) -> Policy:
        dropped = ClassThresholds(accept=0.7, reject=0.6)
        return Policy(accept=0.7, reject=0.1, classes={other: dropped})

    routing = RouteOptions(Budget.parse("10 images"), 0.2)
    route(run, wants("WBC"), "a", routing)
    push(run, server, settings)
    parts = {item.sha256: item.part for item in queue(run)}
    assert sorted(parts.values()) == ["audit"] * 2 + ["value"] * 8
    tasks = tasks_of(server, settings)
    done = next(task for task in tasks if parts[task["data"][KEY]] == "value")
    answer(ann, done, done["predictions"][0]["result"])
    assert {len(task["predictions"][0]["result"]) for task in tasks} >= {1}

    first = refresh_run(run, server, settings, wants("WBC"))  # the rule changes: unsure is hidden
    assert (first.open, first.closed, first.reopened) == (9, 0, 0)
    assert first.predicted >= 7
    open_now = [task for task in tasks_of(server, settings) if not task["annotations"]]
    assert [len(task["predictions"]) for task in open_now] == [1] * 9
    assert not any(task["predictions"][0]["result"] for task in open_now)
    assert sorted(task["data"]["rank"] for task in open_now) == list(range(1, 10))
    again = refresh_run(run, server, settings, wants("WBC"))
    assert (again.predicted, again.ranked, again.closed) == (0, 0, 0)

    turned = refresh_run(run, server, settings, wants("RBC"))
    assert (turned.open, turned.closed) == (2, 7)
    left = {task["data"][KEY] for task in tasks_of(server, settings)}
    audit = {key for key, part in parts.items() if part == "audit"}
    assert left == audit | {done["data"][KEY]}
    assert push(run, server, settings).created == 0  # closed stays closed
    back = refresh_run(run, server, settings, wants("WBC"))
    assert (back.closed, back.reopened) == (0, 7)
    assert push(run, server, settings).created == 7
    assert pull_run(run, server, settings).answers == 1


def one_unsure_box(at: int) -> Detections:
    """An RBC in even images, a WBC in odd ones."""
    return boxes([(20.0 + at, 30, 100.0 + at, 90)], [0.5], [at % 2])


_LABEL_PAGES = """
import sys
from pathlib import Path
from pipelines import label_run, load_config
from pipelines.demo.digits import make_pages

place = Path(sys.argv[1])
make_pages(place / "pages", images=4, hard_share=0.5, broken=False)
(place / "run.yaml").write_text(
    "name: pages\\n"
    f"source: {{url: {place / 'pages' / 'images'}}}\\n"
    f"output: {place / 'digits'}\\n"
    f"model: {{checkpoint: {sys.argv[2]}}}\\n"
    "workers: {count: 1}\\n"
)
label_run(load_config(str(place / "run.yaml")))
"""


@pytest.fixture
def pages(place: Path) -> Manifest:
    """Four hard pages of handwritten digits, labelled by the demo's model."""
    place.mkdir(parents=True, exist_ok=True)
    model = Path(pipelines.__file__).parent / "assets" / "digits_nano.safetensors"
    subprocess.run(
        [sys.executable, "-c", _LABEL_PAGES, str(place), str(model)],
        check=True, cwd=Path(pipelines.__file__).parents[1], timeout=patient(300),
    )  # fmt: skip
    return Manifest.open(str(place / "digits"))


def test_a_page_shows_each_place_once_and_unchanged_means_what_was_shown(
    pages: Manifest, server: LabelStudio, settings: ReviewSettings, ann: httpx.Client
) -> None:
    route_run(pages, budget="4 images", policy=POLICY, invocation="a", audit=0.25)
    items = {item.sha256: item for item in read_queue(pages.store)}
    assert sorted(item.part for item in items.values()) == ["audit", *["value"] * 3]
    push(pages, server, settings)
    rows = {row.sha256: row for row in live_rows(pages)}
    shown = {}
    for task in tasks_of(server, settings):
        (prediction,) = task["predictions"]
        key = task["data"][KEY]
        width, height = items[key].width, items[key].height
        places = [
            region.bbox for region in read_results(prediction["result"], width, height).regions
        ]
        assert len(places) < len(rows[key].detections) / 2
        corners = corners_of(places)
        assert (np.triu(iou_matrix(corners, corners), 1) < 0.8).all()  # no stacks
        scores = np.array([region["score"] for region in prediction["result"]], np.float64)
        assert (prior(scores) > (1.6 + 7.0) / 14.0).all()
        assert "draw what is missing" in task["data"]["boxes_shown"]
        shown[key] = places
        answer(ann, task, prediction["result"], lead_time=30)
    assert sum(map(len, shown.values())) >= 12
    assert pull_run(pages, server, settings).answers == 4

    def rounded(boxes: Iterable[Sequence[float]]) -> set[tuple[int, ...]]:
        return {tuple(round(side) for side in box) for box in boxes}

    answers = {a.sha256: a for a in read_answers(pages.store)}
    alone_run = _without_answers(pages)
    machine = {r.sha256: r for r in label_rows_of(alone_run, decide_run(alone_run, POLICY))}
    for made in label_rows_of(pages, decide_run(pages, POLICY)):
        assert made.source == "human"
        told = answers[made.sha256]
        assert rounded(told.shown) == rounded(shown[made.sha256])
        kept = [label.bbox for label in made.labels if label.origin == "kept"]
        assert rounded(kept) == rounded(shown[made.sha256])
        rest = [label for label in made.labels if label.origin != "kept"]
        if items[made.sha256].part == "audit":
            assert rest == []  # a full answer: nothing else is there
            assert told.hidden == ()
            continue
        # Away from the boxes that people were shown, the decisions are the policy's alone.
        alone = [
            (label.bbox, label.ignore) for label in machine[made.sha256].labels
            if not covered(np.array([label.bbox]), corners_of(shown[made.sha256])).any()
        ]  # fmt: skip
        assert sorted((label.bbox, label.ignore) for label in rest) == sorted(alone)


def corners_of(places: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    return np.array(places, np.float64).reshape(-1, 4)


def label_rows_of(manifest: Manifest, version: LabelVersion) -> list[LabelRow]:
    return [r for t in read_label_tables(manifest.store, version) for r in label_rows(t)]


def _without_answers(manifest: Manifest) -> Manifest:
    """A copy of the run that no person looked at."""
    store = MemoryStore()
    for listed in manifest.store.list(""):
        if not listed.key.startswith(("review/", "labels/")):
            store.create(listed.key, manifest.store.get(listed.key))
    return Manifest(store, manifest.record)


def test_a_mistyped_project_is_neither_made_nor_remembered(
    manifest: Manifest, server: LabelStudio, settings: ReviewSettings,
    label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv(VARIABLE, label_studio.token)
    run, title = manifest.url, settings.project[:40]

    def call(*given: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["review", "push", run, "--url", label_studio.url, *given])
        assert isinstance(left.value.code, int)
        return left.value.code, capsys.readouterr().err

    code, said = call("--project", title)
    assert code == 1
    assert "--create" in said
    assert call("--project", "2")[0] == 1
    assert read_settings(manifest.store) is None
    assert call("--project", title, "--create")[0] == 0
    code, said = call("--project", f"{title}x")
    assert code == 1
    assert title in said.replace("\n", "")
    kept = read_settings(manifest.store)
    project = server.find_project(title)
    assert kept is not None
    assert project is not None
    assert (kept.project, kept.project_id) == (title, project.project_id)
    assert server.find_project(f"{title}x") is None


def test_annotators_find_instructions_reasons_tabs_and_overlap(
    manifest: Manifest, server: LabelStudio, settings: ReviewSettings
) -> None:
    desk = replace(settings, overlap=(0.5, 3), people=("ann", "ben"))
    push(manifest, server, desk)
    project = server.find_project(settings.project)
    assert project is not None
    assert "Submit unchanged" in project.instructions
    assert (project.people, project.overlap_percent) == (3, 50)
    found = server.tasks(project.project_id, include="id,overlap")
    assert sorted(task["overlap"] for task in found) == [1] * 6 + [3] * 6
    tasks = tasks_of(server, settings)
    assert all(task["data"]["why"] and task["data"]["expected_corrections"] >= 0 for task in tasks)
    assert not any("audit" in str(task["data"]["why"]) for task in tasks)
    assert [task["data"]["assigned_to"] for task in tasks] == ["ann", "ben"] * 6
    views = {view["data"]["title"]: view for view in server.views(project.project_id)}
    assert list(views) == ["To review", "ann", "ben"]
    params = {"view": views["ben"]["id"], "page_size": 100, "include": "id,data"}
    shown = server.http.get("/api/tasks", params)["tasks"]
    assert [task["data"]["assigned_to"] for task in shown] == ["ben"] * 6
    assert f"tasks:data.{KEY}" in views["ann"]["data"]["hiddenColumns"]["explore"]

    server.update_project(project.project_id, expert_instruction="As the lead wrote it.")
    push(manifest, server, desk)
    kept = server.project(project.project_id)
    assert kept is not None
    assert kept.instructions == "As the lead wrote it."
    assert len(server.views(project.project_id)) == 3
