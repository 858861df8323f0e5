"""Archived objects on a real S3 server: the others are labelled, these are named and retried."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.demo.digits import make_pages
from tests.e2e.jobs import Job
from tests.support.samples.tar_samples import tar_of
from tests.support.servers.s3 import S3Server

pytestmark = pytest.mark.slow

TARS, ARCHIVED = 40, 15


def test_archived_tars_are_named_the_others_labelled_and_a_later_run_takes_them_up(
    moto_s3: S3Server, shared_ray: dict[str, str], tmp_path: Path
) -> None:
    make_pages(tmp_path / "pages", images=1, seed=5)
    (page,) = (tmp_path / "pages" / "images").iterdir()
    tar, client = tar_of(("page.png", page.read_bytes())), moto_s3.client()
    bucket = moto_s3.fresh_bucket()
    names = [f"{i:02d}.tar" for i in range(TARS)]
    for name in names:
        place = {"StorageClass": "GLACIER"} if name < f"{ARCHIVED:02d}" else {}
        client.put_object(Bucket=bucket, Key=f"in/{name}", Body=tar, **place)
    job = Job(
        tmp_path, f"s3://{bucket}/in", f"s3://{bucket}/out", {**moto_s3.env(), **shared_ray},
        fields={"storage": {"endpoint_url": moto_s3.endpoint_url}}, options=moto_s3.options,
    )  # fmt: skip
    code, summary, err = job.run()
    assert code == 3, err
    assert (summary["shards"], summary["quarantined"], summary["left"]) == (25, ARCHIVED, 0)
    assert set(job.rows()) == {f"{name}/page.png" for name in names[ARCHIVED:]}
    records = job.manifest().quarantined().values()
    assert sorted(record["key"] for record in records) == names[:ARCHIVED]
    assert all("archived" in record["errors"][-1] for record in records)

    client.put_object(Bucket=bucket, Key="in/00.tar", Body=tar)  # restored: the same bytes
    code, summary, err = job.run()
    assert code == 3, err
    assert (summary["new_shards"], summary["quarantined"]) == (1, ARCHIVED - 1)
    for name in names[1:ARCHIVED]:
        client.put_object(Bucket=bucket, Key=f"in/{name}", Body=tar)
    code, summary, err = job.run()
    assert (code, summary["shards"], summary["quarantined"]) == (0, TARS, 0), err
    assert len(job.rows()) == TARS
