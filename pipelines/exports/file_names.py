"""File names for exported images: safe on every system, unique, and the image's own where possible.

An image id is untrusted text: it may climb (``../``), start with a slash, differ from another one
only in case, or hold characters that a file system refuses. The name keeps what is harmless; if it
had to change or is taken, twelve digits of the id's sha256 make it unique.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

from storage.shards.selecting import IMAGE_SUFFIXES

_KNOWN = "|".join(re.escape(suffix.removeprefix(".")) for suffix in IMAGE_SUFFIXES)
_SUFFIX = re.compile(rf"\.({_KNOWN})(#\d+)?$", re.IGNORECASE)
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\#%\u2028\u2029\ud800-\udfff]')
_RESERVED = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
_MAX_BYTES = 120  # of one path component; file systems allow 255
# Most ids: nothing in them has to change. One look finds that, where the rules take a dozen.
_PLAIN = re.compile(
    r"(?:(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:[./]|\Z))\w(?:[\w.-]{0,118}\w)?(?:/(?!\Z)|\Z))+",
    re.ASCII | re.IGNORECASE,
)


class FileNames:
    """Gives each image id its name; the same ids in the same order get the same names.

    Args:
        flat: no folders, and no two names that differ only in their suffix (YOLO's label files
            are found by the stem).
    """

    def __init__(self, *, flat: bool) -> None:
        self._flat = flat
        self._files: set[str] = set()
        self._folders: set[str] = set()
        self._last = ""  # folder that was free, and from which all names since came

    def name(self, image_id: str) -> str:
        """Return a relative path of safe components, never given before, not even in other case."""
        clean = image_id if _PLAIN.fullmatch(image_id) else _cleaned(image_id)
        expected = image_id
        if self._flat:
            clean, expected = clean.replace("/", "_"), image_id.replace("/", "_")
            if not _SUFFIX.search(clean):  # else loaders take what follows a dot for the suffix
                clean = clean.replace(".", "_")
        longest = _MAX_BYTES if self._flat else 4 * _MAX_BYTES
        if clean != expected or len(clean.encode()) > longest:
            clean = _marked(clean, image_id)
        tried = 0
        while not self._take(clean):
            # Without its folders: one of those may be the name of a file.
            clean = _marked(clean.replace("/", "_"), image_id if not tried else f"{tried} {clean}")
            tried += 1
        return clean

    def _take(self, name: str) -> bool:
        """Take a name, and return True, unless it is taken or lies below a file's name."""
        key = name.casefold()
        key = key.rsplit(".", 1)[0] if self._flat else key
        folder = key.rpartition("/")[0]
        if key in self._files or key in self._folders:
            return False
        if folder != self._last:
            parents = _parents(folder)
            if not self._files.isdisjoint(parents):
                return False
            self._folders.update(parents)
            self._last = folder
        self._files.add(key)
        return True


def _cleaned(image_id: str) -> str:
    text = image_id
    found = _SUFFIX.search(text)
    if found and found[2]:  # a repeated member name: a.jpg#2
        text = f"{text[: found.start()]}{found[2]}.{found[1]}"
    parts = (_component(part) for part in text.split("/"))
    return "/".join(part for part in parts if part) or "image"


def _component(part: str) -> str:
    safe = _UNSAFE.sub("_", part).strip(" ").rstrip(".")
    if safe in ("", ".", ".."):
        return "_" if part.strip() else ""
    if _RESERVED.match(safe):
        safe = f"_{safe}"
    return _shortened(safe)


def _shortened(part: str) -> str:
    raw = part.encode()
    if len(raw) <= _MAX_BYTES:
        return part
    found = _SUFFIX.search(part)
    end = found[0] if found else ""
    return raw[: _MAX_BYTES - len(end)].decode(errors="ignore") + end


def _marked(name: str, image_id: str) -> str:
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    folder, slash, last = name.rpartition("/")
    if len(folder.encode()) > 2 * _MAX_BYTES:
        folder, slash = "", ""
    found = _SUFFIX.search(last)
    stem, end = (last[: found.start()], found[0]) if found else (last, "")
    stem = stem.encode()[: _MAX_BYTES - 20].decode(errors="ignore")
    return f"{folder}{slash}{stem}-{digest}{end}"


@lru_cache(maxsize=1024)
def _parents(folder: str) -> tuple[str, ...]:
    """The folder and those above it; an image's neighbours ask for the same."""
    parts = folder.split("/") if folder else []
    return tuple("/".join(parts[: n + 1]) for n in range(len(parts)))
