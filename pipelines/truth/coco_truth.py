"""COCO ground truth: reading it, and joining its images to a run's rows by name.

A name in the file joins the row with exactly that ``image_id``; failing that, the only row whose
path ends in it (``shards/a.tar/pages/7.jpg`` for ``7.jpg`` or ``pages/7.jpg``), or the only row
that is itself the end of the name (``7.jpg`` for ``val/7.jpg``, when the run's source was the
folder ``val``). A name with several such rows, or a row with several such names, is an error:
a wrong join gives plausible, wrong figures.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.errors import ConfigError, TruthMismatch
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_store
from storage.urls import shown_url

# Class names that mark regions to leave out of any count, as KITTI and VisDrone use them.
IGNORE_NAMES = ("dontcare", "ignore", "ignored", "ignoredregions", "ignoredregion")
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class TruthImage:
    """One image of the file. ``width`` and ``height`` are 0 where the file does not say."""

    name: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class TruthBox:
    """One annotation: ``xywh`` in pixels; ``ignore``: a crowd, or marked as not to be counted."""

    category_id: int
    xywh: tuple[float, float, float, float]
    area: float
    ignore: bool


@dataclass(frozen=True, slots=True)
class Truth:
    """A COCO file: images in its order, their boxes, and class names by the file's own ids."""

    source: str
    images: tuple[TruthImage, ...]
    boxes: tuple[tuple[TruthBox, ...], ...]
    categories: dict[int, str]


@dataclass(frozen=True, slots=True)
class Join:
    """Rows joined to ground truth.

    Attributes:
        image_of_row: index into ``Truth.images`` by image_id.
        shard_ids: the shards those rows are in.
        unmatched: names without a row.
        rows_without_truth: live rows that no name joined.
    """

    image_of_row: dict[str, int]
    shard_ids: frozenset[str]
    unmatched: tuple[str, ...]
    rows_without_truth: int


def read_truth(location: str | Path, options: StorageOptions | None = None) -> Truth:
    """Read a COCO detection file from a path or any store's URL.

    Raises:
        ConfigError: not JSON, or not COCO's layout; the first offence is named.
        ObjectNotFound: no such file.
    """
    url = str(location)
    folder, _, name = url.rpartition("/")
    raw = open_store(folder or ("/" if url.startswith("/") else "."), options).get(name)
    url = shown_url(url)
    try:
        return _parse(url, json.loads(raw))
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{url} is not JSON text", hint="give a COCO .json file") from exc
    except json.JSONDecodeError as exc:
        raise ConfigError(f"{url} is not JSON: {exc}", hint="give a COCO .json file") from exc
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as exc:
        raise ConfigError(
            f"{url} is not a COCO detection file: {type(exc).__name__}: {exc}",
            hint="it needs images (id, file_name), annotations (image_id, category_id, bbox as "
            "[x, y, width, height] in pixels) and categories (id, name)",
        ) from exc


def _parse(url: str, coco: dict[str, Any]) -> Truth:
    categories = {int(c["id"]): str(c["name"]) for c in coco["categories"]}
    index: dict[Any, int] = {}
    images: list[TruthImage] = []
    for image in coco["images"]:
        if image["id"] in index:
            raise ValueError(f"image id {image['id']!r} is used twice")
        index[image["id"]] = len(images)
        size = (int(image.get("width") or 0), int(image.get("height") or 0))
        images.append(TruthImage(_normal_path(str(image["file_name"])), *size))
    boxes: list[list[TruthBox]] = [[] for _ in images]
    for annotation in coco["annotations"]:
        if annotation["image_id"] not in index:
            raise ValueError(
                f"annotation {annotation.get('id')!r} names image {annotation['image_id']!r}, "
                "which is not listed"
            )
        boxes[index[annotation["image_id"]]].append(_box(annotation, categories))
    return Truth(url, tuple(images), tuple(tuple(b) for b in boxes), categories)


def _box(annotation: dict[str, Any], categories: dict[int, str]) -> TruthBox:
    where = f"annotation {annotation.get('id')!r}"
    category_id = int(annotation["category_id"])
    if category_id not in categories:
        raise ValueError(f"{where} has category {category_id}, which is not listed")
    x, y, w, h = (float(v) for v in annotation["bbox"])
    if not all(math.isfinite(v) for v in (x, y, w, h)) or w < 0 or h < 0:
        raise ValueError(f"{where} has the box {annotation['bbox']!r}")
    area = float(annotation.get("area") or w * h)
    ignore = bool(annotation.get("iscrowd") or annotation.get("ignore"))
    return TruthBox(category_id, (x, y, w, h), area, ignore)


def _normal_path(name: str) -> str:
    """'/'-separated, without a leading './' or '/': as keys are written."""
    return re.sub(r"^(\./|/)+", "", name.replace("\\", "/"))


def normal_name(name: str) -> str:
    """A class name without case, spaces and punctuation: 'Traffic Light' is 'traffic_light'."""
    return "".join(ch for ch in name.casefold() if ch.isalnum())


def match_categories(run: Sequence[str], truth: dict[int, str]) -> dict[int, int]:
    """The run's contiguous category id for each of the file's ids that has one.

    By exact name first, then without case, spaces and punctuation where that is unambiguous.
    """
    matched = {i: run.index(name) for i, name in truth.items() if name in run}
    taken = set(matched.values())
    loose_run = _unique({k: normal_name(n) for k, n in enumerate(run) if k not in taken})
    loose_truth = _unique({i: normal_name(n) for i, n in truth.items() if i not in matched})
    both = loose_run.keys() & loose_truth.keys()
    return matched | {loose_truth[name]: loose_run[name] for name in both}


