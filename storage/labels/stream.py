"""A label version as flat arrays: boxes, decisions, places and stored scores, by image number.

All of a version is held in memory: some 200 bytes an image and 25 a box, 70 with stored scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.boxes import clipped
from storage.errors import ObjectNotFound, SourceEmpty, SourceError
from storage.labels.versions import LabelVersion, read_label_tables
from storage.records import ImageRef
from storage.runs.annotations import read_tables
from storage.runs.manifest import Manifest, annotation_key

# (raw scores [N], category ids [N]) → probabilities of being right [N]
Weigh = Callable[[NDArray[np.float32], NDArray[np.int16]], NDArray[np.float64]]

_PLACE = ("image_id", "shard_id", "offset", "nbytes", "sha256")
_COLUMNS = (*_PLACE, "width", "height", "source", "labels")


@dataclass(frozen=True, slots=True)
class Stored:
    """What the run's rows hold about each box; NaN, and class -1, where nothing.

    Attributes:
        topk_ids: int16 [T, K]; ``topk_scores``: float32 [T, K], descending.
        spread: float32 [T, 4], standard deviations of left, top, right and bottom in pixels.
    """

    topk_ids: NDArray[np.int16]
    topk_scores: NDArray[np.float32]
    spread: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ImageLabels:
    """The labels of one image, N boxes.

    Attributes:
        width, height: of the upright image.
        by_people: people settled the image.
        boxes: float32 [N, 4] xyxy, pixels of the upright image.
        category_ids: int16 [N]; ``weights``: float32 [N], probability of being right.
        ignore: bool [N], neither object nor background.
        human: bool [N], a person made, moved or confirmed the box.
        stored: what the run's rows hold about the boxes; None if it was not read.
    """

    width: int
    height: int
    by_people: bool
    boxes: NDArray[np.float32]
    category_ids: NDArray[np.int16]
    weights: NDArray[np.float32]
    ignore: NDArray[np.bool_]
    human: NDArray[np.bool_]
    stored: Stored | None


@dataclass(frozen=True, slots=True)
class LabelIndex:
    """All images of a label version; number i is its i-th row.

    Attributes:
        version: the lineage.
        digest: 16 hex digits of all that its labels and weights depend on.
    """

    version: LabelVersion
    digest: str
    _places: pa.Table
    _sizes: NDArray[np.int32]
    _by_people: NDArray[np.bool_]
    _first: NDArray[np.int64]
    _boxes: NDArray[np.float32]
    _category_ids: NDArray[np.int16]
    _weights: NDArray[np.float32]
    _ignore: NDArray[np.bool_]
    _human: NDArray[np.bool_]
    _stored: Stored | None

    def __len__(self) -> int:
        return len(self._sizes)

    def place(self, number: int) -> ImageRef:
        """Return where an image's bytes lie."""
        return ImageRef(*(self._places.column(name)[number].as_py() for name in _PLACE))

    def nbytes(self, number: int) -> int:
        """Return the size of an image's file."""
        return int(self._places.column("nbytes")[number].as_py())

    def shard_ids(self) -> set[str]:
        """Return the shards that the images lie in."""
        return set(self._places.column("shard_id").unique().to_pylist())

    def objects(self, learned: NDArray[np.bool_]) -> int:
        """Count the boxes that are not ignored, of classes [C] that are learned."""
        return int((~self._ignore & learned[self._category_ids]).sum())

    @property
    def images_by_people(self) -> int:
        """Images that people settled."""
        return int(self._by_people.sum())

    def labels(self, number: int) -> ImageLabels:
        """Return the labels of an image."""
        at = slice(int(self._first[number]), int(self._first[number + 1]))
        width, height = self._sizes[number].tolist()
        stored = self._stored
        return ImageLabels(
            width,
            height,
            bool(self._by_people[number]),
            self._boxes[at],
            self._category_ids[at],
            self._weights[at],
            self._ignore[at],
            self._human[at],
            None
            if stored is None
            else Stored(stored.topk_ids[at], stored.topk_scores[at], stored.spread[at]),
        )


