"""What is sent to Label Studio, judged by Label Studio's own SDK."""

from __future__ import annotations

import pytest

from pipelines.label_studio.interface import Interface, label_config
from pipelines.label_studio.regions import ShownBox
from pipelines.policy.policy import Policy
from pipelines.review.tasks import TaskMaker, in_order, queued, shown_boxes
from pipelines.routing.route import route_run
from storage.stores.memory import MemoryStore
from tests.support.samples.review_runs import random_run

CLASSES = ("RBC", "WBC", "Platelets", "a <b> & 'c' \"d\"", "überzählig")


@pytest.mark.slow  # the SDK takes seconds to import
def test_the_sdk_accepts_interface_tasks_and_predictions() -> None:
    from label_studio_sdk.label_interface import LabelInterface

    manifest = random_run(MemoryStore(), 2, 20)
    route_run(manifest, budget="20 images", policy=Policy(), invocation="one")
    wanted = queued(manifest)
    boxes = shown_boxes(manifest, wanted)
    urls = {q.item.sha256: f"https://example.org/{q.item.sha256}.jpg" for q in wanted}
    maker = TaskMaker(Interface(), "cells-1", "cells")
    judge = LabelInterface(label_config(CLASSES))
    judge.validate()
    told = LabelInterface(label_config(CLASSES, show_why=True))
    told.validate()
    tasks = list(in_order(wanted, boxes, urls, maker))
    assert len(tasks) == 20
    assert sum(len(t["predictions"][0]["result"]) for t in tasks) > 20
    assert {t["data"]["boxes_shown"] for t in tasks} == {
        "only boxes that are right with a probability above 61% (estimated): draw what is missing"
    }
    for task in tasks:
        (prediction,) = task.pop("predictions")  # with it the SDK's validate_task fails by itself
        assert judge.validate_task(task)
        assert told.validate_task(task)
        assert judge.validate_prediction(prediction, return_errors=True) == []
    assert all(task["data"]["agreement"] is None for task in tasks)  # the run is of one model
    order = ["image", "why", "boxes_shown", "agreement", "expected_corrections", "assigned_to"]
    order += ["image_id", "run", "labelfleet_key"]
    assert all(list(task["data"]) == order for task in tasks)
    fused = [ShownBox("box0", (1.0, 1.0, 9.0, 9.0), "RBC", 0.9, share) for share in (1.0, 0.5)]
    assert maker.task(wanted[0], "https://example.org/x.jpg", fused)["data"]["agreement"] == 0.75
    # It does look: a label the interface lacks and a box of the wrong kind are refused.
    odd = ShownBox("box0", (1.0, 1.0, 9.0, 9.0), "fly", 0.9)
    wrong = maker.task(wanted[0], "https://example.org/x.jpg", [odd])
    assert judge.validate_prediction(wrong["predictions"][0], return_errors=True) != []
