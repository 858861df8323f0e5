"""Set up a project beside its tasks: instructions, tabs, and how many people answer.

Everything is made once and then left to the lead, who may edit or delete it in Label Studio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.label_studio.client import KEY, LabelStudio, Project
from pipelines.review.tasks import ASSIGNED
from storage.errors import ReviewError
from storage.review.settings import ReviewSettings

INSTRUCTIONS = (
    "<p>Correct the boxes until they are right, then submit.</p><ul>"
    "<li><b>Submit unchanged</b>: every box is right, and none is missing.</li>"
    "<li><b>Draw what is missing</b>, everything: boxes that the model is unsure of are not "
    "shown.</li>"
    "<li><b>Submit without boxes</b>: none of the classes is there.</li>"
    "<li><b>Skip</b> when you cannot tell. It says nothing about the image.</li></ul>"
    "<p>Draw boxes tightly around what can be seen, and give each exactly one label.</p>"
)
_EVERYBODY = "To review"
# Not useful to annotators; the queue's order is the order of the tasks' numbers.
_HIDDEN = (
    f"tasks:data.{KEY}", "tasks:data.run", "tasks:annotations_results", "tasks:predictions_results",
    "tasks:annotations_ids", "tasks:file_upload", "tasks:storage_filename", "tasks:created_at",
    "tasks:updated_at", "tasks:avg_lead_time", "tasks:predictions_model_versions",
    "tasks:predictions_score", "tasks:total_predictions", "tasks:inner_id", "tasks:draft_exists",
)  # fmt: skip


def prepare_desk(server: LabelStudio, project: Project, settings: ReviewSettings) -> None:
    """Give a project its instructions, tabs and overlap, where they are not there yet.

    Args:
        server: a client.
        project: as it was found or made.
        settings: ``people`` get a tab each; ``overlap`` says which share of the tasks how many
            people answer.

    Raises:
        ReviewError: Label Studio did not take the overlap.
    """
    fields: dict[str, Any] = {}
    if not project.instructions:
        fields = {"expert_instruction": settings.instructions or INSTRUCTIONS,
                  "show_instruction": True}  # fmt: skip
    share, people = settings.overlap
    if people > 1 and (project.people, project.overlap_percent) != (people, round(100 * share)):
        fields |= {"maximum_annotations": people, "overlap_cohort_percentage": round(100 * share)}
    if fields:
        now = server.update_project(project.project_id, **fields)
        if people > 1 and now.people != people:
            raise ReviewError(
                f"Label Studio did not set the overlap of {project.title!r} to {people} people",
                hint="set it in the project's Settings > Annotation, or leave out review.overlap",
            )
    _add_tabs(server, project.project_id, settings.people)


def _add_tabs(server: LabelStudio, project_id: int, people: Sequence[str]) -> None:
    there = {str(view.get("data", {}).get("title")) for view in server.views(project_id)}
    wanted: dict[str, str | None] = {_EVERYBODY: None, **{person: person for person in people}}
    for title, person in wanted.items():
        if title not in there:
            server.add_view(project_id, _tab(title, person))


def add_ranked_tab(server: LabelStudio, project_id: int) -> None:
    """Add a tab that lists what pays most first, as the last refresh ranked it."""
    title = "By what pays most"
    there = {str(view.get("data", {}).get("title")) for view in server.views(project_id)}
    if title not in there:
        server.add_view(project_id, {**_tab(title, None), "ordering": ["tasks:data.rank"]})


def _tab(title: str, person: str | None) -> dict[str, Any]:
    items = [] if person is None else [
        {"filter": f"filter:tasks:data.{ASSIGNED}", "operator": "equal", "type": "String",
         "value": person}
    ]  # fmt: skip
    hidden = list(_HIDDEN)
    return {
        "title": title,
        "type": "list",
        "target": "tasks",
        "filters": {"conjunction": "and", "items": items},
        "ordering": ["tasks:id"],
        "hiddenColumns": {"explore": hidden, "labeling": hidden},
    }
