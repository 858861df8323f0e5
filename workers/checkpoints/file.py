"""One checkpoint file: its weights and its self-description.

.pth, .pt, .ckpt and .pth.tar files are read by torch_file.py, without running anything in them;
.safetensors files of our own carry a JSON description under the metadata key ``labelfleet``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from storage.errors import CheckpointError
from storage.objects.os_errors import translating_os_errors
from workers.checkpoints.cache import file_sha256
from workers.checkpoints.description import (
    METADATA_KEY,
    Description,
    names_of,
    read_description,
)
from workers.checkpoints.pickle_values import Call
from workers.checkpoints.plain_values import plain
from workers.checkpoints.processing import preprocessing_of
from workers.checkpoints.torch_file import TensorRef, TorchFile, tensor_ref
from workers.images.preprocessing import Preprocessing

# A weight's name as it is in a YOLO-NAS, behind whatever wraps the network.
_IN_NETWORK = re.compile(r"((?:.*?\.)??)(?:backbone|neck|heads)\.")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint file's self-description; ``load_state_dict`` reads its weights.

    Attributes:
        path: the local file.
        sha256: hex digest of its bytes.
        num_classes: outputs of the classification heads, from the weights' shapes.
        shapes: of every weight, by its name in the network.
        name: yolo_nas_s, _m or _l; None when it does not say.
        arch_params: canonical JSON text, or None: those of ``name``.
        classes: names by contiguous id, as many as ``num_classes``; None when it does not say.
        official_ids: the ids that its training set gave the classes; None when it does not say.
        preprocessing: what it was trained with; None when it does not say.
        nms_iou: the threshold it was made for; None when it does not say.
        licence: as stated by its author.
        training: how it was trained, as recorded by its trainer.
        provenance: the models it learned from; see ``workers.checkpoints.provenance``.
    """

    path: Path
    sha256: str
    num_classes: int
    shapes: Mapping[str, tuple[int, ...]]
    name: str | None = None
    arch_params: str | None = None
    classes: tuple[str, ...] | None = None
    official_ids: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None
    nms_iou: float | None = None
    licence: str | None = None
    training: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) it was trained with, in pixels."""
        return self.preprocessing.size if self.preprocessing else None

    def load_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights by name, on the CPU; of a super-gradients checkpoint the EMA ones.

        Raises:
            CheckpointError: damaged, or with values that are not finite floating-point numbers.
        """
        if self.path.suffix == ".safetensors":
            state = _safetensors_weights(self.path)
        else:
            file = TorchFile(self.path)
            state = file.tensors(_weights(self.path, _root(file)))
        for name, tensor in state.items():
            _check_values(self.path, name, tensor)
        return state


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of torch or a .safetensors file, reading everything but the weights.

    Raises:
        CheckpointError: not a checkpoint, damaged, not YOLO-NAS, or inconsistent.
    """
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"{path.name} is an ONNX graph, and weights of a YOLO-NAS are asked for here",
            hint="give a .pth, .pt, .ckpt or .safetensors; only a run's `model` takes an .onnx, "
            "with `family`",
        )
    digest = file_sha256(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, digest)
    root = _root(TorchFile(path))
    shapes = {name: ref.shape for name, ref in _weights(path, root).items()}
    params = root.get("processing_params")
    said = _from_processing(path, plain(params)) if params is not None else {}
    return _checked(Checkpoint(path, digest, _num_classes(path, shapes), shapes, **said))


def save_checkpoint(
    path: Path, state_dict: Mapping[str, torch.Tensor], description: Description
) -> None:
    """Write a self-describing .safetensors.

    Args:
        state_dict: unfused weights, in the dtype to keep (float16 halves the file).

    Raises:
        StorageError: it cannot be written, such as on a full disk.
    """
    weights = {k: v.detach().cpu().contiguous() for k, v in state_dict.items()}
    temporary = path.with_name(f".{path.name}.part")
    # Not save_file, whose error does not tell a full disk from other faults.
    content = save(weights, metadata={METADATA_KEY: description.to_text()})
    with translating_os_errors(str(temporary)):
        temporary.write_bytes(content)
        temporary.replace(path)


# .safetensors


def _read_safetensors(path: Path, digest: str) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = network_names(path, file.keys())
            shapes = {n: tuple(file.get_slice(k).get_shape()) for k, n in names.items()}
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{path.name} is damaged, or no safetensors file: {exc}") from exc
    said = read_description(path.name, metadata.get(METADATA_KEY))
    return _checked(Checkpoint(path, digest, _num_classes(path, shapes), shapes, **said))


def _safetensors_weights(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        names = network_names(path, file.keys())
        return {name: file.get_tensor(k) for k, name in names.items()}


# .pth and .pt


def _root(file: TorchFile) -> dict[Any, Any]:
    """Return the pickled dict, OrderedDict or not; its values are left as they are."""
    root = file.root
    if isinstance(root, Call) and root.target and root.target.name == "OrderedDict":
        root = root.items
    if not isinstance(root, dict):
        what = f" but {root.target}" if isinstance(root, Call) and root.target else ""
        raise CheckpointError(
            f"{file.path.name} holds no dict of weights{what}",
            hint="save the model's state_dict(), not the model itself",
        )
    return root


def _weights(path: Path, root: Mapping[Any, Any]) -> dict[str, TensorRef]:
    """super-gradients' choice: ``ema_net``, else ``net``; what others call them; else the dict."""
    found: Any = root
    for key in ("ema_net", "net", "ema_state_dict", "state_dict", "model_state_dict", "model"):
        if key in root:
            found = root[key]
            break
    if isinstance(found, Call):
        found = found.items
    refs = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        try:
            ref = tensor_ref(value)
        except CheckpointError as exc:
            raise CheckpointError(f"{path.name}: {name!s:.80}: {exc.message}") from exc
        if ref is not None and isinstance(name, str):
            refs[name] = ref
    if not refs:
        raise CheckpointError(f"{path.name} holds no weights under net, ema_net or at its top")
    return {name: refs[key] for key, name in network_names(path, refs).items()}


