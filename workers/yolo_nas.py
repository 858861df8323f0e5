"""The one place that knows super-gradients: build YOLO-NAS, fuse it, read its heads, run it.

``DenseDetector`` is the network as every runtime sees it: uint8 images in, boxes, scores and DFL
statistics out; ``TorchDetector`` runs it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from storage.errors import CheckpointError, ConfigError, ModelError
from storage.objects import StorageOptions
from workers.checkpoints import Checkpoint, canonical_arch, fetch_checkpoint, read_checkpoint
from workers.detector import Detector, Preprocessing
from workers.sg_environment import undisturbed
from workers.spec import ModelSpec, PrecisionName
from workers.torch_detector import TorchDetector
from workers.torchvision_ops import ensure_torchvision

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def import_super_gradients() -> Any:
    """super-gradients' ``models`` module, imported without its side effects.

    Takes 5 s of CPU time. Its packages import all of it, and going around them was tried: the
    YOLO-NAS modules alone still pull in torchmetrics, scipy and TensorBoard, for 3.5 s.
    """
    with undisturbed():
        ensure_torchvision()
        from super_gradients.training import models
    return models


def build_network(name: str, arch_params: str | None, num_classes: int) -> nn.Module:
    """A YOLO-NAS with random weights, unfused, as super-gradients builds it.

    Args:
        name: yolo_nas_s, yolo_nas_m or yolo_nas_l.
        arch_params: JSON text of arch_params that override those of ``name``; None: none.
        num_classes: outputs of the classification heads, whatever ``arch_params`` says.

    Raises:
        ConfigError: super-gradients cannot build that.
    """
    models = import_super_gradients()
    params = None if arch_params is None else json.loads(canonical_arch(json.loads(arch_params)))
    try:
        return models.get(name, arch_params=params, num_classes=num_classes)  # type: ignore[no-any-return]
    except Exception as exc:
        raise ConfigError(
            f"super-gradients cannot build {name}"
            + (" with these arch_params" if params else "")
            + f": {type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}",
            hint="compare the arch file with super-gradients' own recipes/arch_params/",
        ) from exc


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

    super-gradients' ``full_fusion`` folds the re-parameterised blocks and leaves the plain
    convolution + batch norm pairs, which are folded here (boxes move by less than 1e-4 px).
    """
    network.eval()
    network.prep_model_for_conversion(input_size=size, full_fusion=True)  # type: ignore[operator]
    for module in list(network.modules()):
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, torch.nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return network.requires_grad_(False)


