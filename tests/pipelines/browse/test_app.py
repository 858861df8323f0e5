"""The page over HTTP: who may ask, pictures, and the one thing that it writes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from starlette.requests import Request
from starlette.testclient import TestClient

from pipelines.browse.app import Browser
from pipelines.browse.chosen import send_to_review
from pipelines.browse.index import find_sources
from pipelines.browse.pictures import Pictures
from pipelines.browse.questions import Questions
from storage.review.queue import queue_parts, read_queue
from storage.runs.live_rows import live_rows
from storage.runs.lock import run_lock
from storage.runs.manifest import Manifest
from storage.stores.open import open_store

SEND = {"x-labelfleet": "browse"}
PATHS = (
    "/", "/assets/app.js", "/api/about", "/api/images", "/api/image/0", "/thumb/0.jpg",
    "/image/0.jpg",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_nothing_without_the_token(path: str, stranger: TestClient) -> None:
    for told in ({}, {"token": "guessed"}, {"token": "ü"}):
        reply = stranger.get(path, params=told)
        assert (reply.status_code, "token" in reply.text) == (401, False)
        assert "labelfleet browse" in reply.json()["error"]


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_nothing_under_another_name(path: str, page: TestClient) -> None:
    reply = page.get(path, headers={"host": "evil.example:8080"})
    assert reply.status_code == 403


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_everything_with_it_and_no_word_to_anywhere_else(path: str, page: TestClient) -> None:
    reply = page.get(path)
    assert reply.status_code == 200
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "http://" not in reply.text.replace("http://www.w3.org", "")
    assert "https://" not in reply.text


def test_the_cookie_is_out_of_reach_of_scripts_and_of_other_pages(stranger: TestClient) -> None:
    cookie = stranger.get("/", params={"token": "a-token-of-this-test"}).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "labelfleet_browse_8080=" in cookie


def test_pages_of_a_view_make_up_the_whole(page: TestClient, run: Manifest) -> None:
    whole = page.get("/api/images", params={"limit": 500}).json()
    parts = []
    for first in range(0, whole["total"], 3):
        told = {"offset": first, "limit": 3}
        parts += page.get("/api/images", params=told).json()["images"]
    assert parts == whole["images"]
    rows = list(live_rows(run))
    assert [one["image_id"] for one in parts] == [one.image_id for one in rows]
    assert [len(one["drawn"]) for one in parts] == [len(one.detections) for one in rows]


def test_runs_of_one_name_are_told_apart_by_their_places(
    run: Manifest, other: Manifest, questions: Questions, tmp_path: Path
) -> None:
    name = run.record.identity.name
    assert other.record.identity.name == name
    pictures = Pictures(run, open_store(str(tmp_path / "source")))
    browser = Browser(find_sources(run, None, other), questions, pictures)
    about = json.loads(bytes(browser.about(Request({"type": "http"})).body))
    assert (about["name"], about["other"]) == (f"{name} at run", f"{name} at other")


def test_a_picture_is_a_jpeg_of_the_source_image(page: TestClient, run: Manifest) -> None:
    for n, row in enumerate(live_rows(run)):
        reply = page.get(f"/thumb/{n}.jpg")
        if row.status != "ok":
            assert reply.status_code == 404
            continue
        picture = Image.open(io.BytesIO(reply.content))
        assert (picture.format, picture.size) == ("JPEG", (row.width, row.height)), row.image_id
    assert page.get("/thumb/999.jpg").status_code == 404


def test_an_image_that_changed_is_told_and_not_shown(page: TestClient, tmp_path: Path) -> None:
    (tmp_path / "source/loose/000.png").write_bytes(b"something else entirely")
    reply = page.get("/thumb/0.jpg")
    assert reply.status_code == 404
    assert "loose/000.png" in reply.json()["error"]


def test_all_that_is_known_of_one_image(page: TestClient, run: Manifest) -> None:
    first = page.get("/api/image/0").json()
    layers = {box["layer"] for box in first["boxes"]}
    assert {"model", "label", "person"} <= layers
    assert first["answers"] == [{"who": "ann", "skipped": False}]
    assert isinstance(first["phash"], str)  # JavaScript would round it
    assert page.get("/api/image/999").status_code == 404


@pytest.mark.slow
@pytest.mark.parametrize(
    "query",
    ["limit=x", "offset=-1&limit=99999999", "view=none", "sql=DROP TABLE images", "low=nan"],
)
def test_a_wrong_question_is_one_line(query: str, page: TestClient) -> None:
    reply = page.get(f"/api/images?{query}")
    assert reply.status_code in (200, 400)
    if reply.status_code == 400:
        assert reply.json()["error"]


def test_what_is_sent_to_review_is_queued_once(page: TestClient, run: Manifest) -> None:
    rows = list(live_rows(run))
    parts = len(queue_parts(run.store))
    told = page.post("/api/review", json={"images": list(range(len(rows)))}, headers=SEND).json()
    answered, broken = 2, sum(row.status != "ok" for row in rows)
    assert told == {
        "queued": len(rows) - answered - broken, "known": answered, "unreadable": broken,
    }  # fmt: skip
    items = list(read_queue(run.store))
    assert {item.sha256 for item in items} == {r.sha256 for r in rows[2:] if r.status == "ok"}
    assert {item.reasons[0].note for item in items} == {"chosen by hand"}
    again = page.post("/api/review", json={"images": [2, 3]}, headers=SEND).json()
    assert again == {"queued": 0, "known": 2, "unreadable": 0}
    assert len(queue_parts(run.store)) == parts + 1


def test_only_the_page_itself_may_send(page: TestClient, run: Manifest) -> None:
    assert page.post("/api/review", json={"images": [2]}).status_code == 403
    for wrong in ({}, [], {"images": "2"}, {"images": [True]}, {"images": []}, "2"):
        assert page.post("/api/review", json=wrong, headers=SEND).status_code == 400
    assert page.post("/api/review", content=b"\xff{", headers=SEND).status_code == 400
    beyond = page.post("/api/review", json={"images": [10**40]}, headers=SEND)
    assert (beyond.status_code, bool(beyond.json()["error"])) == (400, True)
    assert page.get(f"/thumb/{10**40}.jpg").status_code == 400
    assert list(read_queue(run.store)) == []


def test_a_run_that_is_held_is_left_alone(run: Manifest, page: TestClient) -> None:
    with run_lock(run.store, "labelfleet run cells"):
        reply = page.post("/api/review", json={"images": [2]}, headers=SEND)
    assert reply.status_code == 404
    assert "labelfleet run cells" in reply.json()["error"]
    assert list(read_queue(run.store)) == []


def test_nothing_chosen_writes_nothing(run: Manifest) -> None:
    sent = send_to_review(run, [])
    assert (sent.queued, queue_parts(run.store)) == (0, [])
