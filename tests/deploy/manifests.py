"""Manifests against what they are for: Kubernetes's own schemas, and KubeRay's fields."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
FIELDS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "kuberay_fields.yaml").read_text())
_PLAIN = {"string": str, "integer": int, "boolean": bool, "number": (int, float)}


def documents(path: str) -> list[dict[str, Any]]:
    """Every document of a YAML file of the repository."""
    return [found for found in yaml.safe_load_all((ROOT / path).read_text()) if found]


def core_problems(manifest: dict[str, Any]) -> list[str]:
    """What Kubernetes's schema says of an object of its own; an unknown field is a problem."""
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as exc:
        return [str(exc)]
    return []


def pod_problems(template: dict[str, Any]) -> list[str]:
    """The same of a PodTemplateSpec, as a Pod."""
    unknown = [f"unknown field {key}" for key in template.keys() - {"metadata", "spec"}]
    metadata = {"name": "x", **template.get("metadata", {})}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template.get("spec")}
    return unknown + core_problems(pod)


def ray_problems(manifest: dict[str, Any]) -> list[str]:
    """What KubeRay's fields say of a RayJob or RayCronJob, its pods included."""
    return list(_section(manifest, manifest["kind"], manifest["kind"]))


def _section(value: Any, name: str, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: a section is expected"
        return
    fields = {key.rstrip("!"): kind for key, kind in FIELDS[name].items()}
    for key in FIELDS[name]:
        if key.endswith("!") and key.rstrip("!") not in value:
            yield f"{path}: {key.rstrip('!')} is missing"
    for key, inner in value.items():
        if key not in fields:
            yield f"{path}: unknown field {key}"
        else:
            yield from _value(inner, fields[key], f"{path}.{key}")


def _value(value: Any, kind: Any, path: str) -> Iterator[str]:
    if isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{path}: a list is expected"
            return
        for position, inner in enumerate(value):
            yield from _value(inner, kind[0], f"{path}[{position}]")
    elif isinstance(kind, dict):
        if value not in kind["one of"]:
            yield f"{path}: one of {kind['one of']} is expected"
    elif kind == "texts":
        if not all(isinstance(text, str) for text in value.values()):
            yield f"{path}: every value must be a text"
    elif kind == "pod":
        yield from (f"{path}: {problem}" for problem in pod_problems(value))
    elif kind in _PLAIN:
        right = isinstance(value, _PLAIN[kind])
        if not right or (isinstance(value, bool) and kind != "boolean"):
            yield f"{path}: {kind} is expected"
    elif kind != "core":
        yield from _section(value, kind, path)
