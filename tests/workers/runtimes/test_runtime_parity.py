"""Every runtime finds what torch finds: boxes, scores, DFL statistics, top-5 classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from pipelines.demo.digits import make_pages
from storage.errors import ArtefactError, ModelError
from storage.objects.protocols import StorageOptions
from storage.records import Detections
from storage.stores.open import open_store
from workers.compile.agreement import BOX_PX, SCORE, difference, refuse_difference
from workers.compile.make_artefact import GRAPH, make_graph
from workers.compile.quantize import RECIPE, Quantiser
from workers.detectors.graph import GraphDetector
from workers.images.decode import decode
from workers.images.letterbox import letterbox
from workers.models.load import load_detector, session_of
from workers.models.resolve import resolve_model
from workers.runtimes.artefacts import Artefact, publish
from workers.runtimes.choose import installed
from workers.runtimes.onnx_session import OnnxSession
from workers.spec import ModelRequest, ModelSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OPTIONS = StorageOptions()
DIGITS = Path(__file__).resolve().parents[3] / "pipelines/assets/digits_nano.safetensors"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, images for it, its exported graph, and what torch finds."""

    spec: ModelSpec
    images: NDArray[np.uint8]
    graph: Artefact
    found: list[Detections]

    def on(self, runtime: Any, precision: Any = "fp32", **more: Any) -> ModelSpec:
        return dataclasses.replace(self.spec, runtime=runtime, precision=precision, **more)


def letterboxed(paths: list[Path], spec: ModelSpec) -> NDArray[np.uint8]:
    pixels = [decode(path.read_bytes(), max_pixels=10**8).pixels for path in paths]
    return np.stack([letterbox(one, spec.preprocessing)[0] for one in pixels])


def digits_case(folder: Path) -> tuple[ModelSpec, list[Path]]:
    pages = make_pages(folder, images=6, seed=5, split="unseen", broken=False)
    request = ModelRequest(checkpoint=str(DIGITS), runtime="torch")
    return resolve_model(request, OPTIONS, device="cpu"), sorted(pages.images.iterdir())[:5]


def bccd_case(models: Path, data: Path) -> tuple[ModelSpec, list[Path]]:
    request = ModelRequest(
        checkpoint=str(models / "bccd_nano.safetensors"),
        arch=str(models / "bccd_nano_arch.yaml"),
        classes=("RBC", "WBC", "Platelets"),
        image_size=(320, 320),
        runtime="torch",
    )
    spec = resolve_model(request, OPTIONS, device="cpu")
    return spec, sorted((data / "bccd/images").glob("*.jpg"))[:5]


