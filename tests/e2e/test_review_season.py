"""One review season on a real Label Studio, by the command line: every figure counted by hand.

Two rounds share a project, three people work on it, and between the rounds the labelling interface
changes, work is edited and deleted, the first round goes to a second project, and the first project
is deleted. After each step the commands must say what a person counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import pytest

from pipelines.cli.main import main
from pipelines.label_studio.client import KEY, LabelStudio
from pipelines.label_studio.token import VARIABLE
from pipelines.routing.cost import Budget
from pipelines.routing.route import route
from pipelines.routing.survey import RouteOptions
from storage.records import Detections
from storage.review.settings import ReviewSettings
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.e2e.test_review import answer, rerun, tasks_of
from tests.support.samples.review_samples import POLICY, loose_run, three_boxes
from tests.support.samples.synthetic_run import boxes
from tests.support.servers.label_studio import LabelStudioServer

pytestmark = pytest.mark.slow

SECOND = "cells-cdcdcdcdcdcd"  # the second round's model, as Label Studio shows it
THRESHOLDS = ("--accept", "0.7", "--reject", "0.1")
CORNERS = [[10, 10], [60, 20], [30, 50]]  # percent of 320 by 240 pixels


def one_box(at: int) -> Detections:
    """What the second round's model finds: the first box alone."""
    return boxes([three_boxes(at).boxes[0]], [0.99], [0])


@dataclass
class Season:
    """The desk of a lead: two runs, a server and three people."""

    server: LabelStudio
    url: str
    capsys: pytest.CaptureFixture[str]
    first: Manifest
    second: Manifest
    people: dict[str, httpx.Client]
    project: str
    elsewhere: str

    def call(self, *given: str) -> tuple[int, Any]:
        """Run a command; returns its exit code and its JSON (its message where it failed)."""
        with pytest.raises(SystemExit) as left:
            main([*given, "--json"])
        told = self.capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, json.loads(told.out) if told.out else told.err

    def tasks(self, project: str = "") -> list[dict[str, Any]]:
        return tasks_of(self.server, ReviewSettings(self.url, project or self.project))

    def project_id(self) -> int:
        found = self.server.find_project(self.project)
        assert found is not None
        return found.project_id

    def decided(self, run: Manifest, *given: str) -> tuple[int, dict[str, int], list[str]]:
        """Exit code of `decide`, its counts, and the images that were set aside."""
        code, told = self.call("decide", run.url, *THRESHOLDS, *given)
        return code, told["counts"], sorted(one["why"] for one in told["set_aside"])


