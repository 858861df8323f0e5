"""Runs an exported graph with ONNX Runtime on a CPU. Imports neither torch nor super-gradients."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import ModelError
from workers.detectors.nms import OUTPUTS, Selected
from workers.runtimes.artefacts import Artefact


def import_onnxruntime() -> Any:
    """Return the ``onnxruntime`` module, without its usage statistics. Raises ModelError."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # it would keep a database in the home directory
    try:
        import onnxruntime
    except ImportError as exc:
        raise ModelError(
            f"ONNX Runtime does not load here: {exc}", hint="run `make setup`"
        ) from exc
    return onnxruntime


class OnnxSession:
    """A ``Session`` on the CPU."""

    def __init__(self, artefact: Artefact, *, threads: int) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that spin between operators take the cores from those that decode images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = ort.InferenceSession(
            str(artefact.files[artefact.main]), options, providers=["CPUExecutionProvider"]
        )

    def run(self, batch: NDArray[np.uint8]) -> Selected:
        """See ``Session.run``."""
        return Selected(*self._session.run(list(OUTPUTS), {"images": np.ascontiguousarray(batch)}))
