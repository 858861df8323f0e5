"""Push and pull through a proxy that loses, doubles, delays and refuses: nothing twice or lost.

``LABELFLEET_CHAOS`` sets how many seeded schedules run (20; ``make chaos-review``: 200).
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from typing import Any
from uuid import uuid4

import pytest

from pipelines.label_studio.client import KEY, LabelStudio
from pipelines.label_studio.errors import ReviewUnavailable
from pipelines.label_studio.send import SendRules
from pipelines.label_studio.serving import choose_serving
from pipelines.review.pull import pull_run
from pipelines.review.push import PushOptions, PushSummary, PushWatcher, push_run
from storage.errors import ReviewError
from storage.objects.protocols import StorageOptions
from storage.review.answers import read_answers
from storage.review.queue import read_queue
from storage.review.settings import ReviewSettings
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.support.patience import patient
from tests.support.samples.review_samples import loose_run, routed
from tests.support.servers.label_studio import LabelStudioServer
from tests.support.servers.proxy import FaultyProxy, Rule, faulty_proxy

pytestmark = pytest.mark.slow

IMAGES = 10
QUICK = SendRules(first=3, most=4, settle_s=0.3)
SCHEDULES = int(os.environ.get("LABELFLEET_CHAOS", "12"))


class Crash(Exception):
    """The process that pushes is gone."""


class CrashingWatcher(PushWatcher):
    """Crashes once, after a number of images."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, count: int) -> None:
        self.left -= count
        if self.left <= 0:
            self.left = 10**9
            raise Crash