def _from_processing(path: Path, params: Any) -> dict[str, Any]:
    """Return the fields given by ``processing_params``; all of them are optional."""
    said: dict[str, Any] = {}
    try:
        if params.get("class_names") is not None:
            said["classes"] = names_of(params["class_names"])
        if params.get("image_processor") is not None:
            said["preprocessing"] = preprocessing_of(params["image_processor"])
        if params.get("iou") is not None:
            said["nms_iou"] = _share(params["iou"])
    except (ValueError, TypeError, AttributeError) as exc:
        raise CheckpointError(f"{path.name}: its processing_params: {exc!s:.200}") from exc
    return said


def _share(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"iou is {value!r:.40}")
    return float(value)


# both


def network_names(path: Path, keys: Iterable[str]) -> dict[str, str]:
    """Return the weights of the network: their names in it, by their keys in the file.

    What wraps a network shows in the keys: ``module.`` (DataParallel), ``_orig_mod.``
    (torch.compile, in any place), ``model.`` or any other attribute of a Lightning module. What
    such a module holds beside the network, a loss or a metric, is left out. Of several networks
    in one file the averaged one is taken, as super-gradients does.

    Raises:
        CheckpointError: several networks, and no single one of them is named as the average.
    """
    plain = {key: key.replace("_orig_mod.", "") for key in keys}
    prefixes = {found[1] for name in plain.values() if (found := _IN_NETWORK.match(name))}
    if prefixes <= {""}:
        return plain
    if len(prefixes) > 1:
        averaged = {prefix for prefix in prefixes if "ema" in prefix.lower()}
        if len(averaged) != 1:
            raise CheckpointError(
                f"{path.name} holds several networks: "
                + ", ".join(sorted(prefix or "one without a prefix" for prefix in prefixes)),
                hint="save the state_dict() of the one to use",
            )
        prefixes = averaged
    prefix = prefixes.pop()
    return {k: n.removeprefix(prefix) for k, n in plain.items() if n.startswith(prefix)}


def _num_classes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    counts = {
        shape[0] for name, shape in shapes.items() if name.endswith(".cls_pred.weight") and shape
    }
    if len(counts) != 1:
        raise CheckpointError(
            f"{path.name} is not a YOLO-NAS detector: "
            + ("its heads disagree about the classes" if counts else "no classification heads"),
            hint=f"it holds {len(shapes)} weights, the first {next(iter(shapes), 'none')!r:.60}",
        )
    return counts.pop()


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    names = checkpoint.classes
    if names is not None and len(names) != checkpoint.num_classes:
        raise CheckpointError(
            f"{checkpoint.path.name} names {len(names)} classes, "
            f"and its weights have {checkpoint.num_classes}"
        )
    if names is not None and len(set(names)) != len(names):
        raise CheckpointError(f"{checkpoint.path.name} names a class twice")
    return checkpoint


def _check_values(path: Path, name: str, tensor: torch.Tensor) -> None:
    if name.endswith("num_batches_tracked"):
        return
    if not tensor.is_floating_point():
        raise CheckpointError(f"{path.name}: {name} is {tensor.dtype}, not floating point")
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"{path.name}: {name} holds values that are not finite",
            hint="the training diverged; take an earlier checkpoint",
        )
