"""The steps that notebooks call, on runs of a few rows."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipelines import Run, decide, export, fit
from pipelines.policy.policy import Policy
from pipelines.routing.route import route_run
from storage.errors import ConfigError
from storage.labels.versions import read_version
from storage.review.answers import append_answers
from storage.review.queue import read_queue
from tests.pipelines.policy.test_fit import answer, some_run


def audited(folder: Path, answers: int) -> Run:
    """A run whose boxes with a score of 0.5 or more are right, with an audit of all its images."""
    manifest, right = some_run(str(folder / "run"), 120)
    route_run(manifest, budget="120 images", policy=Policy(), invocation="one", audit=1.0)
    items = list(read_queue(manifest.store))[:answers]
    append_answers(manifest.store, [answer(i, right[i.image_id], "RBC") for i in items])
    return Run(manifest.url)


@pytest.mark.slow
def test_fit_leaves_a_policy_with_a_guarantee_and_decide_says_it(tmp_path: Path) -> None:
    run = audited(tmp_path, 60)
    fitted = fit(run, guarantee=0.9)
    assert fitted.refused is None
    shown = fitted.policy.guarantee
    assert shown is not None
    assert (shown.target, shown.confidence, shown.audited) == (0.9, 0.9, 60)
    assert Policy.of_run(run.manifest.store, run.url) == fitted.policy
    decide(run)
    assert "At least 90% of all accepted boxes" in read_version(run.manifest.store).guarantee


@pytest.mark.slow
def test_fit_says_when_the_share_is_not_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = audited(tmp_path, 30)
    with caplog.at_level(logging.WARNING, "labelfleet.fit"):
        fitted = fit(run, guarantee=0.999)
    assert fitted.policy.guarantee is None
    assert "a share of 0.999 is not shown" in caplog.text
    assert fitted == fit(run)


def test_a_step_takes_a_run_by_its_url_or_path(tmp_path: Path) -> None:
    url = audited(tmp_path, 30).url
    path = tmp_path / "run"
    assert fit(url) == fit(path) == fit(Run(path))
    made = decide(path)
    assert decide(url).version == "v0002"
    assert export(path, tmp_path / "coco", "coco", version=made.version).images == 120
    with pytest.raises(ConfigError, match=r"no run at .*/none"):
        export(tmp_path / "none", "out", "coco")
    with pytest.raises(ConfigError, match=r"no run at .*/none"):  # one URL, not its letters
        decide(path, answers_from=str(tmp_path / "none"))


def test_an_absent_label_version_is_refused_at_once_with_those_there_are(tmp_path: Path) -> None:
    run = audited(tmp_path, 30)
    decide(run)
    assert len(list(run.labels("v0001"))) == 120
    with pytest.raises(ConfigError, match="no label version 'v9'") as refused:
        run.labels("v9")  # not asked for a row
    assert refused.value.hint == "there are v0001"
