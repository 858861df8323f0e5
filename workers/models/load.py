"""A detector of a resolved model on a runtime."""

from __future__ import annotations

from storage.errors import ModelError
from storage.objects.protocols import StorageOptions
from workers.detectors.graph import Session, detector_around
from workers.detectors.protocol import Detector
from workers.runtimes.artefacts import Artefact, fetch_artefact
from workers.spec import ModelSpec


def load_detector(spec: ModelSpec, options: StorageOptions, *, threads: int) -> Detector:
    """Return the model of ``spec`` on its runtime and device, ready.

    Only torch and TensorRT import torch, and only torch imports super-gradients: a worker on
    another runtime starts in a second.

    Args:
        spec: every choice made.
        options: how to reach checkpoint and artefact.
        threads: cores that inference may use on a CPU.

    Raises:
        CheckpointError, ArtefactError: the model cannot be had, read or loaded.
        ModelError: the device or runtime is not there.
    """
    if spec.runtime == "torch":
        from workers.models.load_torch import load_detector as load_torch

        return load_torch(spec, options, threads=threads)
    return detector_around(_session(spec, options, threads), spec)


def _session(spec: ModelSpec, options: StorageOptions, threads: int) -> Session:
    if spec.artefact is None:
        raise ModelError(
            f"runtime {spec.runtime} needs an artefact, and none was made",
            hint="`labelfleet compile CONFIG` makes it; `labelfleet run` does so by itself",
        )
    return session_of(fetch_artefact(spec.artefact, options), spec, threads=threads)


def session_of(artefact: Artefact, spec: ModelSpec, *, threads: int) -> Session:
    """Return a session on an artefact that is here; ``threads`` 0: all cores."""
    if spec.convention is not None:
        from workers.models.onnx_family import FamilySession

        return FamilySession(artefact, spec, threads=threads)
    if spec.runtime == "openvino":
        from workers.runtimes.openvino_session import OpenVinoSession

        return OpenVinoSession(artefact, spec.precision, threads=threads)
    if spec.runtime == "onnx":
        from workers.runtimes.onnx_session import OnnxSession

        return OnnxSession(artefact, threads=threads)
    from workers.runtimes.tensorrt_session import TensorRtEngine

    return TensorRtEngine(artefact).session()
