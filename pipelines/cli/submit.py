"""``labelfleet submit`` on the command line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Annotated, TextIO

import typer

from pipelines.cli.common import Json, Strict, show
from pipelines.display.terminal import harmless
from storage.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command of this page."""
    app.command(epilog="Example: labelfleet submit cells.yaml --address http://127.0.0.1:8265")(
        submit
    )


def submit(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="Run, training or round: YAML, any URL.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a field, as in `run`."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many shards in this invocation.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray's job server; default: RAY_ADDRESS, else http://127.0.0.1:8265."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="KEY=VALUE",
            help="For the job: a known setting, or a path on the nodes.",
        ),
    ] = None,
    strict: Strict = False,
    only: Annotated[
        str | None, typer.Option(metavar="STEP", help="Of a round: take this step alone.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="STEP", help="Of a round: the steps up to this one.")
    ] = None,
    again: Annotated[
        list[str] | None, typer.Option(metavar="STEP", help="Of a round: repeat this step.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow it, and end with its exit code.")
    ] = True,
    json_: Json = False,
) -> None:
    """Run, train or take a round on a Ray cluster. Again, it attaches until the job ends."""
    from pipelines.cluster.bundle import bundle_run
    from pipelines.cluster.follow import Listener
    from pipelines.cluster.submit import JobRequest, submit_run
    from pipelines.dispatch.stopping import stopping_on_signals
    from pipelines.rounds.submission import kind_of

    overrides, variables = tuple(set_ or ()), _variables(env or [])
    bundle = bundle_run(config, overrides, variables, kind_of(config, overrides))
    of_run, of_round = _of_run(limit, strict), _of_round(only, until, again)
    refuse_foreign(bundle.command, of_run, of_round)
    further = of_run + of_round
    if bundle.url is not None:  # else they are in the packed config
        further += [word for override in overrides for word in ("--set", override)]
    request = JobRequest(bundle, further, variables)
    with stopping_on_signals() as stopper:
        listener = Listener(
            note=lambda line: print(harmless(line), file=sys.stderr, flush=True),
            # The last line of stdout is for the JSON, if there is one: the output goes beside it.
            show=_writer(sys.stderr if json_ else sys.stdout),
            again=shlex.join(
                ["labelfleet", "submit", config, *given(set_, address, env), *of_run, *of_round]
            ),
            left=stopper.asked,
        )
        submitted = submit_run(request, listener, address=address, wait=wait)
    state = submitted.status.lower()
    ended = "" if submitted.exit_code is None else f" with exit code {submitted.exit_code}"
    show(f"{submitted.submission_id} {state}{ended}", submitted.to_fields(), json_)
    raise typer.Exit(submitted.exit_code or 0)


def _of_run(limit: int | None, strict: bool) -> list[str]:
    """Return the options that only `labelfleet run` has."""
    return [*(["--limit", str(limit)] if limit is not None else []), *["--strict"] * strict]


def _of_round(only: str | None, until: str | None, again: list[str] | None) -> list[str]:
    """Return the options that only `labelfleet round` has. Raises ConfigError."""
    from pipelines.rounds.state import refuse_unknown_steps

    refuse_unknown_steps(only, until, again or ())
    return [
        *(["--only", only] if only is not None else []),
        *(["--until", until] if until is not None else []),
        *(word for step in again or () for word in ("--again", step)),
    ]


def refuse_foreign(command: str, of_run: list[str], of_round: list[str]) -> None:
    """Raise ConfigError for options that the config's command does not have."""
    owner = {"run": "a run's", "train": "a training's", "round": "a round's"}[command]
    if of_run and command != "run":
        raise ConfigError(f"--limit and --strict are of runs, and this is {owner} config")
    if of_round and command != "round":
        raise ConfigError(f"--only, --until and --again are of rounds, and this is {owner} config")


def given(set_: list[str] | None, address: str | None, env: list[str] | None) -> list[str]:
    """Repeat the options: another name or output would be another run's job."""
    words = [word for text in set_ or () for word in ("--set", text)]
    words += ["--address", address] if address else []
    return words + [word for text in env or () for word in ("--env", text)]


def _writer(stream: TextIO) -> Callable[[str], None]:
    def write(text: str) -> None:
        stream.write(harmless(text))
        stream.flush()

    return write


def _variables(given: list[str]) -> dict[str, str]:
    variables = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier():
            raise ConfigError(f"--env {name!r}: NAME=value is expected")
        variables[name] = value
    return variables
