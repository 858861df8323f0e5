"""Prepare one image: from bytes to network input, or to a row with the reason for failure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.errors import ImageError
from storage.records import AnnotationRow, Detections, ImageRecord, ImageRef, Status
from workers.images.decode import decode, probe
from workers.images.letterbox import LetterboxTransform, letterbox
from workers.images.phash import phash
from workers.images.pixels import DecodedImage, in_memory, let_go
from workers.images.preprocessing import Preprocessing, Window

_NO_PIXELS = np.empty((0, 0, 3), np.uint8)


@dataclass(slots=True, eq=False)
class OpenedImage:
    """A decoded image: placed in one or more batches, then a row.

    Attributes:
        ref: where it came from.
        phash: of the upright pixels.
        image: what the decoder returned; its pixels until ``release``.
    """

    ref: ImageRef
    phash: int
    image: DecodedImage

    def place(
        self, preprocessing: Preprocessing, slot: NDArray[np.uint8], window: Window | None = None
    ) -> LetterboxTransform | AnnotationRow:
        """Letterbox into ``slot``, uint8 [H, W, 3] of the network's input size.

        Args:
            window: the part to place, of an image that was decoded whole; None: all of it.

        Returns:
            How the pixels lie in the slot; the image's row where placing them failed.
        """
        image = self.image
        try:
            if window is None:
                _, transform = letterbox(
                    image.pixels, preprocessing, slot, size=image.size, factor=image.factor
                )
            else:
                _, transform = letterbox(in_memory(window.of(image.pixels)), preprocessing, slot)
            let_go(image.pixels)
            return transform
        except MemoryError:
            raise
        except Exception as exc:  # noqa: BLE001 - as in open_image
            return self.failed("undecodable", f"{type(exc).__name__}: {exc}")

    def release(self) -> None:
        """Drop the pixels; what the row says about the image stays."""
        self.image = self.image._replace(pixels=_NO_PIXELS)

    def failed(self, status: Status, error: str) -> AnnotationRow:
        """Return the image's row, without labels."""
        height, width = self.image.size
        return _failed(self.ref, (width, height, self.image.exif_orientation), status, error)

    def row(self, detections: Detections) -> AnnotationRow:
        """Return the image's row; ``detections`` in its upright pixels."""
        image = self.image
        height, width = image.size
        return AnnotationRow(
            *self.ref.fields,
            phash=self.phash,
            width=width,
            height=height,
            exif_orientation=image.exif_orientation,
            status="ok",
            error=None,
            detections=detections,
            frames=image.frames,
            warning=image.warning,
        )


def open_image(
    record: ImageRecord, shard_id: str, preprocessing: Preprocessing, max_pixels: int
) -> OpenedImage | AnnotationRow:
    """Decode one image, no larger than it will be needed. Never raises for a bad image.

    Returns:
        The decoded image; the image's row where it cannot be labelled.

    Raises:
        MemoryError: this process is short of memory; no image is to blame.
    """
    digest = "" if record.data is None else hashlib.sha256(record.data).hexdigest()
    ref = ImageRef(record.image_id, shard_id, record.offset, record.nbytes, digest)
    if record.status != "ok" or record.data is None:
        status: Status = record.status if record.status != "ok" else "missing"
        return _failed(ref, _size(record.data), status, record.error or "no bytes")
    try:
        image = decode(
            record.data,
            max_pixels=max_pixels,
            enough=preprocessing if preprocessing.decode == "fast" else None,
            value_range=preprocessing.value_range,
        )
        hashed = phash(image.pixels)
        let_go(image.pixels)
        return OpenedImage(ref, hashed, image)
    except ImageError as exc:
        return _failed(ref, _size(record.data), exc.status, exc.message)
    except MemoryError:
        raise
    except Exception as exc:  # noqa: BLE001 - foreign decoders on hostile bytes
        reason = f"{type(exc).__name__}: {exc}"
        return _failed(ref, _size(record.data), "undecodable", reason)


def _size(data: bytes | None) -> tuple[int, int, int]:
    """Return (width, height, orientation) by the header; zeros where it does not say."""
    return (probe(data) if data else None) or (0, 0, 0)


def _failed(ref: ImageRef, size: tuple[int, int, int], status: Status, error: str) -> AnnotationRow:
    width, height, orientation = size
    return AnnotationRow(
        *ref.fields,
        phash=None,
        width=width,
        height=height,
        exif_orientation=orientation,
        status=status,
        error=error,
        detections=Detections.empty(),
    )
