"""A ``Detector`` around a network that some runtime runs: checks, NMS, detections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from storage.errors import OutputNotFinite
from storage.records import Detections
from workers.detectors.nms import NmsRules, Selected, detections_from_selected
from workers.images.preprocessing import Preprocessing
from workers.spec import ModelSpec


class Session(Protocol):
    """The network on one device, loaded and ready. Used by one thread."""

    def run(self, batch: NDArray[np.uint8]) -> Selected:
        """uint8 [B, H, W, 3] → its best anchors; the arrays may be reused by the next call."""
        ...


@runtime_checkable
class QueueingSession(Session, Protocol):
    """A Session on a device of its own; see ``QueueingDetector``."""

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return an uninitialised array in memory that the device reads at full speed."""
        ...

    def launch(self, batch: NDArray[np.uint8]) -> Callable[[], Selected]:
        """As ``run``, in two steps; the arrays may be reused by the launch after the next."""
        ...


class GraphDetector:
    """See ``Detector``; runtime-specific code is in its session."""

    def __init__(self, session: Session, spec: ModelSpec) -> None:
        self._session = session
        self._spec = spec
        repeats = spec.convention is None or spec.convention.nms
        self._rules = NmsRules(
            spec.score_floor, spec.nms_iou if repeats else None, spec.max_detections
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return self._spec.classes

    @property
    def preprocessing(self) -> Preprocessing:
        return self._spec.preprocessing

    def detect(self, batch: NDArray[np.uint8]) -> list[Detections]:
        """See ``Detector.detect``. Raises OutputNotFinite where the network's is."""
        return self._finish(self._finite(self._session.run(self._checked(batch))))

    def start(self, batch: NDArray[np.uint8]) -> Callable[[], list[Detections]]:
        """See ``Detector.start``. Raises as ``detect``."""
        return self._unfinished(self._session.run(self._checked(batch)))

    def _unfinished(self, selected: Selected) -> Callable[[], list[Detections]]:
        self._finite(selected)
        # The session's own arrays are the next batch's.
        arrays = {field.name: getattr(selected, field.name) for field in fields(selected)}
        copies: dict[str, Any] = {k: None if v is None else v.copy() for k, v in arrays.items()}
        kept = Selected(**copies)
        return lambda: self._finish(kept)

    def _finish(self, selected: Selected) -> list[Detections]:
        return detections_from_selected(selected, keep=self._spec.keep, rules=self._rules)

    def _checked(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        wanted = (*self._spec.preprocessing.size, 3)
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[1:] != wanted:
            raise ValueError(f"batch is {batch.dtype} {batch.shape}, not uint8 [B, {wanted}]")
        return batch

    def _finite(self, selected: Selected) -> Selected:
        bad = np.flatnonzero(~np.isfinite(selected.total)).tolist()
        if bad:
            full = self._spec.precision == "fp32"
            raise OutputNotFinite(
                f"the network's output is not finite for image(s) {bad} of the batch "
                f"({self._spec.runtime}, {self._spec.precision} on {self._spec.device})",
                hint="the graph itself gives NaN or infinity: export it again from sound weights"
                if full
                else "the weights or the precision overflow: try `precision: fp32`",
            )
        return selected


class QueueingGraphDetector(GraphDetector):
    """See ``QueueingDetector``."""

    def __init__(self, session: QueueingSession, spec: ModelSpec) -> None:
        super().__init__(session, spec)
        self._queue = session

    def empty(self, images: int) -> NDArray[np.uint8]:
        """See ``QueueingDetector.empty``."""
        return self._queue.empty((images, *self._spec.preprocessing.size, 3))

    def launch(self, batch: NDArray[np.uint8]) -> Callable[[], Callable[[], list[Detections]]]:
        """See ``QueueingDetector.launch``. Raises ValueError; what is returned, as ``detect``."""
        wait = self._queue.launch(self._checked(batch))
        return lambda: self._unfinished(wait())


def detector_around(session: Session, spec: ModelSpec) -> GraphDetector:
    """Return the detector that does what its session can."""
    if isinstance(session, QueueingSession):
        return QueueingGraphDetector(session, spec)
    return GraphDetector(session, spec)
