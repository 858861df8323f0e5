"""Examine what is installed and works here, and say how to fix what does not."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from pipelines.config.run_config import RunConfig, load_config
from pipelines.doctor.finding import Finding
from pipelines.doctor.runtimes import runtime_findings
from storage.errors import LabelfleetError, NotAtomic
from storage.extras import EXTRA_OF, not_installed
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_store
from storage.urls import shown_url

_PACKAGES = (
    ("torch", "torch"),
    ("ray", "ray"),
    ("safetensors", "safetensors"),
    ("super-gradients", "super_gradients"),
    ("pyarrow", "pyarrow"),
    ("boto3", "boto3"),
    ("fsspec", "fsspec"),
    ("obstore", "obstore"),
    ("simplejpeg", "simplejpeg"),
    ("opencv-python-headless", "cv2"),
    ("label-studio-sdk", "label_studio_sdk"),
    ("duckdb", "duckdb"),
    ("starlette", "starlette"),
    ("uvicorn", "uvicorn"),
)
# What an installation without an extra cannot do.
_NEEDED_BY = {
    "run": "run, plan, gate, compile, demo, train, round, suite and card need it",
    "super-gradients": "train, round and suite need it",
    "clouds": "gs:// and az:// URLs need it, and s3:// is read faster with it",
    "review": "pull needs it where reviewers painted brush masks",
    "browse": "browse needs it",
}
_SPOOL_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class Findings:
    """All findings."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether none of the findings is a problem."""
        return all(finding.level != "problem" for finding in self.findings)

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"healthy": self.healthy, "findings": [asdict(f) for f in self.findings]}


def examine(config: str | None = None) -> Findings:
    """Look at this machine, and at a run config's storage and model when one is given.

    Leaves nothing behind; a config's output is looked at, not written.
    """
    findings = [_python(), *_packages(), *_devices(), *_places()]
    if config is not None:
        findings.extend(_config(config))
    return Findings(tuple(findings))


def _python() -> Finding:
    found = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] == (3, 11):
        return Finding("ok", "python", found)
    return Finding("problem", "python", found, "labelfleet is made for Python 3.11")


def _packages() -> Iterator[Finding]:
    for distribution, module in _PACKAGES:
        try:
            found = version(distribution)
            if module != "super_gradients":  # seconds, and tried below with the model
                importlib.import_module(module)
            yield Finding("ok", distribution, found)
        except PackageNotFoundError:
            yield _lacking(distribution, module)
        except Exception as exc:  # noqa: BLE001 - a broken package may raise anything
            text = f"does not load: {type(exc).__name__}: {exc}"
            yield Finding("problem", distribution, text, "run `make clean setup`")
    if importlib.util.find_spec("torch") is not None:
        yield _attempt("runtime torch", _load_network, "run `make clean setup`")
    yield from runtime_findings()


def _lacking(distribution: str, module: str) -> Finding:
    """Say which commands do without, and what brings the package; needed ones are a problem."""
    missing = not_installed(ModuleNotFoundError(name=module))
    if missing is None:
        return Finding("problem", distribution, "not installed", "run `make setup`")
    needing = _NEEDED_BY[EXTRA_OF[module]]
    return Finding("note", distribution, f"not installed; {needing}", missing.hint or "")


def _load_network() -> str:
    from workers.yolo_nas.network import build_network, installed_package

    network = build_network("yolo_nas_s", None, 1)
    parameters = sum(p.numel() for p in network.parameters())
    return f"{installed_package()} built a YOLO-NAS S of {parameters / 1e6:.1f}M parameters"


def _attempt(subject: str, action: Callable[[], str], advice: str) -> Finding:
    try:
        return Finding("ok", subject, action())
    except LabelfleetError as exc:
        return Finding("problem", subject, exc.message, exc.hint or advice)
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is what is to be reported
        return Finding("problem", subject, f"{type(exc).__name__}: {exc}", advice)


