"""The run's config: one YAML, parsed once, frozen; an unknown key is an error naming the nearest.

Each field states its default, unit and reason. Secrets are never here: storage credentials come
from boto3's own chain, the Label Studio token from LABEL_STUDIO_API_KEY.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from storage.errors import ConfigError
from storage.objects import StorageOptions, open_object

P = TypeVar("P", bound="Part")
Auto = Literal["auto"]
Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """Base of every section: frozen, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _no_credentials(url: str) -> str:
    if re.match(r"^[a-z0-9+.-]+://[^/@]*@", url):
        raise ValueError("a URL with credentials in it; use environment, profile or instance role")
    return url


Url = Annotated[str, Field(min_length=1), AfterValidator(_no_credentials)]


class SourceConfig(Part):
    """Where the images are."""

    url: Url = Field(description="Folder, file:// or s3:// prefix of tar shards or loose images.")
    kind: Literal["auto", "tar", "images"] = Field(
        "auto", description="What to label there; auto: tars and loose images, whichever are there."
    )
    include: tuple[str, ...] = Field((), description="Globs on the key; empty: everything.")
    exclude: tuple[str, ...] = Field((), description="Globs on the key that are left out.")
    keys: Url | None = Field(
        None, description="CSV or Parquet with a column `key`: label only these objects."
    )
    shard_size: int = Field(
        256, ge=1, le=100_000, description="Loose images a virtual shard; one commit each."
    )


