"""Pick images of the run's own source to calibrate and to measure on, never the same ones.

Images that the ground truth names are measured on and never calibrated on.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pipelines.config.run_config import RunConfig
from pipelines.config.source import group_shards, listed_objects
from pipelines.truth.coco_truth import join_rows, may_join, refuse_unmatched
from storage.coco.truth import Truth
from storage.errors import SourceEmpty
from storage.objects.os_errors import translating_os_errors
from storage.objects.protocols import ObjectStore
from storage.records import ImageRecord, StoredObject
from storage.shards.reading import read_shard
from storage.shards.selecting import classify, list_source
from storage.stores.open import open_store
from workers.images.letterbox import LetterboxTransform
from workers.images.prepare import OpenedImage, open_image
from workers.images.preprocessing import Preprocessing

MEASURED_MAX = 1000  # mAP moves little beyond, and each image is run many times
_SHARDS = 8  # tars that are read for a sample, at most
_SEED = 0
_LISTED = 200_000  # objects looked at for a sample


@dataclass(frozen=True, slots=True)
class Inputs:
    """Letterboxed images, on disk in a file that has no name and ends with the process.

    Attributes:
        pixels: uint8 [N, H, W, 3], RGB.
        transforms: the ways back to upright pixels.
        image_ids: their names in the run.
        sha256: over the encoded bytes of all of them.
    """

    pixels: NDArray[np.uint8]
    transforms: tuple[LetterboxTransform, ...]
    image_ids: tuple[str, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.image_ids)

    def part(self, start: int, stop: int) -> Inputs:
        """Return a selection of the images; the digest is the whole's."""
        return Inputs(
            self.pixels[start:stop],
            self.transforms[start:stop],
            self.image_ids[start:stop],
            self.sha256,
        )


def sample(
    config: RunConfig, preprocessing: Preprocessing, count: int, truth: Truth | None = None
) -> Inputs:
    """Return up to ``count`` images from across the source, the same ones every time.

    Args:
        truth: images that it names are left out.

    Raises:
        SourceEmpty: none of the images is left, or none can be read.
        StorageError: the source cannot be read.
    """
    store = open_store(config.source.url, config.storage.options())
    listed = islice(listed_objects(config), _LISTED)
    chosen = _drawn(listed, max(4 * count, _SHARDS))
    records = _without(truth, _spread(store, chosen, config, count))
    found = _prepared(records, preprocessing, config.max_pixels, count)
    if not len(found):
        raise SourceEmpty(
            f"no image of {store.url} can be used to compile the model"
            + (": the ground truth names all of them" if truth else ""),
            hint="images that are measured on are never calibrated on: give ground truth of fewer",
        )
    return found


