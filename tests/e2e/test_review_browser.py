"""The web page as a reviewer has it: boxes over the objects, a correction that reaches the run."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from pipelines.label_studio.client import KEY, LabelStudio
from pipelines.label_studio.serving import choose_serving
from pipelines.review.pull import pull_run
from pipelines.review.push import push_run
from pipelines.routing.route import route_run
from storage.objects.protocols import StorageOptions
from storage.records import Xyxy
from storage.review.answers import read_answers
from storage.review.queue import read_queue
from storage.review.settings import ReviewSettings
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.e2e.test_review import push, rerun, tasks_of
from tests.support.patience import patient
from tests.support.samples.review_samples import (
    POLICY,
    committed_run,
    loose_run,
    routed,
    three_boxes,
)
from tests.support.samples.synthetic_run import boxes, row
from tests.support.servers.label_studio import ROOT, LabelStudioServer

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver: make chromium"
    ),
]

SIZE = (600, 400)
OBJECT: Xyxy = (90, 60, 260, 230)
RED = (0xE6, 0x19, 0x4B)  # of the first class
_WAIT_S = 120
T = TypeVar("T")
_CANVASES = """return [...document.querySelectorAll("canvas")]
    .map(e => e.getBoundingClientRect()).filter(r => r.width > 100)
    .map(r => [r.x, r.y, r.width, r.height])"""


def photograph(orientation: int) -> bytes:
    """A black rectangle on white at OBJECT of the upright image."""
    image = Image.new("RGB", SIZE, "white")
    x1, y1, x2, y2 = OBJECT
    ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill="black")
    exif = Image.Exif()
    if orientation == 6:
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, exif=exif)
    return out.getvalue()


@pytest.fixture(scope="module")
def browser(label_studio: LabelStudioServer) -> Iterator[webdriver.Chrome]:
    """Headless Chromium, logged in."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000",
        "--force-device-scale-factor=1", "--disable-background-networking",
        "--disable-component-update", "--disable-dev-shm-usage",
    ):  # fmt: skip
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        driver.get(f"{label_studio.url}/user/login/")
        driver.find_element(By.NAME, "email").send_keys(label_studio.email)
        driver.find_element(By.NAME, "password").send_keys(label_studio.password)
        driver.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
        WebDriverWait(driver, _WAIT_S).until(lambda d: "/login" not in d.current_url)
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def pushed(
    request: pytest.FixtureRequest, label_studio: LabelStudioServer
) -> tuple[Manifest, ReviewSettings]:
    """One image, of the orientation given, in a project of its own."""
    place = label_studio.folder / uuid4().hex
    source, output = open_store(str(place / "source")), open_store(str(place / "run"))
    raw = photograph(request.param)
    source.put("a.jpg", raw)
    made = row("a.jpg", "0" * 16, boxes([OBJECT], [0.9], [0]), size=SIZE, nbytes=len(raw))
    rows = {"a.jpg": replace(made, sha256=hashlib.sha256(raw).hexdigest())}
    manifest = routed(committed_run(source, output, rows))
    settings = ReviewSettings(label_studio.url, f"page {uuid4().hex}")
    serving = choose_serving(output, StorageOptions())
    push_run(manifest, label_studio.client(), settings, source=source, serving=serving)
    return manifest, settings


@pytest.mark.parametrize("pushed", [1, 6], indirect=True, ids=["upright", "exif-6"])
def test_boxes_lie_over_the_objects_and_a_correction_comes_back(
    pushed: tuple[Manifest, ReviewSettings],
    label_studio: LabelStudioServer,
    browser: webdriver.Chrome,
    request: pytest.FixtureRequest,
) -> None:
    manifest, settings = pushed
    server = label_studio.client()
    project = server.find_project(settings.project)
    assert project is not None
    (ref,) = server.task_refs(project.project_id)
    browser.get(f"{label_studio.url}/projects/{project.project_id}/data?task={ref.task_id}")
    page = drawn_page(browser, artefact(request.node.name))

    x, y, width, height = page.image
    scale = width / SIZE[0]
    assert height / SIZE[1] == pytest.approx(scale, rel=0.01)
    assert x >= page.view[0] - 1  # nothing of the image is cut off
    assert y >= page.view[1] - 1
    assert x + width <= page.view[0] + page.view[2] + 1
    expected = np.array(OBJECT) * scale + np.array([x, y, x, y])
    assert np.abs(extent(strokes(page.pixels)) - expected).max() <= 2  # the box
    assert np.abs(extent(dark(page.pixels)) - expected).max() <= 2  # the object, upright

    # The reviewer drags the box by (60, 40) of the screen's pixels.
    drag(browser, (expected[0] + expected[2]) / 2, (expected[1] + expected[3]) / 2, 60, 40)
    submit(browser)
    until(lambda: server.is_touched(ref.task_id))
    pulled = pull_run(manifest, server, settings)
    assert (pulled.answers, pulled.moved, pulled.deleted) == (1, 1, 0)
    (answer,) = read_answers(manifest.store)
    assert answer.annotator == label_studio.email
    assert answer.lead_time_s is not None
    assert not answer.was_blind
    moved = np.array(OBJECT) + np.array([60, 40, 60, 40]) / scale
    assert np.abs(np.array(answer.boxes[0].bbox) - moved).max() <= 2 / scale + 0.5


