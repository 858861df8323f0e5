"""The steps on a run that the commands of the same names take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.exports.export import ExportFormat, ExportRequest, ExportSummary, export_version
from pipelines.exports.images import ImageMode
from pipelines.face.run import Run, opened
from pipelines.labels.decide import decide_run
from pipelines.policy.choose import choose_policy
from pipelines.policy.curves import Wanted
from pipelines.policy.fit import Fit, fit_run
from pipelines.policy.guarantee import Asked, guarantee_run
from pipelines.policy.policy import POLICY_KEY, Policy
from pipelines.truth.settle import Settling
from storage.coco.truth import read_truth
from storage.labels.versions import LabelVersion
from storage.runs.lock import run_lock

log = logging.getLogger("labelfleet.fit")


def fit(
    run: Run | str | Path,
    truth: str | None = None,
    *,
    precision: float = 0.9,
    lost: float = 0.02,
    guarantee: float | None = None,
    allow_missing: bool = False,
) -> Fit:
    """Fit calibration and thresholds, and leave the policy with the run.

    A policy whose accepted boxes are right far less often than asked for is not left there; the
    log says so, and ``refused`` of the result says why. With ``guarantee`` the policy accepts
    exactly the boxes that the share was shown for, and ``policy.guarantee`` of the result says so;
    it is None where nothing was shown, and the log says how many audit images more would do.

    Args:
        run: the run whose scores are calibrated, or its URL.
        truth: COCO ground truth, any URL; None: the answers to the run's audit.
        precision: wanted share of right boxes among the accepted.
        lost: share of right boxes that may be dropped, at most.
        guarantee: share of accepted boxes to be proven right, with 90 % confidence; None: nothing
            is proven.
        allow_missing: leave out truth images that the run has no row for.

    Raises:
        LabelfleetError: as ``pipelines.policy.fit.fit_run``.
    """
    run = opened(run)
    known = None if truth is None else read_truth(truth, run.options)
    fitted = fit_run(run.manifest, known, Wanted(precision, lost), allow_missing=allow_missing)
    if guarantee is not None:
        asked = Asked(guarantee)
        proven = guarantee_run(
            run.manifest, fitted.policy, asked, known, allow_missing=allow_missing
        )
        if proven.guarantee is None:
            more = proven.all.more
            log.warning(
                "a share of %g is not shown; %s", guarantee,
                f"about {more} more audit images would do" if more else "no larger audit would do",
            )  # fmt: skip
        else:  # it accepts what was shown, not what was fitted
            fitted = replace(fitted, policy=proven.policy, refused=None)
    if fitted.refused is None:
        run.manifest.store.put(POLICY_KEY, fitted.policy.to_yaml().encode())
    else:
        log.warning("no policy written: %s", fitted.refused)
    return fitted


def decide(
    run: Run | str | Path,
    policy: Policy | None = None,
    *,
    answers_from: Sequence[Run | str | Path] = (),
    settling: Settling = "latest",
) -> LabelVersion:
    """Merge model, policy and answers into a new label version. Takes the run's lock.

    Args:
        run: the run whose live rows become labels, or its URL.
        policy: None: what ``fit`` left with the run, else the last routing's, else the default.
        answers_from: other runs whose answers count too, or their URLs.
        settling: how several answers to one image become one.

    Raises:
        RunLocked: another process writes to the run.
    """
    run = opened(run)
    chosen = policy or choose_policy(run.manifest, None, None, None, run.options)
    others = [opened(other).manifest for other in _several(answers_from)]
    with run_lock(run.manifest.store, "labelfleet decide"):
        return decide_run(run.manifest, chosen, answers_from=others, settling=settling)


def _several(runs: Sequence[Run | str | Path]) -> Sequence[Run | str | Path]:
    """Return the runs; a single URL is one of them, not its letters."""
    return (runs,) if isinstance(runs, str) else runs


def export(
    run: Run | str | Path,
    dest: str | Path,
    format: ExportFormat,
    *,
    version: str | None = None,
    images: ImageMode = "none",
) -> ExportSummary:
    """Write a label version as a data set that trainers read.

    Args:
        run: the run, or its URL.
        dest: an empty folder or URL.
        format: ``coco``, ``yolo`` or ``hf``.
        version: a label version; None: the latest.
        images: ``copy``, ``link`` or ``none``.

    Raises:
        LabelfleetError: as ``pipelines.exports.export.export_version``.
    """
    run = opened(run)
    request = ExportRequest(format, version, images)
    return export_version(run.manifest, str(dest), request, run.options)
