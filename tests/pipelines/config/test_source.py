"""What a run labels: what may be missing from a source, and what is said when too much is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.config.run_config import RunConfig
from pipelines.config.source import check_drop, group_shards, listed_objects
from storage.errors import SourceEmpty, SourceError
from storage.runs.listing_changes import ListingDrop
from storage.shards.reading import read_shard
from storage.shards.selecting import LeftOut
from storage.stores.open import open_store


def config_of(**source: Any) -> RunConfig:
    fields = {"name": "n", "output": "/out", "model": {"checkpoint": "m.pth"}}
    return RunConfig.model_validate(fields | {"source": {"url": "/in", **source}})


@pytest.mark.parametrize(
    ("drop", "max_drop", "refused"),
    [
        (ListingDrop(1000, 100, 0, ()), None, False),
        (ListingDrop(1000, 101, 0, ()), None, True),
        (ListingDrop(1000, 3, 1, ("b",)), None, True),
        (ListingDrop(1000, 101, 0, ()), 0.2, False),
        (ListingDrop(1000, 1000, 2, ("a", "b")), 1.0, False),
        (ListingDrop(0, 0, 0, ()), None, False),
        (ListingDrop(10, 1, 0, ()), 0.0, True),
    ],
)
def test_a_drop_beyond_max_drop_or_of_a_folder_is_refused(
    drop: ListingDrop, max_drop: float | None, refused: bool
) -> None:
    config = config_of() if max_drop is None else config_of(max_drop=max_drop)
    if not refused:
        check_drop(config, drop)
        return
    with pytest.raises(SourceError, match=rf"^{drop.deleted:,} of {drop.known:,} objects") as said:
        check_drop(config, drop)
    assert "--accept-drop" in (said.value.hint or "")
    assert all(f"'{name}/'" in said.value.message for name in drop.examples)


def source_of(folder: Path, **source: Any) -> RunConfig:
    return config_of(url=str(folder), **source)


PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)


def test_files_without_a_suffix_are_sniffed_when_asked(tmp_path: Path) -> None:
    for name, body in {"a": PNG, "b": b"text", "c.txt": PNG, "d.png": PNG, "e": b""}.items():
        (tmp_path / name).write_bytes(body)
    left = LeftOut()
    assert [o.key for o in listed_objects(source_of(tmp_path), left)] == ["d.png"]
    assert left.counts == {"no suffix": 3, ".txt": 1}
    left, config = LeftOut(), source_of(tmp_path, sniff=True)
    found = list(listed_objects(config, left))
    assert [o.key for o in found] == ["a", "d.png"]
    assert left.counts == {"no suffix": 2, ".txt": 1}
    (shard,) = group_shards(found, 9)
    rows = read_shard(open_store(str(tmp_path)), shard, max_image_bytes=1000)
    assert [row.data for row in rows] == [PNG, PNG]


def test_a_linked_folder_is_a_row_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").write_bytes(PNG)
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_bytes(PNG)
    (source / "photos").symlink_to(tmp_path / "elsewhere")
    (source / "notes").symlink_to(source / "a.png")
    left = LeftOut()
    (shard,) = group_shards(listed_objects(source_of(source), left), 9)
    rows = read_shard(open_store(str(source)), shard, max_image_bytes=1000)
    said = {row.image_id: (row.status, row.error) for row in rows}
    assert said["a.png"] == ("ok", None)
    assert said["photos"][0] == "unsupported"
    assert "link to a folder" in str(said["photos"][1])
    assert left.counts == {"no suffix": 1}, "a linked file without an image's name"


def test_no_images_says_what_is_there_instead(tmp_path: Path) -> None:
    with pytest.raises(SourceEmpty, match=r"^no images or tar shards at \S+; there is nothing\n"):
        next(listed_objects(source_of(tmp_path)))
    for name in ("a.json", "b.json", "README", "._x.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(PNG)
    with pytest.raises(SourceEmpty) as caught:
        next(listed_objects(source_of(tmp_path, kind="tar")))
    head, counts = caught.value.message.split("; there are ")
    assert head.startswith("no tar shards at ")
    assert sorted(counts.split(", ")) == ["1 filtered", "1 no suffix", "1 system files", "2 .json"]


@pytest.mark.parametrize(
    ("asked", "found", "absent"),
    [(["a.png", "b.png"], 2, 0), ([f"{c}.png" for c in "abcdefghijk"], 10, 1)],
)
def test_keys_that_are_not_there_are_counted(
    tmp_path: Path, asked: list[str], found: int, absent: int
) -> None:
    for name in "abcdefghij":
        (tmp_path / f"{name}.png").write_bytes(PNG)
    (tmp_path.parent / "keys.csv").write_text("\n".join(asked))
    left, config = LeftOut(), source_of(tmp_path, keys=str(tmp_path.parent / "keys.csv"))
    assert len(list(listed_objects(config, left))) == found
    assert left.counts["keys that are not there"] == absent


def test_too_many_absent_keys_are_an_error_that_names_some(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    keys = tmp_path.parent / "keys2.csv"
    keys.write_text("a.png\nb.png\nc.png\n")
    with pytest.raises(SourceError, match=r"2 of 3 keys are not in the source, such as 'b\.png'"):
        list(listed_objects(source_of(tmp_path, keys=str(keys))))
    assert list(listed_objects(source_of(tmp_path, keys=str(keys), max_absent_keys=0.7)))
    keys.write_text("b.png\nc.png\n")
    with pytest.raises(SourceEmpty, match="2 keys that are not there"):
        list(listed_objects(source_of(tmp_path, keys=str(keys))))
