"""Where a process is short of memory, no image is called damaged, and the process lives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

KINDS = ("PNG", "TIFF", "JPEG", "WEBP", "BMP", "GIF")

SHORT = """
import io, json, resource, sys
from pathlib import Path
import numpy as np
from PIL import Image
from storage.errors import ImageError
from workers.images.decode import decode

def made(kind, side):
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()

def outcome(data):
    try:
        return decode(data, max_pixels=1 << 30).pixels.shape[0]
    except MemoryError:
        return "MemoryError"
    except ImageError as exc:
        return f"{type(exc).__name__}: {exc}"

large = {kind: made(kind, 1200) for kind in sys.argv[1:]}
for kind in large:
    decode(made(kind, 64), max_pixels=1 << 30)  # the libraries are loaded
found, hard = {}, resource.getrlimit(resource.RLIMIT_AS)[1]
for kind, data in large.items():
    for room in (1, 6, 14, 4000):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (room << 20), hard))
        said = outcome(data)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        found[f"{kind} {room}"] = said
print(json.dumps(found))
"""


@pytest.mark.slow
def test_an_image_is_never_blamed_for_a_lack_of_memory() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SHORT, *KINDS], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    wrong = {at: said for at, said in found.items() if said not in (1200, "MemoryError")}
    assert wrong == {}
    assert [found[f"{kind} 4000"] for kind in KINDS] == [1200] * len(KINDS)
    assert "MemoryError" in [found[f"{kind} 1"] for kind in KINDS]
