"""Zips and lists as ingest sources: what is in them, and what hostile or broken ones do."""

from __future__ import annotations

import functools
import http.server
import io
import struct
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.ingest.book import IngestBook
from pipelines.ingest.entries import member_name
from pipelines.ingest.ingest import Sizes, ingest, pack
from pipelines.ingest.sources import ZipSource, open_source
from pipelines.ingest.url_list import ListSource
from storage.errors import ObjectNotFound, SourceEmpty, SourceError
from storage.objects.protocols import StorageOptions
from storage.records import ImageRecord
from storage.shards.reading import read_shard
from storage.shards.selecting import list_source, tar_shards
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.support.samples.image_samples import PLAIN
from tests.support.samples.peak_memory import PeakMemory
from tests.support.samples.tar_samples import tar_of

OPTIONS = StorageOptions()


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes], deflate: bool = False) -> bytes:
    file = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, body in members:
            archive.writestr(name, body, kind)
    return file.getvalue()


def ingested(
    content: bytes, name: str = "x.zip", **sizes: int
) -> tuple[list[ImageRecord], dict[str, str]]:
    """(images in the shards, errors by entry name) of one zip or list in memory."""
    source = MemoryStore()
    source.put(name, content)
    dest = MemoryStore()
    opened = open_source(
        f"{source.url}/{name}", OPTIONS, max_image_bytes=sizes.get("max_image_bytes", 1 << 20)
    )
    pack(opened, dest, "x", Sizes(**sizes))
    records = [
        record
        for shard in tar_shards(list_source(dest))
        for record in read_shard(dest, shard, max_image_bytes=1 << 30)
    ]
    failures = [f for record in IngestBook(dest, "x").records() for f in record.failures]
    return records, {failure.name: failure.error for failure in failures}


def bodies(records: list[ImageRecord]) -> dict[str, bytes | None]:
    return {record.image_id.partition(".tar/")[2]: record.data for record in records}


@pytest.mark.parametrize("deflate", [False, True])
def test_the_layout_of_cocos_zip(deflate: bool) -> None:
    members = [(f"unlabeled2017/{n:012}.jpg", f"image {n}".encode() * 20) for n in range(30)]
    archive = zip_of(("unlabeled2017/", b""), *members, deflate=deflate)
    records, errors = ingested(archive, images_per_shard=8)
    assert bodies(records) == dict(members)
    assert errors == {}


def test_only_images_are_taken_and_directories_are_none() -> None:
    archive = zip_of(
        ("folder.jpg/", b""), ("a.PNG", b"1"), ("a.json", b"{}"), ("__MACOSX/._a.PNG", b"fork")
    )
    assert bodies(ingested(archive)[0]) == {"a.PNG": b"1"}


def test_hostile_names_do_not_get_into_the_shards_as_paths() -> None:
    archive = zip_of(("/etc/a.jpg", b"1"), ("../../b.jpg", b"2"), ("x/./y//../c.jpg", b"3"))
    assert bodies(ingested(archive)[0]) == {"etc/a.jpg": b"1", "b.jpg": b"2", "x/y/c.jpg": b"3"}
    assert member_name("../..") == "unnamed"


def test_equal_names_are_all_kept() -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = zip_of(("a.jpg", b"1"), ("a.jpg", b"2"))
    assert bodies(ingested(archive)[0]) == {"a.jpg": b"1", "a.jpg#2": b"2"}


def test_damaged_members_are_errors_and_the_others_are_taken() -> None:
    names = ["good.jpg", "crc.jpg", "deflate.jpg", "locked.jpg", "odd.jpg", "link.jpg", "last.jpg"]
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = 0xA1FF << 16
    members = [(link if n == "link.jpg" else n, n.encode() * 50) for n in names]
    damaged = bytearray(zip_of(*members, deflate=True))
    with zipfile.ZipFile(io.BytesIO(damaged)) as archive:
        starts = {m.filename: m.header_offset + 30 + len(m.filename) for m in archive.infolist()}
    entries = {name: damaged.rindex(name.encode()) - 46 for name in names}
    damaged[entries["crc.jpg"] + 16] ^= 1
    damaged[starts["deflate.jpg"]] = 0xFF
    damaged[entries["locked.jpg"] + 8] |= 1
    damaged[entries["odd.jpg"] + 10] = 99  # AES, unknown to zipfile
    records, errors = ingested(bytes(damaged))
    assert bodies(records) == {n: n.encode() * 50 for n in ("good.jpg", "last.jpg")}
    assert set(errors) == set(names) - {"good.jpg", "last.jpg"}
    assert errors["locked.jpg"] == "encrypted"
    assert "CRC" in errors["crc.jpg"]
    assert "link" in errors["link.jpg"]


