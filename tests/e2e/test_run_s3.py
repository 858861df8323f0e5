"""The main job on a real Ray against a real S3 server: killed, continued, complete."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.demo.digits import make_pages
from storage.stores.open import open_store
from tests.e2e.jobs import SLOW_MODEL, SLOW_WORKERS, Job
from tests.e2e.killed import killed_and_continued
from tests.support.samples.same_rows import differing
from tests.support.servers.s3 import S3Server

pytestmark = pytest.mark.slow

SHARDS, PAGES = 12, 72


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    folder = tmp_path_factory.mktemp("pages")
    make_pages(folder, images=PAGES, seed=5)
    return [(path.name, path.read_bytes()) for path in sorted((folder / "images").iterdir())]


def test_a_killed_driver_continues_and_every_image_is_there_once(
    weed_s3: S3Server,
    shared_ray: dict[str, str],
    pages: list[tuple[str, bytes]],
    tmp_path: Path,
) -> None:
    bucket = weed_s3.fresh_bucket()
    job = Job(
        tmp_path, f"s3://{bucket}/shards", f"s3://{bucket}/run", weed_s3.env(),
        {"model": SLOW_MODEL, "workers": SLOW_WORKERS}, weed_s3.options,
    )  # fmt: skip
    rows = killed_and_continued(job, pages, SHARDS, joining=shared_ray)

    again = replace(job, env={**job.env, **shared_ray}, output=f"s3://{bucket}/undisturbed")
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
