"""Rounds: the runs that share a Label Studio project, and whose answers count for one another.

A project's description names its runs, a line each; every push adds its own and remembers the
others in the run's settings. Answers are joined by the images' sha256, so it does not matter which
run queued an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipelines.label_studio.client import LabelStudio
from storage.errors import LabelfleetError, ReviewError
from storage.objects.protocols import StorageOptions
from storage.review.settings import ReviewSettings, read_settings, write_settings
from storage.runs.manifest import Manifest
from storage.urls import shown_url

_MARK = "labelfleet run: "


def runs_of(description: str) -> list[str]:
    """Return the URLs of the runs that a project's description names."""
    lines = (line.strip() for line in description.splitlines())
    return [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)]


def join_round(manifest: Manifest, server: LabelStudio, settings: ReviewSettings) -> ReviewSettings:
    """Name the run in its project's description, and return the settings with the other runs.

    Args:
        manifest: the run.
        server: a client.
        settings: which project, after something was pushed there.
    """
    project = server.find_project(settings.project)
    if project is None:
        return settings
    named = runs_of(project.description)
    if manifest.url not in named:
        lines = [*project.description.splitlines(), f"{_MARK}{manifest.url}"]
        server.update_project(project.project_id, description="\n".join(lines))
    others = dict.fromkeys([*settings.rounds, *named])
    others.pop(manifest.url, None)
    projects = {**settings.projects, str(project.project_id): project.title}
    return replace(settings, project_id=project.project_id, rounds=tuple(others), projects=projects)


def refresh_rounds(manifest: Manifest, server: LabelStudio) -> None:
    """Remember runs that joined the project since the last push. The caller holds the run's lock.

    Does nothing where nothing was pushed yet, or the project is gone.
    """
    kept = read_settings(manifest.store)
    if kept is not None and kept.project_id:
        write_settings(manifest.store, join_round(manifest, server, kept))


def runs_besides(
    manifest: Manifest,
    given: Sequence[str],
    *,
    alone: bool,
    options: StorageOptions | None = None,
) -> list[Manifest]:
    """Return the runs whose queues and answers count beside a run's own, each once.

    Args:
        manifest: the run.
        given: URLs of further runs, from the command line.
        alone: leave out the other runs of its review project.
        options: how to reach their outputs.

    Raises:
        LabelfleetError: one of them cannot be read.
    """
    runs = [Manifest.open(url, options) for url in given]
    runs += [] if alone else earlier_runs(manifest, options)
    by_url = {run.url: run for run in runs if run.url != manifest.url}
    return list(by_url.values())


def counted(runs: Sequence[Manifest]) -> str:
    """Name the other runs that count, for people; '' without any."""
    return f"counts too: {', '.join(shown_url(run.url) for run in runs)}" if runs else ""


def earlier_runs(manifest: Manifest, options: StorageOptions | None = None) -> list[Manifest]:
    """Return the other runs of the project, as the last push found them.

    Args:
        manifest: the run.
        options: how to reach their outputs.

    Raises:
        ReviewError: one of them cannot be read. Without its answers, images that people answered
            would silently become the model's again.
    """
    settings = read_settings(manifest.store)
    found = []
    for url in settings.rounds if settings else ():
        try:
            found.append(Manifest.open(url, options))
        except LabelfleetError as exc:
            raise ReviewError(
                f"the earlier round {url} cannot be read: {exc.message}",
                hint="make it readable, or give --alone to leave out its answers",
            ) from exc
    return found
