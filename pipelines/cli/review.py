"""Review on the command line: route, push, pull, status; fit, decide, diff, export."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.common import Endpoint, Json, RunUrl, open_manifest, show, storage_options

review_app = typer.Typer(
    no_args_is_help=True,
    help="Review uncertain images: route → push → (people answer) → pull → decide.",
)

PolicyUrl = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="policy.yaml at any URL; default: the fitted one, or that of the last routing.",
    ),
]
Accept = Annotated[
    float | None, typer.Option(min=0, max=1, help="From this score on, a box is a label.")
]
Reject = Annotated[
    float | None, typer.Option(min=0, max=1, help="Below this score, a box is dropped.")
]
ServerUrl = Annotated[
    str | None,
    typer.Option("--url", help="Label Studio; default: the config's, or the last one used."),
]
Alone = Annotated[
    bool, typer.Option("--alone", help="Leave out the answers of the project's other runs.")
]
ProjectTitle = Annotated[
    str | None,
    typer.Option("--project", help="Project title; default: the same, or the run's name."),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(review_app, name="review")
    app.command(epilog="Example: labelfleet fit runs/cells --truth instances.json")(fit)
    app.command(epilog="Example: labelfleet decide runs/cells --policy policy.yaml")(decide)
    app.command(epilog="Example: labelfleet diff runs/cells v0001 latest")(diff)
    app.command(epilog="Example: labelfleet export runs/cells out/coco --format coco")(export)


@review_app.command(epilog="Example: labelfleet review route runs/cells --budget '240 minutes'")
def route(
    run: RunUrl,
    budget: Annotated[str, typer.Option(help="`N images`, or `N minutes` of reviewers' time.")],
    audit: Annotated[
        float, typer.Option(min=0, max=1, help="Share drawn at random, to estimate quality.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of the random draw.")] = 0,
    policy: PolicyUrl = None,
    accept: Accept = None,
    reject: Reject = None,
    answers_from: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="Skip images that this run has queued or had answered."),
    ] = None,
    alone: Alone = False,
    show_boxes: Annotated[
        str | None,
        typer.Option(
            "--show",
            metavar="RULE",
            help="Boxes that reviewers see: `auto` (those that pay), `score` (those that the "
            "policy accepts) or `none`; default: the config's, or auto.",
        ),
    ] = None,
    gold: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Images with known boxes, to measure annotators."),
    ] = 0,
    gold_truth: Annotated[
        str | None,
        typer.Option(
            metavar="COCO", help="Where boxes are known; default: what --answers-from settled."
        ),
    ] = None,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Select the images to review, each only once. Needs no GPU.

    Images that other runs of its review project queued or had answered are left out, see --alone.
    """
    from dataclasses import asdict
    from typing import cast

    from rich.console import Group
    from rich.text import Text

    from pipelines.policy.choose import choose_policy, given_meaning
    from pipelines.review.rounds import counted, runs_besides
    from pipelines.review.view import render_route
    from pipelines.routing.route import route_run
    from pipelines.routing.showing import Show
    from storage.coco.truth import read_truth
    from storage.review.settings import ReviewSettings, read_settings
    from storage.runs.ledger import new_invocation
    from storage.runs.lock import run_lock

    manifest = open_manifest(run, endpoint_url)
    options = storage_options(endpoint_url)
    chosen = choose_policy(manifest, policy, accept, reject, options)
    others = runs_besides(manifest, answers_from or (), alone=alone, options=options)
    kept = read_settings(manifest.store) or ReviewSettings()
    with run_lock(manifest.store, "labelfleet review route"):
        summary = route_run(
            manifest, budget=budget, policy=chosen, invocation=new_invocation(), seed=seed,
            audit=audit, other_runs=others, show=cast(Show, show_boxes or kept.show),
            gold=gold, gold_truth=read_truth(gold_truth, options) if gold_truth else None,
        )  # fmt: skip
    said = filter(None, (given_meaning(chosen, accept, reject), counted(others)))
    fields = {**asdict(summary), "other_runs": [run.url for run in others]}
    show(Group(render_route(summary), *map(Text, said)), fields, json_)


