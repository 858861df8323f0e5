"""Estimate a run and what is left of it, from listings, a few tars and the ledger."""

from __future__ import annotations

import random
from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.config.files import check_files
from pipelines.config.run_config import RunConfig
from pipelines.config.source import check_places, group_shards, listed_objects
from pipelines.labelling.published import published_lines
from pipelines.runs.pace import MeasuredPace, measured_pace
from pipelines.runs.status import status_and_pace
from storage.errors import (
    InvalidRow,
    LabelfleetError,
    ObjectNotFound,
    ObjectUnreadable,
    SourceError,
    SourceTruncated,
    StorageError,
)
from storage.records import Shard, StoredObject
from storage.runs.listing import Listing
from storage.runs.listing_changes import is_same
from storage.runs.manifest import RUN_KEY, Manifest, RunRecord
from storage.shards.frames import Frames
from storage.shards.reading import SupportsShards, read_shard
from storage.shards.selecting import LeftOut
from storage.stores.open import open_store

_SAMPLED_TARS = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """Estimate of a run. Attributes ending in ``_left`` exclude what the run has committed.

    Attributes:
        shards, images, gib: of the source as it is listed now.
        images_exact: False when the images in tars were estimated from a sample.
        images_per_s: of the newest invocation that labelled anything, of this run or of the one
            that it is planned like, all its ``measured_workers`` together; None: not measured.
        hours_left, cost_left: at that pace, on as many GPUs; None without a measured pace, a
            price, or a GPU.
        hours_second, cost_second: of another run over all images of the source at that pace, such
            as a second opinion for `labelfleet fuse`.
        like: URL of the run whose pace counts, where it is not this one.
        published: what speeds published for this network say, where the run was not measured.
        missing: images that could not be read when they were labelled; the next run looks again.
            None where some results cannot be read.
        unreadable: why sampled tars cannot be read; a run puts them in quarantine.
        model_remarks: for people, about the model, or why it cannot be used.
        exit_code: of the process; not 0 where the model cannot be used, and a run would end so.
    """

    shards: int
    images: int
    gib: float
    images_exact: bool
    shards_left: int
    images_left: int
    gib_left: float
    images_per_s: float | None
    measured_workers: int | None
    hours_left: float | None
    cost_left: float | None
    output: str
    output_exists: bool
    model_remarks: tuple[str, ...] = ()
    exit_code: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    hours_second: float | None = None
    cost_second: float | None = None
    like: str | None = None
    published: tuple[str, ...] = ()
    missing: int | None = 0
    unreadable: tuple[str, ...] = ()

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(slots=True)
class _Count:
    shards: int = 0
    loose: int = 0
    tars: int = 0
    nbytes: int = 0
    tar_nbytes: int = 0

    def add(self, shard: Shard, nbytes: int, *, first: bool) -> None:
        self.shards += first
        self.nbytes += nbytes
        if shard.kind == "tar":
            self.tars += 1
            self.tar_nbytes += nbytes
        else:
            self.loose += len(shard.objects)


class _Sample:
    """A uniform sample of the tars (reservoir sampling), and the images counted in them."""

    def __init__(self) -> None:
        self.tars: list[Shard] = []
        self.unreadable: list[str] = []
        self._images: list[int] = []
        self._offered = 0
        self._random = random.Random(0)  # the same plan twice

    def offer(self, tar: Shard) -> None:
        self._offered += 1
        if len(self.tars) < _SAMPLED_TARS:
            self.tars.append(tar)
        elif (place := self._random.randrange(self._offered)) < _SAMPLED_TARS:
            self.tars[place] = tar

    def count(self, source: SupportsShards, max_image_bytes: int, frames: Frames | None) -> None:
        """Count the images; none in a tar that alone cannot be read, which ends no run either."""
        for tar in self.tars:
            images = 0
            try:
                images = _count_images(source, tar, max_image_bytes, frames)
            except (SourceError, ObjectUnreadable) as exc:
                self.unreadable.append(exc.message)
            self._images.append(images)

    def estimate(self, tar_nbytes: int, *, without: Set[str] = frozenset()) -> int:
        """Estimate the images in tars of this size: exact where sampled, by density elsewhere."""
        nbytes = sum(tar.nbytes for tar in self.tars)
        per_byte = sum(self._images) / nbytes if nbytes else 0.0
        counted = [(t, n) for t, n in zip(self.tars, self._images, strict=True)
                   if t.shard_id not in without]  # fmt: skip
        beyond = tar_nbytes - sum(tar.nbytes for tar, _ in counted)
        return sum(n for _, n in counted) + round(beyond * per_byte)


class _Survey:
    """Adds up shards; a group of loose images may arrive one image at a time."""

    def __init__(self, committed: set[str]) -> None:
        self.committed = committed
        self.left_out = LeftOut()
        self.everything, self.left, self.sample = _Count(), _Count(), _Sample()
        self._groups: set[int] = set()  # those seen, by their ids as numbers

    def add(self, shard: Shard) -> None:
        nbytes, first = shard.nbytes, True
        if shard.kind == "tar":
            self.sample.offer(shard)
        else:
            group = int(shard.shard_id, 16)
            first = group not in self._groups
            self._groups.add(group)
        self.everything.add(shard, nbytes, first=first)
        if shard.shard_id not in self.committed:
            self.left.add(shard, nbytes, first=first)


