"""The last review settings of a run: ``review/settings.json``, without secrets.

``labelfleet run`` writes it from the config's ``review:`` section, ``review push`` from its
options; ``push``, ``pull`` and ``status`` then need only the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from storage.errors import ConfigError, ObjectNotFound, StorageError
from storage.objects.json_records import json_record, read_record
from storage.objects.protocols import SupportsGet, SupportsPut

SETTINGS_KEY = "review/settings.json"


@dataclass(frozen=True, slots=True)
class ReviewSettings:
    """Where and how a run is reviewed.

    Attributes:
        url: Label Studio's URL.
        project: title of the project.
        audit_blind: audit images are shown without boxes.
        project_id: the project's number; 0 before the first push.
        classes: class name in this run by class name in answers, where they differ; None: boxes
            of the class are dropped.
        overlap: (share of tasks from 0 to 1, people per such task); (1.0, 1): one person each.
        people: annotators who each get a tab with a share of the tasks; empty: everyone takes
            the next task.
        instructions: for annotators, as HTML; '' for the built-in ones.
        show: which boxes reviewers see: ``auto``, ``score`` or ``none``.
        show_why: the labelling page of a project made by ``push`` says why an image is there.
        rounds: URLs of the project's other runs, whose answers also count here.
        projects: titles of all projects at ``url`` that the run was pushed to, by number.
    """

    url: str = "http://localhost:8080"
    project: str = ""
    audit_blind: bool = False
    project_id: int = 0
    classes: Mapping[str, str | None] = field(default_factory=dict)
    overlap: tuple[float, int] = (1.0, 1)
    people: tuple[str, ...] = ()
    instructions: str = ""
    rounds: tuple[str, ...] = ()
    show: str = "auto"
    show_why: bool = False
    projects: Mapping[str, str] = field(default_factory=dict)

    def at(self, url: str, project: str) -> ReviewSettings:
        """Return the settings for a project; on the same server, those used before stay known."""
        if url != self.url:
            return replace(self, url=url, project=project, project_id=0, projects={})
        known = {str(self.project_id): self.project} if self.project_id else {}
        projects = {**known, **self.projects}
        if project == (self.project or project):
            return replace(self, project=project, projects=projects)
        numbers = [int(number) for number, title in projects.items() if title == project]
        last = max(numbers, default=0)
        return replace(self, project=project, project_id=last, projects=projects)


class SupportsSettings(SupportsGet, SupportsPut, Protocol):
    """The store verbs needed to keep settings."""


def read_settings(store: SupportsGet) -> ReviewSettings | None:
    """Return the settings, or None if there are none. Raises ConfigError if they are damaged."""
    try:
        return read_record(store, SETTINGS_KEY, _settings)
    except ObjectNotFound:
        return None
    except StorageError as exc:
        if type(exc) is not StorageError:
            raise
        raise ConfigError(exc.message, hint="delete it; give --url and --project") from exc


def _settings(fields: dict[str, Any]) -> ReviewSettings:
    names = {"overlap", "people", "rounds"} & fields.keys()
    lists: dict[str, Any] = {name: tuple(fields[name]) for name in names}
    settings = ReviewSettings(**{**fields, **lists})
    if not (isinstance(settings.url, str) and isinstance(settings.project, str)):
        raise TypeError("url and project must be text")
    if not all(n.isdecimal() and isinstance(title, str) for n, title in settings.projects.items()):
        raise TypeError("projects must be titles by number")
    return settings


def write_settings(store: SupportsSettings, settings: ReviewSettings) -> None:
    """Write the settings if they differ from the stored ones."""
    if read_settings(store) != settings:
        store.put(SETTINGS_KEY, json_record(asdict(settings)))