class ModelConfig(Part):
    """The detector. What the checkpoint knows about itself need not be repeated."""

    checkpoint: Url = Field(description=".pth, .pt or .safetensors at any URL.")
    name: Literal["yolo_nas_s", "yolo_nas_m", "yolo_nas_l"] | None = Field(
        None, description="Architecture; none: the checkpoint's, or yolo_nas_s."
    )
    arch: Url | None = Field(None, description="arch_params yaml that scales `name`.")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, description="Expected digest of the checkpoint; refused when it differs."
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
        None, description="Network input in pixels, one side or [h, w]; none: checkpoint's, or 640."
    )
    runtime: Literal["torch", "onnx", "openvino", "tensorrt"] = Field(
        "torch", description="What runs the network."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="auto: fp32 on CPU, fp16 on CUDA. Fixed when the run is created."
    )
    score_floor: Share = Field(
        0.05, description="Boxes below it are not written; policies come after."
    )
    nms_iou: Share = Field(0.7, description="IoU above which NMS drops the lower box.")
    max_detections: int = Field(300, ge=1, le=10_000, description="Boxes an image, at most.")

    @field_validator("image_size")
    @classmethod
    def _strides(cls, value: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        sides = value if isinstance(value, tuple) else (value,) if value else ()
        for side in sides:
            if side % 32 or not 32 <= side <= 4096:
                raise ValueError(f"{side} is not a multiple of 32 between 32 and 4096")
        return value

    @field_validator("classes", "keep")
    @classmethod
    def _distinct(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            if not value or any(not name.strip() for name in value):
                raise ValueError("an empty list or an empty name")
            if len(set(value)) != len(value):
                raise ValueError("a name twice")
        return value


class WorkersConfig(Part):
    """Actors and their share of the machine; `auto` looks at what is there."""

    count: Auto | Annotated[int, Field(ge=1, le=100_000)] = Field(
        "auto", description="Actors; auto: one a GPU, or on a CPU machine one per 4 cores."
    )
    gpus: Auto | Annotated[float, Field(ge=0)] = Field(
        "auto", description="GPUs an actor (0.5: two share one); auto: 1 where there are any."
    )
    cpus: Auto | Annotated[float, Field(gt=0)] = Field(
        "auto", description="CPU cores an actor; auto: an equal share."
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = Field(
        "auto", description="Images a forward pass; auto: 8 on CPU, 32 on a GPU."
    )
    depth: int = Field(3, ge=1, le=64, description="Shards queued an actor, so that none waits.")
    hang_after_s: float = Field(
        600, gt=0, description="Seconds without a finished image after which an actor is replaced."
    )


class PolicyConfig(Part):
    """Thresholds for review and label versions; labelling itself never looks at them."""

    accept: Share = Field(0.7, description="From this score on, a box is a label.")
    reject: Share = Field(0.1, description="Below this score, a box is dropped.")

    @model_validator(mode="after")
    def _ordered(self) -> PolicyConfig:
        if self.reject > self.accept:
            raise ValueError(f"reject {self.reject} lies above accept {self.accept}")
        return self


class ReviewConfig(Part):
    """What people see, and where; without this section nothing is routed."""

    url: Url = Field("http://localhost:8080", description="Label Studio.")
    project: str = Field(min_length=1, description="Created, or adopted when it exists.")
    budget: str = Field(
        "500 images", description="Per invocation: `N images` or `N minutes` of human time."
    )
    audit: Share = Field(0.2, description="Share of the budget drawn at random, for estimates.")
    audit_blind: bool = Field(False, description="Show audit images without boxes.")
    seed: int = Field(0, description="Of the audit's draw.")

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: str) -> str:
        if not re.fullmatch(r"\s*\d+(\.\d+)?\s*(images?|minutes?)\s*", value):
            raise ValueError("write `500 images` or `240 minutes`")
        return value


class StorageConfig(Part):
    """How to reach S3-compatible storage; applies to every s3:// URL of this config."""

    endpoint_url: Url | None = Field(None, description="None: AWS, or AWS_ENDPOINT_URL.")
    path_style: bool | None = Field(None, description="None: exactly when an endpoint is set.")
    region: str | None = Field(None, description="None: boto3's own chain.")
    attempts: int = Field(5, ge=1, le=20, description="Tries a request.")
    connect_timeout_s: float = Field(10, gt=0, description="Seconds.")
    read_timeout_s: float = Field(60, gt=0, description="Seconds.")

    def options(self) -> StorageOptions:
        """As the storage layer wants it."""
        return StorageOptions(**self.model_dump())


class RunConfig(Part):
    """A labelling run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        description="Letters, digits, `.`, `_`, `-`."
    )
    source: SourceConfig
    output: Url = Field(description="Folder, file:// or s3:// URL; may not overlap the source.")
    model: ModelConfig
    workers: WorkersConfig = WorkersConfig()
    policy: PolicyConfig | Url = PolicyConfig()
    review: ReviewConfig | None = None
    storage: StorageConfig = StorageConfig()
    max_pixels: int = Field(
        178_956_970, ge=1, description="Larger images become `too_large` rows, from the header."
    )
    max_image_bytes: int = Field(
        512 * 1024 * 1024, ge=1, description="Larger files become `too_large` rows, unread."
    )
    max_bad_share: Share = Field(
        1.0, description="More images than this that are not ok: exit 3, as with quarantine."
    )
    attempts: int = Field(3, ge=1, le=20, description="Tries a shard before quarantine.")
    price_per_gpu_hour: float | None = Field(None, ge=0, description="For `plan`; any currency.")
    max_hours: float | None = Field(None, gt=0, description="The run stops after it, resumable.")
    max_cost: float | None = Field(
        None, gt=0, description="Likewise, at price_per_gpu_hour times GPUs."
    )
    notify: Url | None = Field(None, description="Webhook; gets the summary as JSON at the end.")

    @model_validator(mode="after")
    def _priced(self) -> RunConfig:
        if self.max_cost is not None and self.price_per_gpu_hour is None:
            raise ValueError("max_cost needs price_per_gpu_hour")
        return self


def load_config(path: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a run config from a path or URL.

    Args:
        path: YAML file, local or at any URL.
        overrides: ``key.sub=value`` texts, the value read as YAML.

    Raises:
        ConfigError: naming the file, the key, what is wrong and the nearest valid key.
    """
    fields = read_yaml(path)
    for override in overrides:
        apply_override(fields, override)
    return parse_config(RunConfig, fields, where=path)


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML mapping from a path or URL. Raises ConfigError with line and column."""
    store, key = open_object(path)
    raw = store.get(key)
    try:
        loaded = yaml.safe_load(raw)
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not YAML: {exc}", hint="check the indentation there") from exc
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no config: a YAML mapping is expected, not {loaded!r:.80}")
    return loaded


def apply_override(fields: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in nested dicts, in place. Raises ConfigError for another form."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override!r}: write key=value, such as model.score_floor=0.1")
    *parents, last = key.strip().split(".")
    at = fields
    for parent in parents:
        at = at.setdefault(parent, {})
        if not isinstance(at, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    try:
        at[last] = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise ConfigError(f"--set {override!r}: the value is not YAML") from exc


def parse_config(kind: type[P], fields: dict[str, Any], *, where: str) -> P:
    """Validate ``fields`` as ``kind``; every problem on a line of its own, in a ConfigError."""
    try:
        return kind.model_validate(fields)
    except ValidationError as exc:
        problems = dict.fromkeys(_explain(kind, error) for error in _relevant(exc.errors()))
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"{where} cannot be used:\n{lines}", hint="docs/configuration.md lists every field"
        ) from None  # pydantic's own text repeats the values, which may hold a secret


def _explain(kind: type[Part], error: Any) -> str:
    names = [str(part) for part in error["loc"] if _is_name(part)]
    path = ".".join(names) or "config"
    if error["type"] == "extra_forbidden":
        valid = list(_section(kind, names[:-1]).model_fields)
        close = difflib.get_close_matches(names[-1], valid, n=1, cutoff=0.5)
        rest = f"did you mean `{close[0]}`?" if close else f"valid are {', '.join(valid)}"
        return f"{path}: unknown key; {rest}"
    if error["type"] == "missing":
        return f"{path}: missing"
    return f"{path}: {error['msg'].removeprefix('Value error, ')}"


def _relevant(errors: Sequence[Any]) -> list[Any]:
    """Of a union's members, only those that the value came close to."""

    def shadowed(error: Any) -> bool:
        types_only = {"string_type", "literal_error", "none_required", "tuple_type"}
        return error["type"] in types_only and any(
            other is not error
            and other["loc"][0] == error["loc"][0]
            and (len(other["loc"]) > len(error["loc"]) or other["type"] not in types_only)
            and other["loc"][: len(error["loc"]) - 1] == error["loc"][:-1]
            for other in errors
        )

    return [error for error in errors if not shadowed(error)] or list(errors)


def _is_name(part: Any) -> bool:
    # Union members add their own names to the path: `PolicyConfig`, `literal['auto']`, `int`.
    member = {"str", "int", "float", "bool", "constrained-str", "constrained-int"}
    return re.fullmatch(r"[a-z_0-9]+", str(part)) is not None and str(part) not in member


def _section(kind: type[Part], names: list[str]) -> type[Part]:
    for name in names:
        field = kind.model_fields.get(name)
        kind = _part_in(field.annotation) or kind if field else kind
    return kind


def _part_in(annotation: Any) -> type[Part] | None:
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((p for a in get_args(annotation) if (p := _part_in(a))), None)
    return None
