"""The labelled images of a round: split into a part to learn and a part to check on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.policy.fit import FOLDS
from pipelines.training.config import DataConfig
from storage.coco.truth import read_truth
from storage.errors import SourceEmpty

_CHECKED_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Labelled:
    """COCO sets: ``train`` is learned, ``val`` chooses checkpoints and fits thresholds."""

    train: DataConfig
    val: DataConfig


def labelled_sets(
    truth: DataConfig, val: DataConfig | None, work: Path, *, least: int = 1
) -> Labelled:
    """Return both sets; without ``val`` a part of the images of ``truth`` is set apart.

    That is a fifth of them, and of few images half, but no more than a fit needs. The split depends
    on the file names alone: every machine makes the same one, whatever the round skips.

    Args:
        truth: the labelled images.
        val: the set to check on; None: a part of ``truth``.
        work: folder for the files of a split.
        least: fewer set apart than these are an error.

    Raises:
        ConfigError: ``truth`` is not a COCO file.
        SourceEmpty: too few images to split.
    """
    if val is not None:
        return Labelled(truth, val)
    read_truth(truth.annotations)  # its messages name what is wrong
    fields = json.loads(truth.annotations.read_bytes())
    names = sorted((str(i["file_name"]) for i in fields["images"]), key=_draw)
    apart = max(round(_CHECKED_SHARE * len(names)), min(FOLDS, len(names) // 2))
    if apart < max(1, least):
        raise SourceEmpty(
            f"{truth.annotations} names {len(names)} images, too few to learn from and set "
            f"{max(1, least)} apart",
            hint=f"give at least {2 * max(1, least)}, or a set of its own as `val`",
        )
    held = set(names[:apart])
    work.mkdir(parents=True, exist_ok=True)
    made = []
    for part, kept in (("train", set(names) - held), ("val", held)):
        path = work / f"truth_{part}.json"
        _write(path, _only(fields, kept))
        made.append(DataConfig(annotations=path, images=truth.images))
    return Labelled(*made)


def _draw(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _only(fields: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    images = [image for image in fields["images"] if str(image["file_name"]) in names]
    ids = {image["id"] for image in images}
    lists = {
        key: [entry for entry in fields[key] if entry["image_id"] in ids]
        for key in ("annotations", "ignore")
        if isinstance(fields.get(key), Sequence)
    }
    return {**fields, "images": images, **lists}


def _write(path: Path, fields: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(fields))
    temporary.replace(path)


def keys_file(data: DataConfig, path: Path) -> Path:
    """Write the names of a set's images as a list of keys, which narrows a run to them."""
    names = [image.name for image in read_truth(data.annotations).images]
    quoted = ('"' + name.replace('"', '""') + '"' for name in names)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("key\n" + "".join(f"{name}\n" for name in quoted), encoding="utf-8")
    return path


def digest(data: DataConfig) -> str:
    """Return 16 hex digits of a set's annotations."""
    return hashlib.sha256(data.annotations.read_bytes()).hexdigest()[:16]