def test_tasks_of_the_first_and_the_second_round_show_their_boxes(
    label_studio: LabelStudioServer, browser: webdriver.Chrome
) -> None:
    """Run B queues one of A's two images; the other stays open with A's boxes."""
    place = label_studio.folder / uuid4().hex
    source = open_store(str(place / "source"))
    first = routed(loose_run(source, open_store(str(place / "run")), 2))
    settings = ReviewSettings(label_studio.url, f"page {uuid4().hex}")
    server = label_studio.client()
    push(first, server, settings)
    (older, _) = tasks_of(server, settings)
    assert look_at(browser, server, settings, older["id"], "first-round") == ["0.95", "0.40"]

    second = rerun(first, place / "second", three_boxes)
    route_run(second, budget="1 image", policy=POLICY, invocation="b", audit=0.0)
    assert push(second, server, settings).kept_shown == 1
    (queued,) = read_queue(second.store)
    for task in tasks_of(server, settings):
        own = task["data"][KEY] == queued.sha256
        name = "second-round-queued" if own else "second-round-open"
        scores = look_at(browser, server, settings, task["id"], name)
        assert scores == (["0.95"] if own else ["0.95", "0.40"])  # the second round hides the other


def look_at(
    browser: webdriver.Chrome, server: LabelStudio, settings: ReviewSettings, task: int, name: str
) -> list[str]:
    """Scores in the list of regions beside the image; the screenshot stays for people."""
    project = server.find_project(settings.project)
    assert project is not None
    browser.get(f"{settings.url}/projects/{project.project_id}/data?task={task}")

    def scores() -> list[str]:
        said = browser.find_element(By.TAG_NAME, "body").text.rpartition("Relations")[2]
        return re.findall(r"^0\.\d\d$", said, flags=re.MULTILINE)

    found = at_rest(lambda: scores() if len(browser.execute_script(_CANVASES)) >= 2 else None)
    browser.save_screenshot(str(artefact(name)))
    return found


def artefact(name: str) -> Path:
    """Where a screenshot stays for people to look at."""
    folder = ROOT / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.png"


@dataclass(frozen=True)
class Page:
    """A screenshot int [H, W, 3], blank outside of what shows the image; places as x, y, w, h."""

    pixels: NDArray[Any] = field(compare=False)
    image: tuple[float, float, float, float]
    view: tuple[float, float, float, float]


def drawn_page(browser: webdriver.Chrome, kept: Path) -> Page:
    """The page once image and box are drawn; the screenshot stays at ``kept`` for people."""

    def look() -> Page | None:
        places = [tuple(place) for place in browser.execute_script(_CANVASES)]
        if len(places) < 2:
            return None
        browser.save_screenshot(str(kept))
        pixels = np.asarray(Image.open(kept).convert("RGB")).astype(int)
        # The first canvas lies over the image, the others are the view that it is drawn in.
        image, view = places[0], places[-1]
        x, y, width, height = (round(side) for side in view)
        blank = np.full_like(pixels, 255)
        blank[y : y + height, x : x + width] = pixels[y : y + height, x : x + width]
        drawn = strokes(blank).sum() > 200 and dark(blank).sum() > 2000
        return Page(blank, image, view) if drawn else None

    return at_rest(look)


def strokes(pixels: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels of the first class's colour."""
    return np.asarray(np.abs(pixels - np.array(RED)).max(axis=2) < 60)


def dark(pixels: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels of the object, tinted by the box's fill or not."""
    return np.asarray((pixels[:, :, 1] < 60) & (pixels[:, :, 2] < 100) & (pixels.sum(axis=2) < 250))


def extent(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """xyxy of what is set, in rows and columns that hold more than specks."""
    xs, ys = np.flatnonzero(mask.sum(axis=0) > 20), np.flatnonzero(mask.sum(axis=1) > 20)
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float64)


def drag(browser: webdriver.Chrome, x: float, y: float, dx: int, dy: int) -> None:
    """Choose what is at (x, y) of the page by a click, then drag it."""
    body = browser.find_element(By.TAG_NAME, "body")
    left, top = -body.rect["width"] / 2, -body.rect["height"] / 2

    def to(px: float, py: float) -> ActionChains:
        chain = ActionChains(browser, duration=50)
        return chain.move_to_element_with_offset(body, round(left + px), round(top + py))

    to(x, y).click().perform()
    time.sleep(1)
    chain = to(x, y).click_and_hold()
    for _step in range(4):
        chain = chain.move_by_offset(dx // 4, dy // 4).pause(0.05)
    chain.release().perform()
    time.sleep(0.5)


def submit(browser: webdriver.Chrome) -> None:
    browser.find_element(By.XPATH, "//button[normalize-space()='Submit']").click()


def at_rest(look: Callable[[], T | None]) -> T:
    """What is seen three times in a row: for a while the page moves its panels about."""
    seen: list[T | None] = []

    def rests() -> bool:
        seen.append(look())
        return bool(seen[-1]) and len(seen) >= 3 and seen[-1] == seen[-2] == seen[-3]

    until(rests)
    assert seen[-1] is not None
    return seen[-1]


def until(so: Callable[[], Any]) -> None:
    limit = time.monotonic() + patient(_WAIT_S)
    while not so():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.5)
