"""Small, frozen, picklable descriptions of the model and of a worker's task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from storage.logs import LogFormat
from storage.objects.protocols import StorageOptions
from workers.images.preprocessing import DecodeMode, Preprocessing, Tiles, ValueRange, View

RuntimeName = Literal["torch", "onnx", "openvino", "tensorrt"]
PrecisionName = Literal["fp32", "bf16", "fp16", "int8"]
DeviceName = Literal["cpu", "cuda"]

# Raised when a change to decode, letterbox, network or NMS moves results by more than the
# sameness limits (0.05 px, 1e-3): runs then no longer continue across versions.
# 2: JPEGs of twice the input size and more are decoded smaller. 3: only where model.decode is fast;
# TIFFs that Pillow read wrongly are read by libvips; more formats.
INFERENCE_VERSION = 3


@dataclass(frozen=True, slots=True)
class ArtefactRef:
    """A runtime artefact: the URL of its ``artefact.json``, and the digest of that JSON's bytes."""

    url: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Convention:
    """What the outputs of an ONNX graph mean, for detectors of other families than YOLO-NAS.

    Attributes:
        layout: ``joined`` [B, N, 4 + objectness + C] · ``joined_transposed``, its last two axes
            swapped · ``separate`` boxes [B, N, 4] and scores [B, N, C] · ``labelled`` labels
            [B, N], boxes [B, N, 4] and scores [B, N] · ``rows`` [B, N, 6]: box, score, label.
        boxes: ``xyxy``, ``xywh`` (top-left corner), ``cxcywh``, or ``grid``: YOLOX's offsets and
            log sizes, to be decoded on the cells of ``strides``.
        units: of boxes: pixels of the network input, or shares of its sides.
        scores: ``probabilities``, or ``logits`` for a sigmoid, or ``softmax_logits``.
        objectness: a column before the classes that multiplies their scores.
        background: which class column means "no object".
        slots: numbering of class columns and labels: ``contiguous``, as ``classes`` are
            listed, or ``coco``, COCO's official ids.
        nms: whether duplicate boxes of one object remain to be merged.
        size_input: a second input, int64 [B, 2], that takes the size of the network input in this
            order, so that boxes come back in its pixels.
        strides: strides of the grid, in the order of its cells.
    """

    layout: Literal["joined", "joined_transposed", "separate", "labelled", "rows"]
    boxes: Literal["xyxy", "xywh", "cxcywh", "grid"]
    units: Literal["pixels", "shares"]
    scores: Literal["probabilities", "logits", "softmax_logits"]
    objectness: bool = False
    background: Literal["none", "first", "last"] = "none"
    slots: Literal["contiguous", "coco"] = "contiguous"
    nms: bool = True
    size_input: Literal["width_height", "height_width"] | None = None
    strides: tuple[int, ...] = (8, 16, 32)


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """The model as configured; None and ``auto`` are taken from the checkpoint or detected.

    Attributes:
        name: yolo_nas_s, yolo_nas_m or yolo_nas_l, the base that ``arch`` edits; None: the
            checkpoint's own, else yolo_nas_s.
        arch: URL or path of an arch_params yaml; None: the checkpoint's own, else plain ``name``.
        checkpoint: URL or path of a .pth, .pt or .safetensors file.
        sha256: expected digest of the checkpoint; None: any.
        classes: names by contiguous id, or None: the checkpoint's.
        image_size: (height, width) or None: the checkpoint's, else 640. A checkpoint of our own
            may be run at another size than it was trained with.
        preprocessing: overrides the checkpoint's preprocessing; None: the checkpoint's, else that
            of the COCO weights.
        decode, value_range: see ``Preprocessing``; None: as ``preprocessing`` or the checkpoint
            says, else the defaults.
        keep: subset of class names whose detections are kept, or None: all.
        nms_iou: boxes of one class that overlap more are merged; None: the checkpoint's, else 0.7.
        family: the name of the detector's family; all but yolo_nas are read from ONNX.
        convention: of the family's graph; None: YOLO-NAS. ``preprocessing`` is then its input
            without a size that counts, where ``size_stated`` is False.
        tiles: how large images are split; None: not at all.
        view: how the network sees images instead of as usual; None: as usual.
    """

    checkpoint: str
    name: str | None = None
    arch: str | None = None
    sha256: str | None = None
    classes: tuple[str, ...] | None = None
    image_size: tuple[int, int] | None = None
    preprocessing: Preprocessing | None = None
    decode: DecodeMode | None = None
    value_range: ValueRange | None = None
    keep: tuple[str, ...] | None = None
    runtime: Literal["auto"] | RuntimeName = "torch"
    precision: Literal["auto"] | PrecisionName = "auto"
    score_floor: float = 0.05
    nms_iou: float | None = None
    max_detections: int = 300
    family: str = "yolo_nas"
    convention: Convention | None = None
    size_stated: bool = True
    tiles: Tiles | None = None
    view: View | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The fully resolved model: recorded in run.json and enforced by every worker.

    Attributes:
        checkpoint: URL; the bytes must have digest ``sha256``.
        arch_params: the architecture as canonical JSON text, or None: plain ``name``.
        classes: names by contiguous category id, as many as the network has outputs.
        keep: contiguous ids whose detections are kept; the others are dropped before NMS.
        preprocessing: config and checkpoint agreed.
        device: what kind of device every worker must have.
        precision: enforced on every worker.
        licence: as the checkpoint states it; None when it does not.
        official_ids: the training set's own ids of the classes; None: it has none, or they are
            not known.
        convention: what the graph's outputs mean; None: YOLO-NAS, by whatever runs it. ``name`` is
            then the family's.
        remarks: notes for people on how the model was interpreted.
        artefact: what the runtime loads in place of the checkpoint; None: nothing (torch), or not
            made yet.
        tiles: how images larger than a tile are split; None: the network sees whole images.
        view: what ``preprocessing`` makes of the model's usual one; None: nothing.
    """

    checkpoint: str
    sha256: str
    name: str
    arch_params: str | None
    classes: tuple[str, ...]
    keep: tuple[int, ...]
    preprocessing: Preprocessing
    runtime: RuntimeName
    precision: PrecisionName
    device: DeviceName
    score_floor: float
    nms_iou: float
    max_detections: int
    licence: str | None = None
    artefact: ArtefactRef | None = None
    official_ids: tuple[int, ...] | None = None
    remarks: tuple[str, ...] = ()
    convention: Convention | None = None
    tiles: Tiles | None = None
    view: View | None = None


@dataclass(frozen=True, slots=True)
class LabellerOptions:
    """How one worker's thread pipeline is sized.

    Attributes:
        decode_threads: parallel decoders.
        nms_threads: turn network output into detections while the next batch runs.
        batch_size: images per forward, at first.
        batch_size_max: up to this many where that is faster, or fewer; None: ``batch_size`` stays.
        max_pixels: larger images become ``too_large`` rows, from their header.
        max_image_bytes: larger objects and members become ``too_large`` rows unread.
        max_frames: frames of a file that become rows; None: the first, whatever there is.
        queued_bytes: upper bound of encoded bytes that wait for a decoder; decoded images wait in
            the slots of four batches.
        partial_batch_ms: a partial batch goes after this wait, or when nothing is queued.
    """

    decode_threads: int = 2
    nms_threads: int = 1
    batch_size: int = 8
    batch_size_max: int | None = None
    max_pixels: int = 178_956_970
    max_image_bytes: int = 512 * 1024 * 1024
    max_frames: int | None = None
    queued_bytes: int = 32 * 1024 * 1024
    partial_batch_ms: float = 50.0


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Everything a LabelActor's constructor needs; picklable and a few kilobytes small."""

    model: ModelSpec
    source_url: str
    output_url: str
    storage: StorageOptions = field(default_factory=StorageOptions)
    options: LabellerOptions = field(default_factory=LabellerOptions)
    torch_threads: int = 1
    run: str = ""  # its name, for log lines
    log_format: LogFormat = "text"
