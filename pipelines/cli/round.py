"""`round` and `card` on the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.common import Endpoint, Json, show, storage_options


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(
        "round",
        epilog="Examples: labelfleet round cells-round.yaml; on a machine with GPUs "
        "labelfleet round cells-round.yaml --only student; once more with other labels "
        "labelfleet round cells-round.yaml --again decide",
    )(round_)
    app.command(epilog="Example: labelfleet card runs/cells/student/cells.safetensors")(card)


def round_(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Round config: YAML, any URL.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a field: review.wait=false"),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="STEP", help="Take this step alone, on this machine.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="STEP", help="Take the steps up to this one.")
    ] = None,
    again: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STEP",
            help="Repeat this step, and later ones whose inputs change by it; repeatable.",
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else a local Ray.")
    ] = None,
    json_: Json = False,
) -> None:
    """Train a student on labels of its teacher, and say whether it won. Run it again to continue.

    Steps: teacher, gate, label, fit, route, push, pull, decide, student, evaluate, compile, page.
    What is done is not repeated. Exits 5 while reviewers are not done.
    """
    from pipelines.rounds.round_config import load_round_config

    loaded = load_round_config(config, tuple(set_ or ()))  # before what takes seconds to import

    from pipelines.dispatch.progress import watching
    from pipelines.dispatch.stopping import stopping_on_signals
    from pipelines.dispatch.tally import Caller
    from pipelines.display.console import HarmlessConsole
    from pipelines.rounds.round import run_round, selection_of
    from pipelines.rounds.view import round_table

    selection = selection_of(only, until, again or ())
    with stopping_on_signals() as stopper, watching() as watcher:
        summary = run_round(
            loaded, selection, address=address, caller=Caller(watcher, stopper),
            console=HarmlessConsole(stderr=True),
        )  # fmt: skip
    show(round_table(summary), summary.to_fields(), json_)


def card(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of `train` or `round`, any URL.")],
    out: Annotated[
        str | None, typer.Option(help="Where to write it, any URL; default: print it.")
    ] = None,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Print a model card in Hugging Face's format from what a checkpoint says about itself."""
    from pipelines.exports.model_card import model_card, read_card_facts
    from storage.stores.open import open_object

    options = storage_options(endpoint_url)
    facts = read_card_facts(checkpoint, options)
    text = model_card(facts)
    if out is not None:
        store, key = open_object(out, options)
        store.put(key, text.encode())
    show(text.rstrip() if out is None else f"card: {out}", {**facts.to_fields(), "out": out}, json_)
