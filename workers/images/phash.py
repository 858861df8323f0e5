"""A 64-bit perceptual hash: near duplicates differ in a few bits."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from workers.images.pixels import lies_on_disk, shrunk_from_disk

_SAMPLED, _SIDE, _LOW = 96, 32, 8
# The first rows of the orthonormal DCT-II of 32 values: two small products are a fifth of cv2.dct.
_FREQUENCIES = np.arange(_LOW)[:, None] * (2 * np.arange(_SIDE)[None] + 1) * (np.pi / 2 / _SIDE)
_DCT = (np.cos(_FREQUENCIES) * np.sqrt(2 / _SIDE)).astype(np.float32)


def phash(pixels: NDArray[np.uint8]) -> int:
    """Return the DCT hash of C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash
    Functions" (2010), section 3.2.1: grey, 32×32, the 8×8 lowest frequencies, each compared with
    their median. The 32×32 are means of 3×3 samples each, between pixels: reading every pixel costs
    twice as much and turns one bit in a hundred.

    Args:
        pixels: uint8 [H, W, 3], RGB, upright, any size.

    Returns:
        Unsigned 64 bits; the Hamming distance of two hashes is the measure of likeness. An image
        of one colour gives 0.
    """
    sampled: NDArray[Any]
    if lies_on_disk(pixels):
        sampled = shrunk_from_disk(pixels, _SAMPLED, _SAMPLED)
    else:
        sampled = cv2.resize(pixels, (_SAMPLED, _SAMPLED), interpolation=cv2.INTER_LINEAR)
    grey = cv2.cvtColor(sampled, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    low = _DCT.dot(small.astype(np.float32)).dot(_DCT.T).reshape(-1)
    low[0] = 0.0  # the mean brightness says nothing about likeness
    ordered = low.copy()
    ordered.sort()
    median = (ordered[_LOW * _LOW // 2 - 1] + ordered[_LOW * _LOW // 2]) / 2
    # Below 0.01 it is rounding noise of float32; without this, flat images get random bits.
    bits = low > median + np.float32(0.01)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
