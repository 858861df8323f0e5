"""The command line: parse, load the config, call. No logic, and no heavy imports at start."""

from __future__ import annotations

import difflib
import errno
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from pipelines.cli import browse as cli_browse
from pipelines.cli import combine as cli_combine
from pipelines.cli import init as cli_init
from pipelines.cli import labels as cli_labels
from pipelines.cli import review as cli_review
from pipelines.cli import round as cli_round
from pipelines.cli import submit as cli_submit
from pipelines.cli import upkeep as cli_upkeep
from pipelines.cli.common import (
    ConfigPath,
    Endpoint,
    Json,
    RunUrl,
    Sets,
    Strict,
    open_manifest,
    show,
    storage_options,
)
from pipelines.cli.lazy import built, lazy_group
from pipelines.dispatch.stopping import keeping_signal_handlers
from pipelines.display.streams import flushed, open_closed_streams, printing, unprinted
from pipelines.display.terminal import harmless
from storage.errors import Interrupted, LabelfleetError
from storage.extras import not_installed
from storage.logs import VARIABLE, log_format, set_up_logging
from storage.objects.os_errors import no_room
from storage.urls import unsigned
from workers.local_folders import cache_folder

_NEAR = 0.75  # of difflib's 1: `relocat` is near `relocate`, `frobnicate` is not


class _Commands(TyperGroup):
    """Say how to continue after Ctrl-C, and suggest only commands that are near a typo."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        self.suggest_commands = False  # Typer's own suggestions are far-fetched
        try:
            name, command, rest = super().resolve_command(ctx, args)
            return name, built(command), rest
        except typer.TyperException as exc:
            near = difflib.get_close_matches(args[0], list(self.commands), 3, _NEAR)
            if near:
                names = ", ".join(repr(name) for name in near)
                exc.message = f"{exc.message.rstrip('.')}. Did you mean {names}?"
            raise

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted", hint="run the same command to continue") from None


_END_WITHIN_S = 5.0

app = typer.Typer(
    name="labelfleet",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich draws panels, and takes three times as long as everything else
    context_settings={"max_content_width": 100},
    help="Label image collections too large to label by hand.\n\n"
    "YOLO-NAS on Ray, from object storage to Parquet annotations.",
    epilog="Add --debug to any command for the traceback behind an error, --log-format json for "
    "machine-readable logs.",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        with printing():
            sys.stdout.write(f"labelfleet {version('labelfleet')}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Handle the options before any command; the program's help is above."""


@app.command(epilog="Example: labelfleet run cells.yaml --set workers.batch_size=4")
def run(
    config: ConfigPath,
    set_: Sets = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many shards in this invocation.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else a local Ray.")
    ] = None,
    strict: Strict = False,
    accept_drop: Annotated[
        bool,
        typer.Option("--accept-drop", help="Go on where more is gone than source.max_drop."),
    ] = False,
    json_: Json = False,
) -> None:
    """Label a source. Run it again to continue, or to label what was added since."""
    from pipelines.config.run_config import load_config

    drop = ("source.max_drop=1",) if accept_drop else ()
    loaded = load_config(config, (*(set_ or ()), *drop))  # before what takes seconds to import

    from pipelines.dispatch.progress import watching
    from pipelines.dispatch.stopping import stopping_on_signals
    from pipelines.dispatch.tally import Caller
    from pipelines.labelling.run import label_run
    from pipelines.labelling.view import run_table

    with stopping_on_signals() as stopper, watching() as watcher:
        caller = Caller(watcher, stopper)
        summary = label_run(loaded, address=address, limit=limit, strict=strict, caller=caller)
    show(run_table(summary), summary.to_fields(), json_)
    raise typer.Exit(summary.exit_code)


@app.command(epilog="Example: labelfleet plan cells.yaml")
def plan(
    config: ConfigPath,
    set_: Sets = None,
    like: Annotated[
        str | None,
        typer.Option(help="A measured run whose pace counts while this one has none."),
    ] = None,
    json_: Json = False,
) -> None:
    """Estimate a run: shards, images, GiB, hours and cost. Writes nothing."""
    from pipelines.config.run_config import load_config
    from pipelines.labelling.plan import plan_run
    from pipelines.labelling.view import plan_table
    from storage.runs.manifest import Manifest

    loaded = load_config(config, tuple(set_ or ()))
    measured = None if like is None else Manifest.open(like, loaded.storage.options())
    planned = plan_run(loaded, measured)
    show(plan_table(planned), planned.to_fields(), json_)
    raise typer.Exit(planned.exit_code)


