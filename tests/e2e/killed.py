"""A run whose driver is killed in the middle, and continued by the same command."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from storage.records import AnnotationRow
from storage.stores.open import open_store
from tests.e2e.jobs import Job
from tests.support.samples.tar_samples import tar_of
from tests.support.servers.proxy import Rule, faulty_proxy


def killed_and_continued(
    job: Job, pages: Sequence[tuple[str, bytes]], shards: int, joining: Mapping[str, str]
) -> dict[str, AnnotationRow]:
    """Fill the job's source with tars of the pages, kill its driver, continue, and check the rest.

    Args:
        joining: further environment of the second run.

    Returns:
        The rows, by image id.
    """
    source = open_store(job.source, job.options)
    for i in range(shards):
        source.put(f"pages-{i:06d}.tar", tar_of(*pages[i::shards]))
    store = open_store(job.output, job.options)
    server = urlsplit(job.options.endpoint_url or "")._replace(path="").geturl()
    with faulty_proxy(server) as proxy:
        # From the fifth on they hang, so that the run is still going at the kill.
        hanging = Rule("hang", "PUT", path_part="annotations", after=4, times=None)
        proxy.rules.append(hanging)
        through = {n: v.replace(server, proxy.endpoint_url) for n, v in job.env.items()}
        with replace(job, env=through).started() as driver:
            job.has_committed(driver, 2)
            driver.send_signal(signal.SIGKILL)
    committed = {o.key: o.etag for o in store.list("annotations/")}
    assert 0 < len(committed) < shards, "the kill came too late to show anything"

    code, summary, err = replace(job, env={**job.env, **joining}).run()
    assert code == 0, err
    assert summary["images"] == len(pages)
    assert summary["shards"] == shards
    assert summary["left"] == summary["quarantined"] == 0
    rows = job.rows()
    wanted = {f"pages-{i:06d}.tar/{n}" for i in range(shards) for n, _ in pages[i::shards]}
    assert rows.keys() == wanted
    after = {o.key: o.etag for o in store.list("annotations/")}
    assert committed.items() <= after.items(), "what was committed was written again"
    assert sum(len(row.detections) for row in rows.values()) > 0
    return rows
