"""The order of copies and network on a GPU, against a device that does each stream's work as late
and as badly as events allow. What CUDA itself does with it: test_cuda.py, on a GPU."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import workers.runtimes.device_queue as module
from workers.runtimes.device_queue import DeviceQueue


@dataclass(eq=False)
class Stream:
    queued: deque[tuple[str, Any, int]] = field(default_factory=deque)


class Device:
    """Stands for ``torch`` in the module: every other name is torch's own."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.streams: list[Stream] = []
        self.current: Stream | None = None
        self.cuda = self

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def Stream(self) -> Stream:  # noqa: N802 - as in torch.cuda
        self.streams.append(Stream())
        return self.streams[-1]

    def Event(self, blocking: bool) -> Event:  # noqa: N802 - as in torch.cuda
        return Event(self)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def do(self, work: Callable[[], object]) -> None:
        assert self.current is not None
        self.current.queued.append(("do", work, 0))

    def step(self) -> None:
        able = [s for s in self.streams if s.queued and not self._held(*s.queued[0])]
        assert able, "every stream waits for another one"
        kind, what, number = self.chance.choice(able).queued.popleft()
        if kind == "do":
            with torch.inference_mode():
                what()
        elif kind == "record":
            what.done = number

    def _held(self, kind: str, what: Any, number: int) -> bool:
        return kind == "wait" and what.done < number

    def synchronize(self) -> None:
        while any(s.queued for s in self.streams):
            self.step()

    def empty(self, shape: Sequence[int], dtype: torch.dtype, **where: object) -> Tensor:
        made = torch.full(tuple(shape), 99, dtype=dtype).as_subclass(OnDevice)
        made.on = self
        return made

    zeros = empty


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.recorded, self.done = device, 0, 0

    def record(self) -> None:
        assert self.device.current is not None
        self.recorded += 1
        self.device.current.queued.append(("record", self, self.recorded))

    def wait(self) -> None:
        assert self.device.current is not None
        self.device.current.queued.append(("wait", self, self.recorded))

    def synchronize(self) -> None:
        wanted = self.recorded
        while self.done < wanted:
            self.device.step()


class OnDevice(torch.Tensor):
    """What is copied into it is copied later."""

    on: Device

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        plain = self.as_subclass(torch.Tensor)
        self.on.do(lambda: plain.copy_(source))
        return self

    def __getitem__(self, index: Any) -> Tensor:
        part = super().__getitem__(index)
        part.on = self.on  # type: ignore[attr-defined]  # it is an OnDevice, too
        return part


class MeanBrightness:
    """A program with tensors of its own, like a CUDA graph; every output is an image's mean."""

    def __init__(self, device: Device, shape: tuple[int, ...]) -> None:
        self.device = device
        self.images = device.empty(shape, torch.uint8)
        sizes = [(4,), (4, 2), (4, 4), (4, 4), (4,), ()]
        self.made = [device.empty((shape[0], *size), torch.float32) for size in sizes]

    @property
    def outputs(self) -> list[tuple[Sequence[int], torch.dtype]]:
        return [(tensor.shape, tensor.dtype) for tensor in self.made]

    def run(self, images: Tensor, outputs: Sequence[Tensor]) -> None:
        self.images.copy_(images)
        self.device.do(self._replay)
        for there, here in zip(self.made, outputs, strict=True):
            here.copy_(there)

    def _replay(self) -> None:
        means = self.images.as_subclass(torch.Tensor).float().mean((1, 2, 3))
        for tensor in self.made:
            plain = tensor.as_subclass(torch.Tensor)
            plain[:] = means.reshape(-1, *[1] * (plain.ndim - 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_every_batch_gets_its_own_outputs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(seed)
    monkeypatch.setattr(module, "torch", device)
    queue = DeviceQueue(lambda shape, _: MeanBrightness(device, shape))
    buffers = [queue.empty((8, 4, 4, 3)) for _ in range(3)]
    under_way: deque[tuple[Any, Any]] = deque()
    for turn in range(100):
        values = np.arange(turn, turn + device.chance.randint(1, 8), dtype=np.uint8)
        batch = buffers[turn % 3][: len(values)]
        batch[:] = values[:, None, None, None]
        under_way.append((values, queue.launch(batch)))
        if len(under_way) == 2:
            wanted, wait = under_way.popleft()
            found = wait()
            for array in (
                found.anchors[:, 0],
                found.scores[:, 1, 1],
                found.boxes[:, 3, 0],
                found.total,
            ):
                np.testing.assert_array_equal(array, wanted)


def test_what_could_not_be_queued_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(0)
    monkeypatch.setattr(module, "torch", device)

    class Failing(MeanBrightness):
        fails = True

        def run(self, images: Tensor, outputs: Sequence[Tensor]) -> None:
            if self.fails:
                raise RuntimeError("out of memory")
            super().run(images, outputs)

    queue = DeviceQueue(lambda shape, _: Failing(device, shape))
    batch = np.full((2, 4, 4, 3), 7, np.uint8)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            queue.launch(batch)
    monkeypatch.setattr(Failing, "fails", False)
    waits = [queue.launch(batch) for _ in range(2)]
    assert [wait().total.tolist() for wait in waits] == [[7, 7], [7, 7]]
