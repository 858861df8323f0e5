"""Prepare one image: from bytes to network input, or to a row with the reason for failure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.errors import ImageError
from storage.records import AnnotationRow, Detections, ImageRecord, Status
from workers.images.decode import decode, probe
from workers.images.letterbox import LetterboxTransform, letterbox
from workers.images.phash import phash
from workers.images.pixels import DecodedImage, let_go
from workers.images.preprocessing import Preprocessing, Window


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image whose pixels are in a batch, and its row's fields except the detections.

    Attributes:
        image_id, shard_id, offset, nbytes: where it came from.
        transform: letterbox geometry; knows the upright image's size.
        exif_orientation: 1–8, as found; the pixels are upright already.
        sha256, phash: of the encoded bytes, and of the upright pixels.
        frames, warning: as decoded.
    """

    image_id: str
    shard_id: str
    offset: int | None
    nbytes: int
    sha256: str
    phash: int
    exif_orientation: int
    frames: int
    warning: str | None
    transform: LetterboxTransform

    def row(self, detections: Detections) -> AnnotationRow:
        """Return the image's row; ``detections`` as the detector gave them, in input pixels."""
        whole = self.transform
        return self.upright_row(whole.invert(detections), whole.width, whole.height)

    def upright_row(self, detections: Detections, width: int, height: int) -> AnnotationRow:
        """Return the row of an image of that size; ``detections`` in its upright pixels."""
        return AnnotationRow(
            image_id=self.image_id,
            shard_id=self.shard_id,
            offset=self.offset,
            nbytes=self.nbytes,
            sha256=self.sha256,
            phash=self.phash,
            width=width,
            height=height,
            exif_orientation=self.exif_orientation,
            status="ok",
            error=None,
            detections=detections,
            frames=self.frames,
            warning=self.warning,
        )


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that cannot be labelled, and the row that says so."""

    row: AnnotationRow


@dataclass(frozen=True, slots=True)
class Opened:
    """A decoded image that waits for its place in a batch."""

    record: ImageRecord
    shard_id: str
    image: DecodedImage
    sha256: str
    phash: int

    def place(
        self,
        preprocessing: Preprocessing,
        slot: NDArray[np.uint8],
        window: Window | None = None,
    ) -> Prepared | Skipped:
        """Letterbox into ``slot``, uint8 [H, W, 3] of the network's input size.

        Args:
            window: the part that is meant, of an image that was decoded whole; None: all of it.
        """
        record = self.record
        image = self.image
        try:
            if window is None:
                _, transform = letterbox(
                    image.pixels, preprocessing, slot, size=image.size, factor=image.factor
                )
            else:
                _, transform = letterbox(window.of(image.pixels), preprocessing, slot)
            let_go(image.pixels)
        except MemoryError:
            raise
        except Exception as exc:  # noqa: BLE001 - as in open_image
            reason = f"{type(exc).__name__}: {exc}"
            return _skipped(record, self.shard_id, self.sha256, "undecodable", reason)
        return Prepared(
            record.image_id, self.shard_id, record.offset, record.nbytes, self.sha256, self.phash,
            image.exif_orientation, image.frames, image.warning, transform,
        )  # fmt: skip


def open_image(
    record: ImageRecord, shard_id: str, preprocessing: Preprocessing, max_pixels: int
) -> Opened | Skipped:
    """Decode one image, no larger than it will be needed. Never raises for a bad image.

    Raises:
        MemoryError: this process is short of memory; no image is to blame.
    """
    digest = "" if record.data is None else hashlib.sha256(record.data).hexdigest()
    if record.status != "ok" or record.data is None:
        reason = record.error or "no bytes"
        status: Status = record.status if record.status != "ok" else "missing"
        return _skipped(record, shard_id, digest, status, reason)
    try:
        image = decode(
            record.data,
            max_pixels=max_pixels,
            enough=preprocessing if preprocessing.decode == "fast" else None,
            value_range=preprocessing.value_range,
        )
        hashed = phash(image.pixels)
        let_go(image.pixels)
        return Opened(record, shard_id, image, digest, hashed)
    except ImageError as exc:
        return _skipped(record, shard_id, digest, exc.status, exc.message)
    except MemoryError:
        raise
    except Exception as exc:  # noqa: BLE001 - foreign decoders on hostile bytes
        return _skipped(record, shard_id, digest, "undecodable", f"{type(exc).__name__}: {exc}")


def _skipped(
    record: ImageRecord, shard_id: str, digest: str, status: Status, error: str
) -> Skipped:
    size = probe(record.data) if record.data else None
    width, height, orientation = size or (0, 0, 0)
    return Skipped(
        AnnotationRow(
            image_id=record.image_id,
            shard_id=shard_id,
            offset=record.offset,
            nbytes=record.nbytes,
            sha256=digest,
            phash=None,
            width=width,
            height=height,
            exif_orientation=orientation,
            status=status,
            error=error,
            detections=Detections.empty(),
        )
    )
