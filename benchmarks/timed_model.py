"""A YOLO-NAS for timing: random weights that find about a given number of boxes per image.

    python benchmarks/timed_model.py DEST.safetensors IMAGE… [--name yolo_nas_s] [--boxes 15]

Random weights as they come score every anchor alike, below the floor: no box, and no NMS work.
Here the batch norms are given the statistics of real images, as training would have done, the
coarsest head gets class weights that answer to all images alike, and one class bias is set so
that NMS leaves the boxes asked for, on average; single images have from none to some 50.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.truth import coco_classes as coco
from workers.checkpoints.description import Description
from workers.checkpoints.file import save_checkpoint
from workers.detectors.nms import PRE_NMS_CANDIDATES, NmsRules, suppress
from workers.images.decode import decode
from workers.images.letterbox import letterbox
from workers.images.preprocessing import Preprocessing
from workers.models.resolve import coco_preprocessing
from workers.yolo_nas.dense import DenseDetector
from workers.yolo_nas.network import build_network, fuse

BOXES = 15.0
FLOOR, NMS_IOU, MAX_DETECTIONS = 0.05, 0.7, 300
_SEEN = 12  # images that set statistics and bias
_DRAWN = 4000  # random classes, of which the evenest are taken
_SILENCE = -30.0  # class logits of the heads that find nothing

Boxes = NDArray[np.float32]
Scores = NDArray[np.float32]
Classes = NDArray[np.int64]

log = logging.getLogger("labelfleet.benchmarks")


def write_timed_checkpoint(
    path: Path,
    images: Sequence[Path],
    *,
    name: str = "yolo_nas_s",
    size: tuple[int, int] = (640, 640),
    boxes: float = BOXES,
    seed: int = 0,
) -> Path:
    """Write a checkpoint of COCO's 80 classes that describes itself; ``image_size`` is ``size``.

    Args:
        path: a .safetensors file to be; an existing one is kept as it is.
        images: the first and last of them set statistics and bias, so mix kinds across the list.
        boxes: mean detections an image above a score of 0.05, after NMS at 0.7.
        seed: of the weights.
    """
    if path.exists():
        return path
    torch.manual_seed(seed)
    preprocessing = coco_preprocessing(size)
    batch = letterboxed(_spread_over(images), preprocessing)
    network = build_network(name, None, len(coco.CLASSES))
    _normalise(network, batch)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    dense = DenseDetector(fuse(network, size), preprocessing).eval()
    _even_out(dense, batch, seed)
    bias = _bias(dense, batch, boxes)
    for level, head in enumerate(dense._heads(), 1):
        state[f"heads.head{level}.cls_pred.weight"] = head.cls_pred.weight.clone()
        state[f"heads.head{level}.cls_pred.bias"] = head.cls_pred.bias + bias
    save_checkpoint(
        path,
        state,
        Description(
            name=name,
            arch_params=None,
            classes=coco.CLASSES,
            preprocessing=preprocessing,
            licence="random weights",
            training={"seed": seed, "boxes_per_image": boxes},
        ),
    )
    return path


def letterboxed(images: Sequence[Path], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """uint8 [N, H, W, 3] of image files."""
    pixels = [decode(path.read_bytes(), max_pixels=10**9).pixels for path in images]
    return np.stack([letterbox(one, preprocessing)[0] for one in pixels])


def _spread_over(images: Sequence[Path]) -> list[Path]:
    places = np.linspace(0, len(images) - 1, min(_SEEN, len(images))).round().astype(int)
    return [images[i] for i in places]


@torch.no_grad()
def _normalise(network: nn.Module, batch: NDArray[np.uint8]) -> None:
    """Batch norms' running statistics from one forward in training mode; half size is enough."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean of what was seen
    network.train()
    network(torch.from_numpy(batch[:, ::2, ::2].copy()).permute(0, 3, 1, 2).float() / 255)
    network.eval()


@torch.inference_mode()
def _even_out(dense: DenseDetector, batch: NDArray[np.uint8], seed: int) -> None:
    """New class weights for the coarsest head, and silence in the others; in place.

    A random network answers mostly to what an image is like as a whole: one would get 300 boxes
    and the next none. So of many random classes those are taken whose high logits, the best
    hundredth of an image, lie at the same height in all images.
    """
    *silent, head = [head.cls_pred for head in dense._heads()]
    for other in silent:
        other.weight.zero_()
        other.bias.fill_(_SILENCE)
    maps: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: maps.append(given[0].clone()))
    for one in batch:
        dense.raw(torch.from_numpy(one[None]))
    hook.remove()
    features = torch.cat([one.flatten(2).mT for one in maps])  # [images, places, channels]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(_DRAWN, features.shape[2], generator=generator)
    logits = features @ drawn.T
    high = logits.topk(max(1, logits.shape[1] // 100), dim=1).values[:, -1]  # [images, drawn]
    spread = logits.flatten(0, 1).std(0)
    best = (high.std(0) / spread).topk(head.weight.shape[0], largest=False).indices
    head.weight.copy_((drawn / spread[:, None])[best][..., None, None])
    head.bias.copy_(-(high.mean(0) / spread)[best])


@torch.inference_mode()
def _bias(dense: DenseDetector, batch: NDArray[np.uint8], boxes: float) -> float:
    """Return the offset of all class logits that gives that many boxes per image."""
    candidates = [_best(dense, one) for one in batch]
    low, high = -60.0, 60.0
    for _ in range(30):
        bias = (low + high) / 2
        if np.mean([_count(*image, bias) for image in candidates]) > boxes:
            high = bias
        else:
            low = bias
    log.info("boxes an image: %s", [_count(*image, low) for image in candidates])
    return low


def _best(dense: DenseDetector, image: NDArray[np.uint8]) -> tuple[Boxes, Scores, Classes]:
    """Return an image's 1,024 best candidates: a common bias changes neither them nor their
    order."""
    logits, distri = dense.raw(torch.from_numpy(image[None]))
    best = logits.flatten().topk(PRE_NMS_CANDIDATES)
    anchors, classes = best.indices // logits.shape[-1], best.indices % logits.shape[-1]
    boxes, _, _ = dense.decode(distri[0, anchors], dense.points[anchors], dense.strides[anchors])
    return boxes.numpy(), best.values.numpy(), classes.numpy()


def _count(boxes: Boxes, logits: Scores, classes: Classes, bias: float) -> int:
    n = int((1 / (1 + np.exp(-(logits + bias))) > FLOOR).sum())
    rules = NmsRules(FLOOR, NMS_IOU, MAX_DETECTIONS)
    return len(suppress(boxes[:n], logits[:n], classes[:n], rules))


def main() -> None:
    """Write one, and say what it finds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dest", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--name", default="yolo_nas_s")
    parser.add_argument("--boxes", type=float, default=BOXES)
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    write_timed_checkpoint(given.dest, given.images, name=given.name, boxes=given.boxes)


if __name__ == "__main__":
    main()
