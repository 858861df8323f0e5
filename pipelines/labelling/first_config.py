"""Write a first config for a source, from a look at what it holds."""

from __future__ import annotations

import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import load_yaml, parse_config
from pipelines.display.plural import counted
from pipelines.labelling.first_model import FirstModel, as_given, first_model
from storage.coco.truth import read_truth
from storage.errors import ConfigError, SourceEmpty
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.records import printable
from storage.shards.selecting import classify
from storage.stores.open import open_store
from storage.urls import normalise_url, parse_url, readable

SCHEMA_NAME = "labelfleet-run.schema.json"
_AT_MOST = 100_000  # objects that are looked at
_COCO = re.compile(r"(.*/)?(_annotations\.coco|instances[^/]*)\.json|(.*/)?annotations/[^/]+\.json")
_YOLO = re.compile(r"(.*/)?(data|dataset)\.ya?ml")
_MOST_YAML_BYTES = 1 << 20
_MOST_CLASSES = 20  # named in a comment


@dataclass(slots=True)
class Survey:
    """What a source holds, as far as it was looked at.

    Attributes:
        url: normalised.
        suffixes: image files by suffix.
        tars: tar shards.
        others: files that are neither.
        more: whether there are objects that were not looked at.
        coco, yolo: keys of files that look like COCO ground truth, or like a YOLO data set's YAML.
        classes: names, from the ground truth given, or else from a YOLO data set's YAML.
    """

    url: str
    suffixes: Counter[str] = field(default_factory=Counter)
    tars: int = 0
    others: int = 0
    more: bool = False
    coco: list[str] = field(default_factory=list)
    yolo: list[str] = field(default_factory=list)
    classes: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Loose image files."""
        return self.suffixes.total()

    def sentence(self) -> str:
        """Describe it for people."""
        kinds = ", ".join(f"{n:,} {suffix}" for suffix, n in self.suffixes.most_common(5))
        parts = [f"{counted(self.images, 'image')} ({kinds})"] if self.images else []
        parts += [counted(self.tars, "tar shard")] if self.tars else []
        parts += [counted(self.others, "other file")] if self.others else []
        return ("at least " if self.more else "") + ", ".join(parts)


@dataclass(frozen=True, slots=True)
class FirstConfig:
    """A config as text; ``missing``: what is left to do before it runs."""

    name: str
    text: str
    found: str
    missing: tuple[str, ...]


def first_config(
    source: str,
    *,
    checkpoint: str | None = None,
    truth: str | None = None,
    options: StorageOptions | None = None,
) -> FirstConfig:
    """Look at a source, a checkpoint and ground truth, and write a config that labels the source.

    Args:
        source: a folder or a URL prefix.
        checkpoint: weights or an ONNX graph, any URL; None: the config names a file that is to be
            filled in.
        truth: COCO ground truth, any URL, for class names and a command that measures the run.
        options: how S3 is reached.

    Raises:
        SourceEmpty: the source holds no image and no tar.
        LabelfleetError: source, checkpoint or truth cannot be read.
    """
    options = options or StorageOptions()
    store = open_store(source, options)
    next(iter(store.list()), None)  # fail on a missing source before truth and weights are read
    categories = read_truth(truth, options).categories if truth is not None else {}
    survey = survey_source(source, options)
    if categories:
        survey.classes = tuple(categories[key] for key in sorted(categories))
    model, name = first_model(checkpoint, options, survey.classes), name_of(source)
    fields: dict[str, Any] = {
        "name": name,
        "source": {"url": as_given(source, survey.url)},
        "output": _output(survey.url, name),
        "model": model.fields,
    }
    if options.endpoint_url is not None:
        fields["storage"] = {"endpoint_url": options.endpoint_url}
    text = "\n".join(_lines(fields, survey, model, truth)) + "\n"
    parse_config(RunConfig, load_yaml(text.encode(), name), where="the config that was written")
    return FirstConfig(name, text, survey.sentence(), model.missing)


def survey_source(source: str, options: StorageOptions) -> Survey:
    """Count what lies at a source, up to 100,000 objects; nothing is opened but a data.yaml."""
    store = open_store(source, options)
    survey = Survey(normalise_url(source))
    objects = store.list()
    for listed in itertools.islice(objects, _AT_MOST):
        kind, key = classify(listed.key), printable(listed.key)
        if kind == "tar":
            survey.tars += 1
        elif kind == "image":
            survey.suffixes[key.rpartition(".")[2].lower()] += 1
        else:
            survey.others += 1
            survey.coco += [key] if _COCO.fullmatch(key) else []
            survey.yolo += [key] if _YOLO.fullmatch(key) else []
    survey.more = next(iter(objects), None) is not None
    if not survey.images and not survey.tars:
        there = f", only {counted(survey.others, 'other file')}" if survey.others else ""
        raise SourceEmpty(
            f"no image and no tar shard at {survey.url}{there}",
            hint="name the folder or prefix that holds them",
        )
    if survey.yolo:
        survey.classes = _yolo_names(store, survey.yolo[0])
    return survey


def _yolo_names(store: ObjectStore, key: str) -> tuple[str, ...]:
    """Read the class names of a Roboflow or Ultralytics data set; () for any other file."""
    if store.head(key).nbytes > _MOST_YAML_BYTES:
        return ()
    try:
        said = load_yaml(store.get(key), key)
    except ConfigError:
        return ()
    names = said.get("names") if isinstance(said, dict) else None
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=_position)]
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _position(key: object) -> int:
    return int(str(key)) if str(key).isdigit() else 0


def name_of(source: str) -> str:
    """Return a run's name for a source: the last part of its path."""
    url = normalise_url(source)
    last = next((part for part in reversed(parse_url(url).path.split("/")) if part), "labels")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")
    return name[:100] or "labels"


