"""Globs: what they match, and that no key makes them take long."""

from __future__ import annotations

import functools
import multiprocessing
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage.errors import ConfigError
from storage.shards.globs import compile_glob


def matches(glob: str, key: str) -> bool:
    """The same, slowly: by trying everything, remembering what was tried."""
    parts = re.findall(r"\*\*/|\*\*|\*|\?|.", glob if "/" in glob else f"**/{glob}", re.DOTALL)

    @functools.cache
    def at(part: int, place: int) -> bool:
        if part == len(parts):
            return place == len(key)
        kind, rest = parts[part], key[place:]
        if kind == "**/":
            ends = [0, *(i + 1 for i, c in enumerate(rest) if c == "/")]
            return any(
                at(part + 1, place + e)
                for e in ends
                if e == 0 or "" not in rest[: e - 1].split("/")
            )
        if kind in ("*", "**"):
            reach = len(rest) if kind == "**" else len(rest.partition("/")[0])
            return any(at(part + 1, place + e) for e in range(reach + 1))
        if not rest or (kind == "?" and rest[0] == "/"):
            return False
        return (kind == "?" or kind == rest[0]) and at(part + 1, place + 1)

    return at(0, 0)


@given(st.text("ab*?/", min_size=1, max_size=10), st.text("ab/", max_size=12))
@example("*a*b", "aab")
@example("**a*b/", "ab/ab/")
def test_it_matches_what_trying_everything_matches(glob: str, key: str) -> None:
    glob = f"a{glob}" if glob.startswith("/") else glob
    assert (compile_glob(glob).fullmatch(key) is not None) == matches(glob, key)


@pytest.mark.parametrize(
    ("glob", "key", "found"),
    [
        ("[a-c]*.jpg", "x/b1.jpg", True),
        ("[!a-c]*.jpg", "x/b1.jpg", False),
        ("x[+-9]b.jpg", "x/b.jpg", False),  # a set stays within its level, '/' in it or not
        ("x[!a]b.jpg", "x/b.jpg", False),
        ("*_[0-9]*_?.jpg", "cam_7_left_a.jpg", True),
    ],
)
def test_sets(glob: str, key: str, found: bool) -> None:
    assert (compile_glob(glob).fullmatch(key) is not None) is found


def test_a_range_that_runs_backwards_is_said() -> None:
    with pytest.raises(ConfigError, match="is not a valid glob"):
        compile_glob("[z-a]*.jpg")


def _tried(glob: str, key: str) -> bool:
    return compile_glob(glob).fullmatch(key) is None


@pytest.mark.parametrize(
    ("glob", "key"),
    [
        ("*a*a*a*a*a*a*a*b", "a" * 1000),
        ("*a*b*c*d*.jpg", "a" * 250 + "b" * 250 + "c" * 250 + "d" * 250),
        ("x?*?*?*?*?*?*y", "x" * 1000),
    ],
)
def test_no_key_takes_long(glob: str, key: str) -> None:
    """In another process: Python cannot interrupt a match. Minutes where it goes wrong."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_tried, (glob, key)).get(timeout=60)
