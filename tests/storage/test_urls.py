"""Where a URL points: one spelling each, what lies inside what, and nothing secret shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import ConfigError
from storage.stores.open import open_object, open_store
from storage.urls import (
    distinct_ends,
    normalise_url,
    numbered,
    overlaps,
    readable,
    shown_url,
    unsigned,
)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("/a/b", "file:///a/b"),
        ("/a//b/./c/", "file:///a/b/c"),
        ("//a", "file:///a"),
        ("/", "file:///"),
        ("file:///a/b/", "file:///a/b"),
        ("file:/a/b", "file:///a/b"),
        ("file://localhost/a", "file:///a"),
        ("FILE:///a", "file:///a"),
        ("/a b/ü#?", "file:///a%20b/%C3%BC%23%3F"),
        ("file:///a%20b/%C3%BC%23%3F", "file:///a%20b/%C3%BC%23%3F"),
        ("file:///100%25", "file:///100%25"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b//", "s3://bucket/a/b"),
        ("s3a://bucket/a", "s3://bucket/a"),
        ("s3://bucket/a%20b?c#d", "s3://bucket/a%20b?c#d"),
        ("memory://x/y/", "memory://x/y"),
        ("https://host/a/", "https://host/a"),
        ("https://host/a?sig=x/", "https://host/a?sig=x/"),
    ],
)
def test_one_spelling(url: str, expected: str) -> None:
    assert normalise_url(url) == expected
    assert normalise_url(expected) == expected


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert normalise_url("a/b") == (tmp_path / "a" / "b").as_uri()
    assert normalise_url(".") == tmp_path.as_uri()
    assert normalise_url("~/images") == (tmp_path / "home" / "images").as_uri()
    monkeypatch.chdir(tmp_path)
    assert (
        normalise_url("~no-one-is-called-so/images")
        == f"{tmp_path.as_uri()}/~no-one-is-called-so/images"
    )
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    assert normalise_url("link/../x") == (tmp_path / "deep" / "x").as_uri()


@given(st.binary(min_size=1, max_size=20).filter(lambda b: b"\0" not in b and b".." not in b))
def test_any_file_name_survives(raw: bytes) -> None:
    path = "/images/" + raw.decode("utf-8", "surrogateescape")
    url = normalise_url(path)
    assert url.isascii()
    assert normalise_url(url) == url
    assert open_store(url).url == open_store(path).url == url


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("", "empty"),
        ("a\0b", "NUL"),
        ("file:///a%00b", "NUL"),
        ("file://host/a", "absolute"),
        ("file:a", "absolute"),
        ("s3:/bucket/a", "s3://"),
        ("s3://", "bucket"),
        ("s3:///a", "bucket"),
        ("s3://UP!/a", "bucket"),
        ("s4://bucket/a", "s3://"),
        ("oss://bucket/a", "ossfs"),
        ("gs://UP!/a", "bucket"),
        ("az:///a", "container"),
        ("zip://inside::/a.zip", "zip"),
    ],
)
def test_what_cannot_be_read_says_why(url: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hunter2@bucket/a",
        "s3://key:hunt/er2@bucket/a",  # secret keys hold slashes
        "https://me:hunter2@host/a",
        "ftp://me:hunter2@host",
        "abfs://hunter2@account/x",
        "abfs://key:hunter2@account.dfs.core.windows.net/x",
        "gs://hunter2@box/x",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="credentials") as caught:
        open_store(url)
    for shown in (str(caught.value), shown_url(url)):
        assert "hunt" not in shown
        assert "er2" not in shown


def test_signed_urls_are_shown_without_their_signature() -> None:
    store, key = open_object("https://host/models/cells.pth?X-Amz-Signature=hunter2")
    assert key == "cells.pth?X-Amz-Signature=hunter2"
    assert store.url == "https://host/models"
    assert shown_url(f"{store.url}/{key}") == "https://host/models/cells.pth?…"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("GET https://h/p?sig=1&k=2 failed", "GET https://h/p?… failed"),
        ("at s3://key:sec/ret@bucket/x", "at s3://…@bucket/x"),
        ("redis://:pw@h", "redis://…@h"),
        ("https://u:p@h/p?q", "https://…@h/p?…"),
        ("http://h/p://u:pw@x", "http://h/p://…@x"),
        ("mail a@b.c, user://a@b", "mail a@b.c, user://a@b"),
    ],
)
def test_what_others_say_is_repeated_without_queries_and_users(said: str, shown: str) -> None:
    assert unsigned(said) == shown


@pytest.mark.timeout(30)  # as plain searches these take minutes
@pytest.mark.parametrize("piece", ["a", "a://:", "http://", ":", "-", "a@"])
def test_a_name_made_to_take_long_holds_up_no_log(piece: str) -> None:
    name = f"a://{piece * ((1 << 16) // len(piece))}"
    assert unsigned(name) == name


@pytest.mark.parametrize(
    ("url", "root", "key"),
    [
        ("s3://bucket/a/b.pth", "s3://bucket/a", "b.pth"),
        ("s3://bucket/b.pth", "s3://bucket", "b.pth"),
        ("/a/b.pth", "file:///a", "b.pth"),
        ("/b.pth", "file:///", "b.pth"),
        ("file:///a%20b/c%20d", "file:///a%20b", "c d"),
        ("memory://x/a/b", "memory://x/a", "b"),
    ],
)
def test_an_object_is_a_store_and_a_key(url: str, root: str, key: str) -> None:
    store, found = open_object(url)
    assert (store.url, found) == (root, key)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3://bucket/a/", "/", "/a/"])
def test_a_folder_is_not_an_object(url: str) -> None:
    with pytest.raises(ConfigError, match="not an object"):
        open_object(url)


def test_a_file_in_the_root_folder_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "odd name?.pth").write_bytes(b"weights")
    store, key = open_object(str(tmp_path / "odd name?.pth"))
    assert store.get(key) == b"weights"
    assert open_store("/").get(str(tmp_path / "odd name?.pth")[1:]) == b"weights"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("s3://bucket/a", "s3://bucket/a/", True),
        ("s3://bucket/a", "s3://bucket/a/b", True),
        ("s3://bucket", "s3://bucket/a", True),
        ("s3://bucket/a", "s3://bucket/ab", False),
        ("s3://bucket/a", "s3://other/a", False),
        ("s3a://bucket/a", "s3://bucket/a", True),
        ("/x/a", "file:///x/a/b", True),
        ("/x/a", "file:///x/a%20b", False),
        ("/", "/x", True),
        ("/x/a/../b", "/x/b", True),
        ("/bucket/a", "s3://bucket/a", False),
        ("memory://x/a", "memory://x", True),
        ("https://h/a", "https://h/b", False),
        ("az://box/a", "abfs://box/a/b", True),
        ("az://box/a", "abfs://box@one.dfs.core.windows.net/a", True),
        ("az://box@one.blob.core.windows.net/a", "abfss://box@one.dfs.core.windows.net/a", True),
        ("az://box@one.blob.core.windows.net/a", "az://box@two.blob.core.windows.net/a", False),
        ("gs://box/a", "gcs://box/a", True),
        ("gs://box/a", "az://box/a", False),
    ],
)
def test_overlap(a: str, b: str, expected: bool) -> None:
    assert overlaps(a, b) is expected
    assert overlaps(b, a) is expected


def test_links_are_seen_through_when_folders_are_compared(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "alias").symlink_to("images")
    assert overlaps(str(tmp_path / "images"), str(tmp_path / "alias" / "labels"))
    assert overlaps(str(tmp_path / "alias"), (tmp_path / "images" / "not-yet").as_uri())
    assert not overlaps(str(tmp_path / "alias"), str(tmp_path / "alias-labels"))


@given(st.text())
def test_readable_text_is_one_printable_line(text: str) -> None:
    shown = readable(text)
    assert shown.isprintable()
    shown.encode("utf-8")
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize(
    ("urls", "ends"),
    [
        (["s3://a/run", "s3://b/run"], ["a/run", "b/run"]),
        (["s3://a/june/run", "s3://a/july/run/"], ["june/run", "july/run"]),
        (["s3://a/june", "file:///x/july"], ["june", "july"]),
        (["s3://a/run", "gs://a/run"], ["s3://a/run", "gs://a/run"]),
        (["file:///a/run", "file:///b/a/run"], ["/a/run", "b/a/run"]),
        (["file:///a/run", "file:///b/run", "file:///b/other"], ["a/run", "b/run", "other"]),
        (["s3://a/run"], ["run"]),
        (
            [f"az://{box}@acc.dfs.core.windows.net/run" for box in ("june", "july")],
            [f"{box}@acc.dfs.core.windows.net/run" for box in ("june", "july")],
        ),
        (
            ["https://h/run?sig=a", "https://h/run?sig=b", "https://h/run?sig=c"],
            ["https://h/run?…", "https://h/run?… (2)", "https://h/run?… (3)"],
        ),
        (["ftp://ann:pw@h/run", "ftp://bob:pw@h/run"], ["ftp://…@h/run", "ftp://…@h/run (2)"]),
    ],
)
def test_ends_tell_urls_apart(urls: list[str], ends: list[str]) -> None:
    assert distinct_ends(urls) == ends


@given(st.lists(st.sampled_from(["a", "a (2)", "a (2) (2)", "b"]), max_size=8))
def test_numbered_names_all_differ_and_those_that_did_stay(names: list[str]) -> None:
    found = numbered(names)
    assert len(set(found)) == len(names)
    for at, name in enumerate(names):
        assert found[at] == name or (name in names[:at] and found[at].startswith(f"{name} ("))


def test_importing_the_stores_loads_nothing_heavy() -> None:
    program = (
        "import sys; from storage.stores.open import open_store; "
        "import storage.objects.preflight; "
        "open_store('/tmp'); open_store('memory://x'); "
        "heavy = {'boto3', 'botocore', 'fsspec', 'ray', 'torch', 'aiohttp'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ},
    )
    assert loaded.stdout.strip() == "[]"
