"""Label Studio is killed and started again in the middle of a push, which ends well."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest

from pipelines.label_studio.send import SendRules
from pipelines.label_studio.serving import choose_serving
from pipelines.review.push import PushOptions, PushWatcher, push_run
from storage.objects.protocols import StorageOptions
from storage.review.queue import read_queue
from storage.review.settings import ReviewSettings
from storage.stores.open import open_store
from tests.support.samples.review_samples import loose_run, routed
from tests.support.servers.label_studio import (
    LabelStudioServer,
    RestartableServer,
    restartable_label_studio,
)

pytestmark = pytest.mark.slow


class Killing(PushWatcher):
    """Kills the server once some tasks are there; a second later it is started again."""

    def __init__(self, server: RestartableServer) -> None:
        self.server, self.pushing, self.killed = server, False, False
        self.restart = threading.Timer(1.0, server.start)

    def stage(self, name: str, total: int) -> None:
        self.pushing = name == "pushing tasks"

    def advance(self, count: int) -> None:
        if self.pushing and not self.killed:
            self.killed = True
            self.server.kill()
            self.restart.start()


def test_a_push_outlives_the_server(label_studio: LabelStudioServer) -> None:
    """``label_studio`` is asked for so that the skip for its absence holds here too."""
    with restartable_label_studio() as server:
        place = server.server.folder / "restart"
        source, output = open_store(str(place / "in")), open_store(str(place / "run"))
        manifest = routed(loose_run(source, output, 12))
        client: Any = server.server.client(patience_s=180)
        settings = ReviewSettings(server.server.url, "restart")
        watcher = Killing(server)
        pushed = push_run(
            manifest, client, settings, source=source,
            serving=choose_serving(output, StorageOptions()),
            options=PushOptions(watcher=watcher, rules=SendRules(first=4, most=4)),
        )  # fmt: skip
        assert watcher.killed
        assert pushed.created == 12
        project = client.find_project("restart")
        there = Counter(ref.key for ref in client.task_refs(project.project_id))
        assert there == Counter(item.sha256 for item in read_queue(manifest.store))
        watcher.restart.join()
