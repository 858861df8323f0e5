"""``labelfleet review refresh``: update open tasks to the current policy, rows and cost.

Untouched tasks of the run's queue are:

- closed, if they no longer pay: with N value tasks open, an image whose expected corrections per
  second are below half of those of the N-th best unanswered image of the run would not be drawn
  again. Audit tasks stay, since the audit is a random sample. A closed task is deleted; it comes
  back with the next push once another refresh finds that it pays.
- predicted again, if the boxes to show are others than those that the task has.
- ranked again: ``rank`` and ``expected_corrections`` in their data, and a tab in that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.label_studio.client import KEY, LabelStudio, Project
from pipelines.label_studio.interface import interface_of
from pipelines.policy.box_batch import box_batch
from pipelines.policy.policy import Policy
from pipelines.review.desk import add_ranked_tab
from pipelines.review.tasks import SHOWN, Queued, TaskMaker, model_version_of, queued, shown_boxes
from pipelines.review.withdrawals import refuse_renamed
from pipelines.routing.cost import CostModel
from pipelines.routing.route import cost_of
from pipelines.routing.showing import Show, ShowRule
from pipelines.routing.signals import measure
from storage.errors import ReviewError
from storage.review.answers import read_answers, standing
from storage.review.refreshed import Refreshed, read_refreshed, write_refreshed
from storage.review.settings import ReviewSettings
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest

_PAYS = 0.5  # of the N-th best image's worth
_FIELDS = "id,data,predictions,result,model_version,score"


@dataclass(frozen=True, slots=True)
class RefreshSummary:
    """What a refresh did.

    Attributes:
        open: untouched tasks of the queue that stay.
        closed: tasks deleted now. ``reopened``: closed images that pay again; push them.
        predicted: tasks with other boxes than before. ``ranked``: tasks whose rank or expected
            corrections changed.
        above: the probability above which a box is shown now; 0 where the rule is another.
    """

    open: int
    closed: int
    reopened: int
    predicted: int
    ranked: int
    above: float

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Worth:
    """An image now: expected corrections, and those per second of human time."""

    value: float
    rate: float


def refresh_run(
    manifest: Manifest,
    server: LabelStudio,
    settings: ReviewSettings,
    policy: Policy,
    *,
    others: Sequence[Manifest] = (),
) -> RefreshSummary:
    """Refresh the open tasks of a run. The caller holds the run's lock.

    Args:
        manifest: the run, whose predictions the project shows.
        server: a client.
        settings: which project, and which boxes are shown.
        policy: judges the boxes from now on.
        others: runs whose answers count too.

    Raises:
        ReviewError: the project does not exist, or shows another run's predictions.
    """
    server.version()
    project = server.find_project(settings.project)
    if project is None:
        refuse_renamed(server, settings)
        raise ReviewError(f"there is no project {settings.project!r}", hint="push first")
    if project.model_version not in ("", model_version_of(manifest)):
        raise ReviewError(
            f"{project.title!r} shows the boxes of {project.model_version} now",
            hint="refresh the run that was pushed last",
        )
    answers = standing(*(read_answers(run.store) for run in (manifest, *others)))
    cost = cost_of(answers)
    rule = ShowRule.choose(cast(Show, settings.show), cost)
    wanted = {q.item.sha256: q for q in queued(manifest, closed=True)}
    refs = list(server.task_refs(project.project_id))
    untouched = {r.key: r.task_id for r in refs if not r.touched and r.key in wanted}
    worth = _worth(manifest, policy, rule, cost)
    answered = {a.sha256 for a in answers if not a.skipped}
    before = read_refreshed(manifest.store)
    was_closed = dict(before.closed) if before else {}
    asked = {key for key in {*untouched, *was_closed} if wanted[key].item.part == "value"}
    cut = _cut(worth, answered, len(asked))
    closed = {k: wanted[k].item.image_id for k in asked if k not in worth or worth[k].rate < cut}
    write_refreshed(
        manifest.store,
        Refreshed(
            datetime.now(UTC).isoformat(timespec="seconds"),
            policy.to_fields(), rule.to_fields(), closed,
        ),
    )  # fmt: skip
    deleted = 0
    for key in untouched.keys() & closed.keys():
        if not server.is_touched(untouched[key]):  # it may have been opened since
            server.delete_task(untouched[key])
            deleted += 1
    still = [q for q in queued(manifest) if q.item.sha256 in untouched.keys() - closed.keys()]
    changed = TaskChanges(manifest, server, project, settings).apply(still, worth)
    add_ranked_tab(server, project.project_id)
    reopened = len(was_closed.keys() - closed.keys() - answered)
    return RefreshSummary(len(still), deleted, reopened, *changed, rule.above)


def _worth(
    manifest: Manifest, policy: Policy, rule: ShowRule, cost: CostModel
) -> dict[str, _Worth]:
    """Return every readable live image by sha256."""
    thresholds = policy.for_run(manifest.record.identity)
    found = {}
    columns = ["sha256", "width", "height", "status", "detections"]
    for _, table in live_tables(manifest, columns):
        ok = table.filter(pc.equal(table.column("status").cast(pa.string()), "ok"))
        if not ok.num_rows:
            continue
        batch = box_batch(ok, thresholds)
        values = measure(batch)[1].sum(axis=1)
        seconds = rule.seconds(batch, cost)
        for i, sha256 in enumerate(ok.column("sha256").to_pylist()):
            found[sha256] = _Worth(float(values[i]), float(values[i] / seconds[i]))
    return found


def _cut(worth: Mapping[str, _Worth], answered: set[str], n: int) -> float:
    """Corrections per second below which a value task is closed, with ``n`` of them asked for."""
    rates = np.sort([w.rate for key, w in worth.items() if key not in answered])[::-1]
    return _PAYS * float(rates[min(n, len(rates)) - 1]) if n and len(rates) else 0.0


@dataclass(frozen=True, slots=True)
class TaskChanges:
    """Brings tasks in line with the queue as it reads now."""

    manifest: Manifest
    server: LabelStudio
    project: Project
    settings: ReviewSettings

    def apply(self, still: Sequence[Queued], worth: Mapping[str, _Worth]) -> tuple[int, int]:
        """Return how many tasks have other boxes, and how many another rank."""
        identity = self.manifest.record.identity
        classes = [c.name for c in identity.categories]
        maker = TaskMaker(
            names=interface_of(self.project.controls, classes),
            model_version=model_version_of(self.manifest),
            run=identity.name,
            audit_blind=self.settings.audit_blind,
        )
        boxes = shown_boxes(self.manifest, still)
        best_first = sorted(still, key=lambda q: -worth[q.item.sha256].rate
                            if q.item.sha256 in worth else 0.0)  # fmt: skip
        place = {q.item.sha256: rank for rank, q in enumerate(best_first, 1)}
        by_key = {q.item.sha256: q for q in still if q.item.sha256 in boxes}
        predicted = ranked = 0
        for task in self.server.tasks(
            self.project.project_id, include=_FIELDS, whole=True, page=100
        ):
            key = str(task["data"].get(KEY))
            if (one := by_key.get(key)) is None:
                continue
            made = None if maker.is_blind(one) else maker.prediction(one.item, boxes[key])
            predicted += self.predict(task, made)
            says = one.rule.says(Policy.from_config(one.head.policy))
            fields = {"rank": place[key], "expected_corrections": round(worth[key].value, 2),
                      **({SHOWN: says} if says else {})}  # fmt: skip
            if fields.items() - task["data"].items():
                self.server.update_data(task["id"], {**task["data"], **fields})
                ranked += 1
        return predicted, ranked

    def predict(self, task: Mapping[str, Any], made: dict[str, Any] | None) -> bool:
        """Replace this model's prediction of a task by this one, unless it is the same."""
        version = model_version_of(self.manifest)
        there = [p for p in task.get("predictions") or [] if p["model_version"] == version]
        if _boxes(there[-1:]) == _boxes([made] if made else []):
            return False
        if self.server.is_touched(task["id"]):  # a person may have opened it since it was listed
            return False
        for old in there:
            self.server.delete_prediction(old["id"])
        if made is not None:
            self.server.import_predictions(self.project.project_id, [{"task": task["id"], **made}])
        return True


def _boxes(predictions: Sequence[Mapping[str, Any]]) -> list[list[tuple[Any, ...]]]:
    """Return what predictions show, to a hundredth of a percent."""
    return [
        sorted(
            (
                *result["value"].get("rectanglelabels", ()),
                *(round(result["value"][side], 2) for side in ("x", "y", "width", "height")),
            )
            for result in prediction["result"]
        )
        for prediction in predictions
    ]
