"""The report in a real browser: pictures show, hostile names stay text, scripts never run."""

from __future__ import annotations

import io
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from pipelines.report.page import write_report
from pipelines.routing.route import route_run
from storage.records import Shard
from storage.review.answers import Answer, append_answers
from storage.review.queue import read_queue
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.support.patience import patient
from tests.support.samples.synthetic_run import boxes, make_run, row, tar_shard

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)"),
]

HOSTILE = "<script>document.title='ran'</script>\"'><img src=x onerror=\"document.title='ran'\">"
RED = (220, 20, 20)


def browse(page: Path, folder: Path, *options: str) -> str:
    """What a headless browser prints for a page."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=3000",
        f"--user-data-dir={folder / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(120), check=True)
    return done.stdout


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A report of a run whose file names, classes and errors are hostile."""
    image = io.BytesIO()
    Image.new("RGB", (640, 480), RED).save(image, "JPEG")
    source = open_store(str(tmp_path / "source"))
    source.put("a.bin", image.getvalue())
    (listed,) = source.list()
    shard = Shard("0" * 16, "tar", (listed,))
    rows = [
        row(
            f"a.tar/{HOSTILE}.jpg",
            shard.shard_id,
            boxes([(200, 200, 300, 300)], [0.9], [0]),
            nbytes=listed.nbytes,
        ),
        row(f"a.tar/{HOSTILE}2.jpg", shard.shard_id, status="undecodable", error=HOSTILE),
    ]
    out = open_store(str(tmp_path / "run"))
    aside = tar_shard("aside.tar")
    manifest = make_run(
        out, {shard: rows}, unlabelled=[aside], classes=(HOSTILE, "</style><script>"),
        source=str(tmp_path / "source"),
    )  # fmt: skip
    manifest.set_aside(aside, [HOSTILE], "i")
    review(manifest)
    write_report(manifest)
    return tmp_path / "run" / "report" / "index.html"


def review(manifest: Manifest) -> None:
    """An annotator with a hostile name answers that nothing is there."""
    route_run(manifest, budget="1 images", policy=Policy(), invocation="one", audit=1.0)
    (item,) = read_queue(manifest.store)
    answer = Answer(
        item.image_id, item.sha256, 1, 1, HOSTILE, 9.0, datetime.now(UTC), False, (), (), "m", False
    )
    append_answers(manifest.store, [answer])
    decide_run(manifest, Policy())


def test_hostile_names_are_shown_and_do_not_run(page: Path, tmp_path: Path) -> None:
    dom = browse(page, tmp_path, "--dump-dom")
    assert "<title>cells · labelfleet report</title>" in dom
    assert dom.count("&lt;script&gt;document.title='ran'&lt;/script&gt;") >= 5
    assert "<script" not in dom
    review_part = dom.split('id="review"')[1].split('id="gallery"')[0]
    assert review_part.count("&lt;script&gt;document.title='ran'&lt;/script&gt;") >= 3
    assert review_part.count("data:image/jpeg;base64,") == 2  # before and after


def test_a_script_in_the_page_would_not_run_either(page: Path, tmp_path: Path) -> None:
    """The second line of defence; without it the same script does run."""
    html = page.read_text()
    injected = html.replace("</main>", f"{HOSTILE}</main>")
    page.write_text(injected)
    assert "<title>cells" in browse(page, tmp_path, "--dump-dom")
    page.write_text(injected.replace("Content-Security-Policy", "X-Nothing"))
    assert "<title>ran" in browse(page, tmp_path, "--dump-dom")


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_show_in_light_and_dark(page: Path, tmp_path: Path, dark: bool) -> None:
    shot = tmp_path / "shot.png"
    scheme = "--blink-settings=preferredColorScheme=" + ("0" if dark else "1")
    browse(page, tmp_path, f"--screenshot={shot}", "--window-size=1000,2400", scheme)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    red = (abs(pixels - np.array(RED)).max(axis=2) < 12).sum()
    assert red > 40_000
    background = pixels[5, 5].mean()
    assert background < 60 if dark else background > 200
