"""From rows and answers to labels on the command line: fit, decide, diff, export."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.common import (
    Accept,
    Alone,
    Endpoint,
    Json,
    PolicyUrl,
    Reject,
    RunUrl,
    open_manifest,
    show,
    storage_options,
)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(epilog="Example: labelfleet fit runs/cells --truth instances.json")(fit)
    app.command(epilog="Example: labelfleet decide runs/cells --policy policy.yaml")(decide)
    app.command(epilog="Example: labelfleet diff runs/cells v0001 latest")(diff)
    app.command(epilog="Example: labelfleet export runs/cells out/coco --format coco")(export)


def fit(
    run: RunUrl,
    truth: Annotated[
        str | None,
        typer.Option(help="COCO ground truth, any URL; default: the answers to the run's audit."),
    ] = None,
    precision: Annotated[
        float, typer.Option(min=0, max=1, help="Share of accepted boxes that shall be right.")
    ] = 0.9,
    lost: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of right boxes that may be dropped.")
    ] = 0.02,
    out: Annotated[
        str | None, typer.Option(help="Where to write policy.yaml; default: into the run.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option(help="Leave out truth images that the run has no row for.")
    ] = False,
    ignore_area: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Largest share of the image area that may be ignored."),
    ] = None,
    count_bulk: Annotated[
        bool, typer.Option(help="Count predictions accepted in bulk as audit answers.")
    ] = False,
    guarantee: Annotated[
        float | None,
        typer.Option(help="Share of accepted boxes to be proven right, such as 0.95."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Confidence of a guarantee.")] = 0.9,
    guarantee_by: Annotated[
        str, typer.Option(help="Guarantee `all` accepted boxes together, or every `class`.")
    ] = "all",
    force: Annotated[
        bool, typer.Option(help="Write a policy that would be refused as too imprecise.")
    ] = False,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Fit calibration and thresholds, which decide which boxes become labels.

    decide and review route use the policy stored in the run unless given another.
    If accepted boxes are right far less often than asked for, nothing is written; exit code 3.
    """
    from dataclasses import replace
    from typing import cast

    from pipelines.policy.curves import Wanted
    from pipelines.policy.fit import fit_run
    from pipelines.policy.fit_view import fit_table
    from pipelines.policy.guarantee import Asked, guarantee_run
    from pipelines.policy.policy import POLICY_KEY
    from pipelines.policy.statement import By
    from storage.coco.truth import read_truth
    from storage.stores.open import open_object

    asked = None
    if guarantee is not None:
        asked = Asked(guarantee, confidence, cast(By, guarantee_by))
    manifest, options = open_manifest(run, endpoint_url), storage_options(endpoint_url)
    known = None if truth is None else read_truth(truth, options)
    fitted = fit_run(
        manifest, known, Wanted(precision, lost), allow_missing=allow_missing,
        count_bulk=count_bulk, ignore_area=ignore_area,
    )  # fmt: skip
    proven = None
    if asked is not None:
        proven = guarantee_run(
            manifest, fitted.policy, asked, known, allow_missing=allow_missing,
            count_bulk=count_bulk,
        )  # fmt: skip
        fitted = replace(fitted, policy=proven.policy)
    if fitted.policy.guarantee is not None:
        fitted = replace(fitted, refused=None)  # it accepts what was shown, not what was fitted
    written = None
    if fitted.refused is None or force:
        store, key = (manifest.store, POLICY_KEY) if out is None else open_object(out, options)
        store.put(key, fitted.policy.to_yaml().encode())
        written = out or f"{manifest.url}/{POLICY_KEY}"
    fields = {**fitted.to_fields(), "written": written}
    told = fit_table(fitted, written, proven)
    if proven is None:
        show(told, fields, json_)
        raise typer.Exit(0 if written is not None else 3)
    show(told, {**fields, "guarantee": proven.to_fields()}, json_)
    raise typer.Exit(0 if proven.guarantee is not None else 3)


