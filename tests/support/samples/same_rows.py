"""Two runs are the same when their rows are: boxes to 0.05 px, scores to 1e-3."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from storage.records import AnnotationRow

# Everything that does not come out of the network must be equal to the last bit.
_PLAIN = (
    "image_id", "shard_id", "offset", "nbytes", "sha256", "phash", "status", "width", "height",
    "exif_orientation", "error",
)  # fmt: skip


def same(a: AnnotationRow, b: AnnotationRow) -> bool:
    """Return whether two rows of one image agree; batches differ, so floats do in their last
    digits."""
    if any(getattr(a, name) != getattr(b, name) for name in _PLAIN):
        return False
    x, y = a.detections, b.detections
    clear = x.scores > 0.051, y.scores > 0.051  # at the floor itself rounding may decide
    return (
        int(clear[0].sum()) == int(clear[1].sum())
        and np.allclose(x.boxes[clear[0]], y.boxes[clear[1]], atol=0.05)
        and np.allclose(x.scores[clear[0]], y.scores[clear[1]], atol=1e-3)
        and np.array_equal(x.category_ids[clear[0]], y.category_ids[clear[1]])
    )


def differing(a: Mapping[str, AnnotationRow], b: Mapping[str, AnnotationRow]) -> list[str]:
    """Image ids that only one of them has, or whose rows differ."""
    return sorted(
        key for key in {*a, *b} if key not in a or key not in b or not same(a[key], b[key])
    )
