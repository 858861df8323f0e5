"""What a JPEG's markers say: where it ends, how many scans it has, whether pictures follow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from workers.images.frames import mpo_frames
from workers.images.jpeg import find_end, read_jpeg_header

FRAME = b"\xff\xc0\0\x0b\x08\0\x10\0\x10\1\1\x11\0"  # 16×16, grey
SCAN = b"\xff\xda\0\x08\1\1\0\0\x3f\0"
START, END = b"\xff\xd8" + FRAME, b"\xff\xd9"


def ending(data: bytes) -> tuple[int | None, int]:
    header = read_jpeg_header(data)
    assert header is not None
    return find_end(data, header.scan_at)


def encoded(**how: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", **how)
    return file.getvalue()


@pytest.mark.parametrize("nbytes", [0, 1, 2, (1 << 20) - 2, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_the_end_is_found_wherever_it_lies(nbytes: int) -> None:
    whole = START + SCAN + bytes(nbytes) + END
    assert ending(whole) == (len(whole), 1)
    assert ending(whole + b"\xff\xd8 a thumbnail \xff\xd9") == (len(whole), 1)
    assert ending(whole[:-2]) == (None, 1)


def test_stuffed_bytes_restarts_and_fill_are_inside_of_a_scan() -> None:
    scan = b"\xff\0\1\xff\xd0\2\xff\0\3\xff\xd7\4\xff\xff"
    whole = START + SCAN + scan + b"\xff\xc4\0\2" + SCAN + scan + END
    assert ending(whole) == (len(whole), 2)


def test_a_tiny_scan_costs_a_small_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = 0
    frombuffer = np.frombuffer

    def counted(data: bytes, kind: type, nbytes: int, at: int) -> object:
        nonlocal looked_at
        looked_at += nbytes
        return frombuffer(data, kind, nbytes, at)

    monkeypatch.setattr(np, "frombuffer", counted)
    whole = START + SCAN * 3000 + bytes(1 << 20) + END
    assert ending(whole) == (len(whole), 3000)
    assert looked_at < 64 << 20  # 3 GiB, were each looked for in a whole piece


def test_encoders_scans_are_counted() -> None:
    for how, scans in (({}, 1), ({"restart_marker_blocks": 1}, 1), ({"progressive": True}, 10)):
        whole = encoded(**how)
        assert ending(whole + b"video") == (len(whole), scans)


def test_only_a_segment_says_that_pictures_follow() -> None:
    for comment in (b"MPF\0", b"\xff\xe2\0\x06MPF\0"):
        header = read_jpeg_header(whole := encoded(comment=comment))
        assert header is not None
        assert not header.is_mpo
        assert mpo_frames(whole) == 1
    image = Image.open(io.BytesIO(encoded()))
    image.save(file := io.BytesIO(), "MPO", save_all=True, append_images=[image.copy()])
    header = read_jpeg_header(file.getvalue())
    assert header is not None
    assert header.is_mpo
    assert mpo_frames(file.getvalue()) == 2
