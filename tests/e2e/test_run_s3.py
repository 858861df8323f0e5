"""The main job on a real Ray against a real S3 server: killed, continued, complete."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.demo.digits import make_pages
from storage.stores.open import open_store
from tests.e2e.jobs import Job, wait_until
from tests.support.samples.same_rows import differing
from tests.support.samples.tar_samples import tar_of
from tests.support.servers.s3 import S3Server

pytestmark = pytest.mark.slow

SHARDS, PAGES = 12, 72


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    folder = tmp_path_factory.mktemp("pages")
    make_pages(folder, images=PAGES, seed=5)
    return [(path.name, path.read_bytes()) for path in sorted((folder / "images").iterdir())]


def fill(server: S3Server, pages: list[tuple[str, bytes]]) -> str:
    """The pages as tars in a new bucket; returns the bucket."""
    bucket = server.fresh_bucket()
    store = open_store(f"s3://{bucket}/shards", server.options)
    for i in range(SHARDS):
        store.put(f"pages-{i:06d}.tar", tar_of(*pages[i::SHARDS]))
    return bucket


def test_a_killed_driver_continues_and_every_image_is_there_once(
    weed_s3: S3Server,
    shared_ray: dict[str, str],
    pages: list[tuple[str, bytes]],
    tmp_path: Path,
) -> None:
    bucket = fill(weed_s3, pages)
    job = Job(
        tmp_path, f"s3://{bucket}/shards", f"s3://{bucket}/run", weed_s3.env(),
        options=weed_s3.options,
    )  # fmt: skip
    store = open_store(job.output, weed_s3.options)
    with job.started() as driver:
        wait_until(lambda: sum(1 for _ in store.list("annotations/")) >= 2 or driver.poll() == 0)
        driver.send_signal(signal.SIGKILL)
    committed = {o.key: o.etag for o in store.list("annotations/")}
    assert 0 < len(committed) < SHARDS, "the kill came too late to show anything"

    joining = replace(job, env={**job.env, **shared_ray})
    code, summary, err = joining.run()
    assert code == 0, err
    assert summary["images"] == len(pages)
    assert summary["shards"] == SHARDS
    assert summary["left"] == summary["quarantined"] == 0
    rows = job.rows()
    wanted = {f"pages-{i:06d}.tar/{n}" for i in range(SHARDS) for n, _ in pages[i::SHARDS]}
    assert rows.keys() == wanted
    after = {o.key: o.etag for o in store.list("annotations/")}
    assert committed.items() <= after.items(), "what was committed was written again"

    again = replace(joining, output=f"s3://{bucket}/undisturbed")
    code, _, err = again.run()
    assert code == 0, err
    undisturbed = again.rows()
    assert differing(rows, undisturbed) == []
    assert sum(len(row.detections) for row in rows.values()) > 0

    data = dict(pages)
    source = open_store(job.source, weed_s3.options)
    for row in list(rows.values())[:10]:  # a ranged read gets the image back
        shard, name = row.image_id.split("/", 1)
        assert row.offset is not None
        assert source.get_range(shard, row.offset, row.nbytes) == data[name]


def test_a_finished_run_does_nothing_and_a_grown_source_only_what_is_new(
    weed_s3: S3Server,
    shared_ray: dict[str, str],
    pages: list[tuple[str, bytes]],
    tmp_path: Path,
) -> None:
    bucket = weed_s3.fresh_bucket()
    source = open_store(f"s3://{bucket}/images", weed_s3.options)
    for name, data in pages[:12]:
        source.put(name, data)
    job = Job(
        tmp_path, f"s3://{bucket}/images", f"s3://{bucket}/run",
        {**weed_s3.env(), **shared_ray}, options=weed_s3.options,
    )  # fmt: skip
    assert job.run()[0] == 0
    first = job.rows()
    code, summary, _ = job.run()
    assert (code, summary["new_shards"], summary["images"]) == (0, 0, 12)

    source.put(pages[12][0], pages[12][1])
    changed, _ = pages[0]
    source.put(changed, pages[13][1])
    deleted, _ = pages[1]
    source.delete(deleted)
    code, summary, err = job.run()
    assert code == 0, err
    assert summary["new_images"] == 2
    rows = job.rows()
    assert rows.keys() == (first.keys() | {pages[12][0]}) - {deleted}
    assert rows[changed].sha256 != first[changed].sha256
    kept = rows.keys() & first.keys() - {changed}
    assert all(rows[key].sha256 == first[key].sha256 for key in kept)
