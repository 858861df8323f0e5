"""Settings of a review command: options first, then the run's record, then defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipelines.label_studio.client import TITLE_LENGTH
from storage.errors import ConfigError
from storage.review.settings import ReviewSettings, read_settings, write_settings
from storage.runs.manifest import Manifest


def choose_settings(
    manifest: Manifest, url: str | None, project: str | None, audit_blind: bool | None
) -> ReviewSettings:
    """Return where a run's review goes; by default the project has the run's name."""
    kept = read_settings(manifest.store) or ReviewSettings()
    title = project or kept.project or manifest.record.identity.name[:TITLE_LENGTH]
    blind = kept.audit_blind if audit_blind is None else audit_blind
    return replace(kept.at(url or kept.url, title), audit_blind=blind)


def may_create(settings: ReviewSettings, project: str | None) -> bool:
    """Return whether a project may be created without --create.

    It may when it is the one that the config or the run names, and nothing was pushed there yet. A
    title from the command line may be mistyped, and a project that was there may have been renamed.

    Args:
        settings: from ``choose_settings``.
        project: as given on the command line.
    """
    return project is None and not settings.project_id


def rename_classes(manifest: Manifest, renamed: Sequence[str]) -> None:
    """Remember what classes in answers are called in this run.

    Args:
        manifest: the run; its lock is held.
        renamed: ``NAME=CLASS`` each, or ``NAME=`` to drop the boxes of a class.

    Raises:
        ConfigError: one has no ``=``, or names a class that the run lacks.
    """
    names = [c.name for c in manifest.record.identity.categories]
    kept = read_settings(manifest.store) or ReviewSettings()
    classes = dict(kept.classes)
    for pair in renamed:
        old, equals, new = pair.rpartition("=")
        if not old or not equals or (new and new not in names):
            raise ConfigError(
                f"{pair!r} does not say which class of the run it means",
                hint=f"write NAME=CLASS with one of {', '.join(names)}, or NAME= to drop it",
            )
        classes[old] = new or None
    write_settings(manifest.store, replace(kept, classes=classes))