def _output(url: str, name: str) -> str:
    """Return a place that does not overlap the source."""
    if parse_url(url).scheme != "file":
        above, _, last = url.rstrip("/").rpartition("/")
        return f"{above}/{last}-labels" if above.count("/") > 2 else f"runs/{name}"
    source = Path(parse_url(url).path)
    inside = Path.cwd() == source or source in Path.cwd().parents
    return str(source.parent / f"{source.name or name}-labels") if inside else f"runs/{name}"


def _lines(
    fields: dict[str, Any], survey: Survey, model: FirstModel, truth: str | None
) -> Iterator[str]:
    name = fields["name"]
    yield f"# yaml-language-server: $schema={SCHEMA_NAME}"
    yield "# Written by `labelfleet init`. Next: `labelfleet plan FILE`, then `labelfleet run`."
    yield "# Every field is described in docs/configuration.md."
    yield from (f"# TO DO: {what}" for what in model.missing)
    yield from ("", *_entry("name", name), "", f"# {survey.sentence()}")
    yield from ("source:", *_entry("url", fields["source"]["url"], 1))
    yield from ("", "# Parquet annotations and label versions; may not lie inside the source.")
    yield from _entry("output", fields["output"])
    yield from ("", "model:")
    for key, value in fields["model"].items():
        yield from _entry(key, value, 1)
    yield from (f"  # {comment}" for comment in model.comments)
    if survey.classes and "classes" not in fields["model"]:  # those of the checkpoint count
        first = ", the first of them" if len(survey.classes) > _MOST_CLASSES else ""
        names = _flow(survey.classes[:_MOST_CLASSES])
        yield f"  # the data set names {len(survey.classes)} classes{first}: {names}"
    if "storage" in fields:
        yield from ("", "storage:", *_entry("endpoint_url", fields["storage"]["endpoint_url"], 1))
    yield from ("", "# workers: {count: auto, gpus: auto, batch_size: auto}")
    yield from ("", "# Send uncertain images to people in Label Studio; off without this line:")
    yield f"# review: {{url: http://localhost:8080, project: {name}, budget: 500 images}}"
    for found in [truth] if truth else [f"{survey.url}/{key}" for key in survey.coco[:3]]:
        words = ["labelfleet", "evaluate", fields["output"], "--truth", found, "--allow-missing"]
        yield from ("", "# Measure the run against this ground truth:")
        # YAML breaks lines at more than newlines
        yield "#   " + readable(printable(shlex.join(words)))


def _entry(key: str, value: Any, depth: int = 0) -> list[str]:
    if isinstance(value, list):
        return [f"{'  ' * depth}{key}: {_flow(value)}"]
    dumped = yaml.safe_dump({key: value}, allow_unicode=True, width=10_000)
    return ["  " * depth + line for line in dumped.splitlines()]


def _flow(names: Sequence[str]) -> str:
    return yaml.safe_dump(
        list(names), default_flow_style=True, allow_unicode=True, width=10_000
    ).strip()
