"""Pictures of the source's images for the page: read by offset, decoded here, sent as JPEG.

The browser never gets a file of the source itself, whatever it claims to be.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import cv2
import numpy as np

from storage.errors import LabelfleetError, ObjectNotFound
from storage.objects.protocols import ObjectStore
from storage.records import ImageRef, Shard
from storage.runs.image_bytes import read_images, shards_of
from storage.runs.manifest import Manifest
from workers.images.decode import decode
from workers.images.preprocessing import recorded_range

THUMB_PX, LARGE_PX = 256, 1600
_MAX_PIXELS = 200_000_000
_QUALITY = 84
_KEPT_NBYTES = 96 * 1024 * 1024
_KEPT_SHARDS = 4096


class Pictures:
    """Makes and keeps the last few hundred pictures. Safe to call from several threads."""

    def __init__(self, manifest: Manifest, source: ObjectStore) -> None:
        self._manifest, self._source = manifest, source
        self._range = recorded_range(manifest.record.inference)
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._nbytes = 0
        self._shards: OrderedDict[str, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def expect(self, shard_ids: Sequence[str]) -> None:
        """Look up the shards of a page in one pass over the listing."""
        with self._lock:
            missing = {one for one in shard_ids if one not in self._shards}
            self._shards.update(shards_of(self._manifest, missing))
            while len(self._shards) > _KEPT_SHARDS:
                self._shards.popitem(last=False)

    def jpeg(self, place: ImageRef, longest_px: int) -> bytes:
        """Return the upright image, no side longer than ``longest_px``.

        Raises:
            LabelfleetError: it cannot be read, changed since it was labelled, or is no image.
        """
        key = (place.image_id, longest_px)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = self._made(place, longest_px)
        with self._lock:
            self._kept[key] = made
            self._nbytes += len(made)
            while self._nbytes > _KEPT_NBYTES and len(self._kept) > 1:
                self._nbytes -= len(self._kept.popitem(last=False)[1])
        return made

    def _made(self, place: ImageRef, longest_px: int) -> bytes:
        self.expect([place.shard_id])
        shard = self._shards.get(place.shard_id)
        if shard is None:
            raise ObjectNotFound(f"shard {place.shard_id} is not listed any more")
        known = {place.shard_id: shard}
        [(_, raw)] = read_images(self._manifest, self._source, [place], shards=known)
        if isinstance(raw, LabelfleetError):
            raise raw
        pixels = decode(raw, max_pixels=_MAX_PIXELS, value_range=self._range).pixels
        height, width = pixels.shape[:2]
        scale = min(1.0, longest_px / max(height, width))
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
        options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
        body = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1]
        return body.tobytes()
