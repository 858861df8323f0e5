"""Shared by the commands: options, opening a run, and showing a result."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from pipelines.display.streams import printing

Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="Run config: YAML, any URL.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field: model.score_floor=0.1"),
]
RunUrl = Annotated[str, typer.Argument(metavar="RUN", help="A run's output URL.")]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Exit 3 for any shard or image left out; for schedulers."),
]
Endpoint = Annotated[
    str | None,
    typer.Option("--endpoint-url", help="S3-compatible server; default: AWS_ENDPOINT_URL or AWS."),
]
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
Alone = Annotated[
    bool, typer.Option("--alone", help="Leave out the answers of the project's other runs.")
]


def storage_options(endpoint_url: str | None) -> Any:
    """Return the StorageOptions for a command's --endpoint-url."""
    from storage.errors import ConfigError
    from storage.objects.protocols import StorageOptions
    from storage.urls import has_credentials

    if endpoint_url and has_credentials(endpoint_url):
        raise ConfigError(
            "--endpoint-url has credentials in it",
            hint="put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
        )
    return StorageOptions(endpoint_url=endpoint_url)


def open_manifest(run: str, endpoint_url: str | None) -> Any:
    """Open the run at a URL. Raises ConfigError when there is none."""
    from storage.errors import ConfigError
    from storage.runs.manifest import Manifest

    options = storage_options(endpoint_url)
    try:
        return Manifest.open(run, options)
    except ConfigError as exc:
        if "no run at" not in exc.message:
            raise
        if run.lower().endswith((".yaml", ".yml")):
            raise _not_a_run(run) from exc
        other = _of_another_command(run, options)
        if other is None:
            raise
        raise other from exc


# What another command leaves, by an object of it: what it is, and where to look instead.
_OTHER_OUTPUTS = (
    ("state/teacher.json", "the output of a round",
     "its page is {0}/round.html, and its run over the pool is {0}/label"),
    ("run/run.json", "the folder of a demo or of a suite's data set", "give its run: {0}/run"),
    ("summary.json", "the output of a training", "its figures are in {0}/summary.json"),
    ("suite.json", "the output of a suite", "its figures are in {0}/suite.json"),
)  # fmt: skip


def _of_another_command(url: str, options: Any) -> Exception | None:
    """Return the error for the output of another command given in place of a run's; None: it is
    none that is known."""
    from storage.errors import ConfigError, StorageError
    from storage.stores.open import open_store

    store = open_store(url, options)
    for key, what, instead in _OTHER_OUTPUTS:
        try:
            store.head(key)
        except StorageError:
            continue
        place = url.rstrip("/")
        return ConfigError(
            f"{place} is {what}, and this command takes a run's output",
            hint=instead.format(place),
        )
    return None


def _not_a_run(config: str) -> Exception:
    """Return the error for a config given in place of a run; it names the run's output."""
    from pipelines.config.yaml_files import read_yaml
    from storage.errors import ConfigError, LabelfleetError

    try:
        output = read_yaml(config).get("output")
    except LabelfleetError:
        output = None
    return ConfigError(
        f"{config} is a config, and this command takes a run's output",
        hint=f"give {output}" if isinstance(output, str) else "give the `output` of the run",
    )


def show(rendered: Any, fields: dict[str, Any], as_json: bool) -> None:
    """Print one JSON line on stdout, or the rendered view for people.

    Raises:
        LabelfleetError: stdout cannot be written, such as a file on a full disk.
    """
    with printing():
        if as_json:
            sys.stdout.write(json.dumps(fields) + "\n")
            sys.stdout.flush()
            return
        from pipelines.display.console import (
            HarmlessConsole,  # importing it would double the time of `--help`
        )

        # A bare string is plain text: brackets in a URL are not markup, and no line is broken at
        # the terminal's width, since it may be a path, a command or a line of a model card.
        plain = isinstance(rendered, str)
        HarmlessConsole().print(rendered, markup=not plain, soft_wrap=plain, crop=False)
