"""The run's config: one YAML, parsed once, frozen; an unknown key is an error naming the nearest.

Each field states its default, unit and reason. Secrets are never here: storage credentials come
from boto3's own chain, the Label Studio token from LABEL_STUDIO_API_KEY.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.model_sections import (
    FamilyConfig,
    FamilyName,
    PreprocessingConfig,
    TilesConfig,
    ViewConfig,
    network_size,
)
from pipelines.config.part import Auto, Digest, Name, Part, Place, Share, Url, Webhook
from pipelines.config.yaml_files import overridden_yaml, parse_config
from storage.objects.protocols import StorageOptions


class SourceConfig(Part):
    """Where the images are."""

    url: Place = Field(
        description="Folder, or s3://, gs:// or az:// prefix, of tar shards or loose images."
    )
    kind: Literal["auto", "tar", "images"] = Field(
        "auto", description="What to label there; auto: all tars and loose images."
    )
    include: tuple[str, ...] = Field((), description="Globs on the key; empty: everything.")
    exclude: tuple[str, ...] = Field((), description="Globs on the key that are left out.")
    keys: Url | None = Field(
        None, description="CSV or Parquet with a column `key`: label only these objects."
    )
    max_absent_keys: Share = Field(
        0.1, description="Share of the keys in `keys` that may be absent; more is an error."
    )
    sniff: bool = Field(
        False,
        description="Also label files without a suffix whose first bytes are those of an image: "
        "one small read each, at every listing.",
    )
    frames: Literal["first", "all"] = Field(
        "first",
        description="Of files with several pages, animation frames or pictures: label the first, "
        "or make each a row of its own, `name#2` and so on.",
    )
    max_frames: int = Field(
        1000,
        ge=1,
        le=1_000_000,
        description="Frames of one file that are labelled with `frames: all`; the others are one "
        "`too_large` row.",
    )
    shard_size: int = Field(
        256, ge=1, le=100_000, description="Loose images per virtual shard; one commit each."
    )
    max_drop: Share = Field(
        0.1,
        description="Share of the listed objects that may be gone, and no first-level folder as a "
        "whole; more needs `--accept-drop`. 1: anything may be gone.",
    )


class ModelConfig(Part):
    """The detector. Fields that the checkpoint records may be omitted."""

    checkpoint: Url = Field(
        description=".pth, .pt, .ckpt, .pth.tar or .safetensors; .onnx of another family."
    )
    name: Literal["yolo_nas_s", "yolo_nas_m", "yolo_nas_l"] | None = Field(
        None, description="Architecture; none: the checkpoint's, or yolo_nas_s."
    )
    family: FamilyName | FamilyConfig = Field(
        "yolo_nas", description="Of an .onnx: the family, or its convention (docs/families.md)."
    )
    arch: Url | None = Field(None, description="arch_params yaml that scales `name`.")
    sha256: Digest | None = Field(
        None, description="Expected digest of the checkpoint; refused if it differs."
    )
    licence: str | None = Field(
        None, description="Recorded on the run. YOLO-NAS's own weights are non-commercial."
    )
    classes: tuple[str, ...] | Literal["coco"] | None = Field(
        None, description="Names in the order of the outputs; none: the checkpoint's."
    )
    keep: tuple[str, ...] | None = Field(
        None, description="Only these classes are written; none: all."
    )
    image_size: int | tuple[int, int] | None = Field(
        None,
        description="Network input in pixels, one side or [h, w]; none: checkpoint's, or 640. "
        "A checkpoint of `labelfleet train` runs at another size when asked.",
    )
    preprocessing: PreprocessingConfig | None = Field(
        None,
        description="What the images go through, whatever the checkpoint says; none: as it says, "
        "or what the COCO weights need.",
    )
    decode: Literal["exact", "fast"] | None = Field(
        None,
        description="`fast` decodes a JPEG at a half, a quarter or an eighth where the network "
        "sees it that small; none: the checkpoint's, or exact.",
    )
    range: Literal["full", "data"] | tuple[float, float] | None = Field(
        None,
        description="Black and white level of samples with more than 8 bits: their type's "
        "range, each image's own, or [lo, hi]; none: the checkpoint's, or full.",
    )
    runtime: Literal["auto", "torch", "onnx", "openvino", "tensorrt"] = Field(
        "auto", description="auto: on x86 CPUs OpenVINO where installed, on GPUs torch."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="auto: fp32 on CPU, fp16 on CUDA. Fixed when the run is created."
    )
    max_loss: float = Field(
        0.5,
        ge=0,
        le=100,
        description="Points of mAP that int8 may cost, with 95 % confidence; more is refused.",
    )
    min_agreement: Share = Field(
        0.9,
        description="Share of the boxes with a score from 0.5 that int8 and fp32 must have in "
        "common, with 95 % confidence.",
    )
    artefacts: Url | None = Field(
        None,
        description="Where compiled models are kept, for several runs; none: below the output.",
    )
    score_floor: Share = Field(
        0.05, description="Boxes below it are not written; policies come after."
    )
    nms_iou: Share | None = Field(
        None, description="IoU above which NMS drops the lower box; none: the checkpoint's, or 0.7."
    )
    max_detections: int = Field(
        300, ge=1, le=10_000, description="Most boxes per image; with `tiles`, per tile."
    )
    tiles: TilesConfig | None = Field(
        None, description="Cut large images (docs/large_images.md); none: never."
    )
    view: ViewConfig | None = Field(
        None, description="Label a mirrored or scaled view (docs/fusion.md); none: as usual."
    )

    @field_validator("range")
    @classmethod
    def _ordered(cls, value: Any) -> Any:
        if isinstance(value, tuple) and not (math.isfinite(sum(value)) and value[0] < value[1]):
            raise ValueError(f"{list(value)}: the first must be below the second")
        return value

    @model_validator(mode="after")
    def _sizes(self) -> ModelConfig:
        if self.image_size is not None and self.family == "yolo_nas":
            network_size(self.image_size)
        if self.preprocessing is not None and self.family != "yolo_nas":
            raise ValueError("of another family, state `family: {base: …, input: …}` instead")
        return self

    @field_validator("classes", "keep")
    @classmethod
    def _distinct(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            if not value or any(not name.strip() for name in value):
                raise ValueError("an empty list or an empty name")
            if twice := [name for name in value if value.count(name) > 1]:
                raise ValueError(f"a name twice: {twice[0]}")
        return value


class WorkersConfig(Part):
    """Actors and their share of the machine; `auto` follows the hardware."""

    count: Auto | Annotated[int, Field(ge=1, le=100_000)] = Field(
        "auto", description="Actors; auto: one per GPU, or on a CPU machine about one per 4 cores."
    )
    gpus: Auto | Annotated[float, Field(ge=0)] = Field(
        "auto", description="GPUs per actor (0.5: two share one); auto: 1 if the machine has any."
    )
    cpus: Auto | Annotated[float, Field(gt=0)] = Field(
        "auto", description="CPU cores per actor; auto: an equal share."
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = Field(
        "auto", description="Images per forward pass; auto: the fastest, found during the run."
    )
    depth: int = Field(
        3, ge=1, le=64, description="Shards queued per actor, so that actors never wait."
    )
    start_after_s: float = Field(
        1800, gt=0, description="Seconds without any ready actor after which the run ends."
    )
    hang_after_s: float = Field(
        600, gt=0, description="Seconds without a finished image after which an actor is replaced."
    )


class PolicyConfig(Part):
    """Thresholds for review and label versions; labelling itself ignores them."""

    accept: Share = Field(0.7, description="From this score on, a box is a label.")
    reject: Share = Field(0.1, description="Below this score, a box is dropped.")

    @model_validator(mode="after")
    def _ordered(self) -> PolicyConfig:
        if self.reject > self.accept:
            raise ValueError(f"reject {self.reject} is above accept {self.accept}")
        return self


class Overlap(Part):
    """How many tasks several people answer, so that their agreement can be measured."""

    share: Share = Field(1.0, description="Share of the tasks, chosen at random by Label Studio.")
    people: int = Field(
        1, ge=1, le=50, description="People who answer each of those; 1: no overlap."
    )


class ReviewConfig(Part):
    """What reviewers see, and where; without this section nothing is routed."""

    url: Url = Field("http://localhost:8080", description="Label Studio.")
    project: str = Field(min_length=1, description="Created, or adopted if it exists.")
    budget: str = Field(
        "500 images", description="Per invocation: `N images` or `N minutes` of human time."
    )
    audit: Share = Field(
        0.2, description="Share of the budget drawn at random, to estimate quality."
    )
    audit_blind: bool = Field(False, description="Show audit images without boxes.")
    seed: int = Field(0, description="Seed of the audit's draw.")
    answers_from: tuple[Url, ...] = Field(
        (), description="Other runs over the same images; images that they queued are skipped."
    )
    show: Literal["auto", "score", "none"] = Field(
        "auto",
        description="Boxes that reviewers see: those that cost less shown than hidden, those that "
        "the policy accepts, or none.",
    )
    show_why: bool = Field(
        False,
        description="Say on the labelling page why an image is there; it may sway people.",
    )
    gold: int = Field(
        0,
        ge=0,
        le=10_000,
        description="Images per invocation whose boxes are known, mixed in unmarked to measure "
        "annotators; part of the budget.",
    )
    gold_truth: Url | None = Field(
        None,
        description="COCO ground truth for `gold`; none: what `answers_from` settled elsewhere.",
    )
    overlap: Overlap = Field(Overlap(), description="Several people answer some of the tasks.")
    people: tuple[str, ...] = Field(
        (), description="Who gets a tab of their own with a share of the tasks."
    )
    instructions: str = Field(
        "", description="For annotators, as HTML; empty: what submitting and skipping mean."
    )
    classes: dict[str, str | None] = Field(
        {},
        description="Names in the run of classes in answers, as in `{smudge: null, "
        'Digit0: "0"}`; null drops their boxes.',
    )

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: str) -> str:
        if not re.fullmatch(r"\s*\d+(\.\d+)?\s*(images?|minutes?)\s*", value):
            raise ValueError("write `500 images` or `240 minutes`")
        return value

    @model_validator(mode="after")
    def _known(self) -> ReviewConfig:
        if self.gold and self.gold_truth is None and not self.answers_from:
            raise ValueError(
                "gold images need known boxes: give gold_truth (a COCO file), or answers_from"
            )
        return self


class GateConfig(Part):
    """The mAP that a model must reach on labelled images before a run is created."""

    truth: Url = Field(description="COCO ground truth of images that the source holds.")
    min_map: Share = Field(description="mAP@0.5:0.95, 0 to 1; below it the run is refused.")


class StorageConfig(Part):
    """How to reach S3-compatible storage; applies to every s3:// URL of this config."""

    endpoint_url: Url | None = Field(None, description="None: AWS, or AWS_ENDPOINT_URL.")
    path_style: bool | None = Field(None, description="None: exactly when an endpoint is set.")
    region: str | None = Field(None, description="None: boto3's own chain.")
    attempts: int = Field(5, ge=1, le=20, description="Tries per request.")
    connect_timeout_s: float = Field(10, gt=0, description="Seconds.")
    read_timeout_s: float = Field(60, gt=0, description="Seconds.")

    def options(self) -> StorageOptions:
        """Convert to the storage layer's type."""
        return StorageOptions(**self.model_dump())


