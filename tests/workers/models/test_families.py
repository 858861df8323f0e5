"""Detectors of other families against independent arithmetic, and graphs that contradict them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import parse_config
from pipelines.models.requested import model_request
from pipelines.truth import coco_classes
from storage.errors import ConfigError, LabelfleetError, ModelError, OutputNotFinite
from storage.objects.protocols import StorageOptions
from storage.records import Detections
from tests.support.samples.family_graphs import write_graph
from workers.compile.agreement import difference
from workers.detectors.graph import GraphDetector
from workers.images.preprocessing import Preprocessing
from workers.labelling.batch_size import BatchSize
from workers.labelling.inference import Inference
from workers.models.families import FAMILIES
from workers.models.load import session_of
from workers.models.onnx_family import network_input
from workers.models.resolve import resolve_model
from workers.runtimes.artefacts import Artefact
from workers.runtimes.choose import installed
from workers.spec import ModelRequest, ModelSpec

H, W = 64, 96
NAMES = ["cat", "dog", "owl"]
QUERIES = 12
RUNTIMES = [
    "onnx",
    pytest.param("openvino", marks=pytest.mark.skipif(
        "openvino" not in installed(), reason="openvino is not installed")),
]  # fmt: skip


def resolved(path: Path, **model: Any) -> ModelSpec:
    fields = {
        "name": "x", "source": {"url": str(path.parent)}, "output": str(path.parent / "out"),
        "model": {"checkpoint": str(path), "classes": NAMES, "runtime": "onnx", **model},
    }  # fmt: skip
    config = parse_config(RunConfig, fields, where="x")
    return resolve_model(model_request(config), StorageOptions(), device="cpu")


def asked(**family: Any) -> ModelRequest:
    model = {"checkpoint": "x.onnx", "classes": NAMES, "family": family}
    fields = {"name": "x", "source": {"url": "in"}, "output": "out", "model": model}
    return model_request(parse_config(RunConfig, fields, where="x"))


def test_an_input_is_stated_as_the_differences_from_its_familys() -> None:
    own = FAMILIES["yolox"].input
    made = asked(base="yolox", input={"channels": "RGB"})
    assert made.preprocessing == replace(own, channels="RGB")
    assert not made.size_stated, "the graph's counts"
    made = asked(base="yolox", input={"size": 416, "place": "center"})
    assert made.preprocessing == replace(
        own, size=(416, 416), resize_to=(416, 416), padding="center"
    )
    assert made.size_stated
    made = asked(base="d-fine", input={"resize": "letterbox"})
    assert made.preprocessing == replace(FAMILIES["d-fine"].input, keep_aspect=True)
    with pytest.raises(ConfigError, match="`fit` needs `size`"):
        asked(base="yolox", input={"fit": 400})


def detected(path: Path, spec: ModelSpec, images: int = 1) -> list[Detections]:
    artefact = Artefact({"model.onnx": path}, "model.onnx", {})
    detector = GraphDetector(session_of(artefact, spec, threads=1), spec)
    return detector.detect(np.full((images, H, W, 3), 7, np.uint8))


def drawn(seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Boxes cxcywh in shares [Q, 4], apart from each other, and logits [Q, 3]."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(3)), -1).reshape(-1, 2)
    centres = (grid + 0.5) / (4, 3)
    sides = rng.uniform(0.05, 0.2, (QUERIES, 2))
    logits = rng.normal(-1, 2, (QUERIES, 3))
    return np.concatenate([centres, sides], 1).astype(np.float32), logits.astype(np.float32)


def expected(boxes: NDArray[Any], scores: NDArray[Any], floor: float = 0.05) -> list[Any]:
    """What is above the floor, as (score, class, xyxy), best first; written with plain loops."""
    found = []
    for (cx, cy, w, h), row in zip(boxes.tolist(), scores.tolist(), strict=True):
        box = ((cx - w / 2) * W, (cy - h / 2) * H, (cx + w / 2) * W, (cy + h / 2) * H)
        found += [(score, k, box) for k, score in enumerate(row) if score > floor]
    return sorted(found, key=lambda one: -one[0])


def same(found: Detections, wanted: list[Any]) -> None:
    assert len(found) == len(wanted) > 5
    np.testing.assert_allclose(found.scores, [w[0] for w in wanted], atol=1e-3)
    assert found.category_ids.tolist() == [w[1] for w in wanted]
    np.testing.assert_allclose(found.boxes, [w[2] for w in wanted], atol=0.5)
    assert (found.box_std, found.box_entropy, found.anchor) == (None, None, None)


def sigmoid(values: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(1 / (1 + np.exp(-values.astype(np.float64))))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_rf_detr(tmp_path: Path, runtime: str) -> None:
    boxes, logits = drawn(1)
    background = np.full((QUERIES, 1), 9.0, np.float32)
    path = write_graph(
        tmp_path / "rf.onnx",
        {"dets": boxes, "labels": np.concatenate([logits, background], 1)},
        size=(H, W),
    )
    family = {"base": "rf-detr", "background": "last"}
    spec = resolved(path, family=family, runtime=runtime)
    assert (spec.preprocessing.size, spec.preprocessing.keep_aspect) == ((H, W), False)
    for found in detected(path, spec, images=3):
        same(found, expected(boxes, sigmoid(logits)))
    with pytest.raises(
        ConfigError, match=r"has 3 names, and rf\.onnx has 4 class columns"
    ) as caught:
        resolved(path, family="rf-detr")
    assert "background: last" in str(caught.value.hint)


@pytest.mark.parametrize("family", ["d-fine", "rt-detr"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_d_fine_and_rt_detr(tmp_path: Path, family: str, runtime: str) -> None:
    boxes, logits = drawn(2)
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    scores, labels = sigmoid(logits).max(1), logits.argmax(1)
    path = write_graph(
        tmp_path / "d.onnx",
        {"labels": labels, "boxes": corners, "scores": scores},
        size=(H, W), size_input="orig_target_sizes",
    )  # fmt: skip
    spec = resolved(path, family=family, runtime=runtime)
    one_label = np.where(np.arange(3) == labels[:, None], scores[:, None], 0)
    for found in detected(path, spec, images=2):
        same(found, expected(boxes, one_label))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("batch", ["batch", 1, 4])
def test_yolox(tmp_path: Path, runtime: str, batch: int | str) -> None:
    rng = np.random.default_rng(3)
    cells = sum((H // s) * (W // s) for s in (8, 16, 32))
    raw = rng.normal(0, 0.4, (cells, 4)).astype(np.float32)
    probabilities = rng.uniform(0, 1, (cells, 4)).astype(np.float32) ** 3
    path = write_graph(
        tmp_path / "x.onnx", {"output": np.concatenate([raw, probabilities], 1)},
        size=(H, W), batch=batch,
    )  # fmt: skip
    spec = resolved(path, family="yolox", runtime=runtime, nms_iou=1.0, max_detections=1000)
    assert spec.preprocessing.channels == "BGR"
    boxes, number = [], 0
    for stride in (8, 16, 32):
        for y in range(H // stride):
            for x in range(W // stride):
                dx, dy, lw, lh = raw[number].tolist()
                centre = ((x + dx) * stride / W, (y + dy) * stride / H)
                boxes.append((*centre, np.exp(lw) * stride / W, np.exp(lh) * stride / H))
                number += 1
    wanted = expected(np.array(boxes), probabilities[:, :1] * probabilities[:, 1:])
    for found in detected(path, spec, images=3):
        same(found, wanted)


@pytest.mark.parametrize("layout", ["joined_transposed", "rows"])
def test_a_convention_stated_in_full(tmp_path: Path, layout: str) -> None:
    boxes, logits = drawn(4)
    pixels = boxes * (W, H, W, H)
    scores = sigmoid(logits)
    family = {"input": {"size": [H, W]}, "layout": layout, "units": "pixels", "nms": False}
    if layout == "rows":
        low, high = pixels[:, :2] - pixels[:, 2:] / 2, pixels[:, :2] + pixels[:, 2:] / 2
        label = scores.argmax(1)[:, None]
        output = np.concatenate([low, high, scores.max(1)[:, None], label], 1)
        scores = np.where(np.arange(3) == label, scores, 0)
        family |= {"boxes": "xyxy", "scores": "probabilities"}
    else:
        output = np.concatenate([pixels, logits], 1).T
        family |= {"boxes": "cxcywh", "scores": "logits"}
    path = write_graph(tmp_path / "u.onnx", {"output0": output}, size=(H, W))
    same(detected(path, resolved(path, family=family))[0], expected(boxes, scores))


def test_class_columns_by_cocos_official_ids(tmp_path: Path) -> None:
    boxes, logits = drawn(5)
    columns = np.full((QUERIES, 91), -9, np.float32)
    columns[:, [1, 18, 90]] = logits  # person, dog, toothbrush
    columns[:, 12] = 9  # an id that COCO never gave
    path = write_graph(tmp_path / "c.onnx", {"dets": boxes, "labels": columns}, size=(H, W))
    family = {"base": "rf-detr", "slots": "coco"}
    spec = resolved(path, family=family, classes="coco")
    (found,) = detected(path, spec)
    by_name = {0: 0, coco_classes.CLASSES.index("dog"): 1, 79: 2}
    same(
        replace(found, category_ids=np.array([by_name[int(k)] for k in found.category_ids])),
        expected(boxes, sigmoid(logits)),
    )


def test_network_input_is_normalised_in_the_networks_order() -> None:
    pixels = np.array([[[[10, 20, 30]]]], np.uint8)
    rule = Preprocessing(
        size=(1, 1), resize_to=(1, 1), channels="BGR", scale=0.1, mean=(1, 2, 3), std=(2, 4, 8)
    )
    values = network_input(pixels, rule).reshape(3)
    np.testing.assert_allclose(values, [(3 - 1) / 2, (2 - 2) / 4, (1 - 3) / 8], atol=1e-6)


# graphs that contradict the convention


def refused(path: Path, **model: Any) -> str:
    with pytest.raises(LabelfleetError) as caught:
        resolved(path, **model)
    assert len(caught.value.message.splitlines()) == 1
    return caught.value.message


def test_contradictions_name_both(tmp_path: Path) -> None:
    boxes, logits = drawn(6)
    two = {"dets": boxes, "labels": logits}
    path = write_graph(tmp_path / "two.onnx", two, size=(H, W))
    assert "layout joined has 1 output, and two.onnx has 2: dets" in refused(path, family="yolox")
    said = refused(path, family="rf-detr", image_size=128)
    assert "128 × 128" in said
    assert "images tensor(float) [?, 3, 64, 96]" in said
    said = refused(path, family="rf-detr", classes=["a", "b"])
    assert "model.classes has 2 names, and two.onnx has 3 class columns" in said
    assert "has 2 inputs, and two.onnx has 1" in refused(
        path, family={"base": "rf-detr", "size_input": "width_height"}
    )
    assert "runtime: torch does not run rf-detr" in refused(path, family="rf-detr", runtime="torch")
    assert "model.family does not say of which family" in refused(path)
    assert "model.classes is missing" in refused(path, family="rf-detr", classes=None)
    assert "model.arch is for YOLO-NAS" in refused(path, family="rf-detr", arch="a.yaml")


def test_inputs_that_are_not_images(tmp_path: Path) -> None:
    boxes, logits = drawn(7)
    two = {"dets": boxes, "labels": logits}
    path = write_graph(tmp_path / "int.onnx", two, size=(H, W), kind=TensorProto.INT64)
    assert "int.onnx takes images as tensor(int64)" in refused(path, family="rf-detr")
    path = write_graph(tmp_path / "any.onnx", two, size=("h", "w"))
    assert "any.onnx takes images of any size" in refused(path, family="rf-detr")
    assert resolved(path, family="rf-detr", image_size=(H, W)).preprocessing.size == (H, W)


def test_files_that_are_not_onnx(tmp_path: Path) -> None:
    path = tmp_path / "page.onnx"
    path.write_text("<html>Sign in</html>")
    assert "page.onnx is not an ONNX file that can be loaded" in refused(path, family="yolox")
    other = tmp_path / "w.pth"
    other.write_bytes(b"x")
    assert "w.pth is not an .onnx" in refused(other, family="yolox")


def test_a_graph_that_takes_nothing(tmp_path: Path) -> None:
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    nodes = [helper.make_node("Constant", [], ["out"], value=value)]
    given = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])]
    graph = helper.make_graph(nodes, "constant", [], given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "constant.onnx"))
    assert refused(tmp_path / "constant.onnx", family="yolox") == (
        "constant.onnx is no detector: it has no input or no output"
    )


@pytest.mark.parametrize("place", ["dets", "labels"])
def test_outputs_that_are_not_finite_are_an_error(tmp_path: Path, place: str) -> None:
    boxes, logits = drawn(8)
    outputs = {"dets": boxes, "labels": logits}
    outputs[place][3, 1] = np.nan
    path = write_graph(tmp_path / "nan.onnx", outputs, size=(H, W))
    with pytest.raises(ModelError, match=r"not finite for image\(s\) \[0\] of the batch") as caught:
        detected(path, resolved(path, family="rf-detr"))
    assert "the graph itself" in str(caught.value.hint)  # fp32 is what it was loaded in


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_image_that_gives_nan_is_set_aside_and_its_neighbours_keep_their_boxes(
    tmp_path: Path, runtime: str
) -> None:
    boxes, logits = drawn(8)
    outputs = {"dets": boxes, "labels": logits}
    path = write_graph(tmp_path / "root.onnx", outputs, size=(H, W), undefined_above=1.0)
    spec = resolved(path, family="rf-detr", runtime=runtime)
    session = session_of(Artefact({"model.onnx": path}, "model.onnx", {}), spec, threads=1)
    batch = np.zeros((3, H, W, 3), np.uint8)
    batch[1] = 255
    names = ["a.jpg", "bright.jpg", "b.jpg"]
    size = BatchSize(3)
    inferred = Inference(GraphDetector(session, spec), size).launch(batch, names)()
    first, bright, last = inferred.finish()
    assert isinstance(bright, OutputNotFinite)
    assert size.now == 3  # the batch was not too large
    for found in (first, last):
        assert isinstance(found, Detections)
        assert len(found) > 0


def test_openvino_agrees_with_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    boxes, logits = drawn(9)
    path = write_graph(tmp_path / "a.onnx", {"dets": boxes, "labels": logits}, size=(H, W))
    artefact = Artefact({"model.onnx": path}, "model.onnx", {})
    specs = [resolved(path, family="rf-detr", runtime=name) for name in ("onnx", "openvino")]
    one, other = (session_of(artefact, spec, threads=1) for spec in specs)
    assert difference(one, other, np.zeros((2, H, W, 3), np.uint8), 0.05).same
