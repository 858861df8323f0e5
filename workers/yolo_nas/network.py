"""Build a YOLO-NAS with the package that is installed, load its weights, fuse it."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
from typing import Any, Literal

import torch
from torch import nn

from storage.errors import CheckpointError, ConfigError, NotInstalled
from storage.objects.protocols import StorageOptions
from workers.checkpoints.cache import fetch_checkpoint
from workers.checkpoints.description import canonical_arch
from workers.checkpoints.file import Checkpoint, read_checkpoint
from workers.spec import ModelSpec
from workers.yolo_nas import modern
from workers.yolo_nas.dense import DenseDetector
from workers.yolo_nas.sg_environment import undisturbed
from workers.yolo_nas.torchvision_ops import ensure_torchvision

Package = Literal["super-gradients", "modern-yolonas"]

# What an arch file can name registers itself when its module is imported.
_REGISTERED = (
    "super_gradients.modules.detection_modules",
    "super_gradients.modules.pose_estimation_modules",
    "super_gradients.training.models.detection_models.csp_darknet53",
    "super_gradients.training.models.detection_models.csp_resnet",
    "super_gradients.training.models.detection_models.pp_yolo_e.pan",
    "super_gradients.training.models.detection_models.yolo_nas.dfl_heads",
    "super_gradients.training.models.detection_models.yolo_nas.panneck",
    "super_gradients.training.models.detection_models.yolo_nas.yolo_nas_variants",
    "super_gradients.training.models.detection_models.yolo_nas.yolo_stages",
    "super_gradients.training.models.segmentation_models.ddrnet_backbones",
)


def import_super_gradients() -> Any:
    """super-gradients' ``models`` module with YOLO-NAS, and without the import's side effects.

    Its other architectures are imported by the first who asks the module for them.
    """
    with undisturbed():
        ensure_torchvision()
        for module in _REGISTERED:
            importlib.import_module(module)
        from super_gradients.training import models
    return models


def build_network(name: str, arch_params: str | None, num_classes: int) -> nn.Module:
    """Return a YOLO-NAS with random weights, unfused.

    Built by super-gradients, or by modern-yolonas where only that is installed: for labelling, the
    two are the same network.

    Args:
        name: yolo_nas_s, yolo_nas_m or yolo_nas_l.
        arch_params: JSON text of arch_params that override those of ``name``; None: none.
        num_classes: outputs of the classification heads, whatever ``arch_params`` says.

    Raises:
        ConfigError: the package cannot build that.
        NotInstalled: neither is installed.
    """
    package = installed_package()
    build = _by_super_gradients if package == "super-gradients" else modern.build
    if package == "super-gradients":
        import_super_gradients()
    params = {} if arch_params is None else json.loads(canonical_arch(json.loads(arch_params)))
    try:
        return build(name, params, num_classes)
    except Exception as exc:
        raise ConfigError(
            f"{package} cannot build {name}"
            + (" with these arch_params" if params else "")
            + f": {type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}",
            hint="compare the arch file with super-gradients' own recipes/arch_params/",
        ) from exc


def installed_package() -> Package:
    """Return what builds the network here: super-gradients where it is installed.

    Raises:
        NotInstalled: neither package is.
    """
    if _is_installed("super_gradients"):
        return "super-gradients"
    if _is_installed("modern_yolonas"):
        return "modern-yolonas"
    raise NotInstalled(
        "a YOLO-NAS on torch needs super-gradients or modern-yolonas; neither is installed",
        hint="pip install 'labelfleet[run]' brings modern-yolonas, enough to label; for "
        "super-gradients, which training needs, see docs/installation.md",
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # from an import hook
        return False


def _by_super_gradients(name: str, arch_params: dict[str, Any], num_classes: int) -> nn.Module:
    """Do what its ``models.get`` does, which loads TensorBoard and its checkpoint code besides."""
    from super_gradients.common.registry.registry import ARCHITECTURES
    from super_gradients.training.utils.utils import HpmStruct

    # PyYAML reads the 1e-3 of super-gradients' own arch files as text; OmegaConf, as a number.
    numbers = {k: float(v) for k, v in arch_params.items() if k in ("bn_eps", "bn_momentum")}
    wanted = HpmStruct(**{**arch_params, **numbers})
    wanted.override(num_classes=num_classes)
    network: nn.Module = ARCHITECTURES[name](arch_params=wanted)
    return network


def load_weights(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Strict load; CheckpointError names the first keys that differ, and the likely cause."""
    state = checkpoint.load_state_dict()
    wanted = network.state_dict()
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in wanted]
    differing = [
        f"{k} is {list(state[k].shape)}, not {list(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    if missing or unexpected or differing:
        raise _misfit(checkpoint, missing, unexpected, differing)
    network.load_state_dict(state, strict=False)


def _misfit(
    checkpoint: Checkpoint, missing: list[str], unexpected: list[str], differing: list[str]
) -> CheckpointError:
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:2])}{', …' if len(keys) > 2 else ''})"
        for what, keys in (
            ("weights missing", missing),
            ("not in the network", unexpected),
            ("of another shape", differing),
        )
        if keys
    ]
    only_classes = bool(differing) and not missing and not unexpected
    only_classes = only_classes and all(".cls_pred." in d for d in differing)
    return CheckpointError(
        f"{checkpoint.path.name} does not fit the network: {'; '.join(parts)}",
        hint="the number of classes differs"
        if only_classes
        else "the architecture differs: check model.name (s, m or l) and model.arch",
    )


def fuse(network: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Fold every batch norm into its convolution, in place; inference only. Returns ``network``.

    The packages fold the re-parameterised blocks and leave the plain convolution + batch norm
    pairs, which are folded here (boxes move by less than 1e-4 px).
    """
    network.eval()
    if hasattr(network, "prep_model_for_conversion"):  # super-gradients'
        network.prep_model_for_conversion(input_size=size, full_fusion=True)  # type: ignore[operator]
    else:
        modern.fuse_blocks(network)
    fold_norms(network)
    return network.requires_grad_(False)


def fold_norms(network: nn.Module) -> None:
    """Fold the plain convolution + batch norm pairs, in place."""
    for module in list(network.modules()):
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, torch.nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())


def load_dense(spec: ModelSpec, options: StorageOptions) -> DenseDetector:
    """Return the model of ``spec``, fused, in fp32 on the CPU.

    Args:
        spec: the checkpoint's bytes must have the digest it names.
        options: how to reach the checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be had, read, or fitted to the network.
    """
    path = fetch_checkpoint(spec.checkpoint, options, sha256=spec.sha256)
    network = build_network(spec.name, spec.arch_params, len(spec.classes))
    load_weights(network, read_checkpoint(path))
    return DenseDetector(fuse(network, spec.preprocessing.size), spec.preprocessing).eval()
