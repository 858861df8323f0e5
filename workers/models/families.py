"""Detectors of other families, as ONNX: their conventions, checked against the graph.

What a graph says about itself, its shapes, types and names, is checked against what the config
states; what it cannot say, such as the channel order, is the convention's word alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storage.errors import CheckpointError, ConfigError
from workers.images.preprocessing import Preprocessing
from workers.runtimes.choose import installed
from workers.runtimes.onnx_session import import_onnxruntime
from workers.spec import Convention, DeviceName, ModelRequest, PrecisionName, RuntimeName

_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_COCO_SLOTS = 91  # official ids go from 1 to 90


@dataclass(frozen=True, slots=True)
class Family:
    """The properties shared by a family's detectors; the size of ``input`` is a placeholder."""

    input: Preprocessing
    convention: Convention
    nms_iou: float = 0.7


_TRANSFORMER = Convention(
    layout="labelled", boxes="xyxy", units="pixels", scores="probabilities", nms=False,
    size_input="width_height",
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    "yolox": Family(
        Preprocessing(padding="bottom_right", channels="BGR", scale=1.0, rounding="down"),
        Convention(
            layout="joined", boxes="grid", units="pixels", scores="probabilities", objectness=True
        ),
        nms_iou=0.65,
    ),
    "d-fine": Family(Preprocessing(keep_aspect=False, antialias=True), _TRANSFORMER),
    "rt-detr": Family(Preprocessing(keep_aspect=False, antialias=True), _TRANSFORMER),
    "rf-detr": Family(
        Preprocessing(keep_aspect=False, **_IMAGENET),
        Convention(layout="separate", boxes="cxcywh", units="shares", scores="logits", nms=False),
    ),
}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output: name, element type as ONNX Runtime writes it, and its shape; None for a
    size that the graph leaves open."""

    name: str
    kind: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sides = ", ".join("?" if side is None else str(side) for side in self.shape)
        return f"{self.name} {self.kind} [{sides}]"


@dataclass(frozen=True, slots=True)
class GraphPorts:
    """The inputs and outputs of a graph."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def image(self) -> Port:
        """The input that takes images: the one with four axes, else the first."""
        return next((port for port in self.inputs if len(port.shape) == 4), self.inputs[0])

    @property
    def sizes(self) -> Port | None:
        """The other input, if there is one."""
        return next((port for port in self.inputs if port is not self.image), None)

    @property
    def batch(self) -> int | None:
        """The number of images that the graph takes at a time; None: any."""
        return self.image.shape[0]


