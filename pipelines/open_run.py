"""From a config to a run at its output: check what can be checked before a worker starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from pipelines import coco
from pipelines.config import RunConfig
from pipelines.keys import read_keys
from storage.annotations import RunIdentity
from storage.errors import ConfigError, ObjectNotFound, SourceEmpty, StorageError
from storage.identity import config_hash
from storage.listing import Listing, ListingChange
from storage.manifest import RUN_KEY, Manifest, RunRecord
from storage.objects import ObjectStore, normalise_url, open_store, overlaps
from storage.preflight import check_output
from storage.records import Shard, StoredObject
from storage.shards import classify, group_images, list_source, tar_shards
from workers.checkpoints import resolve_model
from workers.spec import INFERENCE_VERSION, DeviceName, ModelRequest, ModelSpec

UNSTATED = "unstated"


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run that is there, and what its workers must load."""

    manifest: Manifest
    source: ObjectStore
    model: ModelSpec


def check_places(config: RunConfig) -> None:
    """Refuse an output inside the source or around it, or in memory. Raises ConfigError."""
    for url in (config.source.url, config.output):
        if normalise_url(url).startswith("memory:"):
            raise ConfigError(
                f"{url} lies in the memory of one process, where no worker finds it",
                hint="use a folder, file:// or s3://",
            )
    if overlaps(config.source.url, config.output):
        raise ConfigError(
            f"output {config.output} and source {config.source.url} overlap",
            hint="results below the source would be listed as images: choose an output beside it",
        )


def listed_objects(config: RunConfig) -> Iterator[StoredObject]:
    """Every object of the source to label, ordered by key.

    Raises:
        SourceEmpty: there is none.
        StorageError: the source cannot be listed.
    """
    options = config.storage.options()
    source = open_store(config.source.url, options)
    part = config.source
    found = list_source(source, kind=part.kind, include=part.include, exclude=part.exclude)
    if part.keys is not None:
        wanted = read_keys(part.keys, options)
        found = (o for o in found if o.key in wanted)
    first = next(found, None)
    if first is None:
        what = {"tar": "tar shards", "images": "images", "auto": "images or tar shards"}[part.kind]
        raise SourceEmpty(
            f"no {what} at {source.url}" + (" that match include/exclude/keys" * _filtered(config)),
            hint="check the URL and the filters; `labelfleet plan CONFIG` shows what is found",
        )
    yield first
    yield from found


def _filtered(config: RunConfig) -> bool:
    return bool(config.source.include or config.source.exclude or config.source.keys)


def group_shards(objects: Iterable[StoredObject], shard_size: int) -> Iterator[Shard]:
    """Tars as they are, loose images in groups; both in the order of the listing."""
    loose: list[StoredObject] = []
    for listed in objects:
        if classify(listed.key) == "tar":
            yield from tar_shards([listed])
        else:
            loose.append(listed)
            if len(loose) == shard_size:
                yield from group_images(loose, shard_size)
                loose = []
    yield from group_images(loose, shard_size)


def open_run(config: RunConfig, *, cuda: bool) -> OpenRun:
    """Create the run, or continue the one that is there.

    Args:
        config: what is asked for.
        cuda: whether the workers have GPUs; settled when the run is created.

    Raises:
        LabelfleetError: whatever will not work, before any worker is started.
    """
    check_places(config)
    next(iter(listed_objects(config)))  # nothing is created for a source that is not there
    options = config.storage.options()
    output = open_store(config.output, options)
    existing = _existing(output)
    model = resolve_model(_request(config, existing), options, device=_device(existing, cuda))
    if existing is None:
        _check_output(output)
    manifest = Manifest.create_or_continue(output, _record(config, model))
    return OpenRun(manifest, open_store(config.source.url, options), model)


def _check_output(output: ObjectStore) -> None:
    try:
        check_output(output)
    except StorageError as exc:
        hint = exc.hint or "check `output`, and who may write there"
        raise type(exc)(f"the output cannot be used: {exc.message}", hint=hint) from exc


def refresh_listing(run: OpenRun, config: RunConfig) -> tuple[Listing, ListingChange]:
    """List the source again and append what is new, changed or gone."""
    listing = Listing(run.manifest.store)
    size = config.source.shard_size
    change = listing.refresh(listed_objects(config), lambda objects: group_shards(objects, size))
    return listing, change


def _existing(output: ObjectStore) -> RunRecord | None:
    try:
        return RunRecord.from_json(output.get(RUN_KEY))
    except ObjectNotFound:
        return None


def _device(existing: RunRecord | None, cuda: bool) -> DeviceName:
    wanted: DeviceName = "cuda" if cuda else "cpu"
    recorded: DeviceName = existing.inference.get("device", wanted) if existing else wanted
    if recorded == "cuda" and not cuda:
        raise ConfigError(
            "the run was created on GPUs, and there is none here",
            hint="continue it where there are GPUs, or choose another output",
        )
    return recorded


def model_request(config: RunConfig) -> ModelRequest:
    """The model section as the worker layer wants it."""
    part = config.model
    size = part.image_size
    return ModelRequest(
        checkpoint=normalise_url(part.checkpoint),  # a worker may run in another folder
        name=part.name,
        arch=part.arch,
        sha256=part.sha256,
        classes=coco.CLASSES if part.classes == "coco" else part.classes,
        image_size=(size, size) if isinstance(size, int) else size,
        keep=part.keep,
        runtime=part.runtime,
        precision=part.precision,
        score_floor=part.score_floor,
        nms_iou=part.nms_iou,
        max_detections=part.max_detections,
    )


def _request(config: RunConfig, existing: RunRecord | None) -> ModelRequest:
    request = model_request(config)
    if existing is None or request.precision != "auto":
        return request
    # What `auto` meant was settled when the run was created.
    fields = {name: getattr(request, name) for name in ModelRequest.__dataclass_fields__}
    return ModelRequest(**{**fields, "precision": existing.inference.get("precision", "auto")})


def inference_settings(config: RunConfig, model: ModelSpec) -> dict[str, Any]:
    """Every setting that moves a box or a status; where the weights lie is not one of them."""
    settings = asdict(model)
    settings.pop("checkpoint")
    settings["inference_version"] = INFERENCE_VERSION
    settings["max_pixels"] = config.max_pixels
    settings["max_image_bytes"] = config.max_image_bytes
    return settings


def _record(config: RunConfig, model: ModelSpec) -> RunRecord:
    inference = inference_settings(config, model)
    identity = RunIdentity(
        name=config.name,
        config_hash=config_hash(inference),
        model_sha256=model.sha256,
        licence=config.model.licence or model.licence or UNSTATED,
        runtime=model.runtime,
        precision=model.precision,
        code_version=version("labelfleet"),
        categories=coco.categories_for(model.classes),
    )
    source = {
        "url": normalise_url(config.source.url),
        "kind": config.source.kind,
        "include": list(config.source.include),
        "exclude": list(config.source.exclude),
        "shard_size": config.source.shard_size,
    }
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    return RunRecord(identity, source, inference, created_at)