def decide(
    run: RunUrl,
    policy: PolicyUrl = None,
    accept: Accept = None,
    reject: Reject = None,
    answers_from: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="Another run whose answers count too; repeatable."),
    ] = None,
    alone: Alone = False,
    settle: Annotated[
        str,
        typer.Option(help="How to settle several answers to one image: `latest` or `agreement`."),
    ] = "latest",
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=CLASS",
            help="A class in answers and its name in the run; `NAME=` drops it. "
            "Remembered; repeatable.",
        ),
    ] = None,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Merge model, policy and answers into a new label version. Needs no GPU.

    Answers from the other runs of its review project count too, see --alone. Those that cannot
    become labels are set aside and listed; the exit code is then 3.
    """
    from dataclasses import asdict
    from typing import cast

    from rich.console import Group
    from rich.text import Text

    from pipelines.labels.decide import decide_run, read_set_aside
    from pipelines.labels.view import render_version
    from pipelines.policy.choose import choose_policy, given_meaning, thresholds_on
    from pipelines.review.rounds import counted, runs_besides
    from pipelines.review.settings import rename_classes
    from pipelines.truth.settle import Settling
    from storage.runs.lock import run_lock

    manifest = open_manifest(run, endpoint_url)
    options = storage_options(endpoint_url)
    others = runs_besides(manifest, answers_from or (), alone=alone, options=options)
    chosen = choose_policy(manifest, policy, accept, reject, options)
    with run_lock(manifest.store, "labelfleet decide"):
        if rename:
            rename_classes(manifest, rename)
        lineage = decide_run(manifest, chosen, answers_from=others, settling=cast(Settling, settle))
    aside = read_set_aside(manifest, lineage)
    said = filter(None, (given_meaning(chosen, accept, reject), counted(others)))
    told = Group(render_version(lineage, aside), *map(Text, said))
    fields = {
        **asdict(lineage),
        "other_runs": [run.url for run in others],
        "thresholds_on": thresholds_on(chosen),
        "set_aside": [one.to_fields() for one in aside],
    }
    show(told, fields, json_)
    raise typer.Exit(3 if aside else 0)


def diff(
    run: RunUrl,
    old: Annotated[str, typer.Argument(help="A label version, such as v0001.")],
    new: Annotated[str, typer.Argument(help="Another; default: the latest.")] = "latest",
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Show what changed between two label versions."""
    from pipelines.labels.diff import diff_versions
    from pipelines.labels.view import render_diff

    found = diff_versions(open_manifest(run, endpoint_url), old, new)
    show(render_diff(found), found.to_fields(), json_)


def export(
    run: RunUrl,
    dest: Annotated[str, typer.Argument(help="An empty folder or URL.")],
    format_: Annotated[str, typer.Option("--format", help="coco, yolo or hf.")],
    version: Annotated[str | None, typer.Option(help="Label version; default: the latest.")] = None,
    images: Annotated[str, typer.Option(help="copy, link or none.")] = "none",
    ignore_boxes: Annotated[
        str | None,
        typer.Option(help="`in` or `out` of the labels; default: in for coco, else out."),
    ] = None,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Write a label version as COCO, YOLO or Hugging Face data set.

    A stopped export is continued by the same command. Exits 3 when images were left out.
    """
    from typing import cast

    from pipelines.exports.export import ExportFormat, ExportRequest, export_version
    from pipelines.exports.formats import IgnoreBoxes
    from pipelines.exports.images import ImageMode
    from pipelines.exports.view import export_table

    manifest, options = open_manifest(run, endpoint_url), storage_options(endpoint_url)
    request = ExportRequest(
        cast(ExportFormat, format_),
        version,
        cast(ImageMode, images),
        cast(IgnoreBoxes | None, ignore_boxes),
    )
    summary = export_version(manifest, dest, request, options)
    show(export_table(summary), summary.to_fields(), json_)
    raise typer.Exit(3 if summary.left_out else 0)
