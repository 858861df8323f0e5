"""Ctrl-C while a store does not answer: what reads with several threads waits for none of them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pytest

from storage.labels.objects import objects_now
from storage.records import ImageRef, Shard, StoredObject
from storage.runs.image_bytes import read_images
from storage.runs.ledger import invocations, read_ledger
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.labelled_run import label, png


class Silent(MemoryStore):
    """Answers no thread but the main one, once ``silent`` is set, until ``over`` is."""

    def __init__(self) -> None:
        super().__init__()
        self.silent, self.over = threading.Event(), threading.Event()

    def _wait(self) -> None:
        if self.silent.is_set() and threading.current_thread() is not threading.main_thread():
            self.over.wait(60)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        self._wait()
        return super().list(prefix)

    def head(self, key: str) -> StoredObject:
        self._wait()
        return super().head(key)

    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        self._wait()
        return super().get(key, if_match=if_match)

    def get_range(self, key: str, offset: int, nbytes: int, **condition: Any) -> bytes:
        self._wait()
        return super().get_range(key, offset, nbytes, **condition)

    @contextmanager
    def stream(self, key: str, *, if_match: str | None = None) -> Iterator[BinaryIO]:
        self._wait()
        with super().stream(key, if_match=if_match) as file:
            yield file


@pytest.fixture
def store() -> Iterator[Silent]:
    store = Silent()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield store
    signal.signal(signal.SIGINT, before)
    store.over.set()


def shards_of(manifest: Manifest) -> dict[str, Shard]:
    return {shard.shard_id: shard for shard in Listing(manifest.store).all_shards()}


def images(manifest: Manifest) -> object:
    shards = shards_of(manifest)
    places = [
        ImageRef(one.key, shard.shard_id, 0, one.nbytes, "")
        for shard in shards.values()
        for one in shard.objects
    ]
    return list(read_images(manifest, manifest.store, places, shards=shards))


def objects(manifest: Manifest) -> object:
    listed = [one for shard in shards_of(manifest).values() for one in shard.objects]
    return objects_now(manifest.store, {one.key: one for one in listed})


def ledger(manifest: Manifest) -> object:
    return [list(read_ledger(manifest.store, one)) for one in invocations(manifest.store)]


@pytest.mark.parametrize(
    "read",
    [images, objects, ledger, Manifest.committed, lambda run: list(run.annotation_objects())],
    ids=["images", "objects", "ledger", "commits", "annotations"],
)
def test_an_interrupt_does_not_wait_for_a_store_that_is_silent(
    read: Callable[[Manifest], object], store: Silent
) -> None:
    source = MemoryStore()
    for number in range(40):
        source.put(f"{number}.png", png(number))
    manifest = label(source, store)
    for one in source.list():
        store.put(one.key, source.get(one.key))
    read(manifest)
    store.silent.set()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    last = threading.Timer(10, store.over.set)
    last.start()
    with pytest.raises(KeyboardInterrupt):
        read(manifest)
    assert not store.over.is_set()
    last.cancel()
