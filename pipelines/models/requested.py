"""Resolve the model that a config asks for."""

from __future__ import annotations

from dataclasses import replace

from pipelines.config.model_sections import FamilyConfig
from pipelines.config.run_config import RunConfig
from pipelines.truth import coco_classes as coco
from storage.errors import ConfigError, ObjectNotFound
from storage.objects.protocols import ObjectStore
from storage.runs.manifest import RUN_KEY, RunRecord
from storage.stores.open import open_store
from storage.urls import normalise_url
from workers.images.preprocessing import Preprocessing
from workers.models.families import FAMILIES
from workers.models.resolve import resolve_model
from workers.spec import ArtefactRef, DeviceName, ModelRequest, ModelSpec


def requested_model(config: RunConfig, *, cuda: bool) -> ModelSpec:
    """Return the model that a run of this config loads; an existing run's own record counts.

    Raises:
        LabelfleetError: config and checkpoint disagree, or cannot be used.
    """
    output = open_store(config.output, config.storage.options())
    return requested_by(config, existing_record(output), output, cuda)


def requested_by(
    config: RunConfig, existing: RunRecord | None, output: ObjectStore, cuda: bool
) -> ModelSpec:
    device = _device(existing, cuda)
    model = resolve_model(_request(config, existing), config.storage.options(), device=device)
    if existing is None:
        return model
    return replace(model, artefact=_recorded_artefact(existing, output))


def recorded_model(config: RunConfig, existing: RunRecord, output: ObjectStore) -> ModelSpec:
    """Return what an existing run would load for this config, whatever this machine could run.

    Raises:
        LabelfleetError: config and checkpoint disagree, or cannot be used.
    """
    asked = _request(config, existing)
    anywhere = replace(asked, runtime="auto", precision="auto")
    found = resolve_model(anywhere, config.storage.options(), device="cpu")
    return replace(
        found,
        runtime=found.runtime if asked.runtime == "auto" else asked.runtime,
        precision=found.precision if asked.precision == "auto" else asked.precision,
        device=existing.inference.get("device", found.device),
        artefact=_recorded_artefact(existing, output),
    )


def existing_record(output: ObjectStore) -> RunRecord | None:
    try:
        return RunRecord.from_json(output.get(RUN_KEY))
    except ObjectNotFound:
        return None


def _device(existing: RunRecord | None, cuda: bool) -> DeviceName:
    wanted: DeviceName = "cuda" if cuda else "cpu"
    recorded: DeviceName = existing.inference.get("device", wanted) if existing else wanted
    check_device(cuda=recorded == "cuda", there=cuda)
    return recorded


def check_device(*, cuda: bool, there: bool) -> None:
    """Raise ConfigError for a run on GPUs where there are none to be used."""
    if cuda and not there:
        raise ConfigError(
            "the run was created on GPUs, and this machine has none",
            hint="continue it where there are GPUs, or choose another output",
        )


def model_request(config: RunConfig) -> ModelRequest:
    """Return the model section as the worker layer wants it."""
    part = config.model
    size = part.image_size
    request = ModelRequest(
        checkpoint=normalise_url(part.checkpoint),  # a worker may run in another folder
        name=part.name,
        arch=part.arch,
        sha256=part.sha256,
        classes=coco.CLASSES if part.classes == "coco" else part.classes,
        image_size=(size, size) if isinstance(size, int) else size,
        preprocessing=part.preprocessing.preprocessing() if part.preprocessing else None,
        decode=part.decode,
        value_range=part.range,
        keep=part.keep,
        runtime=part.runtime,
        precision=part.precision,
        score_floor=part.score_floor,
        nms_iou=part.nms_iou,
        max_detections=part.max_detections,
        tiles=part.tiles.tiles() if part.tiles else None,
        view=part.view.view() if part.view else None,
    )
    return request if part.family == "yolo_nas" else _of_family(request, part.family)


def _of_family(request: ModelRequest, stated: str | FamilyConfig) -> ModelRequest:
    """Return the request with the convention of another family."""
    part = FamilyConfig(base=stated) if isinstance(stated, str) else stated
    base = None if part.base is None else FAMILIES[part.base]
    preprocessing, size_stated = _input(part, base.input if base else None)
    nms_iou = request.nms_iou
    if nms_iou is None and base is not None:
        nms_iou = base.nms_iou
    return replace(
        request,
        family=part.base or "onnx",
        convention=part.convention(base.convention if base else None),
        preprocessing=preprocessing,
        size_stated=size_stated,
        nms_iou=nms_iou,
    )


def _input(part: FamilyConfig, base: Preprocessing | None) -> tuple[Preprocessing, bool]:
    """Return what images go through, and whether its size counts: a family's own is open."""
    if part.input is None:
        if base is None:
            raise ConfigError("model.family: without `base` it needs `input`")
        return base, False
    given = part.input.model_fields_set
    if base is not None and "fit" in given and "size" not in given:
        raise ConfigError("model.family.input: `fit` needs `size` beside it", hint="state both")
    try:
        return part.input.preprocessing(base), base is None or "size" in given
    except ValueError as exc:
        raise ConfigError(f"model.family.input: {exc}") from None


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


def _recorded_artefact(existing: RunRecord, output: ObjectStore) -> ArtefactRef | None:
    recorded = existing.inference.get("artefact")
    if recorded is None:
        return None
    url = recorded["url"] if "url" in recorded else f"{output.url}/{recorded['key']}"
    return ArtefactRef(url, recorded["sha256"])
