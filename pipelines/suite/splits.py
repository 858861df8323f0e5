"""The files of a data set: a Roboflow export as it is, or COCO files over one folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import ConfigError

SPLITS = ("train", "valid", "test")
ANNOTATIONS = "_annotations.coco.json"
_FROM_HERE = "paths are relative to the folder the command is started in"


@dataclass(frozen=True, slots=True)
class Split:
    """A part of a data set: its COCO file, and the folder that `file_name` is relative to."""

    annotations: Path
    images: Path


@dataclass(frozen=True, slots=True)
class Splits:
    """The parts of a data set that are there, by name: train, valid, test."""

    parts: Mapping[str, Split]

    def write(self, folder: Path) -> dict[str, Split]:
        """Write each part's COCO file with the categories that can be learned; return the parts.

        Roboflow adds the group of all classes as a category of its own that no box has (id 0,
        supercategory `none`). It is left out, as RF100's own evaluation does.
        """
        folder.mkdir(parents=True, exist_ok=True)
        read = {name: _read(part.annotations) for name, part in self.parts.items()}
        groups = _groups(read.values())
        written = {}
        for name, coco in read.items():
            kept = [c for c in coco["categories"] if c.get("id") not in groups]
            path = folder / f"{name}.json"
            body = json.dumps({**coco, "categories": kept})
            if not path.exists() or path.read_text(encoding="utf-8") != body:
                path.write_text(body, encoding="utf-8")
            written[name] = Split(path, self.parts[name].images)
        return written


def is_export(folder: Path) -> bool:
    """Whether a folder holds a Roboflow export with test images."""
    return (folder / "test" / ANNOTATIONS).is_file()


def roboflow_splits(folder: Path) -> Splits:
    """Return the parts of a Roboflow COCO export. Raises ConfigError without test images."""
    if not is_export(folder):
        raise ConfigError(
            f"{folder} is not a Roboflow export: it has no test/{ANNOTATIONS}",
            hint="export the data set as COCO; each of train, valid and test has that file",
        )
    found = {
        name: Split(folder / name / ANNOTATIONS, folder / name)
        for name in SPLITS
        if (folder / name / ANNOTATIONS).is_file()
    }
    return Splits(found)


def coco_splits(images: Path, files: Mapping[str, Path]) -> Splits:
    """Return parts given as COCO files. Raises ConfigError when one is not there."""
    if not images.is_dir():
        raise ConfigError(f"images: there is no folder {images}", hint=_FROM_HERE)
    for name, path in files.items():
        if not path.is_file():
            raise ConfigError(f"{name}: {path} is not there", hint=_FROM_HERE)
    return Splits({name: Split(path, images) for name, path in files.items()})


def _groups(files: Iterable[Mapping[str, Any]]) -> set[Any]:
    """Return ids of categories that only group the others and have no box in any part."""
    files = list(files)
    every = [category for coco in files for category in coco["categories"]]
    named = {category.get("supercategory") for category in every}
    used = {annotation.get("category_id") for coco in files for annotation in coco["annotations"]}
    return {
        category.get("id")
        for category in every
        if category.get("supercategory") in (None, "", "none")
        and category.get("name") in named
        and category.get("id") not in used
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        coco: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} cannot be read as JSON: {exc}") from exc
    wanted = ("images", "annotations", "categories")
    if not isinstance(coco, dict) or not all(isinstance(coco.get(k), list) for k in wanted):
        raise ConfigError(f"{path} is not a COCO file: it needs the lists {', '.join(wanted)}")
    if not all(isinstance(one, dict) for key in wanted for one in coco[key]):
        raise ConfigError(f"{path} is not a COCO file: its entries are not objects")
    return dict(coco)
