"""Checkpoints for tests: a few weights under YOLO-NAS's names, and ways to package them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

NAMES = ("RBC", "WBC", "Platelets")


def weights(classes: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Only what tells how many classes there are, and one weight more."""
    generator = torch.Generator().manual_seed(seed)
    state = {"backbone.stem.conv.weight": torch.randn(4, 3, 3, 3, generator=generator)}
    for head, channels in (("head1", 8), ("head2", 16), ("head3", 32)):
        shape = (classes, channels, 1, 1)
        state[f"heads.{head}.cls_pred.weight"] = torch.randn(shape, generator=generator)
    return state


def saved(path: Path, content: Any, *, legacy: bool = False) -> Path:
    """``content`` as torch.save writes it."""
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def with_pickle(path: Path, pickled: bytes, *, legacy: bool = False) -> Path:
    """Return a torch container around a hand-made pickle, with the storages of ``weights()``."""
    buffer = io.BytesIO()
    torch.save(weights(), buffer, _use_new_zipfile_serialization=not legacy)
    if legacy:
        head = io.BytesIO()
        torch.save({}, head, _use_new_zipfile_serialization=False)
        raw = head.getvalue()
        cut = raw.rindex(b"}q\x00.")
        path.write_bytes(raw[:cut] + pickled + raw[cut + 4 :])
        return path
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            body = pickled if name.endswith("data.pkl") else source.read(name)
            target.writestr(name, body)
    return path
