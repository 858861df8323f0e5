"""The Label Studio client: projects, tasks, answers, storages; the one HTTP peer.

Plain HTTP and not label-studio-sdk 2.1.2, for reads as for writes:

- It repeats POSTs by itself, and a dropped reply turned 24 tasks into 72. Here nothing that is not
  safe to repeat is repeated (see ``label_studio_http``); who imports looks the keys up instead.
- Reads it tries three times, within seconds. A server that restarts needs more patience, which
  would have to be wrapped around each of its calls, and its errors (ApiError, httpx's, pydantic's)
  translated beside those of the imports, which would stay as they are.
- ``import label_studio_sdk.client`` loads 1,500 modules in 2.4 s of CPU time, httpx 280 in 0.3 s;
  every review command would wait for it.

The SDK is a dependency all the same, for two things: its converter decodes brush masks (shapes.py
imports it when one is pulled), and in tests its validation checks our interface and predictions.

Task lists are walked by id, so that tasks which come, go or change meanwhile shift nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, Protocol

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from pipelines.label_studio.errors import (
    OutcomeUnknown,
    ReviewDenied,
    ReviewRefused,
    ReviewUnavailable,
)
from pipelines.label_studio.http import LabelStudioHttp
from storage.errors import ReviewError

KEY = "labelfleet_key"  # the field of a task's data by which it is known
TITLE_LENGTH = 50
StorageKind = Literal["s3", "localfiles"]
_PAGE = 500
_LONGEST_LIST = 500  # characters of a list of annotation ids
_TRIES = 3
MOST_KEYS = 50  # a lookup: they travel in the URL, and proxies take 8 KB of it
_PROJECT_FIELDS = (
    "id,title,description,created_at,parsed_label_config,model_version,task_number,"
    "finished_task_number,expert_instruction,maximum_annotations,overlap_cohort_percentage"
)


@dataclass(frozen=True, slots=True)
class Project:
    """A project; ``tasks`` in all, ``finished`` of them with as many answers as it wants.

    ``controls``: its labelling interface as the server parsed it, by control name. ``made_at``:
    when it was created, in the server's words. ``people``: how many answer each of
    ``overlap_percent`` of the tasks; one answers the others.
    """

    project_id: int
    title: str
    controls: dict[str, Any]
    model_version: str
    tasks: int
    finished: int
    made_at: str = ""
    description: str = ""
    instructions: str = ""
    people: int = 1
    overlap_percent: int = 100

    @property
    def identity(self) -> str:
        """Identify the project, independent of its server's address and of its title."""
        return f"{self.project_id}@{self.made_at}"


@dataclass(frozen=True, slots=True)
class TaskRef:
    """A task's id and key; ``touched``: it was answered, skipped or begun."""

    task_id: int
    key: str
    touched: bool


class SupportsTasks(Protocol):
    """What creating tasks once needs; see ``LabelStudio``."""

    def task_refs(
        self, project_id: int, keys: Sequence[str] | None = None
    ) -> Iterator[TaskRef]: ...
    def import_tasks(self, project_id: int, tasks: Sequence[Mapping[str, Any]]) -> None: ...
    def is_touched(self, task_id: int) -> bool: ...
    def delete_task(self, task_id: int) -> None: ...


