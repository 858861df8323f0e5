"""``labelfleet browse`` on the command line."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from pipelines.cli.common import Endpoint, RunUrl, open_manifest, storage_options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: labelfleet browse runs/cells --other runs/cells-second")(browse)


def browse(
    run: RunUrl,
    version: Annotated[
        str | None, typer.Option(help="Label version to show; default: the latest.")
    ] = None,
    other: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Another run over the same images, shown beside."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 0,
    endpoint_url: Endpoint = None,
) -> None:
    """Look at a run's images, boxes, labels and answers in the browser. Ctrl-C ends it.

    The page is for this machine alone and needs the token in the printed address. Nothing is copied
    or uploaded; the one thing it can write is the review queue.
    """
    from pipelines.browse.serve import browse as serve

    def say(address: str) -> None:
        sys.stdout.write(f"open {address}\n")
        sys.stdout.flush()

    beside = None if other is None else open_manifest(other, endpoint_url)
    with suppress(KeyboardInterrupt):  # that is how it ends
        serve(
            open_manifest(run, endpoint_url),
            storage_options(endpoint_url),
            version=version,
            other=beside,
            port=port,
            say=say,
        )
