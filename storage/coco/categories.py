"""Categories of a COCO file: one name per id, with duplicate names merged."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from storage.coco import fields

_NO_PARENT = ("", "none")


@dataclass(frozen=True, slots=True)
class Categories:
    """The meaning of a file's category ids.

    Attributes:
        names: class name by id, in the file's order; each name once.
        same: the representative id for each id in the file; without the ids of a category that
            was dropped as an exporter's unused root.
    """

    names: dict[int, str]
    same: dict[int, int]


def read_categories(coco: Mapping[str, Any], used: Collection[int]) -> Categories:
    """Read ``categories``; merge entries that differ only in their id.

    Roboflow writes a root (``supercategory: none``) that all other categories name as their
    supercategory and that no annotation uses. It is not a class, and often shares its name with
    one: it is dropped.

    Args:
        coco: the parsed file.
        used: category ids that annotations name.

    Raises:
        ValueError: an id twice, or two categories of one name that differ in more than the id.
    """
    found: dict[int, Mapping[str, Any]] = {}
    for where, entry in fields.entries(coco, "categories"):
        try:
            number = fields.whole_number(entry, "id")
            fields.text(entry, "name")
        except ValueError as exc:
            raise ValueError(f"{where}: {exc}") from exc
        if number in found:
            raise ValueError(f"category id {number} is used twice")
        found[number] = entry
    root = _unused_root(found, used)
    if root is not None:
        del found[root]
    return _merged(found)


def _unused_root(found: Mapping[int, Mapping[str, Any]], used: Collection[int]) -> int | None:
    for number, entry in found.items():
        others = [other for key, other in found.items() if key != number]
        parent = str(entry.get("supercategory") or "").casefold()
        if (
            others
            and number not in used
            and parent in _NO_PARENT
            and all(other.get("supercategory") == entry["name"] for other in others)
        ):
            return number
    return None


def _merged(found: Mapping[int, Mapping[str, Any]]) -> Categories:
    by_name: defaultdict[str, list[int]] = defaultdict(list)
    for number, entry in found.items():
        by_name[unicodedata.normalize("NFC", entry["name"])].append(number)
    same = {}
    for name, numbers in by_name.items():
        first = _without_id(found[numbers[0]])
        for number in numbers:
            other = _without_id(found[number])
            if other != first:
                differing = sorted(
                    key for key in first.keys() | other.keys() if first.get(key) != other.get(key)
                )
                raise ValueError(
                    f"categories {numbers[0]} and {number} are both named {name!r}, and differ in "
                    f"{', '.join(differing)}: rename one, or give both the same fields to merge "
                    "them"
                )
            same[number] = numbers[0]
    return Categories({numbers[0]: name for name, numbers in by_name.items()}, same)


def _without_id(entry: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in entry.items() if key not in ("id", "name")}
    return rest | {"supercategory": rest.get("supercategory") or ""}
