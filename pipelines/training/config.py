"""The config of ``labelfleet train``: parsed once, frozen; unknown keys are errors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import to_jsonable_python

from pipelines.config.files import absent_files, refuse_below_a_file
from pipelines.config.part import LocalPath, Part, Place
from pipelines.config.run_config import StorageConfig
from pipelines.config.yaml_files import overridden_yaml, parse_config, read_yaml
from pipelines.training.distillation.config import DistillConfig
from pipelines.training.recipe_config import (
    AugmentConfig,
    LrFactorsConfig,
    Share,
    StageConfig,
)
from pipelines.training.team.section import TeamConfig, refuse_team
from storage.errors import ConfigError
from storage.objects.protocols import StorageOptions
from workers.checkpoints.cache import fetch_checkpoint, file_sha256
from workers.images.preprocessing import Preprocessing

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]

# What may differ between a stopped training and its continuation: it moves no weight.
FREE = frozenset(
    {"output", "threads", "eval_every", "max_bad_share", "cache", "workers", "report", "storage"}
)
# Fields that came later, by path. At its default one is left out of the fingerprint, so that
# trainings of earlier versions continue.
_LATER = (
    *("early_stop", "range", "stages", "distill", "int8"),
    *("freeze", "lr_factors", "clip_norm", "accumulate"),
    *("multi_scale", "channels_last", "compile"),
    *("augment.rotate_deg", "augment.shear_deg", "augment.blur", "augment.blur_px"),
    *("augment.mosaic", "augment.mosaic_scale", "augment.mixup", "augment.close_mosaic"),
    "augment.pseudo",
)


TRAIN_PAGE = "docs/train_configuration.md"


class DataConfig(Part):
    """A COCO-format set. Paths are relative to where the command is started."""

    annotations: LocalPath = Field(description="COCO JSON.")
    images: LocalPath = Field(description="Folder that `file_name` is relative to.")

    @field_validator("annotations", "images", mode="before")
    @classmethod
    def _local(cls, value: Any) -> Any:
        return _local_path(value)


class SourceConfig(Part):
    """One of several sources that are learned: a COCO set (`annotations`, `images`), or a label
    version straight from a run's output (`labels`)."""

    annotations: LocalPath | None = Field(None, description="COCO JSON; with `images`.")
    images: LocalPath | None = Field(None, description="Folder that `file_name` is relative to.")
    labels: Place | None = Field(None, description="Output of a run, path or URL.")
    version: str = Field("latest", description="Label version, such as `v0003`.")
    share: float | None = Field(
        None, gt=0, le=1, description="Of the images drawn; none: by number of images."
    )
    classes: dict[str, str | None] = Field(
        default_factory=dict,
        description="New names of its classes; a class named null is ignored.",
    )
    weights: bool = Field(
        True, description="Weigh the model's boxes by their probability of being right."
    )
    ignore_band: bool = Field(
        True, description="Ignore where the policy was undecided; false: it is background."
    )
    absence_from: Share | None = Field(
        0.5,
        description="Least share of a class's objects that labels and undecided boxes cover, by "
        "the fit, for the model's images to teach where the class is not. Below, and where the "
        "policy accepts no box of it, they do not; null: they always do.",
    )

    @field_validator("annotations", "images", mode="before")
    @classmethod
    def _local(cls, value: Any) -> Any:
        return _local_path(value)

    @model_validator(mode="after")
    def _one_kind(self) -> SourceConfig:
        coco = (self.annotations is not None, self.images is not None)
        if coco not in ((True, True), (False, False)) or coco[0] == (self.labels is not None):
            raise ValueError("give either `labels`, or `annotations` and `images`")
        return self

    @property
    def shown(self) -> str:
        """Name in messages."""
        return str(self.annotations) if self.labels is None else f"{self.labels} ({self.version})"


class CacheConfig(Part):
    """Copies of images on this machine; used where the images are not on it already."""

    dir: LocalPath | None = Field(None, description="Folder; none: `images` in the user's cache.")
    size: Annotated[ByteSize, "a size such as 20GB"] = Field(
        ByteSize(20_000_000_000), gt=0, description="Most that the copies may take."
    )


def _kind_of_train(value: Any) -> str:
    return "sources" if isinstance(value, (list, tuple)) else "set"


