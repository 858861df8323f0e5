"""Pack what travels with a submitted job: its config and the local files that it names."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.cluster.secrets import MOUNT_IT, refuse_secrets, secret_in
from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import apply_override, overridden_yaml, parse_config
from storage.errors import ConfigError
from storage.urls import normalise_url, parse_url, shown_url

CONFIG_NAME = "run.yaml"
# Ray refuses packages of 500 MiB; compression saves nothing on weights.
MAX_BYTES = 400 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class BundleKind:
    """What can be submitted: a run, a training or a round.

    Attributes:
        command: of labelfleet, which the job starts with the config.
        parse: checks the fields of a config; the second argument names it in messages.
        files: keys that name one file each; what lies at a path here is copied into the working
            directory. A number in a key counts in a list.
        folders: keys of what stays where it is: the cluster must see it (or refuses, naming the
            nodes).
    """

    command: str
    parse: Callable[[dict[str, Any], str], Any]
    files: Callable[[Mapping[str, Any]], Sequence[str]]
    folders: Callable[[Mapping[str, Any]], Sequence[str]]


RUN = BundleKind(
    command="run",
    parse=lambda fields, where: parse_config(RunConfig, fields, where=where),
    files=lambda _: (
        *("source.keys", "model.checkpoint", "model.arch", "policy"),
        *("review.gold_truth", "gate.truth"),
    ),
    folders=lambda _: ("source.url", "output"),
)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A run, a training or a round, ready to be submitted.

    Attributes:
        config: parsed, as the job will see it.
        fields: the same as a mapping, paths rewritten: what is written to CONFIG_NAME.
        files: name in the working directory -> local file.
        url: where the job reads its config from itself; None: it is in the working directory.
        digest: 16 hex of sha256 over the fields and the contents of the files: whether two
            bundles mean the same.
    """

    config: Any
    fields: Mapping[str, Any]
    files: Mapping[str, Path]
    url: str | None
    digest: str
    command: str = RUN.command

    @property
    def output(self) -> str:
        """The URL of the output."""
        return normalise_url(str(_get(self.fields, "output")))

    def write(self, folder: Path) -> None:
        """Lay out the working directory. Nothing is written for a config at a URL."""
        if self.url is not None:
            return
        for name, path in self.files.items():
            shutil.copyfile(path, folder / name)
        text = yaml.safe_dump(dict(self.fields), sort_keys=False, allow_unicode=True)
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def bundle_run(
    path: str,
    overrides: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    kind: BundleKind = RUN,
) -> Bundle:
    """Read and check a config as its command does, and find the local files it needs.

    Args:
        path: of the config: a local one is packed, one at a URL is read again by the job.
        overrides: ``key=value`` texts of --set.
        environment: variables of the job, only checked here.
        kind: what the config is of.

    Raises:
        ConfigError: it cannot be used, holds a secret, or names files that cannot travel.
    """
    remote = parse_url(path).scheme != "file"
    secret = secret_in(path) if remote else None
    if secret is not None:  # its URL is in the job's command
        raise ConfigError(f"the config's own URL is {secret}", hint=MOUNT_IT)
    fields = overridden_yaml(path, overrides)
    config = kind.parse(fields, path)
    # What the job reads by itself does not travel; what --set adds to it does.
    refuse_secrets(_overridden(overrides) if remote else fields, environment or {})
    files = {} if remote else _pack(fields, kind)
    if remote:
        _refuse_relative(fields, path, kind)
    url = normalise_url(path) if remote else None
    return Bundle(config, fields, files, url, _digest(fields, files), kind.command)


def _digest(fields: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    contents = {}
    for name, path in files.items():
        with path.open("rb") as file:
            contents[name] = hashlib.file_digest(file, "sha256").hexdigest()
    stable = json.dumps([fields, contents], sort_keys=True, default=str).encode()
    return hashlib.sha256(stable).hexdigest()[:16]


def _overridden(overrides: tuple[str, ...]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for override in overrides:
        apply_override(fields, override)
    return fields


def _pack(fields: dict[str, Any], kind: BundleKind) -> dict[str, Path]:
    """Return local files by their name in the job's folder, and rewrite ``fields`` to name that."""
    files: dict[str, Path] = {}
    for key in kind.files(fields):
        path = _local(fields, key)
        if path is None:
            continue
        if path.is_file():
            name = f"{key}-{path.name}"  # two of them may be called the same
            files[name] = path
            _set(fields, key, name)
        elif not _is_absolute(str(_get(fields, key))):
            raise ConfigError(
                f"{key}: there is no file {path}", hint="it was looked for in this folder"
            )
    for key in kind.folders(fields):
        if _local(fields, key) is not None:
            _set(fields, key, normalise_url(str(_get(fields, key))))
    nbytes = sum(path.stat().st_size for path in files.values())
    if nbytes > MAX_BYTES:
        raise ConfigError(
            f"the files that the config names have {nbytes / 2**20:,.0f} MiB, and at most "
            f"{MAX_BYTES / 2**20:,.0f} travel with a job",
            hint="put the checkpoint into object storage and name its URL",
        )
    return files


def _refuse_relative(fields: dict[str, Any], path: str, kind: BundleKind) -> None:
    for key in (*kind.files(fields), *kind.folders(fields)):
        value = _get(fields, key)
        if _local(fields, key) is not None and not _is_absolute(str(value)):
            raise ConfigError(
                f"{shown_url(path)}: {key} is the relative path {value!r}, and the job's folder "
                "has nothing in it",
                hint="name a URL there, or submit a local copy of the config: then the file "
                "travels with it",
            )


def _local(fields: Mapping[str, Any], key: str) -> Path | None:
    """Return the local path that a key names; None for a URL, or for no value."""
    value = _get(fields, key)
    if not isinstance(value, str):
        return None
    place = parse_url(value)
    return Path(place.path) if place.scheme == "file" else None


def _is_absolute(value: str) -> bool:
    return value.startswith(("/", "file:"))


def _get(fields: Mapping[str, Any], key: str) -> Any:
    at: Any = fields
    for part in key.split("."):
        if isinstance(at, list):
            at = at[int(part)]
        else:
            at = at.get(part) if isinstance(at, Mapping) else None
    return at


def _set(fields: dict[str, Any], key: str, value: str) -> None:
    *parents, last = key.split(".")
    at: Any = fields
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    at[int(last) if isinstance(at, list) else last] = value
