"""Build a YOLO-NAS with modern-yolonas, where super-gradients is not installed.

Its parts take the weights of super-gradients' network as they are, and compute the same; what an
arch file says in super-gradients' words is handed to their constructors. Anything else that the
file asks for is refused, since these parts would leave it out without a word.

https://github.com/CondadosAI/modern-yolonas, 0.5.0, Apache-2.0.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

_IGNORED = {"activation_type": "relu"}  # the only one there is
_STAGE = ("out_channels", "num_blocks", "hidden_channels", "concat_intermediates")
_DOWN = (*_STAGE, "width_mult", "depth_mult")
_UP = (*_DOWN, "reduce_channels")
_HEAD = ("inter_channels", "width_mult", "first_conv_group_size", "stride")
_NECKS = {
    "neck1": ("YoloNASUpStage", _UP), "neck2": ("YoloNASUpStage", _UP),
    "neck3": ("YoloNASDownStage", _DOWN), "neck4": ("YoloNASDownStage", _DOWN),
}  # fmt: skip
_OUT_LAYERS = ["stage1", "stage2", "stage3", "context_module"]
# Said by every arch file, and true of every network that is built here.
_FIXED = {"in_channels": 3.0, "bn_eps": 1e-3, "bn_momentum": 0.03}
_WITHOUT_EFFECT = ("inplace_act", "_convert_")  # on what the network computes


class UnsupportedArch(ValueError):
    """The arch_params ask for what modern-yolonas does not build."""


def build(name: str, arch_params: Mapping[str, Any], num_classes: int) -> nn.Module:
    """Return the network, with random weights, unfused.

    Args:
        arch_params: override those of ``name``, as super-gradients does it: mappings key by key,
            anything else as a whole.

    Raises:
        UnsupportedArch: these parts cannot be built from them; other errors: they do not fit.
    """
    parts = _parts()
    params = _overridden(_arch_params(parts["configs"].CONFIGS[name]), arch_params)
    _check_fixed(params)
    backbone = parts["backbone.backbone"].YoloNASBackbone(**_backbone(params["backbone"]))
    neck = parts["neck.pan"].YoloNASPANNeckWithC2(
        in_channels=backbone.out_channels, **_neck(params["neck"])
    )
    heads = parts["head.dfl"].NDFLHeads(
        num_classes=num_classes, in_channels=tuple(neck.out_channels), **_heads(params["heads"])
    )
    network: nn.Module = parts["model"].YoloNAS(backbone=backbone, neck=neck, heads=heads)
    return network


def fuse_blocks(network: nn.Module) -> None:
    """Fold the re-parameterised blocks, in place; the plain pairs are left."""
    block = _parts()["nn.repvgg"].QARepVGGBlock
    for module in list(network.modules()):
        if isinstance(module, block):
            module.full_fusion()


def _parts() -> dict[str, Any]:
    """Import the network's modules, without the package's ``__init__``: it imports what downloads
    weights, reads images and draws, with requirements that are not needed here."""
    root = "modern_yolonas"
    entered = root not in sys.modules
    if entered:
        spec = importlib.util.find_spec(root)
        if spec is None:
            raise ModuleNotFoundError(f"no module named {root!r}", name=root)
        sys.modules[root] = importlib.util.module_from_spec(spec)
    try:
        names = ("configs", "backbone.backbone", "neck.pan", "head.dfl", "model", "nn.repvgg")
        return {name: importlib.import_module(f"{root}.{name}") for name in names}
    finally:
        if entered:  # whoever imports the package itself gets all of it
            del sys.modules[root]


def _arch_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return modern-yolonas's own configuration in super-gradients' words."""
    backbone, neck, heads = config["backbone"], config["neck"], config["heads"]
    return {
        "backbone": {
            "NStageBackbone": {
                "stem": {"YoloNASStem": {"out_channels": backbone["stem_out_channels"]}},
                "stages": [{"YoloNASStage": stage} for stage in backbone["stages"]],
                "context_module": {
                    "SPP": {
                        "output_channels": backbone["spp_output_channels"],
                        "k": list(backbone["spp_k"]),
                    }
                },
                "out_layers": _OUT_LAYERS,
            }
        },
        "neck": {
            "YoloNASPANNeckWithC2": {
                part: {kind: dict(neck[f"{part}_config"])} for part, (kind, _) in _NECKS.items()
            }
        },
        "heads": {
            "NDFLHeads": {
                "reg_max": heads["reg_max"],
                "heads_list": [{"YoloNASDFLHead": head} for head in heads["heads_list"]],
            }
        },
    }


