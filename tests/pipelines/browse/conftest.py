"""A labelled run with a version, answers and another run, and its page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from pipelines.browse.app import Browser, make_app
from pipelines.browse.index import build_index, find_sources, open_index
from pipelines.browse.pictures import Pictures
from pipelines.browse.questions import Questions
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.support.samples.label_version import labelled
from tests.support.samples.labelled_run import label

TOKEN = "a-token-of-this-test"
HOST = "127.0.0.1:8080"


@pytest.fixture
def run(tmp_path: Path) -> Manifest:
    """Four loose images, two of them answered, a tar and a compressed tar; one image is broken."""
    source = open_store(str(tmp_path / "source"))
    return labelled(source, open_store(str(tmp_path / "run")))


@pytest.fixture
def other(run: Manifest, tmp_path: Path) -> Manifest:
    """The same images again."""
    return label(open_store(str(tmp_path / "source")), open_store(str(tmp_path / "other")))


@pytest.fixture
def questions(run: Manifest, other: Manifest, tmp_path: Path) -> Iterator[Questions]:
    folder = tmp_path / "index"
    folder.mkdir()
    database = open_index(build_index(find_sources(run, None, other), folder))
    yield Questions(database)
    database.close()


@pytest.fixture
def stranger(run: Manifest, questions: Questions, tmp_path: Path) -> Iterator[TestClient]:
    """A browser that was not told the token."""
    pictures = Pictures(run, open_store(str(tmp_path / "source")))
    browser = Browser(find_sources(run, None, None), questions, pictures)
    app = make_app(browser, token=TOKEN, hosts=frozenset({HOST}))
    with TestClient(app, base_url=f"http://{HOST}", follow_redirects=False) as client:
        yield client


@pytest.fixture
def page(stranger: TestClient) -> TestClient:
    """A browser that opened the printed address."""
    reply = stranger.get("/", params={"token": TOKEN})
    assert (reply.status_code, reply.headers["location"]) == (303, "/")
    return stranger