@pytest.fixture
def season(
    label_studio: LabelStudioServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Season:
    """Sixteen images under two models; the first round queued twelve of them."""
    monkeypatch.setenv(VARIABLE, label_studio.token)
    place = label_studio.folder / uuid4().hex
    source = open_store(str(place / "source"))
    first = loose_run(source, open_store(str(place / "a")), 16)
    route(first, POLICY, "a", RouteOptions(Budget.parse("12 images"), 0.25))
    second = rerun(first, place / "b", one_box)
    names = ("ann", "ben", "cem")
    people = {name: label_studio.person(f"{name}{uuid4().hex[:6]}") for name in names}
    title = uuid4().hex[:12]
    return Season(
        label_studio.client(), label_studio.url, capsys, first, second, people,
        f"season {title}", f"elsewhere {title}",
    )  # fmt: skip


def test_a_season_of_two_rounds_three_people_and_two_projects(season: Season) -> None:
    first_tasks = first_round(season)
    interface_changes(season)
    second_tasks = second_round(season)
    work_changes(season, first_tasks, second_tasks)
    second_project(season, first_tasks)
    first_project_is_deleted(season)


def shown(task: dict[str, Any]) -> list[dict[str, Any]]:
    return list(task["predictions"][0]["result"])


def first_round(season: Season) -> list[dict[str, Any]]:
    run, (ann, ben, cem) = season.first, season.people.values()
    code, pushed = season.call(
        "review", "push", run.url, "--url", season.url, "--project", season.project, "--create"
    )
    assert (code, pushed["created"]) == (0, 12)
    tasks = season.tasks()
    assert [len(shown(task)) for task in tasks] == [2] * 12
    for task in tasks[:4]:
        answer(ann, task, shown(task), lead_time=10)
    answer(ben, tasks[2], shown(tasks[2]), lead_time=20)
    answer(ben, tasks[3], shown(tasks[3])[:1], lead_time=30)  # the second box is deleted
    answer(cem, tasks[4], shown(tasks[4]), lead_time=40)
    answer(cem, tasks[5], [], was_cancelled=True)

    code, pulled = season.call("review", "pull", run.url)
    given = "answers skipped images people kept deleted"
    assert (code, of(pulled, given)) == (0, [8, 1, 6, 3, 13, 1])
    code, told = season.call("review", "status", run.url)
    seen = "queued pushed touched answered skipped waiting people"
    assert (code, of(told, seen)) == (0, [12, 12, 6, 5, 1, 0, 3])
    figures = {one["name"][:3]: one for one in told["figures"]["people"]}
    assert [figures[n]["images"] for n in season.people] == [4, 2, 1]
    assert [figures[n]["seconds"] for n in season.people] == [10, 25, 40]
    # Ann and Ben drew 4 and 3 boxes on the two images they share, and agree on 3.
    assert figures["ann"]["error_others"] == pytest.approx(1 / 7)
    assert figures["cem"]["error_others"] is None
    (pair,) = told["figures"]["agreement"]
    assert (pair["images"], pair["share"]) == (2, pytest.approx(6 / 7))
    code, counts, aside = season.decided(run)
    assert (code, counts["images_human"], counts["images_model"], aside) == (0, 5, 11, [])
    return tasks


def interface_changes(season: Season) -> None:
    """The lead adds polygons, a class of its own, and another name for WBC."""
    names = ("RBC", "WBC", "Platelets", "Leukocyte", "smudge")
    labels = "".join(f'<Label value="{name}"/>' for name in names)
    config = (
        '<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="label" toName="image">{labels}</RectangleLabels>'
        '<PolygonLabels name="outline" toName="image"><Label value="RBC"/></PolygonLabels></View>'
    )
    season.server.update_project(season.project_id(), label_config=config)


def second_round(season: Season) -> list[dict[str, Any]]:
    """Only the four images that were shown to no reviewer are routed; other tasks do not change."""
    run = season.second.url
    how = ("--budget", "16 images", "--show", "score", "--answers-from", season.first.url)
    code, routed = season.call("review", "route", run, *how, *THRESHOLDS)
    assert (code, routed["value"] + routed["audit"]) == (0, 4)
    code, pushed = season.call(
        "review", "push", run, "--url", season.url, "--project", season.project
    )
    assert (code, of(pushed, "created there predicted kept_shown")) == (0, [4, 0, 0, 12])
    tasks = season.tasks()
    now = [
        len(prediction["result"])
        for task in tasks if not task["annotations"]
        for prediction in task["predictions"]
        if prediction["model_version"] == SECOND
    ]  # fmt: skip
    assert now == [2] * 6 + [1] * 4
    return tasks[12:]


def work_changes(season: Season, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    """Ann's first image is open again, her second is gone, and she moves a box of her third."""
    ann, ben, cem = season.people.values()
    of_ann = {task["id"]: task["annotations"][0]["id"] for task in season.tasks()[:3]}
    ann.delete(f"/api/annotations/{of_ann[a[0]['id']]}/").raise_for_status()
    season.server.delete_task(a[1]["id"])
    offered = cem.get(f"/api/projects/{season.project_id()}/next").json()
    assert (offered["id"], len(shown(offered))) == (a[0]["id"], 2)  # not without its boxes
    left, right = shown(a[2])
    moved = {**left, "value": {**left["value"], "width": 60}}
    edited = {"result": [moved, right]}
    ann.patch(f"/api/annotations/{of_ann[a[2]['id']]}/", json=edited).raise_for_status()
    polygon = {
        "to_name": "image", "original_width": 320, "original_height": 240, "id": "hand",
        "from_name": "outline", "type": "polygonlabels",
        "value": {"points": CORNERS, "closed": True, "polygonlabels": ["RBC"]},
    }  # fmt: skip
    answer(ben, a[6], [polygon])
    left, right = shown(a[7])
    answer(cem, a[7], [left, called(right, "smudge")])
    answer(ann, b[0], shown(b[0]))
    answer(ben, b[1], [called(shown(b[1])[0], "Leukocyte")])

    code, pulled = season.call("review", "pull", season.first.url)
    changed = "answers kept moved relabelled added deleted withdrawn unknown"
    assert (code, of(pulled, changed)) == (0, [3, 2, 1, 1, 1, 2, 2, 2])
    code, pulled = season.call("review", "pull", season.second.url)
    assert (code, of(pulled, changed)) == (0, [2, 1, 0, 1, 0, 0, 0, 8])
    code, told = season.call("review", "status", season.first.url)
    assert of(told, "queued pushed touched answered skipped waiting") == [12, 11, 6, 5, 1, 0]
    assert [one["images"] for one in told["figures"]["people"]] == [2, 3, 2]
    (pair,) = told["figures"]["agreement"]
    assert (pair["images"], pair["share"]) == (2, pytest.approx(4 / 7))  # moved too far

    # Five images are people's in both runs: three of the first round, the polygon, and Ann's of the
    # second. Two answers name a class that the runs lack, until one is told what it means.
    both = ["unknown class Leukocyte", "unknown class smudge"]
    for run, ignored in ((season.first, 11), (season.second, 0)):
        code, counts, aside = season.decided(run)
        assert (code, aside) == (3, both)
        assert of(counts, "images_human images_model labels ignored") == [5, 11, 18, ignored]
        code, counts, aside = season.decided(run, "--rename", "Leukocyte=WBC")
        assert (code, counts["images_human"], aside) == (3, 6, both[1:])


def second_project(season: Season, a: list[dict[str, Any]]) -> None:
    """What is answered is not asked again, and work in the first project goes on counting."""
    run = season.first.url
    code, pushed = season.call("review", "push", run, "--project", season.elsewhere, "--create")
    assert (code, of(pushed, "created answered_before")) == (0, [8, 4])
    here = {task["data"][KEY]: task for task in season.tasks(season.elsewhere)}
    answered = {a[at]["data"][KEY] for at in (2, 3, 4, 6)}
    assert here.keys() == {task["data"][KEY] for task in a} - answered
    answer(season.people["cem"], here[a[1]["data"][KEY]], [])
    answer(season.people["ben"], a[8], [])
    code, told = season.call("review", "status", run)
    assert of(told, "pushed touched answered waiting") == [12, 8, 5, 2]
    code, pulled = season.call("review", "pull", run)
    assert (code, of(pulled, "answers images people deleted withdrawn")) == (0, [2, 2, 2, 4, 0])
    code, told = season.call("review", "status", run)
    assert of(told, "answered skipped waiting") == [7, 1, 0]
    code, counts, _ = season.decided(season.first)
    assert of(counts, "images_human images_human_empty answers_set_aside") == [8, 2, 1]


def first_project_is_deleted(season: Season) -> None:
    """Nine answers of the first run are from there: Ann's 2, Ben's 4, and Cem's 3 with his skip."""
    season.server.http.send("DELETE", f"/api/projects/{season.project_id()}")
    for run, project, count in ((season.first, {season.project: 9}, 8), (season.second, None, 8)):
        code, told = season.call("review", "pull", run.url)
        if project is not None:
            assert (code, told["deleted_projects"], told["withdrawn"]) == (3, project, 0)
        else:
            assert code == 1
            assert "2 answers from it still count" in told["error"]
        code, told = season.call("review", "status", run.url)
        assert "no longer there" in told["problem"]
        assert season.decided(run)[1]["images_human"] == count

    code, pulled = season.call("review", "pull", season.first.url, "--accept-withdrawals")
    assert (code, of(pulled, "withdrawn deleted_projects")) == (0, [9, {}])
    code, pulled = season.call("review", "pull", season.second.url, "--accept-withdrawals")
    assert (code, pulled["withdrawn"]) == (0, 2)
    for run in (season.first, season.second):
        code, counts, aside = season.decided(run)
        assert (code, counts["images_human"], aside) == (0, 1, [])  # Cem's, in the second project
    code, pulled = season.call("review", "pull", season.first.url)
    assert (code, of(pulled, "answers withdrawn")) == (0, [0, 0])


def of(told: dict[str, Any], names: str) -> list[Any]:
    return [told[name] for name in names.split()]


def called(region: dict[str, Any], name: str) -> dict[str, Any]:
    """The region under another class."""
    return {**region, "value": {**region["value"], "rectanglelabels": [name]}}