def plan_run(config: RunConfig, like: Manifest | None = None) -> Plan:
    """Estimate a run.

    Args:
        like: a measured run whose pace counts while this one has none of its own.

    Raises:
        RunMismatch: the output holds a run of another source, model or setting.
        LabelfleetError: what else would stop the run at its start: source, output.
    """
    check_places(config)
    check_files(config)
    options = config.storage.options()
    manifest = _existing(config)
    remarks, exit_code = _model_remarks(config)
    if manifest is not None and not exit_code:
        _refuse_other_run(config, manifest)
    survey = _survey(config, manifest)
    everything, left, sample = survey.everything, survey.left, survey.sample
    frames = _frames(config)
    sample.count(open_store(config.source.url, options), config.max_image_bytes, frames)
    images_left = left.loose + sample.estimate(left.tar_nbytes, without=survey.committed)
    images = everything.loose + sample.estimate(everything.tar_nbytes)
    missing, own = _past(manifest) if manifest else (0, None)
    pace = own or (measured_pace(like) if like else None)
    hours, second = _hours(images_left, pace), _hours(images, pace)
    return Plan(
        shards=everything.shards,
        images=images,
        gib=everything.nbytes / 2**30,
        images_exact=everything.tars <= len(sample.tars)
        and (frames is None or not everything.loose),
        shards_left=left.shards,
        images_left=images_left,
        gib_left=left.nbytes / 2**30,
        images_per_s=pace.images_per_s if pace else None,
        measured_workers=pace.workers if pace else None,
        hours_left=hours,
        cost_left=_cost(hours, pace, config.price_per_gpu_hour),
        output=open_store(config.output, options).url,
        output_exists=manifest is not None,
        model_remarks=remarks,
        exit_code=exit_code,
        left_out=dict(survey.left_out.counts),
        hours_second=second,
        cost_second=_cost(second, pace, config.price_per_gpu_hour),
        published=() if pace else _published(config, images_left),
        missing=missing,
        unreadable=tuple(sample.unreadable),
        like=like.url if like is not None and own is None and pace is not None else None,
    )


def _frames(config: RunConfig) -> Frames | None:
    if config.source.frames == "first":
        return None
    from workers.images.frames import frames_of  # decoders, which other plans do not need

    return frames_of(config.source.max_frames, config.max_pixels)


def _published(config: RunConfig, images: int) -> tuple[str, ...]:
    """Return what is published of the network as it was released."""
    model = config.model
    released = model.arch is None and model.image_size in (None, 640, (640, 640)) and not model.view
    name = model.name if released else None
    return tuple(published_lines(name, images, config.price_per_gpu_hour))


def _hours(images: int, pace: MeasuredPace | None) -> float | None:
    return images / pace.images_per_s / 3600 if pace else None


def _model_remarks(config: RunConfig) -> tuple[tuple[str, ...], int]:
    from pipelines.models.requested import model_request  # torch, which a plan needs only here
    from workers.models.resolve import remarks_on

    try:
        return remarks_on(model_request(config), config.storage.options()), 0
    except LabelfleetError as exc:
        hint = f"; {exc.hint}" if exc.hint else ""
        return (f"the model cannot be used: {exc.message}{hint}",), exc.exit_code


def _past(manifest: Manifest) -> tuple[int | None, MeasuredPace | None]:
    """Return how many images were missing, and the run's own pace."""
    try:
        status, pace = status_and_pace(manifest)
    except (StorageError, InvalidRow):  # damaged results stop no run, and no plan
        return None, measured_pace(manifest)
    return status.images["missing"], pace


def _refuse_other_run(config: RunConfig, manifest: Manifest) -> None:
    from pipelines.labelling.open_run import refuse_other_run  # torch, as above

    refuse_other_run(config, manifest)


def _cost(hours: float | None, pace: MeasuredPace | None, price: float | None) -> float | None:
    if hours is None or pace is None or price is None or not pace.gpus:
        return None
    return hours * pace.gpus * price


def _existing(config: RunConfig) -> Manifest | None:
    store = open_store(config.output, config.storage.options())
    try:
        return Manifest(store, RunRecord.from_json(store.get(RUN_KEY)))
    except ObjectNotFound:
        return None  # not created yet


def _survey(config: RunConfig, manifest: Manifest | None) -> _Survey:
    """The shards as the run would have them: what it listed stays as grouped, the rest is grouped
    anew. One pass by key over the source and all listings, whatever their size."""
    survey = _Survey(manifest.committed() if manifest else set())
    listed = listed_objects(config, survey.left_out)
    fresh = listed if manifest is None else _fresh(listed, manifest, survey)
    for shard in group_shards(fresh, config.source.shard_size):
        survey.add(shard)
    return survey


def _fresh(
    listed: Iterator[StoredObject], manifest: Manifest, survey: _Survey
) -> Iterator[StoredObject]:
    """Yield new and changed objects; add the unchanged ones to the survey."""
    for new, known in Listing(manifest.store).joined(listed):
        if new is None:
            continue  # gone since: not labelled any more
        if known is not None and is_same(new, known):
            survey.add(Shard(known.shard_id, known.kind, (new,)))
        else:
            yield new


def _count_images(
    source: SupportsShards, tar: Shard, max_image_bytes: int, frames: Frames | None
) -> int:
    images = 0
    try:
        for _ in read_shard(source, tar, max_image_bytes=max_image_bytes, frames=frames):
            images += 1
    except SourceTruncated:
        pass  # the run will say so; what is readable counts
    return images
