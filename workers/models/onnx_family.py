"""A graph of another family as a ``Session``: pixels in, its best candidates out.

Everything around the graph is numpy in float32: normalisation before it, and after it what its
convention says about boxes and scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import ModelError
from workers.detectors.nms import PRE_NMS_CANDIDATES, Selected
from workers.images.preprocessing import Preprocessing
from workers.models.families import GraphPorts, Port, box_and_score_places, read_ports
from workers.runtimes.artefacts import Artefact
from workers.runtimes.onnx_session import import_onnxruntime
from workers.runtimes.openvino_session import WEIGHTS, import_openvino
from workers.spec import Convention, ModelSpec

Array = NDArray[np.float32]
Run = Callable[[Mapping[str, NDArray[Any]]], Sequence[NDArray[Any]]]
PORTS = "ports"  # in an artefact's facts: a quantised graph need not keep its names


class FamilySession:
    """See ``Session``. Batches of any size run on a graph that takes a fixed number of images.

    Args:
        artefact: the graph, as ONNX or OpenVINO IR.
        spec: its convention, preprocessing, classes, runtime and device.
        threads: cores to use on a CPU; 0: all.
    """

    def __init__(self, artefact: Artefact, spec: ModelSpec, *, threads: int) -> None:
        if spec.convention is None:
            raise ModelError(f"{spec.name} has no convention, and is not another family's")
        self._convention = spec.convention
        self._preprocessing = spec.preprocessing
        self._official = coco_slots(spec.classes) if spec.convention.slots == "coco" else None
        self._classes = len(spec.classes)
        self._allowed = list(spec.keep)
        ports = artefact.facts.get(PORTS)
        self._ports = ports_from_json(ports) if ports else read_ports(artefact.files[artefact.main])
        open_run = _openvino if spec.runtime == "openvino" else _onnxruntime
        self._run = open_run(artefact, spec, threads, self._ports)

    def run(self, batch: NDArray[np.uint8]) -> Selected:
        """See ``Session.run``."""
        images = network_input(batch, self._preprocessing)
        step = self._ports.batch or len(images)
        outputs: list[list[NDArray[Any]]] = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            filled = np.concatenate(
                [part, np.zeros((step - len(part), *part.shape[1:]), np.float32)]
            )
            found = self._run(self.feed(filled))
            outputs.append([np.asarray(out)[: len(part)] for out in found])
        joined = [np.concatenate(parts) for parts in zip(*outputs, strict=True)]
        return self._selected(joined)

    def feed(self, images: Array) -> dict[str, NDArray[Any]]:
        """Return the graph's inputs for float32 [B, 3, H, W]."""
        return graph_inputs(images, self._ports, self._convention, self._preprocessing)

    def _selected(self, outputs: Sequence[NDArray[Any]]) -> Selected:
        total = np.zeros(len(outputs[0]), np.float32)
        for out in outputs:
            total += np.where(np.isfinite(out.reshape(len(out), -1)).all(axis=1), 0, np.nan)
        with np.errstate(all="ignore"):  # what is not finite is reported by ``total``
            boxes, scores = self._decoded(outputs)
        k = min(PRE_NMS_CANDIDATES, scores.shape[1])
        best = scores[:, :, self._allowed].max(axis=2)
        anchors = np.argpartition(-best, k - 1, axis=1)[:, :k]
        rows = anchors[..., None]
        return Selected(
            anchors=anchors.astype(np.int32),
            scores=np.take_along_axis(scores, rows, axis=1),
            boxes=np.take_along_axis(boxes, rows, axis=1),
            box_std=None,
            entropy=None,
            total=total,
        )

    def _decoded(self, outputs: Sequence[NDArray[Any]]) -> tuple[Array, Array]:
        """Return boxes xyxy in input pixels [B, N, 4], and scores by contiguous class [B, N, C]."""
        said = self._convention
        box_place, score_place = box_and_score_places(self._ports.outputs, said)
        if said.layout == "rows":
            rows = outputs[0].astype(np.float32)
            boxes, labels, scores = rows[..., :4], rows[..., 5], rows[..., 4]
            return self._pixels(boxes), self._spread(labels, scores)
        if said.layout == "labelled":
            (label_place,) = {0, 1, 2} - {box_place, score_place}
            boxes = outputs[box_place].astype(np.float32)
            scores = _activated(outputs[score_place].astype(np.float32), said)
            return self._pixels(boxes), self._spread(outputs[label_place], scores)
        if said.layout == "separate":
            boxes = outputs[box_place].astype(np.float32)
            return self._pixels(boxes), self._columns(outputs[score_place].astype(np.float32), None)
        joined = outputs[0].astype(np.float32)
        if said.layout == "joined_transposed":
            joined = joined.swapaxes(1, 2)
        first = 4 + said.objectness
        objectness = joined[..., 4:5] if said.objectness else None
        return self._pixels(joined[..., :4]), self._columns(joined[..., first:], objectness)

    def _columns(self, columns: Array, objectness: Array | None) -> Array:
        scores = _activated(columns, self._convention)
        if objectness is not None:
            scores = scores * _activated(objectness, self._convention)
        if self._official is not None:
            return np.ascontiguousarray(scores[..., self._official])
        first = 1 if self._convention.background == "first" else 0
        return scores[..., first : first + self._classes]

    def _spread(self, labels: NDArray[Any], scores: Array) -> Array:
        """One label a box as scores by class: all but the one are 0."""
        index = np.rint(labels).astype(np.int64) - (self._convention.background == "first")
        if self._official is not None:
            table = np.full(max(self._official) + 2, -1)
            table[self._official] = np.arange(self._classes)
            index = table[np.clip(index, -1, len(table) - 1)]
        known = (index >= 0) & (index < self._classes)
        spread = np.zeros((*scores.shape, self._classes), np.float32)
        np.put_along_axis(
            spread, np.where(known, index, 0)[..., None], np.where(known, scores, 0)[..., None], 2
        )
        return spread

    def _pixels(self, boxes: Array) -> Array:
        height, width = self._preprocessing.size
        said = self._convention
        if said.boxes == "grid":
            points, strides = self._grid
            boxes = np.concatenate(
                [(boxes[..., :2] + points) * strides, np.exp(boxes[..., 2:]) * strides], axis=-1
            )
        elif said.units == "shares":
            boxes = np.asarray(boxes * np.array([width, height] * 2, np.float32), np.float32)
        if said.boxes == "xyxy":
            return boxes
        low: Array = boxes[..., :2]
        sides: Array = boxes[..., 2:]
        if said.boxes != "xywh":
            low = low - np.float32(0.5) * sides
        corners: Array = np.concatenate([low, low + sides], axis=-1).astype(np.float32, copy=False)
        return corners

    @cached_property
    def _grid(self) -> tuple[Array, Array]:
        """Cells [N, 2] as x, y in strides, and strides [N, 1], level by level, row by row."""
        height, width = self._preprocessing.size
        points, strides = [], []
        for stride in self._convention.strides:
            ys, xs = np.mgrid[: height // stride, : width // stride].astype(np.float32)
            points.append(np.stack([xs, ys], -1).reshape(-1, 2))
            strides.append(np.full((len(points[-1]), 1), stride, np.float32))
        return np.concatenate(points), np.concatenate(strides)


def coco_slots(classes: Sequence[str]) -> list[int]:
    """COCO's official ids of contiguous classes, which are all of COCO's in their order."""
    missing = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids that COCO never gave
    ids = [number for number in range(1, 91) if number not in missing]
    if len(ids) != len(classes):
        raise ModelError(
            f"slots: coco needs COCO's 80 classes, and the model has {len(classes)}",
            hint="use `classes: coco`",
        )
    return ids


def network_input(batch: NDArray[np.uint8], preprocessing: Preprocessing) -> Array:
    """uint8 [B, H, W, 3] RGB as float32 [B, 3, H, W], normalised, in the network's channels."""
    step = -1 if preprocessing.channels == "BGR" else 1
    planes = np.ascontiguousarray(batch[..., ::step].transpose(0, 3, 1, 2)).astype(np.float32)
    if preprocessing.scale != 1.0:
        planes *= np.float32(preprocessing.scale)
    if preprocessing.mean is not None:
        planes -= np.array(preprocessing.mean, np.float32)[:, None, None]
    if preprocessing.std is not None:
        planes /= np.array(preprocessing.std, np.float32)[:, None, None]
    return planes


def graph_inputs(
    images: Array, ports: GraphPorts, convention: Convention, preprocessing: Preprocessing
) -> dict[str, NDArray[Any]]:
    """Return a graph's inputs by name, for float32 [B, 3, H, W]."""
    inputs: dict[str, NDArray[Any]] = {ports.image.name: images}
    if ports.sizes is not None:
        size = preprocessing.size
        order = size[::-1] if convention.size_input == "width_height" else size
        inputs[ports.sizes.name] = np.tile(np.array(order, np.int64), (len(images), 1))
    return inputs


def ports_to_json(ports: GraphPorts) -> dict[str, Any]:
    """For ``artefact.json``."""
    sides = {"inputs": ports.inputs, "outputs": ports.outputs}
    return {side: [[p.name, p.kind, list(p.shape)] for p in found] for side, found in sides.items()}


def ports_from_json(fields: Mapping[str, Any]) -> GraphPorts:
    """Convert the output of ``ports_to_json`` back."""
    inputs, outputs = (
        tuple(Port(name, kind, tuple(shape)) for name, kind, shape in fields[side])
        for side in ("inputs", "outputs")
    )
    return GraphPorts(inputs, outputs)


def _activated(values: Array, convention: Convention) -> Array:
    if convention.scores == "logits":
        return np.asarray(1 / (1 + np.exp(-values)), np.float32)
    if convention.scores == "softmax_logits":
        raised = np.exp(values - values.max(axis=-1, keepdims=True))
        return np.asarray(raised / raised.sum(axis=-1, keepdims=True), np.float32)
    return values


def _onnxruntime(artefact: Artefact, spec: ModelSpec, threads: int, ports: GraphPorts) -> Run:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if spec.device == "cuda":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise ModelError(
                "the run asks for cuda, and this ONNX Runtime has no CUDA provider",
                hint="install onnxruntime-gpu, or set `workers.gpus: 0`",
            )
        providers = ["CUDAExecutionProvider"]
    session = ort.InferenceSession(str(artefact.files[artefact.main]), options, providers=providers)
    names = [port.name for port in ports.outputs]

    def run(inputs: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        found: list[NDArray[Any]] = session.run(names, dict(inputs))
        return found

    return run


def _openvino(artefact: Artefact, spec: ModelSpec, threads: int, ports: GraphPorts) -> Run:
    ov = import_openvino()
    core = ov.Core()
    model = core.read_model(artefact.files[artefact.main], artefact.files.get(WEIGHTS))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(inputs: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        found = request.infer(dict(inputs), share_inputs=True)
        by_name = {name: array for port, array in found.items() for name in port.get_names()}
        return [by_name[port.name] for port in ports.outputs]

    return run
