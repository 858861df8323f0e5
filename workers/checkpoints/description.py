"""The self-description of our checkpoints: one JSON text in the safetensors metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.errors import CheckpointError
from workers.images.preprocessing import Preprocessing, check_preprocessing

METADATA_KEY = "labelfleet"
FORMAT = 1
_LONGEST_TEXT = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a checkpoint of ours says of itself, so that a config needs nothing but its URL.

    Attributes:
        name: the architecture, such as ``yolo_nas_s``.
        arch_params: the network's parameters as JSON; None: those of ``name``.
        classes: by class index.
        preprocessing: what the network was trained with.
        licence: of the weights; None: not known.
        training: JSON values; how it was made.
        official_ids: the training set's own ids of the classes; None: it has none.
        provenance: the models it learned from; see ``workers.checkpoints.provenance``.
    """

    name: str
    arch_params: str | None
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    licence: str | None
    training: Mapping[str, Any]
    official_ids: tuple[int, ...] | None = None
    provenance: Mapping[str, Any] | None = None

    def to_text(self) -> str:
        """Return the JSON text to store under ``METADATA_KEY``."""
        ids, origin = self.official_ids, self.provenance
        return json.dumps(
            {
                "format": FORMAT,
                "name": self.name,
                "arch_params": None if self.arch_params is None else json.loads(self.arch_params),
                "classes": list(self.classes),
                **({} if ids is None else {"official_ids": list(ids)}),
                "preprocessing": self.preprocessing.fields(),
                "licence": self.licence,
                "training": dict(self.training),
                **({} if not origin else {"provenance": dict(origin)}),
            }
        )


def read_description(file_name: str, text: str | None) -> dict[str, Any]:
    """Return the fields of ``Checkpoint`` that a description fills; {} when there is none.

    Raises:
        CheckpointError: the description is invalid (its author is not trusted).
    """
    if text is None:
        return {}
    try:
        return _fields(text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise CheckpointError(f"{file_name} describes itself wrongly: {exc!r:.200}") from exc


def _fields(text: str) -> dict[str, Any]:
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"{len(text)} characters")
    said = json.loads(text)
    if said["format"] != FORMAT:
        raise ValueError(f"format {said['format']!r:.20} is not {FORMAT}")
    arch = said.get("arch_params")
    return {
        "name": _text_or_none(said.get("name")),
        "arch_params": None if arch is None else canonical_arch(arch),
        "classes": (classes := names_of(said["classes"])),
        "official_ids": _official_ids(said.get("official_ids"), len(classes)),
        "preprocessing": _preprocessing(said["preprocessing"]),
        "licence": _text_or_none(said.get("licence")),
        "training": dict(said.get("training") or {}),
        "provenance": dict(said["provenance"]) if said.get("provenance") else None,
    }


def canonical_arch(arch_params: Mapping[str, Any]) -> str:
    """Return arch_params as canonical JSON text, without the class count, which the weights decide.

    Raises:
        TypeError, ValueError: not a mapping of JSON values.
    """
    params = json.loads(json.dumps(arch_params))
    if not isinstance(params, dict):
        raise TypeError("arch_params are not a mapping")
    params.pop("num_classes", None)
    heads = params.get("heads")
    for settings in heads.values() if isinstance(heads, dict) else ():
        if isinstance(settings, dict):
            settings.pop("num_classes", None)
    return json.dumps(params, sort_keys=True, separators=(",", ":"))


def _official_ids(value: Any, classes: int) -> tuple[int, ...] | None:
    """Return the data set's own ids of the classes. Raises ValueError."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 2**31 for i in value):
        raise ValueError(f"official_ids are not a list of ids: {value!r:.80}")
    if len(value) != classes or len(set(value)) != classes:
        raise ValueError(f"{len(set(value))} different official_ids for {classes} classes")
    return tuple(value)


def names_of(value: Any) -> tuple[str, ...]:
    """Class names from plain values: a list, or a mapping {index: name} or {name: index}.

    Raises:
        ValueError: anything else, or a mapping whose indices are not 0 to n - 1.
    """
    if isinstance(value, Mapping):
        pairs = [(v, k) if isinstance(k, str) and not k.isdecimal() else (k, v)
                 for k, v in value.items()]  # fmt: skip
        by_index = {int(k): v for k, v in pairs if isinstance(k, int | str)}
        if set(by_index) != set(range(len(value))):
            raise ValueError(f"classes are not numbered 0 to {len(value) - 1}: {value!r:.80}")
        value = [by_index[i] for i in range(len(value))]
    if not isinstance(value, list | tuple) or not all(isinstance(n, str) for n in value):
        raise ValueError(f"classes are not a list of names: {value!r:.80}")
    return tuple(value)


def _preprocessing(said: Mapping[str, Any]) -> Preprocessing:
    """From JSON, where tuples are lists. Raises TypeError or ValueError."""
    if unknown := set(said) - {f.name for f in dataclasses.fields(Preprocessing)}:
        raise ValueError(f"preprocessing has {sorted(unknown)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
    found = Preprocessing(**values)
    check_preprocessing(found)
    return found


def _text_or_none(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is not text")
    return value