@pytest.fixture(scope="module", params=["digits", "bccd"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    if request.param == "digits":
        spec, paths = digits_case(folder)
    else:
        folders = (request.getfixturevalue(name) for name in ("models_dir", "data_dir"))
        spec, paths = bccd_case(*folders)
    images = letterboxed(paths, spec)
    asked = dataclasses.replace(spec, runtime="onnx")
    made = make_graph(asked, OPTIONS, images, folder, lambda _: None)
    found = list(load_detector(spec, OPTIONS, threads=1).detect(images))
    assert sum(map(len, found)) > 50
    return Case(spec, images, made.artefact(), found)


def assert_same(found: list[Detections], wanted: list[Detections]) -> None:
    """Within the limits of sameness; order among equals does not count."""
    for a, b in zip(found, wanted, strict=True):
        assert len(a) == len(b)
        i, j = (np.lexsort((d.category_ids, d.anchor)) for d in (a, b))
        np.testing.assert_array_equal(a.anchor[i], b.anchor[j])
        np.testing.assert_array_equal(a.category_ids[i], b.category_ids[j])
        np.testing.assert_allclose(a.boxes[i], b.boxes[j], atol=BOX_PX)
        np.testing.assert_allclose(a.scores[i], b.scores[j], atol=SCORE)
        np.testing.assert_allclose(a.topk_scores[i], b.topk_scores[j], atol=SCORE)
        np.testing.assert_allclose(a.box_std[i], b.box_std[j], atol=BOX_PX)
        np.testing.assert_allclose(a.box_entropy[i], b.box_entropy[j], atol=1e-3)


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_fp32_is_torchs(case: Case, runtime: Any) -> None:
    if runtime not in installed():
        pytest.skip(f"{runtime} is not installed")
    spec = case.on(runtime)
    detector = GraphDetector(session_of(case.graph, spec, threads=1), spec)
    assert_same(detector.detect(case.images), case.found)
    alone = [detector.detect(image[None])[0] for image in case.images]
    assert_same(alone, case.found)  # any batch size, one after the other


def test_bf16_finds_the_same_objects_or_says_that_this_cpu_cannot(case: Case) -> None:
    spec = case.on("openvino", "bf16")
    if "openvino" not in installed():
        pytest.skip("openvino is not installed")
    from workers.runtimes.openvino_session import has_bf16, import_openvino

    if not has_bf16(import_openvino().Core()):
        with pytest.raises(ModelError, match="no bf16"):
            session_of(case.graph, spec, threads=1)
        return
    session = session_of(case.graph, spec, threads=1)
    for a, b in zip(GraphDetector(session, spec).detect(case.images), case.found, strict=True):
        sure = b.anchor[b.scores > 0.5]
        assert len(set(sure.tolist()) - set(a.anchor.tolist())) <= 0.1 * len(sure) + 1


def test_the_cut_that_bf16_makes_loses_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network and the selection as two models, both in float32: what one model finds."""
    if "openvino" not in installed():
        pytest.skip("openvino is not installed")
    import workers.runtimes.openvino_session as module

    whole, parts = module._settings, module._parts
    monkeypatch.setattr(module, "has_bf16", lambda core: True)
    monkeypatch.setattr(module, "_settings", lambda hint, threads: whole("f32", threads))
    monkeypatch.setattr(module, "_parts", lambda ov, model, _: parts(ov, model, "bf16"))
    spec = case.on("openvino", "bf16")
    assert_same(GraphDetector(session_of(case.graph, spec, threads=1), spec).detect(case.images),
                case.found)  # fmt: skip


def test_tensorrt_is_torchs(case: Case) -> None:
    import torch

    if "tensorrt" not in installed() or not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and TensorRT")
    spec = case.on("tensorrt", device="cuda")
    detector = GraphDetector(session_of(case.graph, spec, threads=1), spec)
    for a, b in zip(detector.detect(case.images), case.found, strict=True):
        sure = b.anchor[b.scores > 0.5]
        assert len(set(sure.tolist()) - set(a.anchor.tolist())) <= 0.02 * len(sure) + 1


def test_graphs_for_tensorrt_have_only_the_types_that_it_knows(case: Case, tmp_path: Path) -> None:
    """Its documentation: uint8 is cast before anything else, quantised values are int8 around 0."""
    spec = case.on("tensorrt", "int8", device="cuda")
    made = make_graph(spec, OPTIONS, case.images, tmp_path, lambda _: None).artefact()
    quantised = Quantiser(made.files[GRAPH], case.images, tmp_path, "tensorrt").quantise(RECIPE)
    for artefact in (made, quantised):
        graph = onnx.load(str(artefact.files[artefact.main])).graph
        assert {node.op_type for node in graph.node if "images" in node.input} == {"Cast"}
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        ends = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert (len(ends) > 100) == (artefact is quantised)
        for zero in (arrays[node.input[2]] for node in ends):
            assert zero.dtype == np.int8
            assert not zero.any()
        # What it says is right wherever it runs: here, on a CPU.
        found = GraphDetector(OnnxSession(artefact, threads=1), spec).detect(case.images)
        for a, b in zip(found, case.found, strict=True):
            sure = b.anchor[b.scores > 0.5]
            assert len(set(sure.tolist()) - set(a.anchor.tolist())) <= 0.1 * len(sure) + 1


@pytest.mark.parametrize("where", ["scores", "boxes"])
def test_another_network_is_noticed(case: Case, where: str) -> None:
    session = session_of(case.graph, case.on("onnx"), threads=1)

    class Shifted:
        def run(self, batch: NDArray[np.uint8]) -> Any:
            found = session.run(batch)
            return dataclasses.replace(found, **{where: getattr(found, where) + 0.06})

    floor = case.spec.score_floor
    same = difference(session, session, case.images, floor)
    assert same.same
    assert same.anchors > 50
    apart = difference(session, Shifted(), case.images, floor)
    with pytest.raises(ArtefactError, match="does not agree with torch"):
        refuse_difference(apart, "it")


def test_a_worker_loads_by_digest_and_nothing_else(case: Case, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "place"))
    ref = publish(store, "model/k", case.graph.files, case.graph.main, {"note": 1})
    assert publish(store, "model/k", case.graph.files, case.graph.main, {"note": 2}) == ref
    spec = case.on("onnx", artefact=ref)
    loader: Callable[[ModelSpec], Any] = partial(load_detector, options=OPTIONS, threads=1)
    assert_same(list(loader(spec).detect(case.images)), case.found)
    (graph,) = (tmp_path / "place/model/k").glob("*.onnx")
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="has sha256"):
        loader(spec)
    wrong = dataclasses.replace(ref, sha256="0" * 64)
    with pytest.raises(ArtefactError, match="not the model artefact"):
        loader(case.on("onnx", artefact=wrong))
    with pytest.raises(ModelError, match="none was made"):
        loader(case.on("onnx", artefact=None))
