"""Two batches under way on one GPU: while one runs, the next is copied in and the last one out.

    batch ── copy in ──> images ── program ──> outputs ── copy out ──> fetched ──> Selected

Each arrow is a CUDA stream, in which work keeps its order; events keep it between them. Batch and
``fetched`` lie in page-locked memory, without which copies do not run beside the network. The host
waits once a batch, for its last event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.detectors.nms import Selected

_UNDER_WAY = 2
_KEPT_SIZES = 8


class Program(Protocol):
    """The network for batches of one size, on one GPU."""

    @property
    def outputs(self) -> Sequence[tuple[Sequence[int], torch.dtype]]:
        """Shape and type of each output, in the order of ``Selected``."""
        ...

    def run(self, images: Tensor, outputs: Sequence[Tensor]) -> None:
        """Queue the network on the current stream; all tensors are on the device."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one batch lives on its way; reused when it has left."""

    images: Tensor
    outputs: list[Tensor]
    fetched: list[Tensor]  # page-locked
    arrived: Any
    made: Any
    left: Any


@dataclass(frozen=True, slots=True)
class _Lane:
    program: Program
    free: deque[_Place]


class DeviceQueue:
    """A ``QueueingSession`` on one GPU. A batch runs in the smallest program that it fits, of less
    than twice its size; there is one for each power of two, and for the largest batch.

    Args:
        prepare: the program for batches uint8 [B, H, W, 3] of that shape, which is built on the
            given stream, and later run on no other.
    """

    def __init__(self, prepare: Callable[[tuple[int, ...], Any], Program]) -> None:
        self._prepare = prepare
        self._lanes: dict[int, _Lane] = {}
        self._in, self._run, self._out = (_stream() for _ in range(3))

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """See ``QueueingSession.empty``: page-locked."""
        made: NDArray[np.uint8] = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
        return made

    def run(self, batch: NDArray[np.uint8]) -> Selected:
        """See ``Session.run``."""
        return self.launch(batch)()

    @torch.inference_mode()
    def launch(self, batch: NDArray[np.uint8]) -> Callable[[], Selected]:
        """See ``QueueingSession.launch``."""
        count = len(batch)
        fitting = [size for size in self._lanes if count <= size < 2 * count]
        lane = self._lanes[min(fitting)] if fitting else self._open(count, batch.shape[1:])
        place = lane.free.popleft()
        try:
            self._queue(lane.program, place, batch)
        except BaseException:
            torch.cuda.synchronize()  # the caller may overwrite the batch now
            lane.free.append(place)
            raise

        def wait() -> Selected:
            try:
                place.left.synchronize()
            finally:
                lane.free.append(place)
            return Selected(*(tensor.numpy()[: len(batch)] for tensor in place.fetched))

        return wait

    def _queue(self, program: Program, place: _Place, batch: NDArray[np.uint8]) -> None:
        with torch.cuda.stream(self._in):
            place.images[: len(batch)].copy_(torch.from_numpy(batch), non_blocking=True)
            place.arrived.record()
        with torch.cuda.stream(self._run):
            place.arrived.wait()
            program.run(place.images, place.outputs)
            place.made.record()
        with torch.cuda.stream(self._out):
            place.made.wait()
            for here, there in zip(place.fetched, place.outputs, strict=True):
                here.copy_(there, non_blocking=True)
            place.left.record()

    def _open(self, count: int, image: tuple[int, ...]) -> _Lane:
        if count < max(self._lanes, default=0):  # one that other partial batches fit, too
            count = 1 << (count - 1).bit_length()
        shape = (count, *image)
        torch.cuda.synchronize()
        if len(self._lanes) == _KEPT_SIZES:
            del self._lanes[min(self._lanes)]
        program = self._prepare(shape, self._run)
        places = (_place(shape, program.outputs) for _ in range(_UNDER_WAY))
        lane = self._lanes[shape[0]] = _Lane(program, deque(places))
        torch.cuda.synchronize()
        return lane


def _place(shape: tuple[int, ...], outputs: Sequence[tuple[Sequence[int], torch.dtype]]) -> _Place:
    return _Place(
        torch.zeros(shape, dtype=torch.uint8, device="cuda"),
        [torch.empty(tuple(size), dtype=dtype, device="cuda") for size, dtype in outputs],
        [torch.empty(tuple(size), dtype=dtype, pin_memory=True) for size, dtype in outputs],
        *(_event() for _ in range(3)),
    )


def _stream() -> Any:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _event() -> Any:
    # Blocking: a host thread that spins would take a core from the decoders.
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
