"""Make the artefact of a model: export it, compare it with torch, quantise it.

The driver does this once; it needs torch and super-gradients, and nncf for INT8.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.objects.protocols import StorageOptions
from workers.checkpoints.cache import fetch_checkpoint
from workers.detectors.graph import detector_around
from workers.runtimes.artefacts import Artefact
from workers.spec import ModelSpec

# Increase when a change here produces a different graph from the same weights.
GRAPH_VERSION = 2
GRAPH = "model.onnx"
_PACKAGES: dict[str, tuple[str, ...]] = {
    "onnx": ("torch", "onnx", "onnxruntime"),
    "openvino": ("torch", "onnx", "openvino"),
    "tensorrt": ("torch", "onnx", "tensorrt"),
}
_CHECKED = 4  # images that show whether runtimes agree

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Made:
    """Files of an artefact in a local folder, the main file, and its facts."""

    files: Mapping[str, Path]
    main: str
    facts: Mapping[str, Any]

    def artefact(self) -> Artefact:
        """Return it in the form that sessions load, before it is published."""
        return Artefact(self.files, self.main, self.facts)


def artefact_key(spec: ModelSpec, more: Mapping[str, Any] | None = None) -> str:
    """32 hex digits that name the artefact: weights, shape, precision and versions.

    Precisions that load the same graph share it: fp32 and bf16 of OpenVINO.

    Args:
        more: what else decides how it is made (INT8: source and limit).
    """
    input_of_graph = replace(spec.preprocessing, flip=False)  # mirroring does not change the graph
    identity = {
        "weights": spec.sha256,
        "name": spec.name,
        "arch": spec.arch_params,
        "classes": len(spec.classes),
        "keep": spec.keep,
        "preprocessing": input_of_graph.fields(),
        "runtime": spec.runtime,
        "precision": graph_precision(spec),
        "graph": GRAPH_VERSION,
        "versions": versions(spec),
        **({} if spec.convention is None else {"convention": asdict(spec.convention)}),
        **(more or {}),
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def graph_precision(spec: ModelSpec) -> str:
    """Return the precision stored in the graph; the others are applied on loading."""
    typed = spec.runtime == "tensorrt" and spec.precision == "fp16"
    return spec.precision if typed or spec.precision == "int8" else "fp32"


def versions(spec: ModelSpec) -> dict[str, str]:
    """Return the versions of all packages that affect the artefact; skip absent ones."""
    names = _PACKAGES[spec.runtime] + (("nncf",) if spec.precision == "int8" else ())
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def make_graph(
    spec: ModelSpec, options: StorageOptions, images: NDArray[np.uint8], folder: Path, say: Say
) -> Made:
    """Export the graph; on a CPU runtime, check that its fp32 agrees with torch.

    Args:
        spec: the model; its artefact is not looked at.
        images: uint8 [N, H, W, 3], letterboxed, some of which are compared.
        folder: local, where the file is written.

    Raises:
        ArtefactError: it does not agree with torch.
        CheckpointError: the checkpoint cannot be had, read, or fitted to the network.
    """
    if spec.convention is not None:
        return make_family_graph(spec, options, images, folder, say)
    from workers.compile.export_graph import export_onnx
    from workers.yolo_nas.network import load_dense

    say(f"exporting {spec.name} for {spec.runtime}")
    dense = load_dense(spec, options)
    exported = dense
    if graph_precision(spec) == "fp16":
        exported = load_dense(spec, options)
        exported.set_precision("fp16")
    path = folder / GRAPH
    cast_first = spec.runtime == "tensorrt"
    path.write_bytes(export_onnx(exported, spec.keep, len(spec.classes), cast_first=cast_first))
    made = Made({GRAPH: path}, GRAPH, _facts(spec))
    if spec.device != "cpu":
        return made
    from workers.compile.agreement import difference, refuse_difference
    from workers.runtimes.torch_session import torch_session

    say("comparing it with torch")
    plain = dataclasses.replace(spec, precision="fp32")
    found = difference(
        torch_session(dense, plain),
        open_session(made.artefact(), plain),
        images[:_CHECKED],
        spec.score_floor,
    )
    refuse_difference(found, f"the exported graph on {spec.runtime}")
    return Made(made.files, made.main, {**made.facts, "parity": asdict(found)})


def make_family_graph(
    spec: ModelSpec, options: StorageOptions, images: NDArray[np.uint8], folder: Path, say: Say
) -> Made:
    """Return another family's graph as an artefact: the file itself, after a test run on the
    images.

    Raises:
        ArtefactError: the runtime's fp32 does not agree with ONNX Runtime's.
        CheckpointError: the file cannot be had or read.
        ModelError: it does not run, or its output is not finite.
    """
    from workers.compile.agreement import difference, refuse_difference
    from workers.models.families import read_ports
    from workers.models.onnx_family import PORTS, ports_to_json

    path = folder / GRAPH
    path.write_bytes(fetch_checkpoint(spec.checkpoint, options, sha256=spec.sha256).read_bytes())
    facts = {**_facts(spec), PORTS: ports_to_json(read_ports(path))}
    made = Made({GRAPH: path}, GRAPH, facts)
    plain = dataclasses.replace(spec, precision="fp32")
    session = open_session(made.artefact(), plain)
    detector_around(session, plain).detect(images[:_CHECKED])
    if spec.runtime == "onnx":
        return made
    say("comparing it with ONNX Runtime")
    reference = open_session(made.artefact(), dataclasses.replace(plain, runtime="onnx"))
    found = difference(reference, session, images[:_CHECKED], spec.score_floor)
    refuse_difference(found, f"the graph on {spec.runtime}", "ONNX Runtime")
    return Made(made.files, made.main, {**facts, "parity": asdict(found)})


def open_session(artefact: Artefact, spec: ModelSpec) -> Any:
    """Return a session on what was just made, on all cores."""
    from workers.models.load import session_of

    return session_of(artefact, spec, threads=0)


def _facts(spec: ModelSpec) -> dict[str, Any]:
    return {
        "runtime": spec.runtime,
        "graph_precision": graph_precision(spec),
        "weights_sha256": spec.sha256,
        "input_size": list(spec.preprocessing.size),
        "graph_version": GRAPH_VERSION,
        "versions": versions(spec),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
