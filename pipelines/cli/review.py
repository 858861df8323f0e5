"""Review on the command line: route, push, pull, refresh, retract, status."""

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

review_app = typer.Typer(
    no_args_is_help=True,
    help="Review uncertain images: route → push → (people answer) → pull → decide.",
)

ServerUrl = Annotated[
    str | None,
    typer.Option("--url", help="Label Studio; default: the config's, or the last one used."),
]
ProjectTitle = Annotated[
    str | None,
    typer.Option("--project", help="Project title; default: the same, or the run's name."),
]


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    app.add_typer(review_app, name="review")


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
    keep_answers: Annotated[
        bool,
        typer.Option(
            "--keep-answers",
            help="Go on counting answers that were deleted, however few. No later pull asks again.",
        ),
    ] = False,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Fetch the answers given, edited or deleted since the last pull.

    Reads every project that the run was pushed to, or only the one of --project.
    """
    from dataclasses import replace

    from pipelines.label_studio.connect import open_server
    from pipelines.review.pull import pull_run
    from pipelines.review.rounds import refresh_rounds
    from pipelines.review.settings import choose_settings
    from pipelines.review.view import render_pull
    from pipelines.review.withdrawals import Deletions
    from storage.runs.lock import run_lock

    if accept_withdrawals and keep_answers:
        raise typer.BadParameter("it says the opposite of --accept-withdrawals",
                                 param_hint="--keep-answers")  # fmt: skip
    deletions: Deletions = "ask"
    if accept_withdrawals or keep_answers:
        deletions = "withdraw" if accept_withdrawals else "keep"
    manifest = open_manifest(run, endpoint_url)
    settings = choose_settings(manifest, url, project, None)
    if project is not None:
        settings = replace(settings, projects={})
    with open_server(settings.url) as server, run_lock(manifest.store, "labelfleet review pull"):
        summary = pull_run(
            manifest, server, settings, everything=everything,
            deletions=deletions,
        )  # fmt: skip
        refresh_rounds(manifest, server)
    show(render_pull(summary), summary.to_fields(), json_)
    raise typer.Exit(0 if summary.whole else 3)


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
