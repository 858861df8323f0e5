"""The main job on gs:// and az://, real servers: killed, continued, routed, decided, exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.demo.digits import make_pages
from pipelines.label_studio.serving import Presigned
from pipelines.review.copies import copy_images
from storage.review.queue import read_queue
from storage.stores.open import open_store
from tests.e2e.jobs import SLOW_MODEL, SLOW_WORKERS, Job
from tests.e2e.killed import killed_and_continued
from tests.support.servers.azurite import PROGRAM, AzuriteServer, azurite_server, credentials_env
from tests.support.servers.gcs import GcsServer, gcs_server, program

pytestmark = pytest.mark.slow

SHARDS, PAGES = 10, 30


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest) -> Iterator[GcsServer | AzuriteServer]:
    if request.param == "gs":
        if program() is None:
            pytest.skip("needs fake-gcs-server, which has no wheel for this platform")
        with gcs_server() as server:
            yield server
        return
    if not PROGRAM.exists():
        pytest.skip("needs Azurite (node and npm): make azurite")
    with pytest.MonkeyPatch.context() as patch, azurite_server() as azurite:
        for name, value in credentials_env().items():
            patch.setenv(name, value)
        yield azurite


def test_a_killed_run_continues_and_its_labels_are_exported_there(
    cloud: GcsServer | AzuriteServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pages(tmp_path, images=PAGES, seed=5)
    pages = [(path.name, path.read_bytes()) for path in sorted((tmp_path / "images").iterdir())]
    root = f"{cloud.scheme}://{cloud.fresh_bucket()}"
    job = Job(
        tmp_path, f"{root}/shards", f"{root}/run", cloud.env(),
        {"model": SLOW_MODEL, "workers": SLOW_WORKERS}, cloud.options,
    )  # fmt: skip
    killed_and_continued(job, pages, SHARDS, joining={})

    for name, value in cloud.env().items():
        monkeypatch.setenv(name, value)

    def told(*arguments: str) -> dict[str, Any]:
        ended = CliRunner().invoke(app, [*arguments, "--json"])
        assert ended.exit_code == 0, ended.output
        return dict(json.loads(ended.stdout.splitlines()[-1]))

    told("review", "route", job.output, "--budget", "5 images")
    source, output, exported = (
        open_store(f"{root}/{at}", cloud.options) for at in ("shards", "run", "coco")
    )
    copies = copy_images(job.manifest(), source, list(read_queue(output)))
    assert copies.problems == {}
    assert len(list(output.list("review/images/"))) == copies.copied == 5
    if cloud.scheme == "az":  # the fake server checks no signature
        (first, *_) = copies.names.values()
        url = Presigned(output, 86_400).url(first)
        shown = httpx.get(url, timeout=60, trust_env=False)
        assert shown.content == output.get(f"review/images/{first}")
        assert httpx.get(url.replace("sig=", "sig=A"), trust_env=False).status_code == 403
    decided = told("decide", job.output, "--accept", "0.5", "--reject", "0.2")["counts"]
    aside = decided["left_out_undecodable"] + decided["left_out_too_large"]
    assert decided["images_model"] + aside == PAGES
    told_export = told("export", job.output, f"{root}/coco", "--format", "coco", "--images", "copy")
    truth = json.loads(exported.get("annotations.json"))
    assert len(truth["annotations"]) == decided["labels"] + decided["ignored"] > 0
    assert len(truth["images"]) == decided["images_model"]
    data = dict(pages)
    names = [image["file_name"] for image in truth["images"]]
    changed = [n for n in names if exported.get(f"images/{n}") != data[n.rsplit("/", 1)[1]]]
    assert len(changed) == told_export["turned_upright"] < 5