def _local_path(value: Any) -> Any:
    """Refuse URLs, which would otherwise be reported as missing paths."""
    if not isinstance(value, str) or "://" not in value:
        return value
    if value.startswith("file://"):
        return value.removeprefix("file://")
    raise ValueError(
        f"`train` reads local files, and {value.partition('://')[0]}:// is not one; copy it "
        "here first"
    )


class NetworkConfig(Part):
    """The model to train."""

    name: Literal["yolo_nas_s", "yolo_nas_m", "yolo_nas_l"] = Field(
        "yolo_nas_s", description="Architecture."
    )
    arch: str | None = Field(None, description="arch_params yaml that scales `name`; path or URL.")
    checkpoint: str | None = Field(
        None, description="Weights to start from, path or URL; none: random ones."
    )
    licence: str = Field(
        "unstated", description="Written into the checkpoint and recorded on runs that use it."
    )


class TrainConfig(Part):
    """A training."""

    name: Name = Field(description="Also the checkpoint's file name.")
    output: LocalPath = Field(
        description="Folder for checkpoint, summary and state: local, or the URL of any store."
    )
    train: Annotated[
        Annotated[DataConfig, Tag("set")]
        | Annotated[Annotated[tuple[SourceConfig, ...], Field(min_length=1)], Tag("sources")],
        Discriminator(_kind_of_train),
    ] = Field(description="The set that is learned, or a list of sources.")
    cache: CacheConfig | None = Field(
        CacheConfig(), description="Of images that are not on this machine; null: none."
    )
    val: DataConfig = Field(description="Chooses the checkpoint that is kept.")
    test: dict[Name, DataConfig] = Field(
        default_factory=dict, description="Sets measured once, at the end, by name."
    )
    ignore_categories: tuple[str, ...] = Field(
        (), description="Categories whose boxes are ignored: neither object nor background."
    )
    max_bad_share: Share = Field(
        0.05,
        description="Share of a set's images that may be left out because they are missing, "
        "damaged or of another size than annotated; the summary names them.",
    )
    model: NetworkConfig = Field(NetworkConfig(), description="The network.")
    image_size: int | tuple[int, int] = Field(640, description="Pixels: a side, or [h, w].")
    padding: Literal["center", "bottom_right"] = Field("center", description="Of the letterbox.")
    multi_scale: tuple[float, float] | None = Field(
        None,
        description="[low, high] factors on `image_size`, drawn for each step, to a multiple of "
        "32; none: always `image_size`.",
    )
    batch_size: int = Field(8, ge=1, le=4096, description="Images a step.")
    accumulate: int = Field(
        1,
        ge=1,
        le=4096,
        description="Parts a step's images pass the network in, one after the other, to save "
        "memory; the gradient is that of the whole batch.",
    )
    steps: int | None = Field(None, ge=1, description="Optimiser steps; or give epochs.")
    epochs: float | None = Field(None, gt=0, description="Passes over the training set.")
    lr: float = Field(2e-3, gt=0, description="Peak learning rate of AdamW.")
    lr_factors: LrFactorsConfig = Field(
        LrFactorsConfig(), description="Factors on `lr` by part of the network."
    )
    freeze: Literal["none", "stem", "backbone"] = Field(
        "none",
        description="Part that keeps its weights and its BatchNorm statistics.",
    )
    warmup_steps: int = Field(150, ge=0, description="Linear rise before the cosine.")
    weight_decay: float = Field(1e-4, ge=0, description="On weights, not on norms and biases.")
    clip_norm: float | None = Field(
        None, gt=0, description="Largest norm of the gradient; none: it is not clipped."
    )
    ema_decay: float = Field(0.998, ge=0, lt=1, description="Of the averaged weights, the result.")
    eval_every: int | None = Field(None, ge=1, description="Steps; none: ten times a training.")
    early_stop: int | None = Field(
        None, ge=1, description="Validations in a row without a gain that end it; none: never."
    )
    seed: int = Field(0, ge=0, description="Of first weights, order and augmentation.")
    augment: AugmentConfig = Field(AugmentConfig(), description="How images are varied.")
    distill: DistillConfig | None = Field(
        None, description="What is learned from a teacher beside the labels; none: nothing."
    )
    int8: Literal["onnx", "openvino", "tensorrt"] | None = Field(
        None,
        description="Finish `model.checkpoint` for INT8 on this runtime: train with its rounding "
        "simulated and batch norms frozen, validate likewise, and keep ordinary weights.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where it is.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Of the forward pass; auto: bf16 where the device is fast at it, else fp32. "
        "fp16 scales the loss and needs CUDA.",
    )
    channels_last: Literal["auto"] | bool = Field(
        "auto",
        description="Memory layout of images and weights; auto: on CUDA with bf16 or fp16. Never "
        "on a CPU.",
    )
    compile: bool = Field(
        False, description="torch.compile the network: a slow first step, faster ones after it."
    )
    range: Literal["full", "data"] | tuple[float, float] = Field(
        "full", description="As model.range of a run; the checkpoint records it for runs."
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads, of each worker if there are any; none: all cores."
    )
    workers: TeamConfig = Field(
        TeamConfig(), description="Processes that train together, on a Ray cluster."
    )
    report: tuple[str, ...] = Field(
        (),
        description="Who hears of steps and validations: `tensorboard`, or `module:name` of your "
        "own listener.",
    )
    storage: StorageConfig = Field(StorageConfig(), description="How S3 is reached.")
    stages: tuple[StageConfig, ...] = Field(
        (),
        description="Trainings in a row, such as pretrain and finetune, each with a `name` and the "
        "fields that differ in it. Each starts from the weights that the one before it kept.",
    )

    @field_validator("output", mode="before")
    @classmethod
    def _place(cls, value: Any) -> Any:
        """Keep a local output as a path; a URL stays readable for ``remote``."""
        if isinstance(value, str) and value.startswith("file://"):
            return value.removeprefix("file://")
        return value

    @field_validator("image_size")
    @classmethod
    def _strides(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        for side in value if isinstance(value, tuple) else (value,):
            if side % 32 or not 32 <= side <= 4096:
                raise ValueError(f"{side} is not a multiple of 32 between 32 and 4096")
        return value

    @field_validator("train", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        """Take `train: {labels: …}` as a list of one."""
        return [value] if isinstance(value, dict) and "labels" in value else value

    @model_validator(mode="after")
    def _shares(self) -> TrainConfig:
        shares = [one.share is None for one in self.sources]
        if len(set(shares)) > 1:
            raise ValueError("give each of the sources a share, or none of them")
        return self

    @field_validator("multi_scale")
    @classmethod
    def _factors(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0.25 <= value[0] <= value[1] <= 4:
            raise ValueError("write [low, high] with 0.25 ≤ low ≤ high ≤ 4")
        return value

    @model_validator(mode="after")
    def _parts(self) -> TrainConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: batch_size {self.batch_size} does not split into {self.accumulate} "
                "equal parts"
            )
        return self

    @model_validator(mode="after")
    def _length(self) -> TrainConfig:
        given = (self.steps is not None) + (self.epochs is not None)
        if given == 2 or (given == 0 and not self.stages):  # each stage may have its own
            raise ValueError("give either steps or epochs")
        return self

    @model_validator(mode="after")
    def _finish(self) -> TrainConfig:
        if self.int8 is None:
            return self
        if self.model.checkpoint is None:
            raise ValueError("int8: it finishes a trained network; set model.checkpoint")
        if self.multi_scale is not None or self.compile:
            raise ValueError("int8: leave multi_scale and compile out")
        return self

    @model_validator(mode="after")
    def _team(self) -> TrainConfig:
        asked = self.workers
        if asked.most:
            refuse_team(
                asked, batch_size=self.batch_size, accumulate=self.accumulate, device=self.device
            )
        if asked.most > 1 and self.stages and self.remote is not None:
            raise ValueError(
                "stages: several workers hand the weights of a stage on in a folder that all of "
                "them see; set output to one"
            )
        return self

    @property
    def remote(self) -> str | None:
        """The output's URL; None: it is a local folder."""
        # A path has lost one of the two slashes after the scheme.
        found = re.fullmatch(r"([a-z][a-z0-9+.-]+):/+(.+)", str(self.output))
        return f"{found[1]}://{found[2]}" if found else None

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Sources of ``train``; a plain set is one."""
        if isinstance(self.train, DataConfig):
            return (SourceConfig(annotations=self.train.annotations, images=self.train.images),)
        return self.train

    @property
    def annotation_files(self) -> tuple[Path, ...]:
        """Annotation files that decide the weights."""
        files = [one.annotations for one in self.sources if one.annotations is not None]
        return (*files, self.val.annotations)

    @property
    def preprocessing(self) -> Preprocessing:
        """What training images go through, and inference must do likewise."""
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        height, width = size
        return Preprocessing(
            size=(height, width),
            resize_to=(height - 4, width - 4),
            padding=self.padding,
            value_range=self.range,
        )

    def steps_for(self, images: int) -> int:
        """Return the optimiser steps for a training set of ``images`` images."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 0) * images / self.batch_size))

    def fingerprint(
        self,
        *,
        data: bool = True,
        labels: Mapping[str, str] | None = None,
        by_path: bool = False,
        **resolved: Any,
    ) -> str:
        """16 hex digits of all that decides the weights: config, files, what was resolved.

        Args:
            data: the annotations' contents count too.
            labels: digests of the label versions, by source.
            by_path: first weights count by their path, as in earlier versions, instead of by their
                bytes.
            resolved: other values by name.
        """
        fields = self.model_dump(mode="json", exclude=set(FREE))
        options = self.storage.options()
        if self.model.checkpoint is not None and not by_path:
            fields["model"]["checkpoint"] = _sha256_at(self.model.checkpoint, options)
        if self.distill is not None and self.distill.teacher is not None:
            fields["distill"]["teacher"] = _sha256_at(self.distill.teacher, options)
        _drop_later(fields, type(self))
        for path in self.annotation_files if data else ():
            fields[f"sha256 of {path}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        if self.model.arch is not None:
            fields["arch"] = read_yaml(self.model.arch, options=self.storage.options())
        text = json.dumps({**fields, **(labels or {}), **resolved}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sha256_at(url: str, options: StorageOptions) -> str:
    """Return the digest of a checkpoint, which counts wherever the file lies."""
    return file_sha256(fetch_checkpoint(url, options, sha256=None))


def _drop_later(fields: dict[str, Any], kind: type[TrainConfig]) -> None:
    """Remove fields that earlier versions did not have, where they are at their default."""
    for path in _LATER:
        section, _, name = path.rpartition(".")
        model = AugmentConfig if section else kind
        found = fields[section] if section else fields
        default = to_jsonable_python(model.model_fields[name].get_default())
        if found[name] == default:
            del found[name]
    for source in fields["train"] if isinstance(fields["train"], list) else ():
        if source["absence_from"] == SourceConfig.model_fields["absence_from"].default:
            del source["absence_from"]


def load_train_config(path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a training config; ``overrides`` are ``key.sub=value`` texts.

    Raises:
        ConfigError: naming the file, the key, what is wrong and the nearest valid key.
    """
    fields = overridden_yaml(path, overrides, TRAIN_PAGE, command="train")
    config = parse_config(TrainConfig, fields, where=path, page=TRAIN_PAGE)
    _check_files(config, path)
    return config


def _check_files(config: TrainConfig, where: str) -> None:
    """Raise ConfigError for the first field whose file or folder is not there."""
    sets: dict[str, DataConfig | SourceConfig] = {
        f"train.{n}": one for n, one in enumerate(config.sources)
    }
    if isinstance(config.train, DataConfig):
        sets = {"train": config.train}
    sets |= {"val": config.val, **{f"test.{name}": one for name, one in config.test.items()}}
    teacher = config.distill.teacher if config.distill is not None else None
    single = {"model.arch": config.model.arch, "model.checkpoint": config.model.checkpoint,
              "distill.teacher": teacher}  # fmt: skip
    refuse_absent(where, sets, single, config.storage.options())
    if config.remote is None:
        refuse_below_a_file("output", str(config.output))


def refuse_absent(
    where: str,
    sets: Mapping[str, DataConfig | SourceConfig],
    files: Mapping[str, str | None],
    options: StorageOptions,
) -> None:
    """Raise ConfigError for the first file or folder that is not there.

    Args:
        where: name of the config in messages.
        sets: by their field.
        files: paths or URLs by their field; None: it has none.
        options: how URLs are reached.
    """
    absent = [
        f"{name}.{field}: {path} is not there"
        for name, one in sets.items()
        for field, path, there in _paths(one)
        if not there
    ]
    named = {field: url for field, url in files.items() if url is not None}
    absent += absent_files(named, options)
    if absent:
        raise ConfigError(
            f"{where}: {absent[0]}",
            hint="paths are relative to the folder the command is started in",
        )


def _paths(one: DataConfig | SourceConfig) -> Iterator[tuple[str, Path, bool]]:
    """Yield field, path and whether it is there, for a COCO set."""
    if one.annotations is not None:
        yield "annotations", one.annotations, one.annotations.is_file()
    if one.images is not None:
        yield "images", one.images, one.images.is_dir()
