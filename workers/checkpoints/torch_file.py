"""torch checkpoint containers, zip and legacy, as plain values and tensors read on demand.

Only bytes are read: see pickle_values.py for why no code in the file can run. Tensors are built
here from their storages' bytes, within the bounds of the file.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from storage.errors import CheckpointError
from workers.checkpoints.pickle_values import Call, Global, Persistent, read_pickle

# What zipfile and a pickle reader end in when the bytes are not what they should be.
_READ_ERRORS = (
    zipfile.BadZipFile,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    ValueError,
    struct.error,
)
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor in the file: which storage, and which of its elements."""

    storage: str
    dtype: torch.dtype
    storage_numel: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return _numel(self.shape) * self.dtype.itemsize


class TorchFile:
    """An opened .pth or .pt file.

    Attributes:
        root: the pickled value, as read_pickle gives it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._spans: dict[str, tuple[int, int]] = {}
        try:
            self._zip = zipfile.is_zipfile(path)
            self.root = self._read_zip() if self._zip else self._read_legacy()
        except _READ_ERRORS as exc:
            raise CheckpointError(f"{path.name} is damaged: {exc}", hint=_DAMAGED) from exc

    def tensors(self, refs: Mapping[str, TensorRef]) -> dict[str, torch.Tensor]:
        """Return the named tensors, contiguous, in the order of ``refs``; each storage is read
        once.

        Raises:
            CheckpointError: a storage is missing, short or damaged.
        """
        if sum(ref.nbytes for ref in refs.values()) > 2 * self.path.stat().st_size:
            raise CheckpointError(f"{self.path.name} announces more weights than it has bytes")
        found: dict[str, torch.Tensor] = {}
        current: tuple[str, torch.Tensor] | None = None
        with self._open() as source:
            for name, ref in sorted(refs.items(), key=lambda item: item[1].storage):
                if current is None or current[0] != ref.storage:
                    current = (ref.storage, self._storage(source, ref))
                found[name] = (
                    current[1]
                    .as_strided(ref.shape, ref.stride, ref.offset)
                    .clone(memory_format=torch.contiguous_format)
                )
        return {name: found[name] for name in refs}

    def _open(self) -> Any:
        return zipfile.ZipFile(self.path) if self._zip else self.path.open("rb")

    def _storage(self, source: Any, ref: TensorRef) -> torch.Tensor:
        wanted = ref.storage_numel * ref.dtype.itemsize
        try:
            raw = self._zip_bytes(source, ref) if self._zip else self._legacy_bytes(source, ref)
        except _READ_ERRORS as exc:
            raise CheckpointError(
                f"{self.path.name} is damaged: storage {ref.storage}: {exc}", hint=_DAMAGED
            ) from exc
        if len(raw) < wanted:
            raise CheckpointError(
                f"{self.path.name} is damaged: storage {ref.storage} has {len(raw)} of {wanted} "
                "bytes",
                hint=_DAMAGED,
            )
        if wanted == 0:
            return torch.empty(0, dtype=ref.dtype)
        return torch.frombuffer(bytearray(raw), dtype=ref.dtype, count=ref.storage_numel)

    # zip, torch >= 1.6

    def _read_zip(self) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            names = archive.namelist()
            pickles = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
            if len(pickles) != 1:
                raise CheckpointError(f"{self.path.name} is a zip, but not a torch checkpoint")
            self._prefix = pickles[0].removesuffix("data.pkl")
            if self._prefix + "constants.pkl" in names:
                raise CheckpointError(
                    f"{self.path.name} is a TorchScript program, not a checkpoint",
                    hint="save the model's state_dict() with torch.save",
                )
            order = self._prefix + "byteorder"
            if order in names and _stored(archive, order).read(16) != b"little":
                raise CheckpointError(f"{self.path.name} was written on a big-endian machine")
            with _stored(archive, pickles[0]) as file:
                return read_pickle(file)

    def _zip_bytes(self, archive: zipfile.ZipFile, ref: TensorRef) -> bytes:
        with _stored(archive, f"{self._prefix}data/{ref.storage}") as file:
            raw: bytes = file.read()
        return raw

    # legacy: four pickles, then the storages one after the other

    def _read_legacy(self) -> Any:
        with self.path.open("rb") as file:
            _refuse_other_formats(self.path, file.read(512))
            file.seek(0)
            if read_pickle(file) != _LEGACY_MAGIC:
                raise CheckpointError(f"{self.path.name} is not a torch checkpoint")
            read_pickle(file)  # protocol version
            read_pickle(file)  # byte order and type sizes of the writer
            root = read_pickle(file)
            keys = read_pickle(file)
            self._locate_storages(file, keys, _storage_types(root))
            return root

    def _locate_storages(self, file: BinaryIO, keys: Any, itemsizes: Mapping[str, int]) -> None:
        size = self.path.stat().st_size
        for key in keys if isinstance(keys, list) else []:
            (numel,) = struct.unpack("<q", file.read(8))
            nbytes = numel * itemsizes.get(str(key), 1)
            if numel < 0 or file.tell() + nbytes > size:
                raise EOFError(f"ends inside storage {key}")
            self._spans[str(key)] = (file.tell(), nbytes)
            file.seek(nbytes, 1)

    def _legacy_bytes(self, file: BinaryIO, ref: TensorRef) -> bytes:
        start, nbytes = self._spans[ref.storage]
        file.seek(start)
        return file.read(nbytes)


_DAMAGED = "fetch the file again; give its sha256 in the config to notice earlier"


def _stored(archive: zipfile.ZipFile, name: str) -> Any:
    """Return a member as a file. torch never compresses, and refusing to expand keeps bombs out."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise zipfile.BadZipFile(f"{name} is compressed or encrypted")
    return archive.open(entry)


