"""``labelfleet browse`` as a person uses it: a real server, a real browser, hostile names."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from storage.review.queue import read_queue
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.support.patience import patient
from tests.support.samples.labelled_run import label, png

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver: make chromium"
    ),
]

HOSTILE = (
    "<img src=x onerror=alert(1)>.png", "%3Cscript%3E.png", '"><b>bold.png', "a'b\"c.png",
    "ü 😀.png",
)  # fmt: skip

DAMAGED = "damaged.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Thirty images, some with names that would be markup, and one that is none."""
    folder = tmp_path_factory.mktemp("browse")
    source = open_store(str(folder / "source"))
    for at in range(25):
        source.put(f"plain/{at:03}.png", png(at))
    for at, name in enumerate(HOSTILE):
        source.put(name, png(100 + at))
    source.put(DAMAGED, b"")
    return label(source, open_store(str(folder / "run")), shard_size=8)


@pytest.fixture(scope="module")
def address(run: Manifest) -> Iterator[str]:
    """The address that the command prints; it ends with Ctrl-C and exit 0."""
    code = "import sys; from pipelines.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "browse", run.url]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ}, start_new_session=True
    ) as server:
        assert server.stdout is not None
        said = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", server.stdout.readline())
        assert said is not None
        yield said[0]
        server.send_signal(signal.SIGINT)
        assert server.wait(patient(20)) == 0


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[webdriver.Chrome]:
    """Headless Chromium at the address."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,900",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        driver.get(address)
        yield driver
    finally:
        driver.quit()


def until(page: webdriver.Chrome, script: str) -> Any:
    """Wait for a script to return something true, and return it."""
    return WebDriverWait(page, patient(60)).until(lambda d: d.execute_script(f"return {script}"))


def count(page: webdriver.Chrome) -> int:
    return int(page.find_element(By.ID, "count").text.split()[0])


def choose(page: webdriver.Chrome, field: str, value: str) -> None:
    page.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('change'))", field, value,
    )  # fmt: skip


def test_the_grid_shows_every_image_and_names_are_text(page: webdriver.Chrome) -> None:
    until(page, "document.querySelectorAll('.tile').length > 5")
    assert count(page) == 25 + len(HOSTILE) + 1
    assert "token" not in page.current_url
    choose(page, "text", "onerror")
    until(page, "document.getElementById('count').textContent.startsWith('1 ')")
    [tile] = page.find_elements(By.CLASS_NAME, "tile")
    assert HOSTILE[0] in tile.text
    until(page, "document.querySelector('.tile img').naturalWidth > 0")
    assert (
        page.execute_script("return document.querySelectorAll('.words img, .words b').length") == 0
    )


def test_why_an_image_has_no_picture_is_not_hidden_by_its_box(page: webdriver.Chrome) -> None:
    choose(page, "text", DAMAGED)
    until(page, "document.getElementById('count').textContent.startsWith('1 ')")
    until(page, "document.querySelectorAll('.tile .problem').length == 1")
    reason = page.find_element(By.CSS_SELECTOR, ".tile .problem")
    box = page.find_element(By.CSS_SELECTOR, ".tile input")
    assert reason.text.startswith("undecodable: ")
    assert reason.rect["y"] >= box.rect["y"] + box.rect["height"]


def test_an_image_has_its_boxes_its_keys_and_a_link(page: webdriver.Chrome, address: str) -> None:
    choose(page, "text", "plain/")
    until(page, "document.getElementById('count').textContent.startsWith('25 ')")
    until(page, "document.querySelectorAll('.tile').length > 3")
    page.find_elements(By.CLASS_NAME, "tile")[2].click()
    until(page, "document.getElementById('title').textContent === 'plain/002.png'")
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_RIGHT)
    until(page, "document.getElementById('title').textContent === 'plain/003.png'")
    until(page, "document.getElementById('large').naturalWidth > 0")
    assert page.find_elements(By.CSS_SELECTOR, "#boxes tr")
    link = page.current_url
    page.get("about:blank")
    page.get(link)
    until(page, "document.getElementById('title').textContent === 'plain/003.png'")
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    until(page, "document.getElementById('viewer').hidden")


def test_a_selection_goes_to_review(page: webdriver.Chrome, run: Manifest) -> None:
    choose(page, "text", "plain/00")
    until(page, "document.getElementById('count').textContent.startsWith('10 ')")
    page.find_element(By.ID, "all").click()
    until(page, "document.getElementById('chosen').textContent === '10 selected'")
    page.find_element(By.ID, "send").click()
    WebDriverWait(page, patient(30)).until(lambda d: d.switch_to.alert)
    page.switch_to.alert.accept()
    until(page, "document.getElementById('said').textContent.includes('10 queued')")
    assert {item.image_id for item in read_queue(run.store)} == {
        f"plain/{at:03}.png" for at in range(10)
    }


def test_sql_fills_a_table(page: webdriver.Chrome) -> None:
    choose(page, "sql", "SELECT status, count(*) AS many FROM images GROUP BY 1 ORDER BY 2 DESC")
    page.execute_script(
        "document.getElementById('sql').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', ctrlKey: true}))"
    )
    until(page, "!document.getElementById('table').hidden")
    assert page.find_element(By.ID, "table").text.split("\n") == [
        "status many",
        "ok 30",
        "undecodable 1",
    ]


def test_the_browser_had_nothing_to_complain_about(page: webdriver.Chrome) -> None:
    assert [line["message"] for line in page.get_log("browser")] == []
