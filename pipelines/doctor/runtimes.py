"""`doctor` on the runtimes beside torch: which are installed, and what this CPU does fast."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from pipelines.doctor.finding import Finding
from storage.errors import LabelfleetError


def runtime_findings() -> Iterator[Finding]:
    """Report each runtime on a line; a missing one is only a note."""
    yield _onnx()
    yield _openvino()
    yield _tensorrt()


def _onnx() -> Finding:
    from workers.runtimes.onnx_session import import_onnxruntime

    if importlib.util.find_spec("onnxruntime") is None:
        advice = "pip install 'labelfleet[run]'"
        return Finding("note", "runtime onnx", "not installed", advice)
    try:
        return Finding("ok", "runtime onnx", f"ONNX Runtime {import_onnxruntime().__version__}")
    except LabelfleetError as exc:
        return Finding("problem", "runtime onnx", exc.message, exc.hint or "")


def _openvino() -> Finding:
    from workers.runtimes.openvino_session import fast_precisions, import_openvino

    advice = "pip install 'labelfleet[openvino]': the fastest runtime on x86 CPUs"
    try:
        found = version("openvino")
        fast = fast_precisions(import_openvino().Core())
    except PackageNotFoundError:
        return Finding("note", "runtime openvino", "not installed", advice)
    except LabelfleetError as exc:
        return Finding("problem", "runtime openvino", exc.message, exc.hint or "")
    return Finding("ok", "runtime openvino", f"OpenVINO {found}; fast here: {', '.join(fast)}")


def _tensorrt() -> Finding:
    try:
        return Finding("ok", "runtime tensorrt", f"TensorRT {version('tensorrt')}")
    except PackageNotFoundError:
        return Finding("note", "runtime tensorrt", "not installed", "only needed where asked for")
