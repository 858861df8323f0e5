"""File names: inside the folder, unique whatever the system, the image's own where it can be."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from pipelines.exports.file_names import FileNames
from storage.urls import check_key

hostile = st.lists(
    st.sampled_from(["..", ".", "", "a", "A", "a.jpg", "A.JPG", "a.png", "con", "x" * 300, " b ",
                     "\0", "c:", "\\", "é.jpg", "a.jpg#2", "...", "\u2028"]),
    max_size=5,
).map("/".join)  # fmt: skip
ids = st.lists(hostile | st.text(max_size=12), unique=True, max_size=12)


@given(ids, st.booleans())
@example(["a.jpg", "A.JPG", "a.jpg/b.jpg"], False)
@example(["a.jpg/b.jpg", "a.jpg"], False)
@example(["a.jpg", "a.png"], True)
def test_names_are_safe_and_unique_everywhere(given_ids: list[str], flat: bool) -> None:
    names = FileNames(flat=flat)
    made = [names.name(image_id) for image_id in given_ids]
    for name in made:
        check_key(name)
        parts = PurePosixPath(name).parts
        assert ".." not in parts
        assert not PurePosixPath(name).is_absolute()
        assert not PureWindowsPath(name).drive
        assert not PureWindowsPath(name).is_reserved()
        assert all(len(part.encode()) <= 200 for part in parts)
        assert len(parts) == 1 or not flat
    folded = [name.casefold() for name in made]
    assert len(set(folded)) == len(made)
    for name in folded:  # no file where another name needs a folder
        assert not any(other.startswith(name + "/") for other in folded)
    if flat:
        stems = {name.rsplit(".", 1)[0] for name in folded}
        assert len(stems) == len(made)


@pytest.mark.parametrize("name", ["a.jpg", "train/a b.JPEG", "s.tar/0001.png", "é/ü.webp"])
def test_a_harmless_name_stays(name: str) -> None:
    assert FileNames(flat=False).name(name) == name


def test_flat_names_keep_the_path_readable() -> None:
    names = FileNames(flat=True)
    assert names.name("s.tar/0001.png") == "s.tar_0001.png"
    assert names.name("b.jpg") == "b.jpg"
    second = names.name("s.tar_0001.png")
    assert second.startswith("s.tar_0001-")
    assert second.endswith(".png")


def test_the_second_of_a_repeated_member_keeps_its_suffix() -> None:
    assert FileNames(flat=False).name("s.tar/a.jpg#2").endswith(".jpg")


def test_the_same_ids_get_the_same_names() -> None:
    given_ids = ["../a.jpg", "a.jpg", "A.jpg", "x/../a.jpg"]
    one, two = FileNames(flat=False), FileNames(flat=False)
    assert [one.name(i) for i in given_ids] == [two.name(i) for i in given_ids]
