"""The data of a training: COCO sets and label versions, with one list of classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipelines.policy.policy import Policy
from pipelines.training.config import CacheConfig, DataConfig, SourceConfig, TrainConfig
from pipelines.training.silence import silent_classes
from storage.errors import ConfigError, SourceEmpty
from storage.labels.images import StreamImages
from storage.labels.stream import LabelIndex, read_label_index, version_digest
from storage.labels.versions import LabelVersion, read_version, read_version_file
from storage.runs.manifest import Manifest
from storage.shards.node_cache import NodeCache
from storage.stores.open import open_store
from workers.local_folders import cache_folder
from workers.training.coco_set import TrainingSet, read_training_set
from workers.training.distributed import Team
from workers.training.label_stream import LabelStream
from workers.training.samples import Mixture, Samples
from workers.training.usable import TrainingImage

CHECKED_NAME = "checked_images.json"


@dataclass(frozen=True, slots=True)
class TrainData:
    """What is learned, validated and tested.

    Attributes:
        train: what is learned.
        sets: COCO sets by part: ``train`` (or ``train 0``, …), ``val`` and ``test <name>``.
        sources: what each source of a list is: name, digest, images, boxes and share.
    """

    train: Samples
    sets: Mapping[str, TrainingSet]
    sources: tuple[dict[str, object], ...] = ()


def pinned(config: TrainConfig) -> TrainConfig:
    """Return the config with the version that each `latest` is now, so that it is looked up once.

    The leading process decides for all that train together: a new version may appear meanwhile.

    Raises:
        ConfigError: as ``label_digests``.
    """
    if all(source.labels is None for source in config.sources):
        return config
    team = Team.joined()
    names = team.told([_version_now(source, config) for source in config.sources])
    sources = tuple(
        one if name is None else one.model_copy(update={"version": name})
        for one, name in zip(config.sources, names or (), strict=True)
    )
    return config.model_copy(update={"train": sources})


def _version_now(source: SourceConfig, config: TrainConfig) -> str | None:
    if source.labels is None or not Team.joined().leads:
        return None
    manifest = Manifest.open(source.labels, config.storage.options())
    return read_version(manifest.store, source.version).version


def label_digests(config: TrainConfig) -> dict[str, str]:
    """Return the content digests of the label versions that are learned, by source.

    Raises:
        ConfigError: there is no such run, or no such version; the message names those there are.
    """
    found = {}
    for number, source in enumerate(config.sources):
        if source.labels is not None:
            manifest = Manifest.open(source.labels, config.storage.options())
            digest = version_digest(read_version(manifest.store, source.version))
            found[f"labels of source {number}"] = digest
    return found


def read_data(config: TrainConfig, *, stored: bool = False) -> TrainData:
    """Read all parts of a training, with the same classes in the same order.

    Args:
        stored: label versions bring the class scores and spreads of their run's rows.

    Raises:
        ConfigError: classes differ, a version does not exist, or the cache is too small.
        SourceError: images or shards are gone or changed since they were labelled.
        SourceEmpty: there is nothing to learn.
    """
    if isinstance(config.train, DataConfig):
        train = _read_set(config.train, config)
        rest = _held_out(config)
        for part, found in rest.items():
            if found.classes != train.classes:
                raise ConfigError(
                    f"{part} has the classes {list(found.classes)}, "
                    f"train has {list(train.classes)}",
                    hint="list the same categories in the same order in both files",
                )
        facts = {"source": str(config.train.annotations), "digest": train.digest,
                 "images": len(train), "objects": train.objects}  # fmt: skip
        return TrainData(train, {"train": train, **rest}, (facts,))
    opened = [_opened(source, config) for source in config.train]
    names, ids = _renamed(opened[0])
    reading = _Reading(config, stored, _cache(config.cache))
    made = [_made(one, opened[0], names, ids, reading) for one in opened]
    sets = {f"train {n}": one for n, one in enumerate(made) if isinstance(one, TrainingSet)}
    for part, found in _held_out(config).items():
        sets[part] = _with_classes(found, part, {}, opened[0], names, ids)
    shares = tuple(one.share for one in config.train if one.share is not None)
    train_all = Mixture(tuple(made), shares or None)
    if train_all.objects == 0:
        raise SourceEmpty(
            f"{_and(one.shown for one in config.train)}: {len(train_all)} images, but no box to "
            "learn",
            hint="check the policy that the labels were decided by",
        )
    return TrainData(train_all, sets, tuple(_facts(one, made[n]) for n, one in enumerate(opened)))


@dataclass(frozen=True, slots=True)
class _Opened:
    """A source before its images are read: a COCO set, or a version of a run."""

    config: SourceConfig
    classes: tuple[str, ...]
    official_ids: tuple[int, ...]
    found: TrainingSet | tuple[Manifest, LabelVersion]


@dataclass(slots=True)
class _Reading:
    """How the images of label versions are read, with one cache for all of them.

    Attributes:
        stored: the versions bring the class scores and spreads of their run's rows.
        taken: bytes of the cache that the versions so far need.
    """

    config: TrainConfig
    stored: bool
    cache: NodeCache | None
    taken: int = 0

    def images(self, manifest: Manifest, labels: LabelIndex) -> StreamImages:
        """Return the images of one more version. Raises as ``read_data``."""
        source = open_store(str(manifest.record.source["url"]), self.config.storage.options())
        found = StreamImages(manifest, source, labels, self.cache, self.taken)
        found.check()
        self.taken += found.needs
        return found


def _opened(source: SourceConfig, config: TrainConfig) -> _Opened:
    if source.labels is not None:
        manifest = Manifest.open(source.labels, config.storage.options())
        version = read_version(manifest.store, source.version)
        names = tuple(c.name for c in version.categories)
        ids = tuple(c.official_id for c in version.categories)
        return _Opened(source, names, ids, (manifest, version))
    data = DataConfig.model_validate(source.model_dump(include={"annotations", "images"}))
    found = _read_set(data, config)
    return _Opened(source, found.classes, found.official_ids, found)


def _made(
    one: _Opened,
    first: _Opened,
    names: tuple[str, ...],
    ids: tuple[int, ...],
    reading: _Reading,
) -> TrainingSet | LabelStream:
    if isinstance(one.found, TrainingSet):
        return _with_classes(one.found, one.config.shown, one.config.classes, first, names, ids)
    index = class_index(one.classes, one.config.classes, one.config.shown, names, first)
    manifest, version = one.found
    policy = _policy(manifest, version)
    weigh = policy.thresholds(version.categories).probability if one.config.weights else None
    labels = read_label_index(manifest, version, weigh=weigh, stored=reading.stored)
    images = reading.images(manifest, labels)
    why = _silent(policy, version, one.config)
    silent = {int(index[number]): said for number, said in why.items() if index[number] >= 0}
    return LabelStream(labels, images, names, ids, index, one.config.ignore_band, silent)


def _policy(manifest: Manifest, version: LabelVersion) -> Policy:
    """Return the policy that the version was decided by."""
    where = f"{manifest.url}/{version.prefix}policy.yaml"
    raw = read_version_file(manifest.store, version, "policy.yaml")
    return Policy.from_yaml(raw, where=where)


def _silent(policy: Policy, version: LabelVersion, config: SourceConfig) -> dict[int, str]:
    """Return the classes whose absence the version's images do not teach, and why."""
    if config.absence_from is None:
        return {}
    return silent_classes(policy, version.categories, config.absence_from)