def _overridden(base: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in params.items():
        own = merged.get(key)
        both = isinstance(own, Mapping) and isinstance(value, Mapping)
        merged[key] = _overridden(own, value) if both else value  # type: ignore[arg-type]  # both
    return merged


def _check_fixed(params: Mapping[str, Any]) -> None:
    for key, value in params.items():
        if key in ("backbone", "neck", "heads", *_WITHOUT_EFFECT):
            continue
        if key not in _FIXED or float(value) != _FIXED[key]:  # yaml reads 1e-3 as text
            raise UnsupportedArch(f"{key}: {value!r:.40}")


def _backbone(params: Any) -> dict[str, Any]:
    found = _named(params, "NStageBackbone")
    found = _settings(found, ("stem", "stages", "context_module", "out_layers"), "NStageBackbone")
    if found["out_layers"] != _OUT_LAYERS:
        raise UnsupportedArch(f"out_layers: {found['out_layers']!r:.80}")
    if not isinstance(found["stages"], list) or len(found["stages"]) != 4:
        raise UnsupportedArch("a number of stages other than 4")
    stem = _settings(_named(found["stem"], "YoloNASStem"), ("out_channels",), "YoloNASStem")
    pooled = _settings(_named(found["context_module"], "SPP"), ("output_channels", "k"), "SPP")
    return {
        "stem_out_channels": stem["out_channels"],
        "stages_config": [
            _settings(_named(stage, "YoloNASStage"), _STAGE, "YoloNASStage")
            for stage in found["stages"]
        ],
        "spp_output_channels": pooled["output_channels"],
        "spp_k": tuple(pooled["k"]),
    }


def _neck(params: Any) -> dict[str, Any]:
    kind = "YoloNASPANNeckWithC2"
    found = _settings(_named(params, kind), tuple(_NECKS), kind)
    return {
        f"{part}_config": _settings(_named(found[part], name), allowed, name)
        for part, (name, allowed) in _NECKS.items()
    }


def _heads(params: Any) -> dict[str, Any]:
    found = _settings(_named(params, "NDFLHeads"), ("reg_max", "heads_list"), "NDFLHeads")
    if not isinstance(found["heads_list"], list) or len(found["heads_list"]) != 3:
        raise UnsupportedArch("a number of heads other than 3")
    return {
        "reg_max": found["reg_max"],
        "heads_list": [
            _settings(_named(head, "YoloNASDFLHead"), _HEAD, "YoloNASDFLHead")
            for head in found["heads_list"]
        ],
    }


def _named(value: Any, name: str) -> Mapping[str, Any]:
    """Return the settings of a part that an arch file names by its class."""
    if not isinstance(value, Mapping) or set(value) != {name}:
        raise UnsupportedArch(f"{value!r:.60} where {name} is expected")
    if not isinstance(value[name], Mapping):
        raise UnsupportedArch(f"{name}: {value[name]!r:.60}")
    inner: Mapping[str, Any] = value[name]
    return inner


def _settings(params: Mapping[str, Any], allowed: tuple[str, ...], kind: str) -> dict[str, Any]:
    for key, value in params.items():
        if key not in allowed and _IGNORED.get(key) != value:
            raise UnsupportedArch(f"{key}: {value!r:.40} of {kind}")
    return {key: params[key] for key in allowed if key in params}
