"""All of bccd, hituav and coco_ccby, as folders and as shards: every image accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.ingest.ingest import ingest
from storage.objects.protocols import StorageOptions
from storage.shards.selecting import classify
from tests.e2e.jobs import Job

pytestmark = pytest.mark.slow

SETS = ("bccd", "hituav", "coco_ccby")


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_every_image_of_the_real_sets_is_labelled(
    layout: str, data_dir: Path, tmp_path: Path, shared_ray: dict[str, str]
) -> None:
    folders = {name: data_dir / name / "images" for name in SETS}
    files = {
        name: {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        for name, folder in folders.items()
    }
    for name, folder in folders.items():
        source = folder
        if layout == "shards":
            source = tmp_path / f"{name}-shards"
            ingest(str(folder), str(source), options=StorageOptions(), images_per_shard=100)
        job = Job(
            tmp_path, str(source), str(tmp_path / f"{name}-run"), shared_ray,
            fields={"source": {"url": str(source), "shard_size": 100}},
        )  # fmt: skip
        code, summary, err = job.run()
        assert code == 0, err
        wanted = {key for key in files[name] if classify(key) == "image"}
        assert summary["images"] == summary["ok"] == len(wanted)
        found = set(job.rows())
        if layout == "shards":
            found = {key.split("/", 1)[1] for key in found}
        assert found == wanted
