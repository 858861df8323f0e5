"""Maintaining a run on the command line: verify, gc, relocate."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.common import Endpoint, Json, RunUrl, open_manifest, show, storage_options


def register(app: typer.Typer) -> None:
    """Add the commands of this page."""
    app.command(epilog="Example: labelfleet verify runs/cells --complete")(verify)
    app.command(epilog="Example: labelfleet gc runs/cells --dry-run")(gc)
    app.command(epilog="Example: labelfleet relocate runs/cells s3://archive/cells")(relocate)


def verify(
    run: RunUrl,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read records and footers, but no rows.")
    ] = False,
    complete: Annotated[
        bool, typer.Option("--complete", help="Shards without labels are differences too.")
    ] = False,
    source: Annotated[
        bool,
        typer.Option("--source", help="Read every image again; compare its hash and size."),
    ] = False,
    readers: Annotated[int, typer.Option(min=1, help="Objects read at a time.")] = 16,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Check that a run is bit for bit as it was written; exits 1 if it is not.

    Every object is read in full, unless --quick. Nothing is changed.
    """
    from pipelines.runs.verify import verify_run
    from pipelines.runs.verify_view import verify_progress, verify_table
    from storage.stores.open import open_store

    if quick and source:
        raise typer.BadParameter("it reads no rows to compare", param_hint="--quick with --source")
    manifest = open_manifest(run, endpoint_url)
    images = open_store(manifest.record.source["url"], storage_options(endpoint_url))
    with verify_progress() as progress:
        found = verify_run(
            manifest,
            quick=quick,
            complete=complete,
            source=images if source else None,
            readers=readers,
            progress=progress,
        )
    show(verify_table(found), found.to_fields(), json_)
    raise typer.Exit(found.exit_code)


def relocate(
    run: RunUrl,
    new_url: Annotated[str, typer.Argument(help="Where the run's images are now.")],
    sample: Annotated[
        int, typer.Option(min=1, help="Labelled images whose bytes are compared, at most.")
    ] = 200,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Continue a run whose images were moved: same keys and bytes at another URL.

    Every listed object must be there with its size, and a sample of the labelled images with their
    digests; otherwise nothing is changed. Then set source.url in the config.
    """
    from pipelines.runs.relocate import relocate_run, relocated_table

    manifest = open_manifest(run, endpoint_url)
    done = relocate_run(manifest, new_url, storage_options(endpoint_url), sample=sample)
    show(relocated_table(done), done.to_fields(), json_)


def gc(
    run: RunUrl,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be removed.")
    ] = False,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Leave what is younger: 36h, 1d; 0 leaves nothing.")
    ] = "1d",
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Remove objects of a run that no reader uses. Takes the run's lock."""
    from pipelines.runs.gc import collect_garbage, garbage_table, parse_age

    try:
        older_than_s = parse_age(older_than)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--older-than") from exc
    manifest = open_manifest(run, endpoint_url)
    summary = collect_garbage(manifest, older_than_s=older_than_s, dry_run=dry_run)
    show(garbage_table(summary), summary.to_fields(), json_)