class RunConfig(Part):
    """A labelling run."""

    name: Name = Field(description="Letters, digits, `.`, `_`, `-`.")
    source: SourceConfig = Field(description="Where the images are.")
    output: Place = Field(
        description="Folder, or s3://, gs:// or az:// URL; may not overlap the source."
    )
    model: ModelConfig = Field(description="The detector.")
    workers: WorkersConfig = Field(WorkersConfig(), description="Actors and their resources.")
    policy: PolicyConfig | Url = Field(
        PolicyConfig(), description="Thresholds, or the URL of a policy.yaml as `fit` writes it."
    )
    review: ReviewConfig | None = Field(
        None, description="What reviewers see, and where; none: nothing is routed."
    )
    gate: GateConfig | None = Field(
        None, description="A mAP to reach before anything is labelled; none: no check."
    )
    storage: StorageConfig = Field(StorageConfig(), description="How S3 is reached.")
    max_pixels: int = Field(
        178_956_970, ge=1, description="Larger images become `too_large` rows, from the header."
    )
    max_image_bytes: int = Field(
        512 * 1024 * 1024, ge=1, description="Larger files become `too_large` rows, unread."
    )
    max_bad_share: Share = Field(
        1.0, description="Larger share of images that are not ok: exit 3, as with quarantine."
    )
    attempts: int = Field(3, ge=1, le=20, description="Tries per shard before quarantine.")
    price_per_gpu_hour: float | None = Field(None, ge=0, description="For `plan`; any currency.")
    max_hours: float | None = Field(None, gt=0, description="The run stops after it, resumable.")
    max_cost: float | None = Field(
        None, gt=0, description="The run stops after it, at price_per_gpu_hour per GPU."
    )
    notify: Webhook | None = Field(
        None,
        description="Webhook; gets the summary as JSON at the end. Never shown or recorded.",
    )

    @model_validator(mode="after")
    def _priced(self) -> RunConfig:
        if self.max_cost is not None and self.price_per_gpu_hour is None:
            raise ValueError("max_cost needs price_per_gpu_hour")
        return self


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run config from a path or URL.

    Args:
        path: YAML file, local or at any URL.
        overrides: ``key.sub=value`` texts, the value read as YAML.

    Raises:
        ConfigError: naming the file, the key, what is wrong and the nearest valid key.
    """
    fields = overridden_yaml(path, overrides, command="run")
    return parse_config(RunConfig, fields, where=path)