def read_label_index(
    manifest: Manifest,
    version: LabelVersion,
    *,
    weigh: Weigh | None = None,
    stored: bool = False,
) -> LabelIndex:
    """Read a label version whole, its parts checked against the lineage.

    Args:
        weigh: gives the model's boxes their weights; None: all 1, as boxes of people have.
        stored: read the class scores and spreads of the run's rows too.

    Raises:
        SourceEmpty: the version has no image.
        SourceError: a weight is no probability.
        StorageError: a part is missing or damaged.
    """
    tables = list(read_label_tables(manifest.store, version, _COLUMNS))
    table = pa.concat_tables(tables).combine_chunks() if tables else None
    if table is None or table.num_rows == 0:
        raise SourceEmpty(
            f"label version {version.version} of {manifest.url} has no image",
            hint="`labelfleet status` says what became of the images",
        )
    lists = table.column("labels").chunk(0)
    flat = lists.flatten()
    counts = np.asarray(lists.value_lengths(), np.int64)
    boxes = np.asarray(flat.field("bbox").flatten(), np.float32).reshape(-1, 4)
    category_ids = np.asarray(flat.field("category_id"), np.int16)
    by_people = np.array(table.column("source").to_pylist()) == "human"
    drawn = np.array(flat.field("origin").to_pylist(), object) != "model"
    human = np.repeat(by_people, counts) & drawn
    scores = flat.field("score").to_numpy(zero_copy_only=False).astype(np.float32)
    weights = np.ones(len(boxes), np.float32)
    if weigh is not None and not human.all():
        weights[~human] = weigh(scores[~human], category_ids[~human])
    _check_weights(weights, f"label version {version.version} of {manifest.url}")
    index = LabelIndex(
        version=version,
        digest=_digest_of(version_digest(version), weigh is not None),
        _places=table.select(list(_PLACE)),
        _sizes=np.stack([np.asarray(table.column(c), np.int32) for c in ("width", "height")], 1),
        _by_people=by_people,
        _first=np.concatenate([[0], np.cumsum(counts)]),
        _boxes=boxes,
        _category_ids=category_ids,
        _weights=weights,
        _ignore=np.asarray(flat.field("ignore").to_numpy(zero_copy_only=False), np.bool_),
        _human=human,
        _stored=None,
    )
    return _with_stored(manifest, index) if stored else index


def _check_weights(weights: NDArray[np.float32], where: str) -> None:
    wrong = ~((weights >= 0) & (weights <= 1))  # NaN is neither
    if wrong.any():
        raise SourceError(
            f"{int(wrong.sum())} of {len(weights)} boxes of {where} have a weight that is no "
            f"probability, such as {weights[wrong][0]}",
            hint="make another version with `labelfleet decide`, or train with `weights: false`",
        )


def _digest_of(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def version_digest(version: LabelVersion) -> str:
    """Return 16 hex digits of what a version's labels and weights depend on."""
    parts = [(part.key, part.rows, part.sha256) for part in version.parts]
    # Parts of an older labelfleet have no digest: the writer's id names their content.
    writer = "" if all(part.sha256 for part in version.parts) else version.attempt
    categories = [(c.id, c.name) for c in version.categories]
    text = json.dumps([parts, writer, version.policy, categories])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_stored(manifest: Manifest, index: LabelIndex) -> LabelIndex:
    """Join each box of the model with its row in the run."""
    stored: Stored | None = None
    for numbers, rows in _by_shard(manifest, index):
        for number in numbers:
            found = rows.get(index._places.column("image_id")[number].as_py())
            if found is None or found.sha256 != index._places.column("sha256")[number].as_py():
                continue
            if stored is None:
                stored = _nothing(len(index._boxes), found.topk_ids.shape[1])
            _join(index, number, found, stored)
    if stored is None:
        stored = _nothing(len(index._boxes), 1)
    return replace(index, _stored=stored)


@dataclass(frozen=True, slots=True)
class _Row:
    sha256: str
    boxes: NDArray[np.float32]
    category_ids: NDArray[np.int16]
    topk_ids: NDArray[np.int16]
    topk_scores: NDArray[np.float32]
    spread: NDArray[np.float32]


def _by_shard(
    manifest: Manifest, index: LabelIndex
) -> Iterator[tuple[NDArray[np.int64], dict[str, _Row]]]:
    coded = index._places.column("shard_id").combine_chunks().dictionary_encode()
    coded = coded.chunk(0) if isinstance(coded, pa.ChunkedArray) else coded
    codes = np.asarray(coded.indices)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(coded.dictionary)))
    for number, shard_id in enumerate(coded.dictionary.to_pylist()):
        try:
            rows = _rows_of(manifest, shard_id)
        except ObjectNotFound:
            continue  # labelled by answers alone, or removed since
        yield order[ends[number - 1] if number else 0 : ends[number]], rows


