"""Read and check COCO detection JSON, the same way for evaluate, fit, compile and train.

Unambiguous variations seen in real files are accepted (flags, areas and ids as text, categories
listed twice); anything ambiguous is refused with a message that names the entry.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from storage.coco import fields
from storage.coco.categories import Categories, read_categories
from storage.coco.fields import Xywh
from storage.errors import BucketNotFound, ConfigError, ObjectNotFound, StorageError
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_store
from storage.urls import parse_url, shown_url

T = TypeVar("T")

_BEYOND = 0.05  # of the side: more than annotators overshoot a border
_TELLING = 0.1  # share of boxes that far outside above which the format is questioned
_LOOKED_AT = 1000  # objects of a folder that was given in place of a file
_TO_GIVE = (
    "it needs images (id, file_name), annotations (image_id, category_id, bbox as "
    "[x, y, width, height] in pixels) and categories (id, name)"
)


@dataclass(frozen=True, slots=True)
class TruthImage:
    """One image of the file. ``width`` and ``height`` are 0 if the file omits them."""

    name: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class TruthBox:
    """One annotation: ``xywh`` in pixels; ``ignore``: a crowd, or marked to be ignored."""

    category_id: int
    xywh: Xywh
    area: float
    ignore: bool

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        """The corners."""
        x, y, w, h = self.xywh
        return x, y, x + w, y + h


@dataclass(frozen=True, slots=True)
class Truth:
    """A COCO file: images in its order, their boxes, and class names by the file's own ids.

    Attributes:
        source: origin of the file, for messages.
        images: in the file's order.
        boxes: by image; boxes without width or height are left out.
        categories: class name by id; each name once.
        regions: by image, xywh regions in which no class is evaluated or trained: the entries of
            a top-level list ``ignore`` that are not already crowds.
        without_area: number of boxes left out for lack of area.
    """

    source: str
    images: tuple[TruthImage, ...]
    boxes: tuple[tuple[TruthBox, ...], ...]
    categories: dict[int, str]
    regions: tuple[tuple[Xywh, ...], ...] = ()
    without_area: int = 0

    def regions_of(self, image: int) -> tuple[Xywh, ...]:
        """Return the regions of one image, by its index."""
        return self.regions[image] if self.regions else ()


def read_truth(location: str | Path, options: StorageOptions | None = None) -> Truth:
    """Read a COCO detection file from a path or any store's URL.

    Raises:
        ConfigError: not JSON, or not COCO's layout; the message names the first problem.
        ObjectNotFound: no such file.
    """
    url = str(location).rstrip("/")
    folder, _, name = url.rpartition("/")
    store = open_store(folder or ("/" if url.startswith("/") else "."), options)
    try:
        raw = store.get(name)
    except (ObjectNotFound, BucketNotFound) as exc:
        raise _no_file(url, exc, options) from exc
    return parse_truth(raw, shown_url(url))


def _no_file(url: str, exc: StorageError, options: StorageOptions | None) -> StorageError:
    """Say what lies there in place of the file: a folder with or without COCO files, or nothing."""
    with contextlib.suppress(StorageError):
        there = [o.key for o in itertools.islice(open_store(url, options).list(), _LOOKED_AT)]
        found = [key for key in there if key.endswith(".json")]
        # A bucket lists nothing at a prefix that is not there; a local folder may be empty.
        if there or parse_url(url).scheme == "file":
            shown = f", such as {shown_url(url)}/{found[0]}" if found else ""
            return ObjectNotFound(
                f"{shown_url(url)} is a folder, and ground truth is one COCO file",
                hint=f"name the .json file{shown}",
            )
    return ObjectNotFound(
        exc.message,
        hint="ground truth is a COCO .json file, at a path from the folder the command is started "
        "in, or at a URL",
    )


def parse_truth(raw: bytes, where: str) -> Truth:
    """Parse the bytes of a COCO file. Raises ConfigError as ``read_truth`` does."""
    try:
        coco = json.loads(raw)
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{where} is not JSON text", hint="give a COCO .json file") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{where} is not JSON: {exc}", hint="give a COCO .json file") from exc
    try:
        if not isinstance(coco, dict):
            raise ValueError(f"it holds a {type(coco).__name__}, not an object")
        missing = sorted({"images", "annotations", "categories"} - coco.keys())
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        return _parse(where, coco)
    except (ValueError, OverflowError) as exc:
        raise ConfigError(f"{where} is not a COCO detection file: {exc}", hint=_TO_GIVE) from exc


def _parse(where: str, coco: Mapping[str, Any]) -> Truth:
    images, index = _images(coco)
    found = [
        (at, index[key], entry)
        for at, key, entry in _of_images(coco, "annotations")
        if _listed(at, key, index)
    ]
    used = {_at(at, fields.whole_number, entry, "category_id") for at, _, entry in found}
    categories = read_categories(coco, used)
    boxes: list[list[TruthBox]] = [[] for _ in images]
    empty = 0
    for at, image, entry in found:
        box = _box(at, entry, categories)
        if box.xywh[2] > 0 and box.xywh[3] > 0:
            boxes[image].append(box)
        else:
            empty += 1
    _refuse_other_formats(images, boxes)
    regions: list[list[Xywh]] = [[] for _ in images]
    for at, key, entry in _of_images(coco, "ignore") if coco.get("ignore") else ():
        if _listed(at, key, index):
            xywh = _at(at, fields.bbox, entry)
            crowds = {box.xywh for box in boxes[index[key]] if box.ignore}
            if xywh not in crowds and xywh[2] > 0 and xywh[3] > 0:
                regions[index[key]].append(xywh)
    return Truth(
        source=where,
        images=tuple(images),
        boxes=tuple(tuple(of_image) for of_image in boxes),
        categories=categories.names,
        regions=tuple(tuple(of_image) for of_image in regions),
        without_area=empty,
    )


def _images(coco: Mapping[str, Any]) -> tuple[list[TruthImage], dict[int | str, int]]:
    index: dict[int | str, int] = {}
    images: list[TruthImage] = []
    for at, entry in fields.entries(coco, "images"):
        key = _at(at, fields.identifier, entry, "id")
        if key in index:
            raise ValueError(f"image id {key!r} is used twice")
        index[key] = len(images)
        images.append(
            TruthImage(
                _normal_path(_at(at, fields.text, entry, "file_name")),
                _at(at, fields.side, entry, "width"),
                _at(at, fields.side, entry, "height"),
            )
        )
    return images, index


def _of_images(
    coco: Mapping[str, Any], name: str
) -> Iterable[tuple[str, int | str, Mapping[str, Any]]]:
    for at, entry in fields.entries(coco, name):
        yield at, _at(at, fields.identifier, entry, "image_id"), entry


def _listed(at: str, key: int | str, index: Mapping[int | str, int]) -> bool:
    if key not in index:
        raise ValueError(f"{at} names image {key!r}, which is not listed")
    return True


def _box(at: str, entry: Mapping[str, Any], categories: Categories) -> TruthBox:
    category_id = _at(at, fields.whole_number, entry, "category_id")
    if category_id not in categories.same:
        raise ValueError(f"{at} has category {category_id}, which is not listed")
    xywh = _at(at, fields.bbox, entry)
    ignore = _at(at, fields.flag, entry, "iscrowd") or _at(at, fields.flag, entry, "ignore")
    return TruthBox(categories.same[category_id], xywh, _at(at, fields.area, entry, xywh), ignore)


def _at(where: str, read: Callable[..., T], *args: Any) -> T:
    """Return the result of ``read``; add the location to its error."""
    try:
        return read(*args)
    except ValueError as exc:
        raise ValueError(f"{where}: {exc}") from exc


def _refuse_other_formats(
    images: Sequence[TruthImage], boxes: Sequence[Sequence[TruthBox]]
) -> None:
    """Refuse boxes that are clearly corners, or fractions of the image, instead of xywh in
    pixels."""
    every = [(image, box.xywh) for image, of in zip(images, boxes, strict=True) for box in of]
    shares = every and all(_within_one(xywh) for _, xywh in every)
    if shares and any(not side.is_integer() for _, xywh in every for side in xywh):
        raise ValueError(
            f"no box reaches beyond 1, as in {list(every[0][1])}: these are shares of the image's "
            "width and height, not pixels"
        )
    sized = [(image, xywh) for image, xywh in every if image.width and image.height]
    beyond = [(image, xywh) for image, xywh in sized if _reaches_out(image, xywh)]
    if len(beyond) > _TELLING * len(sized) and all(_fits_as_corners(*one) for one in sized):
        image, xywh = beyond[0]
        raise ValueError(
            f"{len(beyond)} of {len(sized)} boxes reach beyond their image if bbox is "
            f"[x, y, width, height], such as {list(xywh)} on {image.name!r} of "
            f"{image.width}×{image.height}, and all fit as [x1, y1, x2, y2]: convert them"
        )


def _within_one(xywh: Xywh) -> bool:
    x, y, w, h = xywh
    return min(x, y) >= 0 and max(x + w, y + h) <= 1 + 1e-6


def _reaches_out(image: TruthImage, xywh: Xywh) -> bool:
    x, y, w, h = xywh
    return x + w > (1 + _BEYOND) * image.width or y + h > (1 + _BEYOND) * image.height


def _fits_as_corners(image: TruthImage, xywh: Xywh) -> bool:
    x1, y1, x2, y2 = xywh
    return x1 < x2 <= image.width + 1 and y1 < y2 <= image.height + 1


def _normal_path(name: str) -> str:
    """Return the path as keys are written: '/'-separated, without a leading './' or '/'."""
    return re.sub(r"^(\./|/)+", "", name.replace("\\", "/"))
