"""What a review command works with: options first, then what the run remembers, then defaults."""

from __future__ import annotations

from dataclasses import replace

from pipelines.label_studio.client import TITLE_LENGTH
from storage.review.settings import ReviewSettings, read_settings
from storage.runs.manifest import Manifest


def choose_settings(
    manifest: Manifest, url: str | None, project: str | None, audit_blind: bool | None
) -> ReviewSettings:
    """Where a run's review goes; the project is called like the run unless somebody says else."""
    kept = read_settings(manifest.store) or ReviewSettings()
    title = project or kept.project or manifest.record.identity.name[:TITLE_LENGTH]
    blind = kept.audit_blind if audit_blind is None else audit_blind
    return replace(kept, url=url or kept.url, project=title, audit_blind=blind)