class LabelStudio:
    """Verbs on one server. Errors: pipelines/label_studio/errors.py."""

    def __init__(self, http: LabelStudioHttp) -> None:
        self.http = http

    def __repr__(self) -> str:
        return f"LabelStudio({self.http.url})"

    def version(self) -> str:
        """Return the server's release. Raises ReviewError when it is not a Label Studio."""
        try:
            return str(self.http.get("/api/version")["release"])
        except (KeyError, TypeError) as exc:
            raise ReviewError(
                f"{self.http.url} answers, but not as Label Studio does",
                hint="give its address without a path, for example http://localhost:8080",
            ) from exc

    def me(self) -> dict[str, Any]:
        """Return the token's owner."""
        owner: dict[str, Any] = self.http.get("/api/current-user/whoami")
        return owner

    def people(self) -> dict[int, str]:
        """Return names by user id, e-mails where known. Empty if the token may not list users."""
        try:
            users = self.http.get("/api/users")
        except ReviewDenied:
            return {}
        return {u["id"]: u.get("email") or u.get("username") or f"user {u['id']}" for u in users}

    def find_project(self, title: str) -> Project | None:
        """Return the oldest project with exactly this title."""
        found, page = [], 1
        while True:
            params = {"title": title, "page": page, "page_size": 100, "include": _PROJECT_FIELDS}
            reply = self.http.get("/api/projects", params)
            found += [p for p in reply["results"] if p["title"] == title]
            if not reply.get("next"):
                break
            page += 1
        return _project(min(found, key=lambda p: int(p["id"]))) if found else None

    def titles(self) -> list[str]:
        """Return the titles of the newest hundred projects."""
        reply = self.http.get("/api/projects", {"page_size": 100, "include": "id,title"})
        return [str(project["title"]) for project in reply["results"]]

    def project(self, project_id: int) -> Project | None:
        """Return the project of this id; None: there is none, or the token may not see it."""
        try:
            return _project(self.http.get(f"/api/projects/{project_id}"))
        except ReviewRefused as exc:
            if exc.status == 404:
                return None
            raise

    def create_project(self, title: str, label_config: str, **fields: Any) -> Project:
        """Create a project, unless one of this title turns up after a lost reply.

        If two result, every caller takes the older: see ``find_project``.
        """
        body = {"title": title, "label_config": label_config, **fields}
        retrying = self._in_doubt(1.0)

        def create() -> Project:
            doubt = retrying.statistics["attempt_number"] > 1
            if doubt and (found := self.find_project(title)):
                return found
            made = _project(self.http.send("POST", "/api/projects", body, repeatable=False))
            return (self.find_project(title) or made) if doubt else made

        try:
            return retrying(create)
        except OutcomeUnknown as exc:
            if found := self.find_project(title):
                return found
            raise ReviewUnavailable(
                f"Label Studio failed {_TRIES} times to create the project {title!r}",
                hint="look at its log, then run the same command again",
            ) from exc

    def _in_doubt(self, pause_s: float) -> Retrying:
        """Repeat what is harmless to repeat; otherwise check first whether it was done."""
        return Retrying(
            retry=retry_if_exception_type(OutcomeUnknown),
            stop=stop_after_attempt(_TRIES),
            wait=wait_fixed(pause_s),
            sleep=self.http.sleep,
            reraise=True,
        )

    def update_project(self, project_id: int, **fields: Any) -> Project:
        """Set fields, such as ``model_version``."""
        return _project(self.http.send("PATCH", f"/api/projects/{project_id}", fields))

    def import_tasks(self, project_id: int, tasks: Sequence[Mapping[str, Any]]) -> None:
        """Create tasks with their predictions: all of them in one transaction.

        Raises:
            OutcomeUnknown: look the keys up before sending them again.
            RequestTooLarge: send fewer at a time.
        """
        path = f"/api/projects/{project_id}/import"
        reply = self.http.send("POST", path, list(tasks), repeatable=False)
        if not isinstance(reply, dict) or reply.get("task_count") != len(tasks):
            raise OutcomeUnknown(f"{len(tasks)} tasks were sent, and the reply was {reply!r:.200}")

    def import_predictions(self, project_id: int, predictions: Sequence[Mapping[str, Any]]) -> None:
        """Add predictions to tasks that are there. Raises OutcomeUnknown."""
        path = f"/api/projects/{project_id}/import/predictions"
        self.http.send("POST", path, list(predictions), repeatable=False)

    def task_refs(self, project_id: int, keys: Sequence[str] | None = None) -> Iterator[TaskRef]:
        """Yield tasks that carry a key, by id. ``keys``: only these, or None for all."""
        fields = "id,data,total_annotations,cancelled_annotations"
        begun = self.begun(project_id)
        batches: list[list[str] | None] = [None]
        if keys is not None:
            batches = [list(keys[i : i + MOST_KEYS]) for i in range(0, len(keys), MOST_KEYS)]
        for batch in batches:
            filters = [] if batch is None else [_filter(f"data.{KEY}", "in_list", batch)]
            for task in self.tasks(project_id, filters, include=fields):
                key = task.get("data", {}).get(KEY)
                if isinstance(key, str):
                    yield TaskRef(task["id"], key, _touched(task) or task["id"] in begun)

    def begun(self, project_id: int) -> set[int]:
        """Return the ids of tasks that were begun and not submitted.

        A list of tasks names only the drafts of the token's owner; this sees everybody's.
        """
        asked = _filter("draft_exists", "equal", True, kind="Boolean")
        return {task["id"] for task in self.tasks(project_id, [asked], include="id")}

    def annotation_ids(self, project_id: int) -> dict[int, frozenset[int] | None]:
        """Return annotation ids by task, skipped ones included; tasks without any are left out.

        None: too many to be listed; the server cuts the list after 500 characters.
        """
        asked = _filter("annotations_ids", "empty", False)  # a filter has the server compute them
        found: dict[int, frozenset[int] | None] = {}
        for task in self.tasks(project_id, [asked], include="id,annotations_ids"):
            said = str(task.get("annotations_ids") or "")
            ids = frozenset(int(part) for part in said.split(",") if part.strip().isdigit())
            found[task["id"]] = ids if len(said) < _LONGEST_LIST else None
        return found

    def predicted_by(self, project_id: int, model_version: str) -> set[int]:
        """Return the ids of the tasks that have a prediction of this version."""
        # A list: of a text the server would look for every letter by itself.
        asked = _filter("predictions_model_versions", "contains", [model_version])
        return {task["id"] for task in self.tasks(project_id, [asked], include="id")}

    def predicted_without(self, project_id: int, model_version: str) -> Iterator[dict[str, Any]]:
        """Tasks that have predictions, but none of this version."""
        asked = [_filter("total_predictions", "greater", 0, kind="Number")]
        fields = "id,data,predictions,result,model_version,score"
        have = self.predicted_by(project_id, model_version)
        for task in self.tasks(project_id, asked, include=fields, whole=True, page=100):
            if task["id"] not in have and task.get("predictions"):
                yield task

    def tasks(
        self,
        project_id: int,
        filters: Sequence[Mapping[str, Any]] = (),
        *,
        include: str,
        whole: bool = False,
        page: int = _PAGE,
    ) -> Iterator[dict[str, Any]]:
        """Yield tasks as the server shows them, by ascending id.

        Args:
            filters: see ``changed_since``; all must hold.
            include: fields, comma-separated; nested ones are named beside the others.
            whole: also annotations and predictions.
            page: tasks a request.
        """
        last = 0
        while True:
            query = {
                "filters": {"conjunction": "and", "items": [*filters, _after(last)]},
                "ordering": ["tasks:id"],
            }
            params = {
                "project": project_id, "page_size": page, "include": include,
                "query": json.dumps(query), **({"fields": "all"} if whole else {}),
            }  # fmt: skip
            found = _checked_tasks(self.http.get("/api/tasks", params), last)
            yield from found
            if len(found) < page:
                return
            last = found[-1]["id"]

    def views(self, project_id: int) -> list[dict[str, Any]]:
        """Return the tabs of a project's data manager."""
        found: list[dict[str, Any]] = self.http.get("/api/dm/views/", {"project": project_id})
        return found

    def add_view(self, project_id: int, data: Mapping[str, Any]) -> None:
        """Add a tab. A lost reply may leave two identical tabs, which is harmless."""
        body = {"project": project_id, "data": dict(data)}
        self.http.send("POST", "/api/dm/views/", body)

    def storages(self, project_id: int, kind: StorageKind) -> list[dict[str, Any]]:
        """Return a project's source storages of one kind."""
        found: list[dict[str, Any]] = self.http.get(
            f"/api/storages/{kind}", {"project": project_id}
        )
        return found

    def add_storage(self, project_id: int, kind: StorageKind, **fields: Any) -> None:
        """Connect a source storage without synchronising it. A second identical one is harmless.

        Raises:
            ReviewRefused, ReviewDenied: the server cannot reach it, or may not; in its words.
            OutcomeUnknown: it keeps failing; an unreachable endpoint shows like that too.
        """
        body = {"project": project_id, **fields}
        add = partial(self.http.send, "POST", f"/api/storages/{kind}", body, repeatable=False)
        self._in_doubt(0.5)(add)

    def image_bytes(self, project_id: int, url: str) -> bytes:
        """Return an image as a task of the project that names this URL would show it."""
        if url.startswith("/"):
            return self.http.get_bytes(url)
        named = base64.urlsafe_b64encode(url.encode()).decode()
        return self.http.get_bytes(f"/projects/{project_id}/resolve/", {"fileuri": named})

    def is_touched(self, task_id: int) -> bool:
        """Return whether a task was answered, skipped or begun by now; True if it is gone."""
        try:
            return _touched(self.http.get(f"/api/tasks/{task_id}"))
        except ReviewRefused as exc:
            if exc.status == 404:
                return True
            raise

    def delete_annotation(self, annotation_id: int) -> None:
        """Delete an annotation; a missing one is not an error."""
        try:
            self.http.send("DELETE", f"/api/annotations/{annotation_id}/")
        except ReviewRefused as exc:
            if exc.status != 404:
                raise

    def update_data(self, task_id: int, data: Mapping[str, Any]) -> None:
        """Replace a task's data."""
        self.http.send("PATCH", f"/api/tasks/{task_id}", {"data": dict(data)})

    def delete_prediction(self, prediction_id: int) -> None:
        """Delete a prediction; a missing one is not an error."""
        try:
            self.http.send("DELETE", f"/api/predictions/{prediction_id}")
        except ReviewRefused as exc:
            if exc.status != 404:
                raise

    def delete_task(self, task_id: int) -> None:
        """Delete a task with everything attached; a missing one is not an error."""
        try:
            self.http.send("DELETE", f"/api/tasks/{task_id}")
        except ReviewRefused as exc:
            if exc.status != 404:
                raise


