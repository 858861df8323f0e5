"""Resolve a model request against its checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from storage.errors import ConfigError, ObjectNotFound
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_object
from storage.urls import shown_url
from workers.checkpoints.cache import fetch_checkpoint, file_sha256
from workers.checkpoints.description import canonical_arch
from workers.checkpoints.file import Checkpoint, read_checkpoint
from workers.images.preprocessing import Preprocessing, as_yaml
from workers.models.families import (
    agreed_preprocessing,
    check_convention,
    family_runtime,
    read_ports,
)
from workers.runtimes.choose import choose_runtime
from workers.spec import Convention, DeviceName, ModelRequest, ModelSpec

DEFAULT_NAME = "yolo_nas_s"
# Input channels of the three classification heads, by which unscaled weights are told apart.
_HEAD_CHANNELS: dict[tuple[int, ...], str] = {
    (64, 128, 256): "yolo_nas_s",
    (96, 192, 384): "yolo_nas_m",
    (128, 256, 512): "yolo_nas_l",
}
DEFAULT_SIZE = (640, 640)
DEFAULT_NMS_IOU = 0.7
COCO_MARGIN = 4  # the COCO weights' longest side is this much smaller than the input
STRIDE = 32


def resolve_model(
    request: ModelRequest, options: StorageOptions, *, device: DeviceName
) -> ModelSpec:
    """Combine config and checkpoint into a fully resolved model.

    Fetches and reads the checkpoint; builds no network (that the weights fit is found out by
    ``yolo_nas.load_detector``).

    Raises:
        ConfigError: the two disagree (the message names both), or something is missing in both.
        CheckpointError: the checkpoint cannot be had or read.
    """
    path = fetch_checkpoint(request.checkpoint, options, sha256=request.sha256)
    if request.convention is not None:
        return _resolve_family(request, request.convention, path, device)
    checkpoint = _read(path)
    arch = None if request.arch is None else read_arch(request.arch, options)
    preprocessing = _preprocessing(request, checkpoint)
    classes = _classes(request, checkpoint)
    runtime, precision = choose_runtime(request.runtime, request.precision, device)
    return ModelSpec(
        checkpoint=request.checkpoint,
        sha256=checkpoint.sha256,
        name=network_name(request, checkpoint),
        arch_params=_agreed("model.arch", arch, checkpoint.arch_params, checkpoint),
        classes=classes,
        keep=_keep(request, classes),
        preprocessing=_seen(request, _decoding(request, preprocessing), STRIDE),
        runtime=runtime,
        precision=precision,
        device=device,
        score_floor=request.score_floor,
        nms_iou=_nms_iou(request, checkpoint),
        max_detections=request.max_detections,
        licence=checkpoint.licence,
        official_ids=checkpoint.official_ids,
        remarks=(*_remarks(request, checkpoint, preprocessing), *_view_remark(request)),
        tiles=request.tiles,
        view=request.view,
    )


def remarks_on(request: ModelRequest, options: StorageOptions) -> tuple[str, ...]:
    """Check a model as far as no device matters, and return notes on how it is interpreted.

    Returns:
        As ``ModelSpec.remarks``; for an ONNX graph, those on its view.

    Raises:
        LabelfleetError: as ``resolve_model``.
    """
    anywhere = replace(request, runtime="auto", precision="auto")
    found = resolve_model(anywhere, options, device="cpu").remarks
    return _view_remark(request) if request.convention is not None else found


def _read(path: Path) -> Checkpoint:
    if path.suffix == ".onnx":
        raise ConfigError(
            f"{path.name} is an ONNX file, and model.family does not say of which family",
            hint="yolox, d-fine, rt-detr, rf-detr, or a convention: see docs/families.md",
        )
    return read_checkpoint(path)


def _resolve_family(
    request: ModelRequest, convention: Convention, path: Path, device: DeviceName
) -> ModelSpec:
    """Return an ONNX graph of another family; what it says about itself must agree with the
    request."""
    if path.suffix != ".onnx":
        raise ConfigError(
            f"model.family {request.family} is read from ONNX, and {path.name} is not an .onnx",
            hint="export the detector to ONNX; docs/families.md says how each family does it",
        )
    if request.classes is None:
        raise ConfigError(
            f"model.classes is missing, and an ONNX file such as {path.name} does not name its "
            "classes",
            hint="add `classes: coco`, or the names in the order of training",
        )
    for field in ("name", "arch"):
        if getattr(request, field) is not None:
            raise ConfigError(
                f"model.{field} is for YOLO-NAS, and model.family is {request.family}",
                hint=f"leave model.{field} out",
            )
    ports = read_ports(path)
    preprocessing = agreed_preprocessing(request, ports, path.name)
    check_convention(convention, ports, request.classes, path.name)
    runtime, precision = family_runtime(request, device)
    return ModelSpec(
        checkpoint=request.checkpoint,
        sha256=file_sha256(path),
        name=request.family,
        arch_params=None,
        classes=request.classes,
        keep=_keep(request, request.classes),
        preprocessing=_seen(request, _decoding(request, preprocessing), None),
        runtime=runtime,
        precision=precision,
        device=device,
        score_floor=request.score_floor,
        nms_iou=DEFAULT_NMS_IOU if request.nms_iou is None else request.nms_iou,
        max_detections=request.max_detections,
        remarks=_view_remark(request),
        convention=convention,
        tiles=request.tiles,
        view=request.view,
    )


def _seen(request: ModelRequest, usual: Preprocessing, step: int | None) -> Preprocessing:
    """Apply the run's view; see ``View.of``."""
    if request.view is None:
        return usual
    try:
        return request.view.of(usual, step=step)
    except ValueError as exc:
        raise ConfigError(f"model.view: {exc}", hint="choose a smaller scale") from exc


