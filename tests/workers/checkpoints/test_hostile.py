"""A checkpoint cannot run code, and a damaged one ends in a readable line."""

from __future__ import annotations

import builtins
import importlib
import operator
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import CheckpointError
from tests.support.samples.checkpoint_samples import saved, weights, with_pickle
from workers.checkpoints.file import read_checkpoint

_events: list[str] | None = None


def _listen(event: str, _: Any) -> None:
    if _events is not None and event in _FORBIDDEN:
        _events.append(event)


# Every way Python has to resolve a pickled name or to start something is announced as one of these.
_FORBIDDEN = {
    "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "subprocess.Popen", "socket.connect", "shutil.rmtree",
}  # fmt: skip
sys.addaudithook(_listen)


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """Collects what must not happen while the test runs; asserts that nothing of it did."""
    global _events
    _events = events = []
    try:
        yield events
    finally:
        _events = None
    assert events == []


def refusal(path: Path) -> str:
    """Why a checkpoint was refused; '' when it was read."""
    try:
        read_checkpoint(path).load_state_dict()
    except CheckpointError as error:
        return error.message
    return ""


class Asks:
    """Pickles as a request to call something."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self._call = (call, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def bombs(sentinel: Path) -> dict[str, Any]:
    command = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w')"
    return {
        "os.system": Asks(os.system, command),
        "eval": Asks(builtins.eval, code),
        "exec": Asks(builtins.exec, code),
        "popen": Asks(subprocess.Popen, command, -1, None, None, None, None, None, True, True),
        "import": Asks(importlib.import_module, "antigravity"),
        "getattr": Asks(getattr, Asks(importlib.import_module, "os"), "system"),
        "methodcaller": Asks(operator.methodcaller, "system", command),
        "torch.hub": Asks(torch.hub.load, "someone/something", "model"),
        "torch.load": Asks(torch.load, str(sentinel)),
        "torch.jit": Asks(torch.jit.load, str(sentinel)),
        "open": Asks(open, str(sentinel), "w"),
        "memory": Asks(bytearray, 10**13),
        "tensor": Asks(torch._utils._rebuild_tensor_v2, Asks(os.system, command), 0, (1,), (1,)),
    }


def test_the_watch_itself_notices(tmp_path: Path) -> None:
    global _events
    _events = events = []
    pickle.loads(pickle.dumps(Asks(os.system, f"touch {tmp_path / 'ran'}")))
    _events = None
    assert "os.system" in events
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", sorted(bombs(Path("x"))))
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_nothing_asked_for_is_called(
    name: str, legacy: bool, tmp_path: Path, watched: list[str]
) -> None:
    sentinel = tmp_path / "ran"
    bomb = bombs(sentinel)[name]
    state = weights()
    if name != "tensor":  # that one is a weight, and then an error
        path = saved(tmp_path / "beside.pth", {"net": state, "x": [bomb]}, legacy=legacy)
        assert torch.equal(
            read_checkpoint(path).load_state_dict()["heads.head1.cls_pred.weight"],
            state["heads.head1.cls_pred.weight"],
        )
    said = {"net": state, "processing_params": bomb}
    for place in ({"net": {**state, "w": bomb}}, {"net": bomb}, bomb, said):
        path = saved(tmp_path / "inside.pth", place, legacy=legacy)
        assert "\n" not in refusal(path)
    assert not sentinel.exists()


HAND_MADE = {
    "inst": b"(S'touch ran'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch ran'\no.",
    "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\ttouch ran\x85R.",
    "persistent id": b"\x80\x02cos\nsystem\nS'touch ran'\n\x85RQ.",
    "text persistent id": b"Pcos\n.",
    "extension registry": b"\x80\x02\x82\x01.",
    "setstate": b"\x80\x02cos\nsystem\n)\x81}U\x01aK\x01sb.",
    "call of a call": b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\nU\x01x\x86R)R.",
    "next buffer": b"\x80\x05\x97.",
    "huge string": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "huge memo index": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "stack underflow": b"\x80\x02R.",
    "mark missing": b"\x80\x02K\x01u.",
    "append to a number": b"\x80\x02K\x01K\x02a.",
    "odd items": b"\x80\x02}(K\x01u.",
    "no stop": b"\x80\x02}",
    "empty": b"",
    "list in itself": b"\x80\x02]q\x00h\x00a.",
    "deep list": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    # 2**40 leaves: hashing or walking it would never end
    "tuple bomb as a key": b"\x80\x02}K\x01" + b"2\x86" * 40 + b"K\x01s.",
}


@pytest.mark.parametrize("name", sorted(HAND_MADE))
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_strange_pickles_end_in_one_line(
    name: str,
    legacy: bool,
    tmp_path: Path,
    watched: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = with_pickle(tmp_path / "bad.pth", HAND_MADE[name], legacy=legacy)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path).load_state_dict()
    assert "bad.pth" in caught.value.message
    assert "\n" not in caught.value.message
    assert not (tmp_path / "ran").exists()


def test_settings_that_multiply_or_contain_themselves(tmp_path: Path, watched: list[str]) -> None:
    many: Any = "x"
    for _ in range(60):
        many = [many, many]
    itself: list[Any] = []
    itself.append(itself)
    for image_processor in (many, itself):
        path = saved(
            tmp_path / "m.pth",
            {"net": weights(), "processing_params": {"image_processor": image_processor}},
        )
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((1 << 20, 1 << 20), (0, 0), 0),  # a view that repeats one element a trillion times
        ((4,), (1,), 10_000),
        ((1 << 39,), (1 << 39,), 0),
        ((3, 8, 1, 1), (-8, 1, 1, 1), 0),
        ((True, 8), (8, 1), 0),
    ],
)
def test_tensors_stay_inside_their_storage(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int, tmp_path: Path
) -> None:
    storage = torch.zeros(24)
    pickled = _pickle_of_tensor(storage.numel(), size, stride, offset)
    path = with_pickle(tmp_path / "t.pth", pickled)
    with pytest.raises(CheckpointError, match="malformed tensor"):
        read_checkpoint(path).load_state_dict()


def _pickle_of_tensor(numel: int, *rest: Any) -> bytes:
    """{"w": _rebuild_tensor_v2(storage, offset, size, stride)} written by hand."""
    size, stride, offset = rest
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK" + bytes([numel]) + b"tQ"
    where = b"".join(pickle.dumps(v, protocol=2)[2:-1] for v in (offset, size, stride))
    return b"\x80\x02}U\x01wctorch._utils\n_rebuild_tensor_v2\n(" + storage + where + b"tRs."


def damaged_files(good: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "zeros": bytes(4096),
        "web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "web page, upper case": b"\n <HTML><head><title>Sign in</title>",
        "xml": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "text": b"hello, world\n",
        "noise": bytes(range(256)) * 40,
        "zip of something else": _zip_of({"readme.txt": b"hi"}),
        "compressed": _zip_of({"archive/data.pkl": bytes(10_000)}, zipfile.ZIP_DEFLATED),
        "torchscript": _zip_of({"a/data.pkl": b"\x80\x02}.", "a/constants.pkl": b"\x80\x02)."}),
        "half": good[: len(good) // 2],
        "tail only": good[len(good) // 2 :],
    }


def _zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("name", sorted(damaged_files(b"12")))
def test_damaged_files_are_named_in_one_line(
    name: str, suffix: str, tmp_path: Path, watched: list[str]
) -> None:
    good = saved(tmp_path / "good.pth", {"net": weights()}).read_bytes()
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(damaged_files(good)[name])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path).load_state_dict()
    assert "bad" in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 250


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("twentieth", range(1, 20))
def test_truncated_files(twentieth: int, legacy: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "cut.pth", {"net": weights()}, legacy=legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * twentieth // 20])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        read_checkpoint(path).load_state_dict()


@settings(max_examples=200, deadline=None)
@given(
    legacy=st.booleans(),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_flipped_bytes_never_end_in_another_error(
    legacy: bool, flips: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"flipped{legacy}.pth"
    params = {"class_names": ["a", "b", "c"], "image_processor": ["ImagePermute"]}
    raw = bytearray(saved(path, {"net": weights(), "p": params}, legacy=legacy).read_bytes())
    for where, value in flips:
        raw[int(where * len(raw))] = value
    path.write_bytes(raw)
    assert "\n" not in refusal(path)
