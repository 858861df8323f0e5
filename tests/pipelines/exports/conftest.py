"""A labelled run of loose images, and one of a tar with hostile names."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from storage.shards.selecting import group_images, tar_shards
from storage.stores.open import open_store
from tests.pipelines.exports.labelled import (
    Labelled,
    jpeg,
    labelled_run,
)


@pytest.fixture
def loose(tmp_path: Path) -> Labelled:
    """Loose images, one in a folder."""
    (tmp_path / "run").mkdir()
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    for n, name in enumerate(("a.jpg", "b.jpg", "sub/a.jpg", "z.png")):
        (folder / name).write_bytes(jpeg(40 * n))
    listed = list(open_store(str(folder)).list())
    (shard,) = group_images(listed, 100)
    return labelled_run(tmp_path, shard)


@pytest.fixture(params=["shards.tar", "shards.tar.gz"])
def hostile(tmp_path: Path, request: pytest.FixtureRequest) -> Labelled:
    """A tar whose members want to be anywhere but in the export's folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / request.param
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for n, name in enumerate(
            ("../../escape.jpg", "/abs.jpg", "a.jpg", "A.JPG", "a.jpg", "c:\\x.jpg", "n\nl.jpg")
        ):
            member = tarfile.TarInfo(name)
            raw = jpeg(30 * n)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    (shard,) = tar_shards(open_store(str(tmp_path / "source")).list())
    return labelled_run(tmp_path, shard)
