"""The model's section of a first config, from a look at the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.config.files import FILL_IN
from pipelines.truth import coco_classes as coco
from storage.errors import ConfigError
from storage.objects.protocols import StorageOptions
from storage.urls import normalise_url, parse_url, readable
from workers.images.preprocessing import Preprocessing, as_yaml
from workers.spec import ModelRequest

FILL_IN_CHECKPOINT = f"{FILL_IN}.pth"
FILL_IN_ARCH = f"{FILL_IN}-arch.yaml"
_FAMILIES = "yolox, d-fine, rt-detr, rf-detr, or the graph's convention (docs/families.md)"
_COCO_INPUT = Preprocessing(size=(640, 640), resize_to=(636, 636))
_COCO_SLOTS = (90, 91)  # columns of exports that count by COCO's official ids


@dataclass(frozen=True, slots=True)
class FirstModel:
    """``fields`` of the section; ``missing``: what is left to do; ``comments`` below the fields."""

    fields: dict[str, Any]
    missing: tuple[str, ...] = ()
    comments: tuple[str, ...] = field(default=())


def first_model(
    checkpoint: str | None, options: StorageOptions, named: Sequence[str]
) -> FirstModel:
    """Read a checkpoint or an ONNX graph and describe it as a run's config does.

    Args:
        checkpoint: any URL; None: it is left to be filled in.
        named: the class names of the data set; empty: it does not say.

    Raises:
        LabelfleetError: the file cannot be read.
    """
    if checkpoint is None:
        missing = ("model.checkpoint: your YOLO-NAS weights, a path or URL",)
        return FirstModel({"checkpoint": FILL_IN_CHECKPOINT}, missing, _comments({}))
    from workers.checkpoints.cache import checkpoint_suffix, fetch_checkpoint  # torch

    fields: dict[str, Any] = {"checkpoint": as_given(checkpoint, normalise_url(checkpoint))}
    path = fetch_checkpoint(checkpoint, options)
    if checkpoint_suffix(checkpoint) == ".onnx":
        return _of_graph(fields, path, named)
    return _of_weights(fields, path, named)


def as_given(given: str, url: str) -> str:
    """Return a path or URL as it was given, but absolute where it depends on this folder."""
    return parse_url(url).path if given.startswith(".") and "://" not in given else given


def _of_weights(fields: dict[str, Any], path: Any, named: Sequence[str]) -> FirstModel:
    from workers.checkpoints.file import read_checkpoint  # torch
    from workers.models.resolve import network_name

    known, missing = read_checkpoint(path), list[str]()
    try:
        network_name(ModelRequest(checkpoint=fields["checkpoint"]), known)
    except ConfigError:
        fields["arch"] = FILL_IN_ARCH
        missing.append(
            "model.arch: the arch_params yaml that these weights were trained with; they are of a "
            "scaled variant"
        )
    if known.classes is None:
        missing += _classes(fields, known.num_classes, named)
    return FirstModel(fields, tuple(missing), _comments(fields))


def _of_graph(fields: dict[str, Any], path: Any, named: Sequence[str]) -> FirstModel:
    from workers.models.families import read_ports  # ONNX Runtime
    from workers.models.guess import guess_family

    ports, missing = read_ports(path), list[str]()
    found = guess_family(ports, path.name)
    columns = None if found is None else found.columns
    if found is None:
        missing.append(f"model.family: {_FAMILIES}")
    elif columns in _COCO_SLOTS and len(named) != columns:
        fields |= {"family": {"base": found.family, "slots": "coco"}, "classes": "coco"}
    else:
        fields["family"] = found.family
    if "classes" not in fields:
        missing += _classes(fields, columns, named)
    if None in ports.image.shape[2:]:
        missing.append("model.image_size: the size it was trained with; the graph takes any")
    listed = (", ".join(map(str, side)) for side in (ports.inputs, ports.outputs))
    shown = readable(" → ".join(listed))  # names of ports may hold line breaks of any kind
    guessed = (
        f"family: {FILL_IN}            # {_FAMILIES}"
        if found is None
        else "The family is a guess from these shapes. They do not show the order of the channels, "
        "for example:"
    )
    measure = () if found is None else ("measure the model once, with `labelfleet evaluate`.",)
    comments = (
        f"The graph: {shown}",
        guessed,
        *measure,
        "image_size: 640           # input in pixels, or [h, w]; default: the graph's",
        "licence: Apache-2.0       # recorded on the run and in every file it writes",
    )
    return FirstModel(fields, tuple(missing), comments)


def _classes(fields: dict[str, Any], columns: int | None, named: Sequence[str]) -> list[str]:
    """State the classes where they are known; return what is missing."""
    if named and columns in (None, len(named)):
        fields["classes"] = "coco" if tuple(named) == coco.CLASSES else list(named)
        return []
    if columns == len(coco.CLASSES):
        fields["classes"] = "coco"
        return []
    differs = f" (the data set names {len(named)})" if named else ""
    count = "" if columns is None else f"{columns} "
    return [f"model.classes: its {count}class names, in the order of training{differs}"]


def _comments(fields: dict[str, Any]) -> tuple[str, ...]:
    arch = "arch: arch_params.yaml    # of a scaled variant, where the checkpoint lacks it"
    return (
        *([] if "arch" in fields else [arch]),
        "image_size: 640           # input in pixels, or [h, w]; default: the checkpoint's",
        "How training images were prepared, where the checkpoint does not say (see `plan`):",
        as_yaml(_COCO_INPUT),
        "licence: proprietary      # recorded on the run and in every file it writes",
    )