def read_ports(path: Path) -> GraphPorts:
    """Return the inputs and outputs of an ONNX file.

    Raises:
        CheckpointError: it is damaged, not ONNX, or takes or gives nothing.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise CheckpointError(
            f"{path.name} is not an ONNX file that can be loaded: {reason:.200}",
            hint="fetch it again; weights in a file of their own are not supported",
        ) from exc
    ports = GraphPorts(_ports(session.get_inputs()), _ports(session.get_outputs()))
    if not ports.inputs or not ports.outputs:
        raise CheckpointError(
            f"{path.name} is no detector: it has no input or no output",
            hint="export the network itself, with images going in and boxes coming out",
        )
    return ports


def _ports(found: Sequence[Any]) -> tuple[Port, ...]:
    return tuple(
        Port(p.name, p.type, tuple(s if isinstance(s, int) and s > 0 else None for s in p.shape))
        for p in found
    )


def agreed_preprocessing(request: ModelRequest, ports: GraphPorts, name: str) -> Preprocessing:
    """Return the network's input, its size agreed between config and graph.

    Raises:
        ConfigError: they contradict each other, or neither says.
        CheckpointError: the graph does not take images as float32 [B, 3, H, W].
    """
    _check_image_input(ports.image, name)
    height, width = ports.image.shape[2:]
    base = request.preprocessing or Preprocessing()
    stated = request.image_size or (base.size if request.size_stated else None)
    if stated is None and (height is None or width is None):
        raise ConfigError(
            f"{name} takes images of any size ({ports.image}), and model.image_size is missing",
            hint="give the size that it was trained with",
        )
    size = stated or (int(height or 0), int(width or 0))
    if (height or size[0], width or size[1]) != size:
        raise ConfigError(
            f"the config says {size[0]} × {size[1]} for the network's input, and {name} takes "
            f"{ports.image}",
            hint="leave the size out to use the graph's own",
        )
    if request.size_stated:
        return replace(base, size=size) if base.size != size else base
    return replace(base, size=size, resize_to=size)


def _check_image_input(port: Port, name: str) -> None:
    if len(port.shape) != 4 or port.shape[1] not in (3, None):
        raise CheckpointError(
            f"{name} takes {port}, and images are float32 [B, 3, H, W]",
            hint="export the detector with channels first",
        )
    if port.kind != "tensor(float)":
        raise CheckpointError(
            f"{name} takes images as {port.kind} ({port}), and labelfleet gives float32",
            hint="export it in float32, with its normalisation outside",
        )


def check_convention(
    convention: Convention, ports: GraphPorts, classes: Sequence[str], name: str
) -> None:
    """Refuse a graph whose inputs or outputs contradict the convention or the class names.

    Raises:
        ConfigError: the message names both sides.
    """
    _check_inputs(convention, ports, name)
    wanted = {"separate": 2, "labelled": 3}.get(convention.layout, 1)
    if len(ports.outputs) != wanted:
        raise ConfigError(
            f"layout {convention.layout} has {wanted} output{'s' * (wanted > 1)}, and {name} has "
            f"{len(ports.outputs)}: {', '.join(map(str, ports.outputs))}",
            hint="is model.family the family of this file?",
        )
    _check_ranks(convention, ports.outputs, name)
    _check_width(convention, ports.outputs, classes, name)


def _check_inputs(convention: Convention, ports: GraphPorts, name: str) -> None:
    wanted = 1 if convention.size_input is None else 2
    if len(ports.inputs) != wanted:
        raise ConfigError(
            f"the convention has {wanted} input{'s' * (wanted > 1)}, and {name} has "
            f"{len(ports.inputs)}: {', '.join(map(str, ports.inputs))}",
            hint="`size_input` says whether the graph asks for the size of the image",
        )
    sizes = ports.sizes
    if sizes is not None and (
        sizes.kind != "tensor(int64)" or sizes.shape[1:] not in ((2,), (None,))
    ):
        raise ConfigError(f"the size input is int64 [B, 2], and {name} takes {sizes}")


def _check_ranks(convention: Convention, outputs: Sequence[Port], name: str) -> None:
    of_two = 2 if convention.layout == "labelled" else 0
    ranks = sorted(len(port.shape) for port in outputs)
    if ranks != sorted([2] * of_two + [3] * (len(outputs) - of_two)):
        raise ConfigError(
            f"layout {convention.layout} does not fit the outputs of {name}: "
            f"{', '.join(map(str, outputs))}"
        )
    if convention.layout == "rows" and outputs[0].shape[2] not in (6, None):
        raise ConfigError(f"layout rows has 6 numbers a box, and {name} gives {outputs[0]}")


def _check_width(
    convention: Convention, outputs: Sequence[Port], classes: Sequence[str], name: str
) -> None:
    """Compare the number of class columns with the class names, if the graph has columns."""
    if convention.layout in ("labelled", "rows"):
        return
    port = outputs[box_and_score_places(outputs, convention)[1]]
    axis = 1 if convention.layout == "joined_transposed" else 2
    width = port.shape[axis]
    if width is None:
        return
    inside = width - (0 if convention.layout == "separate" else 4 + convention.objectness)
    expected = _class_columns(convention, len(classes))
    if inside == expected or (convention.slots == "coco" and inside >= expected):
        return
    beside = "" if convention.background == "none" else " and one for the background"
    raise ConfigError(
        f"model.classes has {len(classes)} names{beside}, and {name} has {inside} class columns "
        f"({port})",
        hint="a column more than names is often the background: "
        "`family: {base: …, background: last}`"
        if inside == expected + 1
        else "give the names in the order of training; COCO's official ids: `slots: coco`",
    )


def _class_columns(convention: Convention, classes: int) -> int:
    if convention.slots == "coco":
        return _COCO_SLOTS - 1  # some exports leave the last one out
    return classes + (convention.background != "none")


def box_and_score_places(outputs: Sequence[Port], convention: Convention) -> tuple[int, int]:
    """Which outputs hold boxes and class scores: by name, else by their last side, else in order.

    Both are 0 where one output holds all.
    """
    if len(outputs) == 1:
        return 0, 0
    for place, port in enumerate(outputs):
        if any(word in port.name.lower() for word in ("box", "dets", "bbox")):
            return place, _scores_beside(outputs, place)
    ranked = [k for k, port in enumerate(outputs) if len(port.shape) == 3]
    four = [k for k in ranked if outputs[k].shape[2] == 4]
    boxes = four[0] if len(four) == 1 else ranked[0]
    return boxes, _scores_beside(outputs, boxes)


def _scores_beside(outputs: Sequence[Port], boxes: int) -> int:
    others = [k for k in range(len(outputs)) if k != boxes]
    named = [k for k in others if "score" in outputs[k].name.lower()]
    return named[0] if named else others[-1]


def family_runtime(request: ModelRequest, device: DeviceName) -> tuple[RuntimeName, PrecisionName]:
    """Resolve ``auto`` for a graph of another family.

    Raises:
        ConfigError: the runtime or precision does not run ONNX of other families here.
    """
    here = installed()
    possible: tuple[RuntimeName, ...] = ("openvino", "onnx") if device == "cpu" else ("onnx",)
    if request.runtime != "auto" and request.runtime not in possible:
        raise ConfigError(
            f"model.runtime: {request.runtime} does not run {request.family} on {device}",
            hint=f"it runs on {' and '.join(possible)}; leave it out to get the fastest",
        )
    runtime = request.runtime
    if runtime == "auto":
        runtime = next((name for name in possible if name in here), "onnx")
    if runtime not in here:
        raise ConfigError(f"model.runtime: {runtime} is not installed")
    if request.precision not in ("auto", "fp32", "int8") or (
        request.precision == "int8" and device != "cpu"
    ):
        raise ConfigError(
            f"model.precision: {request.family} on {runtime} and {device} takes "
            f"{'fp32, int8' if device == 'cpu' else 'fp32'}, not {request.precision}"
        )
    return runtime, "int8" if request.precision == "int8" else "fp32"