class DenseDetector(nn.Module):
    """uint8 NHWC RGB batch → boxes, scores, box_std, entropy for every anchor; can be exported.

    Normalisation is inside; a network trained on BGR gets its first convolution's input weights
    reversed instead of its images. Everything after the heads' last convolution is float32.
    """

    points: Tensor
    strides: Tensor
    bins: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        heads: Any = network.heads
        self.reg_max = int(heads.reg_max)
        self.head_strides = tuple(int(s) for s in heads.fpn_strides)
        points, strides = _anchors(
            preprocessing.size, self.head_strides, float(heads.grid_cell_offset)
        )
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("strides", strides, persistent=False)
        bins = torch.arange(self.reg_max + 1, dtype=torch.float32)
        self.register_buffer("bins", bins, persistent=False)
        self.scale = preprocessing.scale
        self._set_channels(preprocessing)

    def _set_channels(self, preprocessing: Preprocessing) -> None:
        step = -1 if preprocessing.channels == "BGR" else 1
        if step == -1:
            first = next(m for m in self.network.modules() if isinstance(m, nn.Conv2d))
            first.weight.data = first.weight.data.flip(1).contiguous()
        mean = (preprocessing.mean or (0.0, 0.0, 0.0))[::step]
        std = (preprocessing.std or (1.0, 1.0, 1.0))[::step]
        self.normalises = preprocessing.mean is not None or preprocessing.std is not None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def set_precision(self, precision: PrecisionName) -> None:
        """Cast the network; the heads' last convolutions stay float32, boxes depend on them."""
        dtype = _DTYPES[precision]
        self.network.to(dtype)
        for head in self._heads():
            head.cls_pred.float()
            head.reg_pred.float()

    def _heads(self) -> list[Any]:
        heads: Any = self.network.heads
        return [getattr(heads, f"head{i + 1}") for i in range(len(self.head_strides))]

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, A, C] and DFL logits [B, A, 4, bins], both float32.

        Args:
            images: uint8 [B, H, W, 3], RGB.
        """
        network: Any = self.network
        feats = network.neck(network.backbone(self._normalised(images)))
        logits, distri = [], []
        for head, feat in zip(self._heads(), feats, strict=False):
            stem = head.stem(feat)
            cls = head.cls_pred(head.cls_convs(stem).float())
            reg = head.reg_pred(head.reg_convs(stem).float())
            logits.append(cls.permute(0, 2, 3, 1).flatten(1, 2))
            distri.append(reg.permute(0, 2, 3, 1).flatten(1, 2))
        joined = torch.cat(distri, 1)
        return torch.cat(logits, 1), joined.reshape(*joined.shape[:2], 4, self.reg_max + 1)

    def _normalised(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float() * self.scale  # NHWC seen as channels_last
        if self.normalises:
            pixels = (pixels - self.mean) / self.std
        return pixels.to(self._heads()[0].stem.seq.conv.weight.dtype)

    def decode(
        self, distri: Tensor, points: Tensor, strides: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, their spread and their entropy from DFL logits (Generalized Focal Loss, 2020).

        Args:
            distri: float32 [..., 4, bins]: left, top, right, bottom, in strides from the point.
            points: float32 [..., 2], xy in strides.
            strides: float32 [..., 1], pixels.

        Returns:
            xyxy [..., 4] and standard deviations per side [..., 4] in input pixels; entropy
            [...] in nats, mean over the four sides.
        """
        log_p = distri.log_softmax(-1)
        p = log_p.exp()
        mean = (p * self.bins).sum(-1)
        lt, rb = mean[..., :2], mean[..., 2:]
        boxes = torch.cat([points - lt, points + rb], -1) * strides
        spread = (p * (self.bins - mean.unsqueeze(-1)) ** 2).sum(-1).sqrt() * strides
        entropy = -(p * log_p).sum(-1).mean(-1)
        return boxes, spread, entropy

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All anchors: boxes [B, A, 4], scores [B, A, C], box_std [B, A, 4], entropy [B, A]."""
        logits, distri = self.raw(images)
        boxes, spread, entropy = self.decode(distri, self.points, self.strides)
        return boxes, logits.sigmoid(), spread, entropy


def _anchors(size: tuple[int, int], strides: Sequence[int], offset: float) -> tuple[Tensor, Tensor]:
    """Anchor points [A, 2] (xy, in strides) and strides [A, 1] of all levels, row by row."""
    points, widths = [], []
    for stride in strides:
        ys = torch.arange(size[0] // stride, dtype=torch.float32) + offset
        xs = torch.arange(size[1] // stride, dtype=torch.float32) + offset
        grid_y, grid_x = torch.meshgrid(ys, xs, indexing="ij")
        points.append(torch.stack([grid_x, grid_y], -1).reshape(-1, 2))
        widths.append(torch.full((len(points[-1]), 1), float(stride)))
    return torch.cat(points), torch.cat(widths)


def load_detector(spec: ModelSpec, options: StorageOptions, *, threads: int) -> Detector:
    """The model of ``spec``, fused and ready on its device.

    Args:
        spec: every choice made; the checkpoint's bytes must have the digest it names.
        options: how to reach the checkpoint.
        threads: torch threads of this process on a CPU.

    Raises:
        CheckpointError: the checkpoint cannot be had, read, or fitted to the network.
        ModelError: the device or runtime is not there.
    """
    _check_device(spec)
    torch.set_num_threads(threads)
    path = fetch_checkpoint(spec.checkpoint, options, sha256=spec.sha256)
    network = build_network(spec.name, spec.arch_params, len(spec.classes))
    load_weights(network, read_checkpoint(path))
    dense = DenseDetector(fuse(network, spec.preprocessing.size), spec.preprocessing)
    dense.set_precision(spec.precision)
    dense.eval().to(spec.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TorchDetector(dense, spec)


def _check_device(spec: ModelSpec) -> None:
    if spec.runtime != "torch" or spec.precision not in _DTYPES:
        raise ModelError(f"runtime {spec.runtime} with precision {spec.precision} is not available")
    if spec.device == "cuda":
        if not torch.cuda.is_available():
            raise ModelError(
                "the run asks for cuda, and torch sees no CUDA device on this machine",
                hint="install a CUDA build of torch, or start a new run on cpu",
            )
        # fp32 means fp32: TF32 moves boxes.
        torch.backends.cudnn.allow_tf32 = spec.precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = spec.precision != "fp32"
