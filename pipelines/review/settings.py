"""What a review command works with: options first, then what the run remembers, then defaults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pipelines.label_studio.client import TITLE_LENGTH, LabelStudio
from pipelines.label_studio.http import LabelStudioHttp
from pipelines.label_studio.token import Token
from pipelines.policy.policy import Policy
from storage.objects.protocols import StorageOptions
from storage.review.queue import queue_parts, read_head
from storage.review.settings import ReviewSettings, read_settings
from storage.runs.manifest import Manifest

_FIRST_PATIENCE_S = 5.0  # a wrong address should not take a minute and a half to say so


@contextmanager
def open_server(url: str) -> Iterator[LabelStudio]:
    """A client with the token from the environment, closed when left.

    Raises:
        ReviewError: nobody answers there, it is no Label Studio, or it refuses the token.
    """
    token = Token.from_environment()
    first = LabelStudioHttp(url, token, patience_s=_FIRST_PATIENCE_S)
    try:
        LabelStudio(first).version()
        LabelStudio(first).me()
    finally:
        first.close()
    http = LabelStudioHttp(url, token)
    try:
        yield LabelStudio(http)
    finally:
        http.close()


def choose_settings(
    manifest: Manifest, url: str | None, project: str | None, audit_blind: bool | None
) -> ReviewSettings:
    """Where a run's review goes; the project is called like the run unless somebody says else."""
    kept = read_settings(manifest.store) or ReviewSettings()
    title = project or kept.project or manifest.record.identity.name[:TITLE_LENGTH]
    blind = kept.audit_blind if audit_blind is None else audit_blind
    return replace(kept, url=url or kept.url, project=title, audit_blind=blind)


def choose_policy(
    manifest: Manifest,
    url: str | None,
    accept: float | None,
    reject: float | None,
    options: StorageOptions | None = None,
) -> Policy:
    """The policy at ``url``, else what ``fit`` left with the run, else the last routing's.

    Where there is none of them, the default. Thresholds given by hand replace its own.

    Raises:
        ConfigError: it cannot be read, or the thresholds contradict each other.
    """
    policy = _policy_of(manifest) if url is None else Policy.load(url, options)
    if accept is None and reject is None:
        return policy
    return policy.with_thresholds(accept, reject)


def _policy_of(manifest: Manifest) -> Policy:
    fitted = Policy.of_run(manifest.store, manifest.url)
    if fitted is not None:
        return fitted
    parts = queue_parts(manifest.store)
    return Policy.from_config(read_head(manifest.store, parts[-1]).policy) if parts else Policy()
