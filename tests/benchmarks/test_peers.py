"""The plumbing of vs_daft, cores and labels, without Daft, without Ray and in small."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import labels, vs_daft
from benchmarks.cores import Timed, leave_pixels_out, measured
from benchmarks.detectors import FreeDetector
from benchmarks.photos import photo_bytes
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest


def test_a_metered_detector_finds_the_same_and_notes_its_process(tmp_path: Path) -> None:
    plain, notes = FreeDetector((32, 32)), tmp_path / "notes"
    metered = vs_daft.Metered(plain, notes)
    batch = np.zeros((3, 32, 32, 3), np.uint8)
    assert metered.detect(batch) == plain.detect(batch)
    assert metered.start(batch)() == plain.detect(batch)
    ready_s, last_s, peak_mb = vs_daft.read_meter(notes)
    assert 0 < ready_s <= last_s
    assert peak_mb > 10


def test_what_a_killed_job_left_is_counted(tmp_path: Path) -> None:
    noting = vs_daft.Noting(tmp_path / "notes")
    noting.detect(np.zeros((5, 1, 1, 3), np.uint8))
    noting.detect(np.zeros((2, 1, 1, 3), np.uint8))
    assert vs_daft.seen(tmp_path / "notes") == 7
    assert vs_daft.seen(tmp_path / "none") == 0
    assert vs_daft.outcome(Counter(a=1, b=2), 4, 7) == {
        "images": 4,
        "without a row": 2,
        "with two rows": 1,
        "seen twice by the detector": 3,
    }


def test_rows_of_daft_are_counted_over_its_readable_files(tmp_path: Path) -> None:
    for number, paths in enumerate((["a", "b"], ["b"])):
        table = pa.table({"found": [{"path": path} for path in paths]})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    assert vs_daft.daft_rows(tmp_path) == Counter(a=1, b=2)
    assert vs_daft.daft_rows(tmp_path / "none") == Counter()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["free", "lock", "500"])
def test_each_measurement_of_cores(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2
    import simplejpeg

    monkeypatch.setattr(cv2, "resize", cv2.resize)  # put back what "lock" leaves out
    monkeypatch.setattr(simplejpeg, "decode_jpeg", simplejpeg.decode_jpeg)
    found = measured(kind, photo_bytes(None, 8))
    assert found["images_per_s"] > 0
    assert found["cpu_ms"] > 0
    if kind == "500":  # the device is the limit, however fast the machine is
        assert found["images_per_s"] < 510


@pytest.mark.slow
def test_pixels_are_left_out_and_everything_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2
    import simplejpeg

    (photo,) = photo_bytes(None, 1)
    whole = simplejpeg.decode_jpeg(photo)
    small = cv2.resize(whole, (96, 96))
    monkeypatch.setattr(cv2, "resize", cv2.resize)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", simplejpeg.decode_jpeg)
    leave_pixels_out(photo)
    again = simplejpeg.decode_jpeg(b"anything", "RGB", strict=True)
    assert (again == whole).all()
    assert (cv2.resize(again, (96, 96)) == small).all()
    slot = np.zeros((20, 30, 3), np.uint8)
    assert cv2.resize(again, (30, 20), dst=slot) is slot
    assert (cv2.resize(small, (8, 8)) == cv2.resize(small, (8, 8))).all()


def test_the_timed_device_takes_images_of_the_usual_size() -> None:
    assert Timed(0.001).preprocessing == FreeDetector().preprocessing


@pytest.mark.slow
def test_every_step_of_labels_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "PER_SHARD", 30)
    labels.synthetic(tmp_path, 90, 6)
    manifest = Manifest.open(str(tmp_path / "run"))
    tables = [table for _, table in live_tables(manifest, ["image_id", "detections"])]
    assert sum(table.num_rows for table in tables) == 90
    assert len({one for table in tables for one in table.column("image_id").to_pylist()}) == 90
    boxes = sum(len(found) for t in tables for found in t.column("detections").to_pylist())
    assert 400 < boxes < 680  # 90 draws of a Poisson distribution of mean 6
    for step in labels.STEPS:
        for name in (step, f"scan for {step}"):
            if step.startswith("export") and name != step:
                continue  # the scan of labels is below
            took = labels.one(name, tmp_path)
            assert took["s"] > 0
            assert took["peak_mb"] > 10
    ((count, *_),) = labels.scan_of("scan for decide", tmp_path)()
    assert count == boxes
    ((labelled, *_),) = labels.scan_of("scan for export coco", tmp_path)()
    assert 0 < labelled <= boxes
