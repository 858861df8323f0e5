"""What is true of gold images: ``review/gold/<invocation>.json``, a record for each routing.

Gold images are queued like any others, to compare what people answer with what is known. The truth
is kept with the run, so that figures need neither the file nor the run that it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from storage.objects.json_records import json_record, read_record
from storage.objects.protocols import SupportsGet, SupportsList, SupportsPut

GOLD = "review/gold/"

Xyxy = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class GoldImage:
    """One image whose boxes are known.

    Attributes:
        source: ``truth``: a COCO file; ``answers``: what people of an earlier round settled.
        boxes: (xyxy in pixels of the upright image, class name).
        regions: (xyxy, class name, or '' for all classes): boxes with their centre there are
            neither right nor wrong.
    """

    source: Literal["truth", "answers"]
    boxes: tuple[tuple[Xyxy, str], ...]
    regions: tuple[tuple[Xyxy, str], ...] = ()


class SupportsGold(SupportsGet, SupportsList, Protocol):
    """The store verbs needed to read gold images."""


def gold_key(invocation: str) -> str:
    """Return the key of a routing's record."""
    return f"{GOLD}{invocation}.json"


def write_gold(store: SupportsPut, invocation: str, images: Mapping[str, GoldImage]) -> None:
    """Record a routing's gold images, by sha256."""
    fields = {sha256: asdict(image) for sha256, image in images.items()}
    store.put(gold_key(invocation), json_record({"invocation": invocation, "images": fields}))


def read_gold(store: SupportsGold) -> dict[str, GoldImage]:
    """Return all gold images by sha256. Raises StorageError where a record is damaged."""
    found: dict[str, GoldImage] = {}
    for listed in store.list(GOLD):
        found |= read_gold_record(store, listed.key)
    return found


def read_gold_record(store: SupportsGet, key: str) -> dict[str, GoldImage]:
    """Return one routing's gold images by sha256. Raises ObjectNotFound, StorageError."""
    return read_record(store, key, lambda fields: _images(fields, key))


def _images(fields: dict[str, Any], key: str) -> dict[str, GoldImage]:
    # Records of older versions do not name their routing.
    if gold_key(str(said := fields.get("invocation"))) != key and said is not None:
        raise ValueError(f"it is that of another routing, {said!r:.40}")
    return {
        sha256: GoldImage(
            source=image["source"],
            boxes=_named(image["boxes"]),
            regions=_named(image["regions"]),
        )
        for sha256, image in fields["images"].items()
    }


def _named(pairs: list[Any]) -> tuple[tuple[Xyxy, str], ...]:
    out: list[tuple[Xyxy, str]] = []
    for (x1, y1, x2, y2), name in pairs:
        out.append(((float(x1), float(y1), float(x2), float(y2)), str(name)))
    return tuple(out)