@review_app.command(epilog="Example: labelfleet review push runs/cells --project blood-cells")
def push(
    run: RunUrl,
    url: ServerUrl = None,
    project: ProjectTitle = None,
    audit_blind: Annotated[
        bool | None,
        typer.Option(
            "--audit-blind/--audit-shown", help="Show audit images without or with boxes."
        ),
    ] = None,
    presigned: Annotated[
        int | None,
        typer.Option(
            metavar="DAYS", help="Use links that expire after 1 to 7 days instead of a storage."
        ),
    ] = None,
    create: Annotated[
        bool, typer.Option("--create", help="Create the project if it does not exist.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also push images that people answered before.")
    ] = False,
    alone: Alone = False,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Push the queue to Label Studio. Run it again to continue; tasks are never duplicated.

    The token is read only from LABEL_STUDIO_API_KEY.
    """
    from pipelines.label_studio.connect import open_server
    from pipelines.label_studio.serving import choose_serving
    from pipelines.review.push import PushOptions, push_run
    from pipelines.review.rounds import earlier_runs, join_round
    from pipelines.review.settings import choose_settings, may_create
    from pipelines.review.view import push_progress, render_push
    from storage.review.settings import write_settings
    from storage.runs.lock import run_lock
    from storage.stores.open import open_store

    manifest, storage = open_manifest(run, endpoint_url), storage_options(endpoint_url)
    settings = choose_settings(manifest, url, project, audit_blind)
    serving = choose_serving(manifest.store, storage, presign_days=presigned)
    with (
        open_server(settings.url) as server,
        run_lock(manifest.store, "labelfleet review push"),
        push_progress() as watcher,
    ):
        options = PushOptions(
            create=create or may_create(settings, project),
            again=again,
            earlier=() if alone else earlier_runs(manifest, storage),
            watcher=watcher,
        )
        source = open_store(manifest.record.source["url"], storage)
        summary = push_run(
            manifest, server, settings, source=source, serving=serving, options=options
        )
        write_settings(manifest.store, join_round(manifest, server, settings))
    show(render_push(summary), summary.to_fields(), json_)
    raise typer.Exit(3 if summary.not_shown else 0)


@review_app.command(epilog="Example: labelfleet review pull runs/cells")
def pull(
    run: RunUrl,
    url: ServerUrl = None,
    project: ProjectTitle = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Read every task, not only those changed since the last pull."),
    ] = False,
    accept_withdrawals: Annotated[
        bool,
        typer.Option(help="Withdraw answers although most, or the whole project, were deleted."),
    ] = False,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Fetch the answers given, edited or deleted since the last pull."""
    from pipelines.label_studio.connect import open_server
    from pipelines.review.pull import pull_run
    from pipelines.review.rounds import refresh_rounds
    from pipelines.review.settings import choose_settings
    from pipelines.review.view import render_pull
    from storage.runs.lock import run_lock

    manifest = open_manifest(run, endpoint_url)
    settings = choose_settings(manifest, url, project, None)
    with open_server(settings.url) as server, run_lock(manifest.store, "labelfleet review pull"):
        summary = pull_run(
            manifest, server, settings, everything=everything,
            accept_withdrawals=accept_withdrawals,
        )  # fmt: skip
        refresh_rounds(manifest, server)
    show(render_pull(summary), summary.to_fields(), json_)
    raise typer.Exit(3 if summary.unusable or summary.held_back or summary.unreadable else 0)


@review_app.command(epilog="Example: labelfleet review refresh runs/cells")
def refresh(
    run: RunUrl,
    policy: PolicyUrl = None,
    accept: Accept = None,
    reject: Reject = None,
    alone: Alone = False,
    url: ServerUrl = None,
    project: ProjectTitle = None,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Update open tasks to a new policy: their boxes, their ranks, and whether to keep them.

    Tasks that were answered, skipped or begun stay as they are.
    """
    from pipelines.label_studio.connect import open_server
    from pipelines.policy.choose import choose_policy
    from pipelines.review.refresh import refresh_run
    from pipelines.review.rounds import runs_besides
    from pipelines.review.settings import choose_settings
    from pipelines.review.view import render_refresh
    from storage.runs.lock import run_lock

    manifest, options = open_manifest(run, endpoint_url), storage_options(endpoint_url)
    settings = choose_settings(manifest, url, project, None)
    chosen = choose_policy(manifest, policy, accept, reject, options)
    others = runs_besides(manifest, (), alone=alone, options=options)
    with open_server(settings.url) as server, run_lock(manifest.store, "labelfleet review refresh"):
        summary = refresh_run(manifest, server, settings, chosen, others=others)
    show(render_refresh(summary), summary.to_fields(), json_)


@review_app.command(epilog="Example: labelfleet review retract runs/cells --annotator ann@x.org")
def retract(
    run: RunUrl,
    task: Annotated[int | None, typer.Option(help="Answers to this task.")] = None,
    annotator: Annotated[str | None, typer.Option(help="Answers of this person.")] = None,
    image: Annotated[str | None, typer.Option(help="Answers to this image id or sha256.")] = None,
    keep_there: Annotated[
        bool, typer.Option("--keep-there", help="Do not change Label Studio.")
    ] = False,
    url: ServerUrl = None,
    project: ProjectTitle = None,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Withdraw answers by hand and reopen their tasks. All conditions must match."""
    from contextlib import nullcontext

    from pipelines.label_studio.connect import open_server
    from pipelines.review import withdrawals
    from pipelines.review.settings import choose_settings
    from pipelines.review.view import render_retract
    from storage.runs.lock import run_lock

    manifest = open_manifest(run, endpoint_url)
    settings = choose_settings(manifest, url, project, None)
    chosen = withdrawals.Chosen(task, annotator, image)
    connected = nullcontext() if keep_there else open_server(settings.url)
    with connected as server, run_lock(manifest.store, "labelfleet review retract"):
        summary = withdrawals.retract(manifest, chosen, server, settings)
    show(render_retract(summary), summary.to_fields(), json_)


@review_app.command(epilog="Example: labelfleet review status runs/cells")
def status(
    run: RunUrl,
    url: ServerUrl = None,
    project: ProjectTitle = None,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Show review progress: queued, pushed, answered, minutes left, worth so far."""
    from pipelines.review.settings import choose_settings
    from pipelines.review.status import ask_status
    from pipelines.review.view import render_status

    manifest = open_manifest(run, endpoint_url)
    found = ask_status(manifest, choose_settings(manifest, url, project, None))
    show(render_status(found), found.to_fields(), json_)


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

    from rich.console import Group

    from pipelines.policy.curves import Wanted
    from pipelines.policy.fit import fit_run
    from pipelines.policy.fit_view import fit_table, guarantee_table
    from pipelines.policy.guarantee import Asked, guarantee_run
    from pipelines.policy.policy import POLICY_KEY
    from pipelines.policy.statement import By
    from storage.coco.truth import read_truth
    from storage.stores.open import open_object

    manifest, options = open_manifest(run, endpoint_url), storage_options(endpoint_url)
    known = None if truth is None else read_truth(truth, options)
    fitted = fit_run(
        manifest, known, Wanted(precision, lost), allow_missing=allow_missing,
        count_bulk=count_bulk, ignore_area=ignore_area,
    )  # fmt: skip
    proven = None
    if guarantee is not None:
        asked = Asked(guarantee, confidence, cast(By, guarantee_by))
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
    if proven is None:
        show(fit_table(fitted, written), fields, json_)
        raise typer.Exit(0 if written is not None else 3)
    told = Group(fit_table(fitted, written), guarantee_table(proven))
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
