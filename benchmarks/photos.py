"""The JPEG files that benchmarks label: a folder's, or made-up ones; repeated as needed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from storage.shards.tar_writer import TarWriter

_MADE_UP = 32


def photo_bytes(folder: Path | None, count: int) -> list[bytes]:
    """``count`` JPEGs, spread evenly over the folder's, again from the start where it has fewer."""
    if folder is None:
        found = [_made_up(seed) for seed in range(_MADE_UP)]
    else:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        if not paths:
            raise SystemExit(f"no JPEG below {folder}")
        step = max(1, len(paths) // count)
        found = [path.read_bytes() for path in paths[::step][:count]]
    return list(islice(cycle(found), count))


def _made_up(seed: int, width: int = 640, height: int = 480) -> bytes:
    """Shapes, gradients and grain: some 50 KB, as a photo of that size has."""
    chance = np.random.default_rng(seed)
    coarse = chance.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(25):
        x, y = (int(chance.integers(0, side)) for side in (width, height))
        colour = tuple(int(c) for c in chance.integers(0, 256, 3))
        cv2.circle(pixels, (x, y), int(chance.integers(8, 60)), colour, -1)
    grain = chance.normal(0, 6, pixels.shape)
    noisy = np.clip(pixels + grain, 0, 255).astype(np.uint8)
    made: bytes = simplejpeg.encode_jpeg(noisy, quality=85)
    return made


def write_files(folder: Path, photos: Sequence[bytes]) -> list[Path]:
    """Loose files, each another one by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.jpg" for i in range(len(photos))]
    for path, photo in zip(paths, photos, strict=True):
        path.write_bytes(photo)
    return paths


def write_tars(folder: Path, photos: Sequence[bytes], per_shard: int) -> int:
    """Write tar shards of that many photos; return the number of shards."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(photos), per_shard)
    for number, start in enumerate(starts):
        writer = TarWriter((folder / f"{number:05d}.tar").open("wb"))
        for i, photo in enumerate(photos[start : start + per_shard]):
            writer.add(f"{start + i:06d}.jpg", photo)
        writer.close()
    return len(starts)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that goes with the benchmark."""
    return tempfile.TemporaryDirectory(prefix="labelfleet-bench-", ignore_cleanup_errors=True)
