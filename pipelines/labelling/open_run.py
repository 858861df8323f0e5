"""From a config to a run at its output: check what can be checked before a worker starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from pipelines.config.run_config import RunConfig
from pipelines.config.source import check_places, group_shards, listed_objects
from pipelines.models.view import say
from pipelines.truth import coco_classes as coco
from storage.errors import ConfigError, ModelError, ObjectNotFound, StorageError
from storage.identity import config_hash
from storage.objects.preflight import check_output
from storage.objects.protocols import ObjectStore, normalise_url, open_store
from storage.records import Shard, StoredObject
from storage.runs.annotations import RunIdentity
from storage.runs.listing import Listing, ListingChange
from storage.runs.manifest import RUN_KEY, Manifest, RunRecord
from workers.models.resolve import resolve_model
from workers.spec import INFERENCE_VERSION, ArtefactRef, DeviceName, ModelRequest, ModelSpec

UNSTATED = "unstated"


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run that is there, and what its workers must load."""

    manifest: Manifest
    source: ObjectStore
    model: ModelSpec


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
    model = _requested(config, existing, output, cuda)
    if existing is None:
        _check_output(output)
        model = _made_ready(config, model)
    manifest = Manifest.create_or_continue(output, _record(config, model))
    return OpenRun(manifest, open_store(config.source.url, options), model)


def requested_model(config: RunConfig, *, cuda: bool) -> ModelSpec:
    """What a run of this config would load or loads: its own record counts where there is one.

    Raises:
        LabelfleetError: config and checkpoint disagree, or cannot be used.
    """
    output = open_store(config.output, config.storage.options())
    return _requested(config, _existing(output), output, cuda)


def _requested(
    config: RunConfig, existing: RunRecord | None, output: ObjectStore, cuda: bool
) -> ModelSpec:
    device = _device(existing, cuda)
    model = resolve_model(_request(config, existing), config.storage.options(), device=device)
    if existing is None:
        return model
    return replace(model, artefact=_recorded_artefact(existing, output))


def _check_output(output: ObjectStore) -> None:
    try:
        check_output(output)
    except StorageError as exc:
        hint = exc.hint or "check `output`, and who may write there"
        raise type(exc)(f"the output cannot be used: {exc.message}", hint=hint) from exc


def refresh_listing(
    run: OpenRun, config: RunConfig, found: Callable[[Shard], None] = lambda shard: None
) -> tuple[Listing, ListingChange]:
    """List the source again and append what is new, changed or gone.

    Args:
        found: told of every new shard, while the listing goes on.
    """
    listing = Listing(run.manifest.store)

    def group(objects: Iterable[StoredObject]) -> Iterator[Shard]:
        for shard in group_shards(objects, config.source.shard_size):
            found(shard)
            yield shard

    return listing, listing.refresh(listed_objects(config), group)


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
    if existing is None:
        return request
    # What `auto` meant was settled when the run was created.
    if request.runtime == "auto":
        request = replace(request, runtime=existing.inference.get("runtime", "auto"))
    if request.precision == "auto":
        request = replace(request, precision=existing.inference.get("precision", "auto"))
    return request


def _made_ready(config: RunConfig, model: ModelSpec) -> ModelSpec:
    """With its artefact; where `runtime: auto` chose one that does not work out, on torch."""
    from pipelines.models.compile import with_artefact  # torch, and more

    try:
        return with_artefact(config, model, say=say)
    except ModelError as exc:
        if config.model.runtime != "auto" or model.precision == "int8":
            raise
        say(f"{model.runtime} does not work out here, so torch is used: {exc.message}")
        return replace(model, runtime="torch")


def _recorded_artefact(existing: RunRecord, output: ObjectStore) -> ArtefactRef | None:
    recorded = existing.inference.get("artefact")
    if recorded is None:
        return None
    url = recorded["url"] if "url" in recorded else f"{output.url}/{recorded['key']}"
    return ArtefactRef(url, recorded["sha256"])


def _artefact_settings(ref: ArtefactRef, output: str) -> dict[str, str]:
    """By key where it lies below the output, so that a run can be moved as a whole."""
    inside = ref.url.removeprefix(f"{output}/")
    place = {"url": ref.url} if inside == ref.url else {"key": inside}
    return {**place, "sha256": ref.sha256}


def inference_settings(config: RunConfig, model: ModelSpec) -> dict[str, Any]:
    """Every setting that moves a box or a status; where the weights lie is not one of them."""
    settings = asdict(model)
    settings.pop("checkpoint")
    settings.pop("artefact")
    if model.artefact is not None:
        output = open_store(config.output, config.storage.options())
        settings["artefact"] = _artefact_settings(model.artefact, output.url)
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