def _unique(names: dict[int, str]) -> dict[str, int]:
    values = list(names.values())
    return {name: i for i, name in names.items() if name and values.count(name) == 1}


def is_ignore_class(name: str) -> bool:
    """Whether a class name marks regions that are not to be counted, such as DontCare."""
    return normal_name(name) in IGNORE_NAMES


@dataclass(slots=True)
class _Found:
    """What one name of the file has met so far."""

    exact: tuple[str, str] | None = None  # (image_id, shard_id)
    by_suffix: list[tuple[str, str]] = field(default_factory=list)
    n_by_suffix: int = 0


def join_rows(truth: Truth, rows: Iterable[tuple[str, str]]) -> Join:
    """Join names to rows; memory grows with the ground truth, not with the run.

    Args:
        truth: the file.
        rows: (image_id, shard_id) of every live row.

    Raises:
        TruthMismatch: names that fit several rows, or rows that fit several names.
    """
    exact, ends = _name_indices(truth)
    found = [_Found() for _ in truth.images]
    n_rows = 0
    for row in rows:
        n_rows += 1
        for i, whole in _candidates(row[0], exact, ends):
            if whole:
                found[i].exact = row
            else:
                found[i].n_by_suffix += 1
                if len(found[i].by_suffix) < _EXAMPLES:
                    found[i].by_suffix.append(row)
    return _resolve(truth, found, n_rows)


def may_join(truth: Truth) -> Callable[[str], list[int]]:
    """Which names of the file an image id may stand for, as indices, whatever other rows there are.

    Raises:
        TruthMismatch: the file lists a name twice.
    """
    exact, ends = _name_indices(truth)
    return lambda image_id: [i for i, _ in _candidates(image_id, exact, ends)]


def _name_indices(truth: Truth) -> tuple[dict[str, int], dict[str, list[int]]]:
    exact: dict[str, int] = {}
    ends: dict[str, list[int]] = {}
    repeated: list[str] = []
    for i, image in enumerate(truth.images):
        if image.name in exact:
            repeated.append(f"  {image.name!r}")
        exact[image.name] = i
        for suffix in _proper_suffixes(image.name):
            ends.setdefault(suffix, []).append(i)
    if repeated:
        raise TruthMismatch(
            _with_examples(f"{truth.source} lists {len(repeated)} file names twice", repeated),
            hint="each image needs a file_name of its own; add the folder to it",
        )
    return exact, ends


def _proper_suffixes(path: str) -> Iterator[str]:
    at = path.find("/")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find("/", at + 1)


def _candidates(
    image_id: str, exact: dict[str, int], ends: dict[str, list[int]]
) -> Iterator[tuple[int, bool]]:
    """(index of a name, whether it is the whole key); of a row's own endings the longest counts."""
    if image_id in exact:
        yield exact[image_id], True
        return
    for suffix in _proper_suffixes(image_id):
        if suffix in exact:
            yield exact[suffix], False
            return
    for i in ends.get(image_id, ()):
        yield i, False


def _resolve(truth: Truth, found: list[_Found], n_rows: int) -> Join:
    names_of_row: dict[str, list[int]] = {}
    shard_ids: set[str] = set()
    unmatched: list[str] = []
    several: list[str] = []
    for i, (image, met) in enumerate(zip(truth.images, found, strict=True)):
        if met.exact is None and met.n_by_suffix > 1:
            rows = ", ".join(repr(r[0]) for r in met.by_suffix)
            more = ", …" if met.n_by_suffix > len(met.by_suffix) else ""
            several.append(f"  {image.name!r} fits {met.n_by_suffix} rows: {rows}{more}")
        elif (row := met.exact or next(iter(met.by_suffix), None)) is not None:
            names_of_row.setdefault(row[0], []).append(i)
            shard_ids.add(row[1])
        else:
            unmatched.append(image.name)
    shared = [
        f"  row {row!r} fits {len(names)} names: "
        + ", ".join(repr(truth.images[i].name) for i in names[:_EXAMPLES])
        for row, names in names_of_row.items()
        if len(names) > 1
    ]
    _refuse_ambiguous(truth, several, shared)
    image_of_row = {row: names[0] for row, names in names_of_row.items()}
    return Join(image_of_row, frozenset(shard_ids), tuple(unmatched), n_rows - len(image_of_row))


def _refuse_ambiguous(truth: Truth, several: list[str], shared: list[str]) -> None:
    if not several and not shared:
        return
    parts = []
    if several:
        parts.append(_with_examples(f"{len(several)} names fit several rows", several))
    if shared:
        parts.append(_with_examples(f"{len(shared)} rows fit several names", shared))
    raise TruthMismatch(
        f"{truth.source}: {len(truth.images)} images, but " + "\n".join(parts),
        hint="write the folder, or the tar and the member, into file_name: "
        "'sub/7.jpg', 'shard-0.tar/7.jpg'; an image_id as it stands in the run always joins",
    )


def refuse_unmatched(truth: Truth, join: Join, *, hint: str) -> None:
    """Raise TruthMismatch when names have no row, with the count and three of them."""
    if join.unmatched:
        raise TruthMismatch(
            _with_examples(
                f"{truth.source}: {len(join.unmatched)} of {len(truth.images)} images have no row",
                [f"  {name!r}" for name in join.unmatched],
            ),
            hint=hint,
        )


def _with_examples(what: str, examples: Sequence[str]) -> str:
    shown = list(examples[:_EXAMPLES])
    if len(examples) > _EXAMPLES:
        shown.append(f"  … and {len(examples) - _EXAMPLES} more")
    return "\n".join([f"{what}, such as", *shown] if len(examples) > _EXAMPLES else [what, *shown])