class Chaos:
    """Faults by a seed: any step, any kind, a third of all requests."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.met: Counter[str] = Counter()

    def __call__(self, method: str, path: str) -> Rule | None:
        if self.rng.random() > 1 / 3:
            return None
        rule = self.rng.choice(
            [
                Rule("drop_reply", method),
                Rule("close", method),
                Rule("delay", method, delay_s=0.2),
                Rule("late", method, delay_s=self.rng.choice([0.1, 1.0])),
                Rule("answer", method, status=429),
                Rule("answer", method, status=500),
                Rule("answer_after", method, status=502),
                Rule("cut", method, keep_bytes=20),
            ]
        )
        self.met[rule.effect] += 1
        return rule


@pytest.fixture
def manifest(label_studio: LabelStudioServer) -> Manifest:
    place = label_studio.folder / uuid4().hex
    source, output = open_store(str(place / "source")), open_store(str(place / "run"))
    return routed(loose_run(source, output, IMAGES))


def push(
    manifest: Manifest,
    server: LabelStudio,
    settings: ReviewSettings,
    watcher: PushWatcher | None = None,
) -> PushSummary:
    source = open_store(manifest.record.source["url"])
    serving = choose_serving(manifest.store, StorageOptions())
    options = PushOptions(rules=QUICK, watcher=watcher or PushWatcher())
    return push_run(manifest, server, settings, source=source, serving=serving, options=options)


def keys_there(server: LabelStudio, title: str) -> Counter[str]:
    """How often each key is in the project, as the server itself says."""
    project = server.find_project(title)
    assert project is not None
    return Counter(ref.key for ref in server.task_refs(project.project_id))


def wanted(manifest: Manifest) -> Counter[str]:
    return Counter(item.sha256 for item in read_queue(manifest.store))


def hasty(seconds: float) -> None:
    """The client waits a quarter of what it would between two tries: twenty schedules take minutes
    of waiting otherwise, and what is late arrives at a worse moment."""
    time.sleep(seconds / 4)


def settled(proxy: FaultyProxy) -> None:
    while proxy.late:
        time.sleep(0.05)


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_whatever_happens_every_image_and_every_answer_is_there_once(
    seed: int, manifest: Manifest, label_studio: LabelStudioServer
) -> None:
    settings = ReviewSettings(label_studio.url, f"chaos {seed} {uuid4().hex[:8]}")
    direct = label_studio.client()
    chaos = Chaos(seed)
    with faulty_proxy(label_studio.url) as proxy:
        proxy.chaos = chaos
        through = label_studio.client(
            proxy.endpoint_url, read_timeout_s=10, patience_s=20, sleep=hasty
        )
        crash = CrashingWatcher(chaos.rng.randrange(1, 4 * IMAGES))
        persist(lambda: push(manifest, through, settings, crash))
        # A request that was on its way may still land, after everyone has waited for it: such a
        # twin is pull's to find. Nothing is lost in any case.
        assert set(keys_there(direct, settings.project)) == set(wanted(manifest))
        settled(proxy)
        pull_of = persist(lambda: pull_run(manifest, through, settings))
        assert pull_of.answers == 0
        assert keys_there(direct, settings.project) == wanted(manifest)
        given = answer_all(direct, settings)
        persist(lambda: pull_run(manifest, through, settings))
        persist(lambda: pull_run(manifest, through, settings))
    pulled = Counter(a.annotation_id for a in read_answers(manifest.store))
    assert pulled == Counter(given)
    assert chaos.met


def persist(step: Any) -> Any:
    """As a person does: again, until it says that all is well."""
    for _ in range(30):
        try:
            return step()
        except (ReviewError, Crash):
            continue
    raise AssertionError("it never ended well")


def answer_all(server: LabelStudio, settings: ReviewSettings) -> list[int]:
    """Annotate every task as it was predicted; ids of the annotations."""
    project = server.find_project(settings.project)
    assert project is not None
    made = []
    for task in tasks_with_boxes(server, project.project_id):
        body = {"result": task["predictions"][0]["result"]}
        made.append(server.http.send("POST", f"/api/tasks/{task['id']}/annotations/", body)["id"])
    return made


def tasks_with_boxes(server: LabelStudio, project_id: int) -> list[dict[str, Any]]:
    """All tasks; read again while one lacks its prediction, as one does that is being deleted.

    The server reads tasks first and their predictions afterwards, and a twin whose deletion lost
    its reply may go in between.
    """
    limit = time.monotonic() + patient(20)
    while True:
        tasks = list(server.tasks(project_id, include="id,predictions,result", whole=True))
        bare = [task for task in tasks if not task["predictions"]]
        if not bare:
            return tasks
        assert time.monotonic() < limit, bare
        time.sleep(0.25)


STEPS = {
    "version": ("GET", "/api/version"),
    "who": ("GET", "/api/current-user/whoami"),
    "find": ("GET", "/api/projects"),
    "create": ("POST", "/api/projects"),
    "storages": ("GET", "/api/storages/localfiles"),
    "connect": ("POST", "/api/storages/localfiles"),
    "image": ("GET", "/data/local-files/"),
    "import": ("POST", "/import"),
    "choose": ("PATCH", "/api/projects/"),
}
KINDS = {
    "drop_reply": Rule("drop_reply", ""),
    "close": Rule("close", ""),
    "cut": Rule("cut", "", keep_bytes=5),
    "429": Rule("answer", "", status=429),
    "500": Rule("answer", "", status=500),
    "502 after": Rule("answer_after", "", status=502),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_push_rides_out_a_fault_at_every_step(
    kind: str, manifest: Manifest, label_studio: LabelStudioServer
) -> None:
    """Every step fails once in one and the same push, which ends well all the same."""
    settings = ReviewSettings(label_studio.url, f"steps {uuid4().hex}")
    direct = label_studio.client()
    with faulty_proxy(label_studio.url) as proxy:
        model = KINDS[kind]
        for method, path in STEPS.values():
            proxy.rules.append(
                Rule(model.effect, method, path_part=path, status=model.status,
                     keep_bytes=model.keep_bytes)
            )  # fmt: skip
        through = label_studio.client(proxy.endpoint_url, read_timeout_s=10)
        pushed = push(manifest, through, settings)
        assert [rule.hits for rule in proxy.rules] == [1] * len(STEPS)
    assert pushed.created == IMAGES
    assert keys_there(direct, settings.project) == wanted(manifest)


def test_tasks_that_are_there_without_their_boxes_get_them(
    manifest: Manifest, label_studio: LabelStudioServer
) -> None:
    """An import without a reply may leave tasks whose predictions are lacking."""
    settings = ReviewSettings(label_studio.url, f"bare {uuid4().hex[:8]}")
    direct = label_studio.client()
    keys = list(wanted(manifest))

    def bare() -> None:
        project = direct.find_project(settings.project)
        assert project is not None
        tasks = [{"data": {"image": "http://127.0.0.1/none.png", KEY: key}} for key in keys[:3]]
        direct.import_tasks(project.project_id, tasks)

    with faulty_proxy(label_studio.url) as proxy:
        proxy.rules.append(Rule("close", "POST", path_part="/import", action=bare))
        summary = push(manifest, label_studio.client(proxy.endpoint_url), settings)
    assert summary.lost_replies == 1
    assert summary.predicted == 3
    assert keys_there(direct, settings.project) == wanted(manifest)
    assert len(answer_all(direct, settings)) == len(keys)


def test_a_server_that_only_fails_is_given_up_with_a_readable_error(
    manifest: Manifest, label_studio: LabelStudioServer
) -> None:
    settings = ReviewSettings(label_studio.url, f"down {uuid4().hex}")
    with faulty_proxy(label_studio.url) as proxy:
        proxy.rules.append(Rule("answer", "POST", path_part="/import", times=None, status=500))
        through = label_studio.client(proxy.endpoint_url)
        with pytest.raises(ReviewUnavailable, match="6 times in a row") as caught:
            push(manifest, through, settings)
        assert "push again" in str(caught.value.hint)
        proxy.rules.clear()
        assert push(manifest, through, settings).created == IMAGES
    assert keys_there(label_studio.client(), settings.project) == wanted(manifest)


def test_a_body_limit_makes_the_chunks_smaller(
    manifest: Manifest, label_studio: LabelStudioServer
) -> None:
    settings = ReviewSettings(label_studio.url, f"limit {uuid4().hex}")
    with faulty_proxy(label_studio.url) as proxy:
        proxy.rules.append(Rule("answer", "POST", path_part="/import", status=413))
        pushed = push(manifest, label_studio.client(proxy.endpoint_url), settings)
    assert (pushed.created, pushed.lost_replies) == (IMAGES, 0)
    assert keys_there(label_studio.client(), settings.project) == wanted(manifest)


def test_the_token_is_in_no_error_log_or_repr(
    manifest: Manifest,
    label_studio: LabelStudioServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    settings = ReviewSettings(label_studio.url, f"secret {uuid4().hex}")
    with faulty_proxy(label_studio.url) as proxy:
        proxy.chaos = Chaos(1)
        through = label_studio.client(proxy.endpoint_url, patience_s=0)
        said = [repr(through), repr(through.http), repr(through.http._token)]
        for _ in range(5):
            try:
                push(manifest, through, settings)
            except ReviewError as exc:
                said += [str(exc), repr(exc), repr(exc.__cause__)]
    assert not any(label_studio.token in text for text in [*said, caplog.text])
    kept = b"".join(manifest.store.get(o.key) for o in manifest.store.list("review/"))
    assert label_studio.token.encode() not in kept
