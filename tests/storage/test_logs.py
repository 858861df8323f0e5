"""Log lines: one JSON object each, with the ids of what they are about; or plain text."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage.logs import about, log_format, set_up_logging

log = logging.getLogger("labelfleet.test")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    yield io.StringIO()
    set_up_logging("text")


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_line_is_one_object_whatever_is_in_it(stream: io.StringIO) -> None:
    set_up_logging("json", stream=stream, run="cells")
    log.info('two\nlines with "quotes" and \udcff %s', "[red]", extra={"path": io.StringIO})
    try:
        raise ValueError("inside")
    except ValueError:
        log.exception("with a traceback")
    first, second = lines(stream)
    assert first["message"] == 'two\nlines with "quotes" and \udcff [red]'
    assert (first["run"], first["level"], first["logger"]) == ("cells", "info", "labelfleet.test")
    assert "ValueError: inside" in str(second["traceback"])
    assert str(first["time"]).endswith("+00:00")


def test_ids_belong_to_the_thread_that_set_them_and_end_with_their_block(
    stream: io.StringIO,
) -> None:
    set_up_logging("json", stream=stream, run="cells")

    def work(shard: str) -> None:
        with about(shard=shard, attempt=f"a-{shard}"):
            log.info("labelled")
        log.info("afterwards")

    with about(invocation="i"), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, "abcdefgh"))
        log.info("here")
    said = lines(stream)
    labelled = [line for line in said if line["message"] == "labelled"]
    assert sorted(str(line["shard"]) for line in labelled) == list("abcdefgh")
    assert all(line["attempt"] == f"a-{line['shard']}" for line in labelled)
    assert all("shard" not in line for line in said if line["message"] != "labelled")
    assert said[-1]["invocation"] == "i"
    log.info("outside")
    assert "invocation" not in lines(stream)[-1]


def test_a_line_s_own_ids_win(stream: io.StringIO) -> None:
    set_up_logging("json", stream=stream, run="cells")
    with about(shard="a"):
        log.info("x", extra={"shard": "b"})
    assert lines(stream)[0]["shard"] == "b"


def test_text_has_the_ids_behind_the_message_and_starts_at_warnings(stream: io.StringIO) -> None:
    set_up_logging("text", stream=stream)
    log.info("not said")
    with about(shard="ab", attempt="i-ab-1"):
        log.warning("attempt failed", extra={"seconds": 3})
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("labelfleet.test: attempt failed [shard=ab attempt=i-ab-1]")


def test_what_others_say_below_a_warning_is_never_written(stream: io.StringIO) -> None:
    """botocore's and httpx's lines have credentials and whole URLs in them."""
    set_up_logging("json", stream=stream)
    logging.getLogger("botocore").info("secret")
    assert stream.getvalue() == ""


def test_setting_it_up_again_replaces_the_first(stream: io.StringIO) -> None:
    set_up_logging("json", stream=stream, run="one")
    set_up_logging("json", stream=stream, run="two")
    log.info("x")
    assert [line["run"] for line in lines(stream)] == ["two"]


@pytest.mark.parametrize(("value", "kind"), [("json", "json"), ("JSON", "json"), ("", "text")])
def test_the_environment_chooses(value: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABELFLEET_LOG", value)
    assert log_format() == kind
