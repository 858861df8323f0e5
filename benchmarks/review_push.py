"""How fast a push is, next to bare POSTs of the same chunks to the same server.

    LABEL_STUDIO_API_KEY=… python benchmarks/review_push.py http://127.0.0.1:8080 [--tasks 10000]

One push into a new project; each of its chunks also goes bare into another one, before ours or
after it in turn, so that neither a busy machine nor a server that grows slower favours a side. All
else that the push does (lookups, pacing) is ours.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any
from uuid import uuid4

import httpx

from pipelines.label_studio.client import KEY, LabelStudio
from pipelines.label_studio.http import LabelStudioHttp
from pipelines.label_studio.interface import Interface, label_config
from pipelines.label_studio.regions import ShownBox, to_result
from pipelines.label_studio.send import Sender
from pipelines.label_studio.token import Token

CLASSES = ("RBC", "WBC", "Platelets")


class Compared(LabelStudio):
    """A client that also posts each chunk bare, to ``twin``, on a clock of its own."""

    def __init__(self, http: LabelStudioHttp, bare: httpx.Client) -> None:
        super().__init__(http)
        self.bare, self.twin = bare, 0
        self.sizes: list[int] = []
        self.bare_s = 0.0

    def import_tasks(self, project_id: int, tasks: Any) -> None:
        self.sizes.append(len(tasks))
        if len(self.sizes) % 2:
            self._post(tasks)
        super().import_tasks(project_id, tasks)
        if not len(self.sizes) % 2:
            self._post(tasks)

    def _post(self, tasks: Any) -> None:
        began_s = time.perf_counter()
        self.bare.post(f"/api/projects/{self.twin}/import", json=tasks).raise_for_status()
        self.bare_s += time.perf_counter() - began_s


def made_tasks(count: int, boxes: int) -> list[dict[str, Any]]:
    """Tasks with a prediction of that many boxes each."""
    results = [
        to_result(
            ShownBox(f"box{i}", (7 * i, 5 * i, 7 * i + 60, 5 * i + 50), CLASSES[i % 3], 0.5),
            640, 480, Interface(),
        )
        for i in range(boxes)
    ]  # fmt: skip
    prediction = {"model_version": "benchmark", "score": 0.5, "result": results}
    return [
        {
            "data": {"image": f"s3://bucket/{i:06d}.jpg", KEY: f"{i:064x}"},
            "predictions": [prediction],
        }
        for i in range(count)
    ]


def push(server: Compared, tasks: list[dict[str, Any]]) -> float:
    """Return seconds of ours alone."""
    config = label_config(CLASSES)
    twin = server.create_project(f"bare {uuid4().hex[:12]}", config)
    project = server.create_project(f"push {uuid4().hex[:12]}", config)
    server.twin = twin.project_id
    # The pace is set by our requests alone.
    sender = Sender(server, project.project_id, clock=lambda: time.perf_counter() - server.bare_s)
    began_s = time.perf_counter()
    found = server.find_project(project.title)
    assert found is not None
    assert not found.tasks
    sender.send(tasks)
    seconds = time.perf_counter() - began_s - server.bare_s
    there = sum(1 for _ in server.task_refs(project.project_id))
    assert there == len(tasks), f"{there} tasks instead of {len(tasks)}"
    for done in (project, twin):
        server.http.send("DELETE", f"/api/projects/{done.project_id}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--boxes", type=int, default=20)
    given = parser.parse_args()
    token = Token.from_environment()
    bare = httpx.Client(base_url=given.url, auth=token.auth(given.url), timeout=300)
    server = Compared(LabelStudioHttp(given.url, token), bare)
    seconds = push(server, made_tasks(given.tasks, given.boxes))
    rates = {
        "tasks": given.tasks,
        "boxes_a_task": given.boxes,
        "chunks": server.sizes,
        "ours_per_s": round(given.tasks / seconds, 1),
        "bare_per_s": round(given.tasks / server.bare_s, 1),
        "ours_over_bare": round(server.bare_s / seconds, 3),
    }
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