def _cache(config: CacheConfig | None) -> NodeCache | None:
    if config is None:
        return None
    return NodeCache(config.dir or cache_folder() / "images", int(config.size))


def _held_out(config: TrainConfig) -> dict[str, TrainingSet]:
    parts = {"val": config.val, **{f"test {name}": data for name, data in config.test.items()}}
    return {part: _read_set(data, config) for part, data in parts.items()}


def _read_set(data: DataConfig, config: TrainConfig) -> TrainingSet:
    return read_training_set(
        data.annotations,
        data.images,
        ignore_categories=config.ignore_categories,
        max_bad_share=config.max_bad_share,
        checked=config.output / CHECKED_NAME,
    )


def _renamed(one: _Opened) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the classes of the first source under their new names: those of the training."""
    found: dict[str, int] = {}
    for name, official in zip(one.classes, one.official_ids, strict=True):
        new = one.config.classes.get(name, name)
        if new is not None:
            found.setdefault(new, official)
    return tuple(found), tuple(found.values())


def class_index(
    classes: Sequence[str],
    renamed: Mapping[str, str | None],
    shown: str,
    names: Sequence[str],
    first: _Opened,
) -> NDArray[np.int64]:
    """Return the training's class of each class of a source; -1: it is ignored.

    Raises:
        ConfigError: the classes are others than the training's, naming both sources.
    """
    unknown = sorted(set(renamed) - set(classes))
    if unknown:
        raise ConfigError(
            f"{shown} has no class {_and(unknown)}, which its `classes` rename",
            hint=f"it has {', '.join(classes)}",
        )
    new = [renamed.get(name, name) for name in classes]
    here, there = {name for name in new if name is not None}, set(names)
    if here != there:
        apart = [
            f"only {place} has {_and(sorted(only))}"
            for place, only in ((shown, here - there), (first.config.shown, there - here))
            if only
        ]
        raise ConfigError(
            f"{shown} and {first.config.shown} differ in their classes: {'; '.join(apart)}",
            hint="rename classes of a source by `classes: {its name: other name}`; null ignores",
        )
    return np.array([-1 if name is None else list(names).index(name) for name in new], np.int64)


def _with_classes(
    found: TrainingSet,
    shown: str,
    renamed: Mapping[str, str | None],
    first: _Opened,
    names: tuple[str, ...],
    ids: tuple[int, ...],
) -> TrainingSet:
    index = class_index(found.classes, renamed, shown, names, first)
    images = tuple(_relabelled(image, index) for image in found.images)
    return replace(found, images=images, classes=names, official_ids=ids)


def _relabelled(image: TrainingImage, index: NDArray[np.int64]) -> TrainingImage:
    labels = index[image.labels]
    kept = labels >= 0
    return replace(
        image,
        boxes=image.boxes[kept],
        labels=labels[kept],
        ignore=np.concatenate([image.ignore, image.boxes[~kept]]),
    )


def silent_sources(data: TrainData) -> dict[str, dict[str, str]]:
    """Return the silent classes of each label version that has any, and why, by its source."""
    found = {}
    for source in data.sources:
        silent = source.get("silent")
        if isinstance(silent, dict):
            found[str(source["source"])] = silent
    return found


def _facts(one: _Opened, made: TrainingSet | LabelStream) -> dict[str, object]:
    facts: dict[str, object] = {
        "source": one.config.shown,
        "digest": made.digest,
        "images": len(made),
        "objects": made.objects,
        "share": one.config.share,
    }
    if isinstance(made, LabelStream):
        version = made.index.version
        facts |= {
            "version": version.version,
            "images_by_people": made.index.images_by_people,
            "model_sha256": version.run["model_sha256"],
            "licence": version.run["licence"],
            "guarantee": version.guarantee,
        }
        if made.silent:
            facts["silent"] = {made.classes[number]: why for number, why in made.silent.items()}
    return facts


def _and(names: Iterable[str]) -> str:
    return ", ".join(names)