def _view_remark(request: ModelRequest) -> tuple[str, ...]:
    if request.view is None:
        return ()
    return (
        f"the network sees each image {request.view.in_words()} (model.view): a second opinion of "
        "the same model, for `labelfleet fuse`",
    )


def _decoding(request: ModelRequest, found: Preprocessing) -> Preprocessing:
    """Apply the run's decoding settings, with the checkpoint's as defaults."""
    return replace(
        found,
        decode=request.decode or found.decode,
        value_range=request.value_range or found.value_range,
    )


def _remarks(request: ModelRequest, checkpoint: Checkpoint, used: Preprocessing) -> tuple[str, ...]:
    name, said, asked = checkpoint.path.name, checkpoint.preprocessing, request.preprocessing
    if asked is None and said is None:
        return (
            f"{name} does not say how its training images were prepared; assumed is what the COCO "
            f"weights need ({in_words(used)}). Other weights may need BGR or another padding, and "
            f"lose accuracy without any error: state it below `model:`, as in `{as_yaml(used)}`",
        )
    if asked is not None and said is not None and used != said:
        return (
            f"model.preprocessing ({in_words(used)}) is used instead of what {name} says "
            f"({in_words(said)})",
        )
    if said is not None and used.size != said.size:
        return (
            f"{name} was trained with {_by(said.size)} and runs at {_by(used.size)}, as "
            "model.image_size asks: objects look smaller or larger than in its training",
        )
    return ()


def in_words(found: Preprocessing) -> str:
    """Return a preprocessing on one line."""
    fit = "fitted" if found.keep_aspect else "stretched"
    parts = [found.channels, f"{fit} into {_by(found.resize_to)}"]
    if found.size != found.resize_to or found.keep_aspect:
        where = "around the centre" if found.padding == "center" else "at the right and bottom"
        parts.append(f"padded {where} to {_by(found.size)} with {found.pad_value}")
    parts.append(f"times {found.scale:.6g}")
    if found.mean is not None or found.std is not None:
        parts.append(f"mean {found.mean or 0}, std {found.std or 1}")
    return ", ".join(parts)


def read_arch(url: str, options: StorageOptions) -> str:
    """Return an arch_params yaml at any URL as canonical JSON text.

    Raises:
        ConfigError: not there, not yaml, or not arch_params.
    """
    store, key = open_object(url, options)
    try:
        params = yaml.safe_load(store.get(key))
    except ObjectNotFound as exc:
        raise ConfigError(f"model.arch: there is nothing at {shown_url(url)}") from exc
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise ConfigError(
            f"model.arch: {shown_url(url)} is not yaml: {str(exc).splitlines()[0]}"
        ) from exc
    if not isinstance(params, Mapping) or not {"backbone", "neck", "heads"} & set(params):
        raise ConfigError(
            f"model.arch: {shown_url(url)} holds no arch_params (backbone, neck, heads)",
            hint="start from super-gradients' recipes/arch_params/yolo_nas_s_arch_params.yaml",
        )
    try:
        return canonical_arch(params)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"model.arch: {shown_url(url)}: {exc}") from exc


def _agreed(field: str, asked: str | None, said: str | None, checkpoint: Checkpoint) -> str | None:
    if asked is not None and said is not None and asked != said:
        raise ConfigError(
            f"{field}: the config says {_short(asked)}, and the checkpoint "
            f"{checkpoint.path.name} says {_short(said)}",
            hint=f"leave {field} out to use the checkpoint's own",
        )
    return asked if asked is not None else said


