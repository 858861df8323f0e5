"""A run small enough for any test: pages of noise in a folder, and a config for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import parse_config
from tests.support.samples.image_samples import encode


def fill_folder(folder: Path, count: int, *, size: int = 64, first: int = 0) -> list[str]:
    """Write ``count`` PNGs, each another one; returns their keys."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = []
    for index in range(first, first + count):
        pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), np.uint8)
        keys.append(f"page-{index:04d}.png")
        (folder / keys[-1]).write_bytes(encode(Image.fromarray(pixels), "PNG"))
    return keys


def run_fields(
    source: object, output: object, checkpoint: Path, /, **sections: Any
) -> dict[str, Any]:
    """Return a config as a mapping; ``sections`` are merged in: ``source={"shard_size": 2}``."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "source": {"url": str(source), "shard_size": 4},
        "output": str(output),
        "model": {"checkpoint": str(checkpoint), "runtime": "torch"},  # nothing to compile
    }
    for name, value in sections.items():
        merged = isinstance(value, dict) and name in fields
        fields[name] = {**fields[name], **value} if merged else value
    return fields


def run_config(source: object, output: object, checkpoint: Path, /, **sections: Any) -> RunConfig:
    """As ``run_fields``, parsed."""
    return parse_config(RunConfig, run_fields(source, output, checkpoint, **sections), where="tiny")
