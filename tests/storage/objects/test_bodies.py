"""Bodies of every kind, compared with what a store holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import ObjectNotFound
from storage.objects.bodies import has_body
from storage.objects.protocols import Body
from storage.stores.memory import MemoryStore
from tests.support.poured import Poured

LARGE = bytes(range(256)) * (3 << 12)  # 3 MiB: several pieces


@pytest.mark.parametrize("kind", ["bytes", "file", "poured"])
@pytest.mark.parametrize("content", [b"", b"x", LARGE], ids=["empty", "small", "large"])
def test_only_the_very_bytes_are_the_same(kind: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    bodies: dict[str, Body] = {
        "bytes": content, "file": tmp_path / "file", "poured": Poured([content[:1], content[1:]])
    }  # fmt: skip
    store = MemoryStore()
    store.put("same", content)
    assert has_body(store, "same", bodies[kind])
    others = [content + b"!", content[:-1], content[:-1] + b"!", b"!" + content[1:]]
    for number, other in enumerate(one for one in others if one != content):
        store.put(f"{number}", other)
        assert not has_body(store, f"{number}", bodies[kind])
    with pytest.raises(ObjectNotFound):
        has_body(store, "gone", bodies[kind])
