"""COCO ground truth joined to a run: its images to rows, its classes to the run's, by name.

A name in the file joins the row with exactly that ``image_id``; failing that, the only row whose
path ends in it (``shards/a.tar/pages/7.jpg`` for ``7.jpg`` or ``pages/7.jpg``), or the only row
that is itself the end of the name (``7.jpg`` for ``val/7.jpg``, when the run's source was the
folder ``val``). Unicode forms of one name (NFC, NFD) are the same name. A name with several such
rows, or a row with several such names, is an error: a wrong join gives plausible, wrong figures.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pipelines.truth.nearest import KEPT, nearest_lines
from storage.coco.truth import Truth
from storage.errors import TruthMismatch

# Class names that mark regions to leave out of any count, as KITTI and VisDrone use them.
IGNORE_NAMES = ("dontcare", "ignore", "ignored", "ignoredregions", "ignoredregion")
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Join:
    """Rows joined to ground truth.

    Attributes:
        image_of_row: index into ``Truth.images`` by image_id.
        shard_ids: the shards those rows are in.
        unmatched: names without a row.
        rows_without_truth: live rows that no name joined.
        nearest: for the first of ``unmatched``, the most similar row and how it differs.
    """

    image_of_row: dict[str, int]
    shard_ids: frozenset[str]
    unmatched: tuple[str, ...]
    rows_without_truth: int
    nearest: tuple[str, ...] = ()


def normal_name(name: str) -> str:
    """Return a class name without case, spaces and punctuation, so that spellings agree."""
    return "".join(ch for ch in name.casefold() if ch.isalnum())


def match_categories(run: Sequence[str], truth: dict[int, str]) -> dict[int, int]:
    """Return the run's contiguous category id for each of the file's ids that has one.

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
    """Return whether a class name marks regions that are not to be counted, such as DontCare."""
    return normal_name(name) in IGNORE_NAMES


@dataclass(slots=True)
class _Found:
    """Rows that one name of the file has met so far, those of the best kind of match."""

    rank: int = 9
    rows: list[tuple[str, str]] = field(default_factory=list)  # (image_id, shard_id), the first
    n: int = 0

    def meet(self, row: tuple[str, str], rank: int) -> None:
        """Count a row unless a better kind of match is known."""
        if rank > self.rank:
            return
        if rank < self.rank:
            self.rank, self.rows, self.n = rank, [], 0
        self.n += 1
        if len(self.rows) < _EXAMPLES:
            self.rows.append(row)


_SAME, _SAME_IN_NFC, _ENDING = range(3)  # kinds of match, the best first


def join_rows(truth: Truth, rows: Iterable[tuple[str, str]]) -> Join:
    """Join names to rows; memory grows with the ground truth, not with the run.

    Args:
        truth: the file.
        rows: (image_id, shard_id) of every live row.

    Raises:
        TruthMismatch: names that fit several rows, or rows that fit several names.
    """
    names = _Names(truth)
    found = [_Found() for _ in truth.images]
    n_rows = 0
    strangers: list[str] = []
    for row in rows:
        n_rows += 1
        known = False
        for i, rank in names.candidates(row[0]):
            found[i].meet(row, rank)
            known = True
        if not known and len(strangers) < KEPT:
            strangers.append(row[0])
    return _resolve(truth, found, n_rows, strangers)


def may_join(truth: Truth) -> Callable[[str], list[int]]:
    """Return the indices of the file's names that an image id may stand for, other rows aside.

    Raises:
        TruthMismatch: the file lists a name twice.
    """
    names = _Names(truth)
    return lambda image_id: [i for i, _ in names.candidates(image_id)]


class _Names:
    """The file's names by themselves and by their endings, in one Unicode form (NFC).

    macOS writes names decomposed (NFD), most annotation tools composed: both mean one file.
    """

    def __init__(self, truth: Truth) -> None:
        self._exact: dict[str, int] = {}
        self._composed: dict[str, list[int]] = {}
        self._ends: dict[str, list[int]] = {}
        repeated: list[str] = []
        for i, image in enumerate(truth.images):
            if image.name in self._exact:
                repeated.append(f"  {image.name!r}")
            self._exact[image.name] = i
            name = _nfc(image.name)
            self._composed.setdefault(name, []).append(i)
            for suffix in _proper_suffixes(name):
                self._ends.setdefault(suffix, []).append(i)
        if repeated:
            raise TruthMismatch(
                _with_examples(f"{truth.source} lists {len(repeated)} file names twice", repeated),
                hint="each image needs a unique file_name; add the folder to it",
            )

    def candidates(self, image_id: str) -> Iterator[tuple[int, int]]:
        """(index of a name, kind of match); of a row's own endings the longest counts."""
        if image_id in self._exact:
            yield self._exact[image_id], _SAME
            return
        name = _nfc(image_id)
        if name in self._composed:
            yield from ((i, _SAME_IN_NFC) for i in self._composed[name])
            return
        for suffix in _proper_suffixes(name):
            if suffix in self._composed:
                yield from ((i, _ENDING) for i in self._composed[suffix])
                return
        yield from ((i, _ENDING) for i in self._ends.get(name, ()))


def _nfc(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _proper_suffixes(path: str) -> Iterator[str]:
    at = path.find("/")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find("/", at + 1)


def _resolve(truth: Truth, found: list[_Found], n_rows: int, strangers: list[str]) -> Join:
    names_of_row: dict[str, list[int]] = {}
    shard_ids: set[str] = set()
    unmatched: list[str] = []
    several: list[str] = []
    for i, (image, met) in enumerate(zip(truth.images, found, strict=True)):
        if met.n > 1:
            rows = ", ".join(repr(r[0]) for r in met.rows)
            more = ", …" if met.n > len(met.rows) else ""
            several.append(f"  {image.name!r} fits {met.n} rows: {rows}{more}")
        elif met.n:
            names_of_row.setdefault(met.rows[0][0], []).append(i)
            shard_ids.add(met.rows[0][1])
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
    return Join(
        image_of_row=image_of_row,
        shard_ids=frozenset(shard_ids),
        unmatched=tuple(unmatched),
        rows_without_truth=n_rows - len(image_of_row),
        nearest=tuple(nearest_lines(unmatched[:_EXAMPLES], strangers)),
    )


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
    """Raise TruthMismatch when names have no row: the count, three of them, the nearest rows."""
    if join.unmatched:
        raise TruthMismatch(
            _with_examples(
                f"{truth.source}: {len(join.unmatched)} of {len(truth.images)} images have no row",
                [f"  {name!r}" for name in join.unmatched],
            )
            + "".join(f"\n{line}" for line in join.nearest),
            hint=hint,
        )


def _with_examples(what: str, examples: Sequence[str]) -> str:
    shown = list(examples[:_EXAMPLES])
    if len(examples) > _EXAMPLES:
        shown.append(f"  … and {len(examples) - _EXAMPLES} more")
    return "\n".join([f"{what}, such as", *shown] if len(examples) > _EXAMPLES else [what, *shown])