@app.command(epilog="Example: labelfleet status s3://plates/labels/blood-cells")
def status(run: RunUrl, endpoint_url: Endpoint = None, json_: Json = False) -> None:
    """Show a run's progress, running or ended, from any machine that can read its output."""
    from pipelines.runs.status import run_status, status_table

    found = run_status(open_manifest(run, endpoint_url))
    show(status_table(found), found.to_fields(), json_)


@app.command(epilog="Example: labelfleet evaluate runs/cells --truth instances.json")
def evaluate(
    run: RunUrl,
    truth: Annotated[str, typer.Option(help="COCO ground truth: JSON, any URL.")],
    allow_missing: Annotated[
        bool, typer.Option(help="Leave out truth images that the run has no row for.")
    ] = False,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Measure a run against COCO ground truth: mAP, AR, calibration, error types."""
    from pipelines.evaluation.evaluate import evaluate_run
    from pipelines.evaluation.result import evaluation_table
    from pipelines.policy.choose import choose_policy

    manifest, options = open_manifest(run, endpoint_url), storage_options(endpoint_url)
    result = evaluate_run(
        manifest,
        truth,
        options=options,
        allow_missing=allow_missing,
        policy=choose_policy(manifest, None, None, None, options),
    )
    show(evaluation_table(result), result.to_fields(), json_)


@app.command(epilog="Example: labelfleet report runs/cells --truth instances.json")
def report(
    run: RunUrl,
    truth: Annotated[
        str | None, typer.Option(help="COCO ground truth, for an evaluation section.")
    ] = None,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Write the run's report with pictures. One self-contained HTML page."""
    from pipelines.evaluation.evaluate import evaluate_run
    from pipelines.policy.choose import choose_policy
    from pipelines.report.page import write_report

    manifest, options = open_manifest(run, endpoint_url), storage_options(endpoint_url)
    policy = choose_policy(manifest, None, None, None, options) if truth else None
    measured = evaluate_run(manifest, truth, options=options, policy=policy) if truth else None
    url = write_report(manifest, source_options=options, evaluation=measured, policy=policy)
    show(f"report: {url}", {"report": url}, json_)


@app.command(epilog="Example: labelfleet ingest unlabeled2017.zip s3://plates/shards")
def ingest(
    source: Annotated[str, typer.Argument(help="Folder, .zip, or a text/CSV list of URLs.")],
    dest: Annotated[str, typer.Argument(help="Where the tar shards go: any URL.")],
    shard_size: Annotated[int, typer.Option(min=1, help="Images a shard, at most.")] = 1000,
    shard_mib: Annotated[int, typer.Option(min=1, help="MiB a shard, at most.")] = 256,
    skip_unreachable: Annotated[
        bool,
        typer.Option(
            "--skip-unreachable",
            help="Set aside what no server answers for; tried again next time.",
        ),
    ] = False,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Pack images into tar shards, byte for byte. Run it again to continue."""
    from pipelines.ingest.ingest import ingest as ingest_images
    from pipelines.ingest.view import ingest_progress, ingest_table

    with ingest_progress() as progress:
        summary = ingest_images(
            source,
            dest,
            options=storage_options(endpoint_url),
            images_per_shard=shard_size,
            shard_bytes=shard_mib * 1024 * 1024,
            skip_unreachable=skip_unreachable,
            progress=progress,
        )
    show(ingest_table(summary), summary.to_fields(), json_)
    raise typer.Exit(summary.exit_code)


@app.command(epilog="Example: labelfleet train examples/digits/train.yaml")
def train(
    config: ConfigPath,
    set_: Sets = None,
    accept_data: Annotated[
        bool,
        typer.Option(
            "--accept-data",
            help="Continue a stopped training although its annotations or images changed.",
        ),
    ] = False,
    extend: Annotated[
        int | None,
        typer.Option(min=1, metavar="STEPS", help="Give a finished training more steps."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster of its `workers`; default: RAY_ADDRESS, else a local Ray."),
    ] = None,
    json_: Json = False,
) -> None:
    """Train a YOLO-NAS on a COCO-format data set, here or on a Ray cluster's workers."""
    from pipelines.training.config import load_train_config

    loaded = load_train_config(config, tuple(set_ or ()))  # before what takes seconds to import

    from pipelines.dispatch.stopping import stopping_on_signals
    from pipelines.display.console import HarmlessConsole
    from pipelines.training.run import train as train_model
    from pipelines.training.summary import training_table

    with stopping_on_signals() as stopper:
        summary = train_model(
            loaded,
            console=HarmlessConsole(stderr=True),
            stopper=stopper,
            accept_data=accept_data,
            more_steps=extend,
            address=address,
        )
    show(training_table(summary), summary.to_fields(), json_)


@app.command("compile", epilog="Example: labelfleet compile cells.yaml --set model.precision=int8")
def compile_(
    config: ConfigPath,
    truth: Annotated[
        str | None,
        typer.Option(help="COCO ground truth of images in the source, to measure int8 on."),
    ] = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Compile the model for its runtime, once; `run` does so when it has not been done."""
    from pipelines.display.console import say
    from pipelines.models.compile import compile_from_file
    from pipelines.models.view import compiled_table

    summary = compile_from_file(config, tuple(set_ or ()), truth, say)
    show(compiled_table(summary), summary.to_fields(), json_)


@app.command(epilog="Example: labelfleet gate cells.yaml --truth val.json --min-map 0.4")
def gate(
    config: ConfigPath,
    truth: Annotated[
        str | None,
        typer.Option(help="COCO ground truth of images in the source; default: gate.truth."),
    ] = None,
    min_map: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="mAP to reach, 0 to 1; default: gate.min_map."),
    ] = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Measure the model on labelled images; exit 4 below the mark, with the likely cause."""
    from pipelines.display.console import say
    from pipelines.evaluation.gate import gate_table
    from pipelines.labelling.exit_codes import BELOW_THE_MARK
    from pipelines.models.gate_trials import gate_from_file

    result = gate_from_file(config, tuple(set_ or ()), truth, min_map, say)
    show(gate_table(result), result.to_fields(), json_)
    raise typer.Exit(0 if result.passed else BELOW_THE_MARK)


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Argument(help="Also check this run config's storage and model.")
    ] = None,
    json_: Json = False,
) -> None:
    """Check what is installed and works here, and how to fix what does not."""
    from pipelines.doctor.examine import examine, findings_table

    findings = examine(config)
    show(findings_table(findings), findings.to_fields(), json_)
    raise typer.Exit(0 if findings.healthy else 1)


@app.command(epilog="Example: labelfleet demo runs/demo")
def demo(
    dest: Annotated[Path, typer.Argument(help="A folder for everything it makes.")] = Path(
        "runs/demo"
    ),
    json_: Json = False,
) -> None:
    """Label 300 pages of handwritten digits. Makes them, measures it, writes the report."""
    from pipelines.demo.run import demo_text, run_demo
    from pipelines.dispatch.progress import watching
    from pipelines.dispatch.stopping import stopping_on_signals
    from pipelines.dispatch.tally import Caller

    with stopping_on_signals() as stopper, watching() as watcher:
        summary = run_demo(dest, caller=Caller(watcher, stopper))
    show(demo_text(summary), summary.to_fields(), json_)


cli_init.register(app)
cli_submit.register(app)
cli_review.register(app)
cli_labels.register(app)
cli_round.register(app)
cli_combine.register(app)
cli_browse.register(app)
cli_upkeep.register(app)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the console script; every error becomes a readable line and an exit code."""
    if arguments is not None:
        with keeping_signal_handlers():
            _main(arguments)
    open_closed_streams()
    with _ending_in_time():
        _main(sys.argv[1:])


def _main(given: list[str]) -> NoReturn:
    debug = "--debug" in given
    given = _take_log_format([argument for argument in given if argument != "--debug"])
    set_up_logging(log_format(), clean=harmless)
    # supervision imports matplotlib, which would make a folder in the user's configuration.
    with suppress(RuntimeError):  # a user without a home folder
        os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))
    if debug:  # ours only: botocore and httpx would log credentials and whole webhook URLs
        logging.getLogger("labelfleet").setLevel(logging.DEBUG)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same clean-up as Ctrl-C
    try:
        # Not standalone: Typer then returns the code of an Exit, and raises everything else.
        code = lazy_group(app)(given, standalone_mode=False, prog_name="labelfleet")
        _leave(code if isinstance(code, int) else 0)
    except SystemExit as exc:  # rich and Typer raise it too, where the reader of a pipe is gone
        _leave(exc.code if isinstance(exc.code, int) else int(exc.code is not None))
    except typer.TyperException as exc:
        _usage(exc, given)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", "run the same command to continue", 130, given)
    except LabelfleetError as exc:
        if debug:
            logging.exception("the traceback behind the error")
        _fail(exc.message, exc.hint, exc.exit_code, given)
    except Exception as exc:  # the process border: print a line, not a traceback
        if debug:
            logging.exception("the traceback behind the error")
        known = _cause_outside(exc)
        if known is not None:
            _fail(known.message, known.hint, known.exit_code, given)
        hint = "this is a bug of labelfleet: run again with --debug and report the traceback"
        # A foreign client's message may hold a signed URL.
        _fail(unsigned(f"{type(exc).__name__}: {exc}"), hint, 1, given)


def _cause_outside(exc: Exception) -> LabelfleetError | None:
    """Return what an error of the installation or of this machine's disks means."""
    if isinstance(exc, ModuleNotFoundError):
        return not_installed(exc)
    return no_room(exc) if isinstance(exc, OSError) else None


def _take_log_format(given: list[str]) -> list[str]:
    """Copy ``--log-format json``, given anywhere, to the environment, where workers find it too."""
    for at, argument in enumerate(given):
        name, equals, value = argument.partition("=")
        if name == "--log-format":
            value = value if equals else "".join(given[at + 1 : at + 2])
            rest = given[:at] + given[at + (1 if equals else 2) :]
            if value not in ("text", "json"):
                _fail(f"--log-format {value}: it is text or json", None, 2, rest)
            os.environ[VARIABLE] = value
            return rest
    return given


def _usage(exc: typer.TyperException, given: list[str]) -> NoReturn:
    """Report a wrong command, option or argument; print the help where there are none."""
    message = exc.format_message()
    if message.startswith("Usage: "):  # called without arguments: the message is the help
        with suppress(OSError):
            sys.stdout.write(message + "\n")
        _leave(2)
    command = getattr(getattr(exc, "ctx", None), "command_path", "labelfleet")
    _fail(message, f"see `{command} --help`", 2, given)


def _fail(message: str, hint: str | None, code: int, given: list[str]) -> NoReturn:
    _ignore_signals()
    _say_error(message, hint, code)
    if "--json" in given:
        with suppress(OSError):  # the code tells
            sys.stdout.write(json.dumps({"error": message, "hint": hint, "exit_code": code}) + "\n")
    _leave(code)


def _ignore_signals() -> None:
    """Let a second Ctrl-C or SIGTERM cut short neither the message nor the end: both take seconds
    at most, and the exit code is that of the first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _say_error(message: str, hint: str | None, code: int) -> None:
    if log_format() == "json":
        logging.getLogger("labelfleet").error(message, extra={"hint": hint, "exit_code": code})
        return
    from rich.text import Text

    from pipelines.display.console import HarmlessConsole

    said = Text.assemble(("error:", "bold red"), " ", message)
    if hint:
        said.append("\n  -> ", "dim").append(hint)
    # With a full disk or a closed pipe behind stderr, where rich ends the process, the code tells.
    with suppress(OSError, SystemExit):
        HarmlessConsole(stderr=True).print(said, soft_wrap=True)


def _leave(code: int) -> NoReturn:
    lost = flushed(sys.stdout)
    if lost is not None and code == 0:
        code = 1
        if lost.errno != errno.EPIPE:  # the reader of a pipe may stop early, as `head` does
            said = unprinted(lost)
            _say_error(said.message, said.hint, code)
    flushed(sys.stderr)
    raise SystemExit(code)


@contextmanager
def _ending_in_time() -> Iterator[None]:
    """Bound the end of a process that failed or was stopped: Python waits for its threads, and
    one may wait for a server that never answers."""

    def end_at_last(code: int) -> None:
        time.sleep(_END_WITHIN_S)
        os._exit(code)

    try:
        yield
    except SystemExit as exc:
        if isinstance(exc.code, int) and exc.code:
            _ignore_signals()
            threading.Thread(target=end_at_last, args=(exc.code,), daemon=True).start()
        raise


if __name__ == "__main__":
    main()