def _refuse_other_formats(path: Path, head: bytes) -> None:
    start = head.lstrip()[:64].lower()
    if not head.strip(b"\0"):
        raise CheckpointError(f"{path.name} is empty" if not head else f"{path.name} is all zeros")
    if head.startswith(b"PK"):
        raise CheckpointError(f"{path.name} is damaged: its end is missing", hint=_DAMAGED)
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{path.name} is a web page, not a checkpoint",
            hint="the address answered with an error or a login page",
        )
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path.name} is a Git LFS pointer, not the checkpoint", hint="run `git lfs pull`"
        )
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{path.name} is a tar, as torch wrote before 0.1.10")


def _storage_types(root: Any) -> dict[str, int]:
    """Item size of every storage the value refers to."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Persistent):
            key = value.key
            if isinstance(key, tuple) and len(key) >= 5 and isinstance(key[1], Global):
                sizes[str(key[2])] = _DTYPES.get(key[1].name, torch.uint8).itemsize
        elif isinstance(value, Call):
            waiting += [value.state, value.elements, value.items, *value.args]
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return sizes


def tensor_ref(value: Any) -> TensorRef | None:
    """Return the tensor a pickled value stands for; None when it stands for something else.

    Raises:
        CheckpointError: a tensor that reaches outside its storage, or is not plain and dense.
    """
    if not isinstance(value, Call) or value.target is None:
        return None
    if value.target.module != "torch._utils":
        return None
    if value.target.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        return tensor_ref(value.args[0]) if value.args else None
    if value.target.name not in ("_rebuild_tensor", "_rebuild_tensor_v2"):
        raise CheckpointError(f"a tensor of a kind that is not supported ({value.target.name})")
    try:
        return _checked_ref(*value.args[:4])
    except (TypeError, ValueError, KeyError) as exc:
        raise CheckpointError(f"a malformed tensor: {str(exc)[:120]}") from exc


def _checked_ref(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRef:
    key = storage.key if isinstance(storage, Persistent) else None
    if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage":
        raise ValueError("it has no storage")
    _, dtype, name, _, numel, *view = key
    if not isinstance(dtype, Global) or view not in ([], [None]):
        raise ValueError("its storage is of a kind that is not supported")
    ref = TensorRef(
        str(name),
        _DTYPES[dtype.name],
        _count(numel),
        _count(offset),
        _counts(shape),
        _counts(stride),
    )
    last = sum((n - 1) * step for n, step in zip(ref.shape, ref.stride, strict=True))
    inside = 0 in ref.shape or ref.offset + last < ref.storage_numel
    if not inside or _numel(ref.shape) > ref.storage_numel:
        raise ValueError(f"shape {list(ref.shape)} reaches outside its storage of {numel}")
    return ref


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**40:
        raise ValueError(f"{value!r:.40} is not a count")
    return value


def _counts(value: Any) -> tuple[int, ...]:
    if isinstance(value, Call) and value.args:  # torch.Size
        value = value.args[0]
    if not isinstance(value, tuple) or len(value) > 8:
        raise ValueError(f"{value!r:.40} is not a shape")
    return tuple(_count(v) for v in value)


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for n in shape:
        numel *= n
    return numel