def _devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    try:
        import torch
    except Exception:  # noqa: BLE001 - reported with the packages; the rest is still worth saying
        yield Finding("ok", "cpu", f"{cores} cores")
        return
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    extra = ", bf16 in hardware" if fast else ""
    yield Finding("ok", "cpu", f"{cores} cores{extra}")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = (
            "this torch is a CPU build" if built is None else f"none seen (torch has CUDA {built})"
        )
        yield Finding("note", "cuda", why, "runs label on CPUs; a GPU host needs a CUDA torch")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")


def _places() -> Iterator[Finding]:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    gib = f"{free / 2**30:.1f} GiB free"
    if free < _SPOOL_BYTES:
        yield Finding("problem", f"spool {folder}", gib, "free some space, or set TMPDIR")
    else:
        yield Finding("ok", f"spool {folder}", gib)
    yield _s3_credentials()


def _s3_credentials() -> Finding:
    try:
        import boto3

        from storage.s3.client import endpoint_of

        credentials = boto3.Session().get_credentials()
    except Exception as exc:  # noqa: BLE001 - a damaged profile, an unreachable role
        return Finding("problem", "s3 credentials", f"{type(exc).__name__}: {exc}", "fix ~/.aws")
    endpoint = endpoint_of(StorageOptions()) or "AWS"
    if credentials is None:
        advice = "for s3:// URLs: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
        return Finding("note", "s3 credentials", "none found", advice)
    return Finding(
        "ok", "s3 credentials", f"found by {credentials.method}; endpoint: {shown_url(endpoint)}"
    )


def _config(path: str) -> Iterator[Finding]:
    try:
        config = load_config(path)
    except LabelfleetError as exc:
        yield Finding("problem", "config", exc.message, exc.hint or "")
        return
    yield Finding("ok", "config", shown_url(path))
    yield _attempt("source", lambda: _source(config), "check the URL and the credentials")
    yield _attempt("output", lambda: _output(config), "check the URL and the credentials")
    stated: list[str] = []
    yield _attempt("model", lambda: _model(config, stated), "check the fields below `model:`")
    yield _licence([*filter(None, [config.model.licence]), *stated])


def _source(config: RunConfig) -> str:
    from pipelines.config.source import check_places, listed_objects

    check_places(config)
    first = next(listed_objects(config))
    return f"{config.source.url}: readable, begins with {first.key}"


def _output(config: RunConfig) -> str:
    store = open_store(config.output, config.storage.options())
    if not store.atomic_create:
        raise NotAtomic(
            f"{store.url} cannot hold a run: it has no atomic create",
            hint="use an output on file://, s3://, gs:// or az://",
        )
    from storage.runs.manifest import RUN_KEY

    existing = any(listed.key == RUN_KEY for listed in _listed(store))
    return f"{store.url}: {'holds a run, which would be continued' if existing else 'new'}"


def _listed(store: Any) -> Iterator[Any]:
    from storage.errors import BucketNotFound

    try:
        yield from store.list("run.json")
    except BucketNotFound:
        if not store.url.startswith("file:"):
            raise  # a folder is made, a bucket is not


def _model(config: RunConfig, stated: list[str]) -> str:
    from pipelines.models.requested import model_request
    from workers.models.resolve import resolve_model

    model = resolve_model(model_request(config), config.storage.options(), device="cpu")
    stated.extend(filter(None, [model.licence]))
    size = "x".join(str(side) for side in model.preprocessing.size)
    return f"{model.name}, {len(model.classes)} classes, {size}, sha256 {model.sha256[:12]}…"


def _licence(stated: Sequence[str]) -> Finding:
    if stated:
        return Finding("ok", "model licence", stated[0])
    return Finding(
        "note",
        "model licence",
        "unstated, by the config and by the checkpoint",
        "set model.licence; YOLO-NAS's own pretrained weights forbid commercial use",
    )


_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}


def findings_table(findings: Findings) -> RenderableType:
    """Render the findings for people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings.findings:
        said = escape(finding.found)
        if finding.advice:
            said += f"\n[dim]-> {escape(finding.advice)}[/]"
        table.add_row(_MARKS[finding.level], escape(finding.subject), said)
    return table