@pytest.mark.slow
@pytest.mark.parametrize("announced", [None, 100])
def test_a_zip_bomb_costs_no_memory_whatever_its_directory_says(announced: int | None) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("bomb.jpg", "w") as bomb:
            for _ in range(32):
                bomb.write(bytes(16 << 20))
        archive.writestr("good.jpg", b"good" * 10)
    content = bytearray(file.getvalue())
    if announced is not None:
        directory = content.rindex(b"bomb.jpg") - 46
        struct.pack_into("<I", content, directory + 24, announced)
    memory = PeakMemory()
    records, errors = ingested(bytes(content))
    assert bodies(records) == {"good.jpg": b"good" * 10}
    assert set(errors) == {"bomb.jpg"}
    assert memory.growth() < 64 << 20


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_cut_zip_is_refused_in_words(keep: float) -> None:
    archive = zip_of(*[(f"{n}.jpg", b"x" * 100) for n in range(20)])
    cut = archive[: int(keep if keep > 1 else keep * len(archive))]
    with pytest.raises(SourceError, match="not a readable zip"):
        ingested(cut)


def test_a_zip_without_images_is_empty() -> None:
    with pytest.raises(SourceEmpty):
        ingested(zip_of(("readme.md", b"x")))


def test_a_zip_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound):
        ZipSource(str(tmp_path / "no.zip"), OPTIONS, 100)


@pytest.mark.slow
def test_a_zip_is_read_by_ranges_in_bounded_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(150):
            archive.writestr(f"{number}.jpg", bytes([number]) * (1 << 20))
    memory = PeakMemory()
    ingest(str(tmp_path / "x.zip"), str(tmp_path / "out"), shard_bytes=20 << 20)
    # A spool file's pages are the kernel's, not this process's.
    assert memory.growth() < 110 << 20


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep test output clean."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


def test_a_list_of_paths_and_urls(web: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = web
    (folder / "w 1.jpg").write_bytes(b"web")
    (folder / "nosuffix").write_bytes(PLAIN["png"])
    near = tmp_path / "lists"
    (near / "sub").mkdir(parents=True)
    (near / "sub" / "r.jpg").write_bytes(b"relative")
    (tmp_path / "abs.jpg").write_bytes(b"absolute")
    (tmp_path / "url.jpg").write_bytes(b"file url")
    lines = [
        "# a comment", "", "sub/r.jpg", str(tmp_path / "abs.jpg"), (tmp_path / "url.jpg").as_uri(),
        f"{address}/w%201.jpg?signature=secret", f"{address}/nosuffix", f"{address}/gone.jpg",
        "missing.jpg", f"{address}/",
    ]  # fmt: skip
    (near / "list.txt").write_text("\n".join(lines))
    summary = ingest(str(near / "list.txt"), str(tmp_path / "out"))
    store = open_store(str(tmp_path / "out"))
    (shard,) = tar_shards(list_source(store))
    records = list(read_shard(store, shard, max_image_bytes=1 << 20))
    port = address.rpartition("/")[2]
    base = str(tmp_path).lstrip("/")
    assert bodies(records) == {
        "sub/r.jpg": b"relative",
        f"{base}/abs.jpg": b"absolute",
        f"{base}/url.jpg": b"file url",
        f"{port}/w 1.jpg": b"web",
        f"{port}/nosuffix.png": PLAIN["png"],
    }
    assert (summary.images, summary.errors) == (5, 3)
    written = "".join(p.read_text() for p in (tmp_path / "out" / "list.ingest").iterdir())
    assert "secret" not in written


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("id,file_name,label\n1,a.jpg,cat\n2,b.jpg,dog\n", ["a.jpg", "b.jpg"]),
        ("a.jpg,cat\nb.jpg,dog\n", ["a.jpg", "b.jpg"]),
        ('URL\n"with, comma.jpg"\n\n', ["with, comma.jpg"]),
        ("\ufeffpath\na.jpg\n", ["a.jpg"]),
    ],
)
def test_the_column_of_a_csv_is_found(tmp_path: Path, table: str, expected: list[str]) -> None:
    (tmp_path / "list.csv").write_text(table, "utf-8")
    source = ListSource(str(tmp_path / "list.csv"), OPTIONS, 1 << 20)
    assert [entry.name for entry in source.entries()] == expected


