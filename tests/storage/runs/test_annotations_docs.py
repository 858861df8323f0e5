"""What docs/annotations.md shows works as it stands there, and reads what was written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.runs.annotation_rows import DETECTION_TYPE, SCHEMA
from storage.stores.open import open_store
from tests.support.samples.synthetic_run import make_run, random_boxes, row, tar_shard

DOCS = Path(__file__).resolve().parents[3] / "docs" / "annotations.md"
SNIPPETS = dict(
    re.findall(r"\n(\w+)[^\n]*:\n\n```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
)
SURE = 0.5


@pytest.fixture
def scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """A run in runs/cells of the working folder; the scores of each of its images."""
    rng = np.random.default_rng(0)
    labelled: dict = {}
    found: list[list[float]] = []
    for k in range(3):
        shard = tar_shard(f"{k}.tar")
        labelled[shard] = [row(f"{k}.tar/bad.jpg", shard.shard_id, status="undecodable")]
        found.append([])
        for i in range(4):
            d = random_boxes(rng, i, 640, 480)
            labelled[shard].append(row(f"{k}.tar/{i}.jpg", shard.shard_id, d, offset=None))
            found.append(d.scores.tolist())
    # A shard without rows, and one without a box: their columns must still fit the others'.
    labelled[tar_shard("empty.tar")] = []
    labelled[tar_shard("no-box.tar")] = [row("no-box.tar/1.jpg")]
    found.append([])
    monkeypatch.chdir(tmp_path)
    make_run(open_store("runs/cells"), labelled)
    return found


def run_snippet(name: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(compile(SNIPPETS[name], f"{DOCS.name}:{name}", "exec"), namespace)
    return namespace


def sure(scores: list[list[float]]) -> list[float]:
    return sorted(s for image in scores for s in image if s >= SURE)


def test_every_snippet_is_tested() -> None:
    assert SNIPPETS.keys() == {"pyarrow", "DuckDB", "Polars", "pandas", "labelfleet"}


def test_pyarrow(scores: list[list[float]], capsys: pytest.CaptureFixture[str]) -> None:
    names = run_snippet("pyarrow")
    assert names["rows"].count_rows() == len(scores)
    assert names["names"] == {0: "RBC", 1: "WBC", 2: "Platelets"}
    assert f"{len(scores)} images" in capsys.readouterr().out
    table = names["rows"].to_table()
    assert table.schema.remove_metadata().equals(SCHEMA)
    read = [[d["score"] for d in image] for image in table.column("detections").to_pylist()]
    assert sorted(map(tuple, read)) == sorted(map(tuple, scores))


def test_duckdb(scores: list[list[float]]) -> None:
    found = run_snippet("DuckDB")["boxes"].fetchall()
    assert sorted(r[2] for r in found) == pytest.approx(sure(scores))
    assert all(0 <= r[3] <= r[5] <= 640 and 0 <= r[4] <= r[6] <= 480 for r in found)


def test_duckdb_reads_the_metadata(scores: list[list[float]]) -> None:
    import duckdb

    found = duckdb.sql(
        "SELECT decode(value) FROM parquet_kv_metadata('runs/cells/annotations/*.parquet') "
        "WHERE decode(key) = 'labelfleet'"
    ).fetchall()
    assert len(found) == 5
    assert sum(sum(json.loads(v)["shard"]["counts"].values()) for (v,) in found) == len(scores)


def test_polars(scores: list[list[float]]) -> None:
    found = run_snippet("Polars")["boxes"]
    assert sorted(found["score"].to_list()) == pytest.approx(sure(scores))
    assert set(found.columns) >= {f.name for f in DETECTION_TYPE}
    assert found["bbox"].to_numpy().shape == (len(found), 4)


def test_pandas(scores: list[list[float]], capsys: pytest.CaptureFixture[str]) -> None:
    images = run_snippet("pandas")["images"]
    assert len(images) == len(scores)
    assert images["boxes"].sum() == sum(len(s) for s in scores)
    assert set(images["status"]) == {"ok", "undecodable"}
    assert "undecodable" in capsys.readouterr().out


def test_labelfleet(scores: list[list[float]]) -> None:
    assert run_snippet("labelfleet")["confident"].dtype == np.float32


def test_large_phash_and_null_offset_survive_other_readers(scores: list[list[float]]) -> None:
    import duckdb
    import polars as pl

    (hashes,) = duckdb.sql("SELECT max(phash) FROM 'runs/cells/annotations/*.parquet'").fetchall()
    assert hashes == (2**63 + 1,)
    read = pl.read_parquet("runs/cells/annotations/*.parquet")
    assert read["phash"].max() == 2**63 + 1
    assert read["offset"].null_count() == 12


def test_the_tables_name_every_column() -> None:
    text = DOCS.read_text()
    for field in (*SCHEMA, *DETECTION_TYPE):
        assert re.search(rf"^\|[^|]*`{field.name}`", text, flags=re.MULTILINE), field.name