def measured(
    config: RunConfig, preprocessing: Preprocessing, truth: Truth
) -> tuple[Inputs, tuple[int, ...]]:
    """Return the images that ground truth names, and their indices in it; at most 1,000, evenly.

    They are looked for in the whole source, whatever include, exclude and keys say.

    Raises:
        TruthMismatch: names that the source does not have, or has several times.
    """
    store = open_store(config.source.url, config.storage.options())
    objects = list(list_source(store, kind=config.source.kind))
    rows = list(_names(store, objects))
    join = join_rows(truth, ((image_id, "") for image_id, _ in rows))
    refuse_unmatched(truth, join, hint="is this the ground truth of this source?")
    kept = dict(sorted(join.image_of_row.items(), key=lambda item: item[1]))
    every = max(1, -(-len(kept) // MEASURED_MAX))
    wanted = dict(list(kept.items())[::every])
    holders = {listed.key: listed for image_id, listed in rows if image_id in wanted}
    records = (r for r in _records(store, holders.values(), config) if r.image_id in wanted)
    found = _prepared(records, preprocessing, config.max_pixels, len(wanted))
    return found, tuple(wanted[image_id] for image_id in found.image_ids)


def unseen(truth: Truth, image_ids: Iterable[str]) -> Truth:
    """Return the ground truth less these images, by their names in the run."""
    names = may_join(truth)
    seen = {index for image_id in image_ids for index in names(image_id)}
    kept = [index for index in range(len(truth.images)) if index not in seen]
    return replace(
        truth,
        images=tuple(truth.images[index] for index in kept),
        boxes=tuple(truth.boxes[index] for index in kept),
        regions=tuple(truth.regions_of(index) for index in kept) if truth.regions else (),
    )


def _drawn(objects: Iterable[StoredObject], count: int) -> list[StoredObject]:
    """Draw a reservoir sample of ``count`` objects, in a seeded order."""
    rng = random.Random(_SEED)
    kept: list[StoredObject] = []
    for seen, listed in enumerate(objects):
        if len(kept) < count:
            kept.append(listed)
        elif (place := rng.randrange(seen + 1)) < count:
            kept[place] = listed
    rng.shuffle(kept)
    return kept


def _spread(
    store: ObjectStore, chosen: Sequence[StoredObject], config: RunConfig, count: int
) -> Iterator[ImageRecord]:
    """Loose images as drawn; of the first tars, equal shares in turn, then the rest of each."""
    tars = [o for o in chosen if classify(o.key) == "tar"][:_SHARDS]
    loose = [o for o in chosen if classify(o.key) == "image"]
    share = -(-count // len(tars)) if tars else 0
    streams = [iter(_records(store, [tar], config)) for tar in tars]
    for stream in streams:
        yield from islice(stream, share)
    yield from _records(store, loose, config)
    for stream in streams:
        yield from stream


def _records(
    store: ObjectStore, objects: Iterable[StoredObject], config: RunConfig
) -> Iterator[ImageRecord]:
    for shard in group_shards(objects, 32):
        yield from read_shard(store, shard, max_image_bytes=config.max_image_bytes)


def _names(
    store: ObjectStore, objects: Sequence[StoredObject]
) -> Iterator[tuple[str, StoredObject]]:
    """(image id, object that holds it) of all images; of tars only the headers are read."""
    for listed in objects:
        if classify(listed.key) == "image":
            yield listed.key, listed
            continue
        for shard in group_shards([listed], 1):
            for record in read_shard(store, shard, max_image_bytes=0):
                yield record.image_id, listed


def _without(truth: Truth | None, records: Iterable[ImageRecord]) -> Iterator[ImageRecord]:
    names = may_join(truth) if truth else None
    for record in records:
        if names is None or not names(record.image_id):
            yield record


def _prepared(
    records: Iterable[ImageRecord], preprocessing: Preprocessing, max_pixels: int, count: int
) -> Inputs:
    """Decode until there are ``count``; what cannot be decoded is passed over.

    Raises:
        StorageFull: the temporary folder has no space for them.
    """
    transforms: list[LetterboxTransform] = []
    ids: list[str] = []
    digest = hashlib.sha256()
    with tempfile.TemporaryFile() as file:
        shape = (max(1, count), *preprocessing.size, 3)
        pixels: NDArray[np.uint8] = np.memmap(file, np.uint8, "w+", shape=shape)
        for record in records:
            opened = open_image(record, "", preprocessing, max_pixels)
            if not isinstance(opened, OpenedImage):
                continue
            _take_room(file.fileno(), len(ids), pixels[0].nbytes)
            placed = opened.place(preprocessing, pixels[len(ids)])
            if isinstance(placed, LetterboxTransform):
                ids.append(opened.ref.image_id)
                transforms.append(placed)
                digest.update(opened.ref.sha256.encode())
            if len(ids) == count:
                break
    return Inputs(pixels[: len(ids)], tuple(transforms), tuple(ids), digest.hexdigest())


def _take_room(file: int, number: int, nbytes: int) -> None:
    """Take the room of one image: a mapped file that runs out of disk would end the process."""
    with translating_os_errors(f"images in {tempfile.gettempdir()}"):
        os.posix_fallocate(file, number * nbytes, nbytes)