def changed_since(when: datetime) -> dict[str, Any]:
    """Return a filter for tasks answered, edited or otherwise touched at this time or later."""
    text = when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # anything else is a 500
    return _filter("updated_at", "greater_or_equal", text, kind="Datetime")


def with_keys(keys: Sequence[str]) -> dict[str, Any]:
    """Return a filter for tasks with these keys, at most ``MOST_KEYS``."""
    return _filter(f"data.{KEY}", "in_list", list(keys))


def _checked_tasks(reply: Any, last: int) -> list[dict[str, Any]]:
    """Return a page's tasks, checked: each with data, by ascending id above ``last``.

    Raises ReviewError: else a walk by id could go in a circle.
    """
    tasks = reply.get("tasks") if isinstance(reply, dict) else None
    for task in tasks if isinstance(tasks, list) else [None]:
        fields = task if isinstance(task, dict) else {}
        number = fields.get("id")
        if type(number) is not int or number <= last or type(fields.get("data", {})) is not dict:
            raise ReviewError(
                "Label Studio's task list holds something that is not a task",
                hint="a proxy or another program in its place? Open the project in a browser",
            )
        last = number
    return tasks or []


def _after(task_id: int) -> dict[str, Any]:
    return _filter("id", "greater", task_id, kind="Number")


def _filter(field: str, operator: str, value: Any, *, kind: str = "String") -> dict[str, Any]:
    return {"filter": f"filter:tasks:{field}", "operator": operator, "type": kind, "value": value}


def _touched(task: Mapping[str, Any]) -> bool:
    answered = task.get("total_annotations") or task.get("annotations")
    begun = task.get("drafts") or task.get("draft_exists")
    return bool(answered or task.get("cancelled_annotations") or begun)


def _project(fields: Mapping[str, Any]) -> Project:
    return Project(
        project_id=int(fields["id"]),
        title=str(fields["title"]),
        controls=dict(fields.get("parsed_label_config") or {}),
        model_version=str(fields.get("model_version") or ""),
        tasks=int(fields.get("task_number") or 0),
        finished=int(fields.get("finished_task_number") or 0),
        made_at=str(fields.get("created_at") or ""),
        description=str(fields.get("description") or ""),
        instructions=str(fields.get("expert_instruction") or ""),
        people=int(fields.get("maximum_annotations") or 1),
        overlap_percent=int(fields.get("overlap_cohort_percentage") or 100),
    )