def _rows_of(manifest: Manifest, shard_id: str) -> dict[str, _Row]:
    columns = ["image_id", "sha256", "detections"]
    found: dict[str, _Row] = {}
    for table in read_tables(manifest.store, annotation_key(shard_id), columns):
        lists = table.column("detections").combine_chunks()
        lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
        flat = lists.flatten()
        total = len(flat)
        boxes = np.asarray(flat.field("bbox").flatten(), np.float32).reshape(-1, 4)
        category_ids = np.asarray(flat.field("category_id"), np.int16)
        topk_ids = _matrix(flat.field("topk_ids"), total).astype(np.int16)
        topk_scores = _matrix(flat.field("topk_scores"), total).astype(np.float32)
        spread = _spread(flat.field("box_std"), total)
        ends = np.concatenate([[0], np.cumsum(np.asarray(lists.value_lengths(), np.int64))])
        ids, digests = table.column("image_id").to_pylist(), table.column("sha256").to_pylist()
        for k, (image_id, digest) in enumerate(zip(ids, digests, strict=True)):
            at = slice(int(ends[k]), int(ends[k + 1]))
            found[image_id] = _Row(
                digest, boxes[at], category_ids[at], topk_ids[at], topk_scores[at], spread[at]
            )
    return found


def _matrix(array: pa.Array, rows: int) -> NDArray[np.generic]:
    values = np.asarray(array.flatten())
    return values.reshape(rows, -1) if rows else values.reshape(0, 1)


def _spread(array: pa.Array, rows: int) -> NDArray[np.float32]:
    """Return box_std [rows, 4]; NaN where it is null."""
    spread = np.full((rows, 4), np.nan, np.float32)
    known = array.is_valid().to_numpy(zero_copy_only=False)
    spread[known] = np.asarray(array.drop_null().flatten(), np.float32).reshape(-1, 4)
    return spread


def _nothing(boxes: int, k: int) -> Stored:
    return Stored(
        np.full((boxes, k), -1, np.int16),
        np.full((boxes, k), np.nan, np.float32),
        np.full((boxes, 4), np.nan, np.float32),
    )


def _join(index: LabelIndex, number: int, row: _Row, stored: Stored) -> None:
    """Find each label among the row's boxes, clipped to the image as labels are."""
    first, end = int(index._first[number]), int(index._first[number + 1])
    width, height = index._sizes[number].tolist()
    if first == end or not len(row.boxes):
        return
    boxes = clipped(row.boxes, width, height)
    same = (index._boxes[first:end, None] == boxes[None]).all(axis=2)
    same &= index._category_ids[first:end, None] == row.category_ids[None]
    here = np.flatnonzero(same.any(axis=1) & ~index._human[first:end])
    place = same[here].argmax(axis=1)
    k = min(stored.topk_ids.shape[1], row.topk_ids.shape[1])
    stored.topk_ids[first + here, :k] = row.topk_ids[place, :k]
    stored.topk_scores[first + here, :k] = row.topk_scores[place, :k]
    stored.spread[first + here] = row.spread[place]