def _short(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 100 else text[:97] + "…"


def network_name(request: ModelRequest, checkpoint: Checkpoint) -> str:
    """Return which YOLO-NAS the weights are of.

    Raises:
        ConfigError: they are of a scaled variant whose arch_params are not known, or of another.
    """
    asked = _agreed("model.name", request.name, checkpoint.name, checkpoint)
    if request.arch is not None or checkpoint.arch_params is not None:
        return asked or DEFAULT_NAME
    heads = [checkpoint.shapes.get(f"heads.head{i}.cls_pred.weight", ()) for i in (1, 2, 3)]
    seen = _HEAD_CHANNELS.get(tuple(shape[1] for shape in heads if len(shape) == 4))
    if seen is None:
        raise ConfigError(
            f"model.arch is missing, and the weights in {checkpoint.path.name} are none of "
            f"{', '.join(_HEAD_CHANNELS.values())}, but a scaled variant",
            hint="give the arch_params yaml they were trained with",
        )
    if asked is not None and asked != seen:
        raise ConfigError(
            f"model.name says {asked}, and the weights in {checkpoint.path.name} are {seen}'s",
            hint="leave model.name out to use the checkpoint's own",
        )
    return seen


def _classes(request: ModelRequest, checkpoint: Checkpoint) -> tuple[str, ...]:
    asked, said, count = request.classes, checkpoint.classes, checkpoint.num_classes
    if asked is not None and len(asked) != count:
        raise ConfigError(
            f"model.classes has {len(asked)} names ({_short(asked)}), and the checkpoint "
            f"{checkpoint.path.name} was trained with {count} classes"
            + (f" ({_short(said)})" if said else ""),
            hint="give the names in the order of training",
        )
    if asked is not None and said is not None and asked != said:
        raise ConfigError(
            f"model.classes says {_short(asked)}, and the checkpoint {checkpoint.path.name} "
            f"says {_short(said)}",
            hint="leave model.classes out to use the checkpoint's own; the order matters",
        )
    if (classes := asked or said) is None:
        raise ConfigError(
            f"model.classes is missing, and the checkpoint {checkpoint.path.name} does not name "
            f"its {count} classes",
            hint="add `classes: coco`" if count == 80 else f"add `classes:` with {count} names",
        )
    return classes


def _keep(request: ModelRequest, classes: tuple[str, ...]) -> tuple[int, ...]:
    if request.keep is None:
        return tuple(range(len(classes)))
    for name in request.keep:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, 1)
            raise ConfigError(
                f"model.keep: {name} is not one of the model's classes",
                hint=f"did you mean {near[0]}?" if near else f"they are {_short(classes)}",
            )
    return tuple(sorted({classes.index(name) for name in request.keep}))


def _preprocessing(request: ModelRequest, checkpoint: Checkpoint) -> Preprocessing:
    asked, said = request.image_size, checkpoint.preprocessing
    if request.preprocessing is not None:
        found = request.preprocessing
        if asked is not None and tuple(asked) != tuple(found.size):
            raise ConfigError(
                f"model.image_size says {_by(asked)}, and model.preprocessing.size "
                f"{_by(found.size)}",
                hint="leave model.image_size out",
            )
    elif asked is not None and said is not None and tuple(asked) != tuple(said.size):
        if checkpoint.training is None:
            raise ConfigError(
                f"model.image_size says {_by(asked)}, and the checkpoint {checkpoint.path.name} "
                f"was trained with {_by(said.size)}",
                hint="leave model.image_size out to use the checkpoint's own; to run it at another "
                "size, state all of model.preprocessing",
            )
        found = at_size(said, asked)
    else:
        found = said or coco_preprocessing(asked or DEFAULT_SIZE)
    if any(side % STRIDE or side <= 0 for side in found.size):
        raise ConfigError(
            f"model.image_size is {_by(found.size)}; both sides must be multiples of {STRIDE}"
        )
    return found


def at_size(preprocessing: Preprocessing, size: tuple[int, int]) -> Preprocessing:
    """Return the preprocessing at another input size (height, width), with the same margin."""
    height, width = (
        new - (old - fit)
        for new, old, fit in zip(size, preprocessing.size, preprocessing.resize_to, strict=True)
    )
    return replace(preprocessing, size=size, resize_to=(height, width))


def coco_preprocessing(size: tuple[int, int]) -> Preprocessing:
    """Return the preprocessing of ``predict()`` with the COCO weights at an input size (h, w)."""
    resize_to = (size[0] - COCO_MARGIN, size[1] - COCO_MARGIN)
    return Preprocessing(size=size, resize_to=resize_to)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _nms_iou(request: ModelRequest, checkpoint: Checkpoint) -> float:
    if request.nms_iou is not None:
        return request.nms_iou
    return DEFAULT_NMS_IOU if checkpoint.nms_iou is None else checkpoint.nms_iou
