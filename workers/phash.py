"""A 64-bit perceptual hash: near duplicates differ in a few bits."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

_SIDE = 32
_LOW = 8


def phash(pixels: NDArray[np.uint8]) -> int:
    """The DCT hash of C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash
    Functions" (2010), section 3.2.1: grey, 32×32, the 8×8 lowest frequencies, each compared with
    their median.

    Args:
        pixels: uint8 [H, W, 3], RGB, upright, any size.

    Returns:
        Unsigned 64 bits; the Hamming distance of two hashes is the measure of likeness. An image
        of one colour gives 0.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    low = np.array(cv2.dct(small.astype(np.float32))[:_LOW, :_LOW], np.float32).reshape(-1)
    low[0] = 0.0  # the mean brightness says nothing about likeness
    # Below 0.01 it is rounding noise of float32; without this, flat images get random bits.
    bits = low > np.median(low) + 0.01
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
