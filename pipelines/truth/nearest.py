"""Find the rows that unmatched names probably meant, and how the two differ."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from urllib.parse import unquote

KEPT = 2_000  # names of rows looked through
_ROBOFLOW = re.compile(r"[_.](jpe?g|png|bmp|webp|tiff?)\.rf\.[0-9a-f]+", re.IGNORECASE)


def nearest_lines(names: Iterable[str], rows: Sequence[str]) -> list[str]:
    """Return one line a name: the most similar row and why it is not the same.

    Omit names without a row.
    """
    lines = []
    for name in names:
        row = _nearest(name, rows)
        if row is not None:
            lines.append(f"  {name!r} is nearest to row {row!r}: {why_not(name, row)}")
    return lines


def why_not(name: str, row: str) -> str:
    """Return what keeps a name of the ground truth and a row's image id from joining."""
    last, row_last = _last(name), _last(row)
    if last == row_last:
        return "they lie in different folders"
    if unicodedata.normalize("NFC", last) == unicodedata.normalize("NFC", row_last):
        return "they differ in Unicode form, and in their folders"
    if last.casefold() == row_last.casefold():
        return "they differ in upper and lower case"
    if unquote(last) == unquote(row_last):
        return "one is percent-encoded"
    if last.split() and "".join(last.split()) == "".join(row_last.split()):
        return "they differ in spaces"
    if _without_export_mark(last) == _without_export_mark(row_last):
        return "one carries the mark of a Roboflow export"
    if _stem(last) == _stem(row_last):
        return f"they differ in their suffix, {_suffix(last)!r} and {_suffix(row_last)!r}"
    return "the file names differ"


def _nearest(name: str, rows: Sequence[str]) -> str | None:
    bare = _bare(name)
    same = next((row for row in rows if _bare(row) == bare), None)
    if same is not None or not rows:
        return same
    by_name = {_last(row): row for row in rows}
    close = difflib.get_close_matches(_last(name), list(by_name), n=1, cutoff=0.0)
    return by_name[close[0]] if close else rows[0]


def _bare(name: str) -> str:
    """Return a file name without what exporters and file systems change about it."""
    text = unicodedata.normalize("NFKC", unquote(_without_export_mark(_last(name))))
    return "".join(_stem(text).casefold().split())


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0]


def _suffix(name: str) -> str:
    return name[len(_stem(name)) :]


def _without_export_mark(name: str) -> str:
    return _ROBOFLOW.sub("", name)