def test_a_list_of_which_nothing_can_be_read_stops_early(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"gone/{n}.jpg" for n in range(500)))
    with pytest.raises(SourceError, match="none of the first 20 entries"):
        ingest(str(tmp_path / "list.txt"), str(tmp_path / "out"))


def test_listed_bytes_that_are_not_an_image_are_errors(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"<html>")
    (tmp_path / "a.jpg").write_bytes(b"kept: its name says image, decoding will tell")
    (tmp_path / "big.jpg").write_bytes(bytes(3 << 20))
    (tmp_path / "list.txt").write_text("page\na.jpg\nbig.jpg")
    summary = ingest(str(tmp_path / "list.txt"), str(tmp_path / "out"), max_image_bytes=1 << 20)
    assert (summary.images, summary.errors) == (1, 2)


def test_a_binary_file_called_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(tar_of(("a.jpg", b"\xff" * 100)))
    with pytest.raises(SourceError, match="not UTF-8"):
        ingest(str(tmp_path / "list.txt"), str(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_unpack_in_one_piece_are_refused(kind: int) -> None:
    """A member that says 1,000 bytes and holds 200 MiB: zipfile would unpack them all."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("bomb.jpg", bytes(200 << 20), kind)
        archive.writestr("good.jpg", b"good" * 10)
    content = bytearray(file.getvalue())
    directory = content.rindex(b"bomb.jpg") - 46
    struct.pack_into("<I", content, directory + 24, 1000)
    memory = PeakMemory()
    records, errors = ingested(bytes(content))
    assert bodies(records) == {"good.jpg": b"good" * 10}
    assert "deflate" in errors["bomb.jpg"]
    assert memory.growth() < 64 << 20


def test_members_that_share_their_bytes_are_refused() -> None:
    """David Fifield's bomb (2019): a small body that a thousand directory entries point at."""
    content = bytearray(zip_of(*[(f"{i:03d}.jpg", b"x" * 4000) for i in range(100)]))
    entry = content.index(b"PK\1\2")
    while content[entry : entry + 4] == b"PK\1\2":
        struct.pack_into("<I", content, entry + 42, 0)  # where the member begins
        entry += 46 + len("000.jpg")
    directory = content.index(b"PK\1\2")
    body = content[: 30 + len("000.jpg") + 4000]  # of the first member; the others' are dropped
    small = body + content[directory:]
    struct.pack_into("<I", small, len(small) - 6, len(body))
    with pytest.raises(SourceError, match="overlap"):
        ingested(bytes(small))


def test_a_list_from_elsewhere_names_no_file_of_this_machine(
    web: tuple[str, Path], tmp_path: Path
) -> None:
    address, folder = web
    (tmp_path / "mine.jpg").write_bytes(PLAIN["jpeg"])
    (folder / "w.jpg").write_bytes(PLAIN["png"])
    (folder / "list.txt").write_text(f"{tmp_path}/mine.jpg\nfile://{tmp_path}/mine.jpg\nw.jpg\n")
    dest = MemoryStore()
    pack(open_source(f"{address}/list.txt", OPTIONS, max_image_bytes=1 << 20), dest, "x", Sizes())
    records = [r for s in tar_shards(list_source(dest))
               for r in read_shard(dest, s, max_image_bytes=1 << 20)]  # fmt: skip
    assert [record.data for record in records] == [PLAIN["png"]]
    errors = [f.error for record in IngestBook(dest, "x").records() for f in record.failures]
    assert len(errors) == 2
    assert all("may not name files of this machine" in error for error in errors)
