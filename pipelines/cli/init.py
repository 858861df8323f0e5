"""``labelfleet init`` and ``labelfleet schema`` on the command line."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.common import Endpoint, Json, show, storage_options
from pipelines.display.streams import printing


def register(app: typer.Typer) -> None:
    """Add the commands of this page."""
    app.command(epilog="Example: labelfleet init photos/ --checkpoint cells.pth")(init)
    app.command(epilog="Example: labelfleet schema run > labelfleet-run.schema.json")(schema)


def init(
    source: Annotated[str, typer.Argument(help="Folder or URL of images or tar shards.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="YOLO-NAS weights (.pth, .pt, .safetensors) or another family's .onnx, any URL."
        ),
    ] = None,
    truth: Annotated[str | None, typer.Option(help="COCO ground truth, any URL.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The config to write; default: the source's name, here.")
    ] = None,
    endpoint_url: Endpoint = None,
    json_: Json = False,
) -> None:
    """Look at a source and write a commented config for it. An existing file is left alone."""
    from pipelines.labelling.first_config import SCHEMA_NAME, first_config, name_of
    from storage.errors import ConfigError

    path = out or Path(f"{name_of(source)}.yaml")
    if path.exists():  # before anything is listed or read
        raise ConfigError(f"{path} is there already", hint="name another file: --out NAME.yaml")
    made = first_config(
        source, checkpoint=checkpoint, truth=truth, options=storage_options(endpoint_url)
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(made.text)
        (path.parent / SCHEMA_NAME).write_text(schema_of("run"), encoding="utf-8")
    except FileExistsError:
        raise ConfigError(
            f"{path} is there already", hint="name another file: --out NAME.yaml"
        ) from None
    except OSError as exc:
        raise ConfigError(
            f"{path} cannot be written: {exc.strerror}",
            hint="name a file in a folder that is there and yours to write: --out NAME.yaml",
        ) from exc
    told = [f"found: {made.found}", f"written: {path}", *(f"fill in {m}" for m in made.missing)]
    told.append("next: " + shlex.join(["labelfleet", "plan", str(path)]))
    fields = {"config": str(path), "found": made.found, "missing": list(made.missing)}
    show("\n".join(told), fields, json_)


def schema(
    kind: Annotated[str, typer.Argument(metavar="run|train", help="Which YAML file.")] = "run",
) -> None:
    """Print the JSON Schema of a YAML file, so that editors can complete and check it."""
    if kind not in ("run", "train"):
        raise typer.BadParameter("it is run or train", param_hint="KIND")
    with printing():
        sys.stdout.write(schema_of(kind))


def schema_of(kind: str) -> str:
    """Return the JSON Schema of ``run`` or ``train`` configs."""
    from pipelines.config.json_schema import schema_text
    from pipelines.config.run_config import RunConfig
    from pipelines.training.config import TrainConfig

    model = RunConfig if kind == "run" else TrainConfig
    return schema_text(model, f"labelfleet {kind} config")
