"""What an export does where its own files meet those of others, or find no room."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.exports import coco, hugging_face, yolo
from pipelines.exports.export import ExportFormat, ExportRequest, export_version
from storage.errors import AlreadyExists, StorageError, StorageFull
from storage.stores.open import open_store
from tests.pipelines.exports.labelled import FORMATS, Labelled, export_to
from tests.support.servers.proxy import Rule, faulty_proxy
from tests.support.servers.s3 import S3Server

SPOOLS = {"coco": ("images", "boxes"), "yolo": ("names.jsonl",), "hf": ("part.parquet",)}


@pytest.mark.parametrize(
    ("format", "lost"),
    [
        ("coco", "unfinished-export.json"),
        ("coco", "images/"),
        ("coco", "annotations.json"),
        ("yolo", "names.jsonl"),
        ("hf", "data/"),
        ("hf", "README.md"),
        ("hf", "/export.json"),
    ],
)
def test_an_object_whose_reply_was_lost_is_known_to_be_its_own(
    format: ExportFormat, lost: str, loose: Labelled, moto_s3: S3Server, tmp_path: Path
) -> None:
    direct = open_store(f"s3://{moto_s3.fresh_bucket()}/out", moto_s3.options)
    with faulty_proxy(moto_s3.endpoint_url) as proxy:
        proxy.rules.append(Rule("drop_reply", "PUT", path_part=lost))
        options = replace(moto_s3.options, endpoint_url=proxy.endpoint_url)
        request = ExportRequest(format, images="copy")
        export_version(loose.manifest, direct.url, request, options)
        assert proxy.rules[0].hits == 1
    export_to(loose, tmp_path / "out", format, "copy")
    local = open_store(str(tmp_path / "out"))
    keys = [one.key for one in local.list()]
    assert [one.key for one in direct.list()] == keys
    same = {key for key in keys if direct.get(key) == local.get(key)}
    assert {*keys} - same <= {"export.json"}, "which says where it lies"


def test_a_file_where_a_link_belongs_is_not_replaced(
    loose: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = coco.place_pictures

    def placed(*what: object) -> None:
        open_store(str(tmp_path / "out")).put("images/a.jpg", b"someone's own work")
        place(*what)  # type: ignore[arg-type]

    monkeypatch.setattr(coco, "place_pictures", placed)
    with pytest.raises(AlreadyExists, match=r"images/a.jpg exists already"):
        export_to(loose, tmp_path / "out", "coco", "link")
    assert (tmp_path / "out" / "images" / "a.jpg").read_bytes() == b"someone's own work"


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_temporary_folder_is_said(
    format: ExportFormat, loose: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (coco, yolo, hugging_face):
        monkeypatch.setattr(module, "temporary_folder", full(SPOOLS[format]))
    with pytest.raises(StorageFull, match=r"no space left for .*labelfleet-"):
        export_to(loose, tmp_path / "out", format)


def full(names: tuple[str, ...]) -> Callable[[], tempfile.TemporaryDirectory[str]]:
    """Makes a folder on which these files have no room."""

    def made() -> tempfile.TemporaryDirectory[str]:
        folder = tempfile.TemporaryDirectory(prefix="labelfleet-")
        for name in names:
            (Path(folder.name) / name).symlink_to("/dev/full")
        return folder

    return made


@pytest.mark.parametrize("format", FORMATS)
def test_a_temporary_folder_that_is_not_there_is_said(
    format: ExportFormat, loose: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match="no temporary folder can be made") as caught:
        export_to(loose, tmp_path / "out", format)
    assert "TMPDIR" in str(caught.value.hint)
