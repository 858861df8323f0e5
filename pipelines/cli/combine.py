"""Several runs or data sets on the command line: fuse, compare, suite."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.common import (
    ConfigPath,
    Endpoint,
    Json,
    RunUrl,
    Sets,
    open_manifest,
    show,
    storage_options,
)


def register(app: typer.Typer) -> None:
    """Add the commands of this page."""
    app.command(epilog="Example: labelfleet fuse runs/cells-a runs/cells-b --out runs/cells-fused")(
        fuse
    )
    app.command(epilog="Example: labelfleet compare runs/cells-june runs/cells-july")(compare)
    app.command(epilog="Example: labelfleet suite rf100.yaml")(suite)


def fuse(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs over the same images.")],
    out: Annotated[str, typer.Option(help="Where the fused run goes, any URL.")],
    name: Annotated[
        str,
        typer.Option(help="Its name; default: the runs' names, joined; 2xcells if both are cells."),
    ] = "",
    iou: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Boxes that overlap by more are one object.")
    ] = 0.55,
    weight: Annotated[
        list[float] | None, typer.Option(help="How much a run counts; one for each run, in order.")
    ] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="NAME=CLASS",
            help="A class name of a later run as the first run has it; NAME= leaves it out.",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Scores as they are, even where a calibration was fitted.")
    ] = False,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Make one run of several over the same images, by weighted boxes fusion.

    No GPU is needed. The same command continues a fusion, or adds what the runs labelled since;
    exits 3 while shards wait for one of them.
    """
    from pipelines.fusion.fuse import fuse_runs
    from pipelines.fusion.record import FuseOptions
    from pipelines.fusion.view import fuse_progress, fuse_table
    from storage.stores.open import open_store

    pairs = [one.partition("=") for one in map_ or ()]
    if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
        raise typer.BadParameter(f"{wrong[0]!r} is not NAME=CLASS", param_hint="--map")
    options = FuseOptions(
        name=name,
        iou=iou,
        weights=tuple(weight or ()),
        renamed={key: to for key, _, to in pairs},
        calibrated=not raw,
    )
    manifests = [open_manifest(run, endpoint_url) for run in runs]
    with fuse_progress() as progress:
        done = fuse_runs(
            manifests, open_store(out, storage_options(endpoint_url)), options, progress=progress
        )
    show(fuse_table(done), done.to_fields(), json_)
    raise typer.Exit(done.exit_code)


def compare(
    old: RunUrl,
    new: RunUrl,
    truth: Annotated[
        str | None, typer.Option(help="COCO ground truth, for the mAP of both.")
    ] = None,
    risk: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="Of a false alarm, over all looks.")
    ] = 0.01,
    pictures: Annotated[int, typer.Option(min=0, help="Images with the largest changes.")] = 12,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Compare two runs: two models on the same images, or two dates of one job.

    Writes a page with pictures, and the same as JSON, to report/ below the second run.
    """
    from pipelines.evaluation.compare import compare_runs
    from pipelines.report.comparison import comparison_table, write_comparison

    options = storage_options(endpoint_url)
    before, after = open_manifest(old, endpoint_url), open_manifest(new, endpoint_url)
    found = compare_runs(before, after, truth=truth, options=options, risk=risk, pictures=pictures)
    page = write_comparison(found, before, after, options)
    show(comparison_table(found, page), found.to_fields() | {"page": page}, json_)


def suite(
    config: ConfigPath,
    set_: Sets = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else a local Ray.")
    ] = None,
    json_: Json = False,
) -> None:
    """Measure many data sets in one go: train or take a model, label, compare with the truth.

    One table by data set and by domain. Run it again to continue: what is measured is not measured
    again. Exits 3 where a data set failed.
    """
    from pipelines.suite.config import load_suite_config

    loaded = load_suite_config(config, tuple(set_ or ()))  # before what takes seconds to import

    from pipelines.dispatch.progress import watching
    from pipelines.dispatch.stopping import stopping_on_signals
    from pipelines.dispatch.tally import Caller
    from pipelines.display.console import HarmlessConsole
    from pipelines.suite.run import run_suite
    from pipelines.suite.view import suite_table

    console = HarmlessConsole(stderr=True)
    with stopping_on_signals() as stopper, watching() as watcher:
        caller = Caller(watcher, stopper)
        done = run_suite(loaded, address=address, caller=caller, console=console)
    show(suite_table(done), done.to_fields(), json_)
    raise typer.Exit(done.exit_code)
