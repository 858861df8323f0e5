"""A model request and its checkpoint, brought into agreement; the door to checkpoint_*.py."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import yaml

from storage.errors import ConfigError, ObjectNotFound
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_object
from storage.urls import shown_url
from workers.checkpoints.cache import fetch_checkpoint
from workers.checkpoints.description import canonical_arch
from workers.checkpoints.file import Checkpoint, read_checkpoint
from workers.images.preprocessing import Preprocessing
from workers.runtimes.choose import choose_runtime
from workers.spec import DeviceName, ModelRequest, ModelSpec

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
    """Every choice made: what the config asks for and what the checkpoint says, in agreement.

    Fetches and reads the checkpoint; builds no network (that the weights fit is found out by
    ``yolo_nas.load_detector``).

    Raises:
        ConfigError: the two disagree (the message names both), or something is missing in both.
        CheckpointError: the checkpoint cannot be had or read.
    """
    checkpoint = read_checkpoint(
        fetch_checkpoint(request.checkpoint, options, sha256=request.sha256)
    )
    arch = None if request.arch is None else read_arch(request.arch, options)
    classes = _classes(request, checkpoint)
    runtime, precision = choose_runtime(request.runtime, request.precision, device)
    return ModelSpec(
        checkpoint=request.checkpoint,
        sha256=checkpoint.sha256,
        name=_name(request, checkpoint),
        arch_params=_agreed("model.arch", arch, checkpoint.arch_params, checkpoint),
        classes=classes,
        keep=_keep(request, classes),
        preprocessing=_preprocessing(request, checkpoint),
        runtime=runtime,
        precision=precision,
        device=device,
        score_floor=request.score_floor,
        nms_iou=_nms_iou(request, checkpoint),
        max_detections=request.max_detections,
        licence=checkpoint.licence,
    )


def read_arch(url: str, options: StorageOptions) -> str:
    """An arch_params yaml at any URL as canonical JSON text.

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


def _name(request: ModelRequest, checkpoint: Checkpoint) -> str:
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
    if asked is not None and said is not None and tuple(asked) != tuple(said.size):
        raise ConfigError(
            f"model.image_size says {_by(asked)}, and the checkpoint {checkpoint.path.name} was "
            f"trained with {_by(said.size)}",
            hint="leave model.image_size out to use the checkpoint's own",
        )
    found = said or coco_preprocessing(asked or DEFAULT_SIZE)
    if any(side % STRIDE or side <= 0 for side in found.size):
        raise ConfigError(
            f"model.image_size is {_by(found.size)}; both sides must be multiples of {STRIDE}"
        )
    return found


def coco_preprocessing(size: tuple[int, int]) -> Preprocessing:
    """What ``predict()`` does with the COCO weights, at any input size (height, width)."""
    resize_to = (size[0] - COCO_MARGIN, size[1] - COCO_MARGIN)
    return Preprocessing(size=size, resize_to=resize_to)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _nms_iou(request: ModelRequest, checkpoint: Checkpoint) -> float:
    if request.nms_iou is not None:
        return request.nms_iou
    return DEFAULT_NMS_IOU if checkpoint.nms_iou is None else checkpoint.nms_iou
