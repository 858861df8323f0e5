"""COCO files as the trainer reads them: nothing is lost silently, nothing is misread."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.errors import ConfigError, SourceEmpty, SourceError
from tests.support.samples.training_samples import box, write_coco
from workers.training.coco_set import read_training_set


def test_category_ids_with_gaps_become_indices_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write_coco(tmp_path, [(40, 30)], [box(1, 90, 1, 2, 3, 4), box(1, 7, 5, 6, 7, 8)])
    found = read_training_set(path, tmp_path)
    assert found.classes == ("ring", "bar", "blur")
    assert found.official_ids == (7, 3, 90)
    assert found.images[0].labels.tolist() == [2, 0]
    assert found.images[0].boxes.tolist() == [[1, 2, 4, 6], [5, 6, 12, 14]]


def test_images_without_boxes_are_kept(tmp_path: Path) -> None:
    path = write_coco(tmp_path, [(40, 30), (40, 30), (40, 30)], [box(2, 3, 1, 1, 5, 5)])
    found = read_training_set(path, tmp_path)
    assert [len(image.labels) for image in found.images] == [0, 1, 0]


def test_every_way_to_mark_a_region_makes_it_one_to_ignore_and_none_to_learn(
    tmp_path: Path,
) -> None:
    path = write_coco(
        tmp_path,
        [(100, 100)],
        [
            box(1, 7, 0, 0, 10, 10),
            box(1, 7, 20, 0, 10, 10, iscrowd=1),
            box(1, 7, 40, 0, 10, 10, ignore=1),
            box(1, 90, 60, 0, 10, 10),
        ],
        ignore=[{"image_id": 1, "bbox": [80, 0, 10, 10]}],
    )
    found = read_training_set(path, tmp_path, ignore_categories=["blur"])
    image = found.images[0]
    assert found.classes == ("ring", "bar")
    assert image.boxes[:, 0].tolist() == [0]
    assert sorted(image.ignore[:, 0].tolist()) == [20, 40, 60, 80]


def test_boxes_are_clipped_and_those_outside_are_counted(tmp_path: Path) -> None:
    path = write_coco(
        tmp_path,
        [(40, 30)],
        [box(1, 7, -5, -5, 10, 10), box(1, 7, 50, 0, 9, 9), box(1, 3, 1, 1, 0, 4)],
    )
    found = read_training_set(path, tmp_path)
    assert found.images[0].boxes.tolist() == [[0, 0, 5, 5]]
    assert found.images[0].labels.tolist() == [0]
    assert found.without_area == 2


def test_missing_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    path = write_coco(tmp_path, [(40, 30)] * 3, [box(1, 7, 1, 1, 5, 5)])
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").write_bytes(b"not an image")
    with pytest.raises(SourceError, match=r"2 of 3 images .*2\.png does not exist"):
        read_training_set(path, tmp_path)


def test_a_size_that_is_not_the_files_own_is_refused(tmp_path: Path) -> None:
    path = write_coco(tmp_path, [(40, 30)], [box(1, 7, 1, 1, 5, 5)])
    Image.new("RGB", (80, 60)).save(tmp_path / "1.png")
    with pytest.raises(SourceError, match="80×60 upright, annotated as 40×30"):
        read_training_set(path, tmp_path)


def test_an_image_lying_on_its_side_is_measured_upright(tmp_path: Path) -> None:
    path = write_coco(tmp_path, [(40, 30)], [box(1, 7, 1, 1, 5, 5)])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 40)).save(tmp_path / "1.png", exif=exif)
    assert read_training_set(path, tmp_path).images[0].width == 40


@pytest.mark.parametrize(
    ("annotation", "message"),
    [(box(9, 7, 1, 1, 5, 5), "image 9"), (box(1, 5, 1, 1, 5, 5), "category 5")],
)
def test_annotations_of_unlisted_things_are_refused(
    tmp_path: Path, annotation: dict[str, object], message: str
) -> None:
    path = write_coco(tmp_path, [(40, 30)], [annotation])
    with pytest.raises(ConfigError, match=message):
        read_training_set(path, tmp_path)


def test_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    path = write_coco(tmp_path, [(40, 30)], [box(1, 90, 1, 1, 5, 5)])
    with pytest.raises(SourceEmpty):
        read_training_set(path, tmp_path, ignore_categories=["blur"])


def test_a_misspelt_ignore_category_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    path = write_coco(tmp_path, [(40, 30)], [box(1, 90, 1, 1, 5, 5)])
    with pytest.raises(ConfigError, match="'blurr'") as caught:
        read_training_set(path, tmp_path, ignore_categories=["blurr"])
    assert "blur" in str(caught.value.hint)


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"images": []})])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "truth.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"truth\.json is not (JSON|a COCO detection file)"):
        read_training_set(path, tmp_path)


def test_hituav_keeps_dont_care_out_of_the_classes(data_dir: Path) -> None:
    found = read_training_set(
        data_dir / "hituav" / "val.json", data_dir / "hituav" / "images",
        ignore_categories=["DontCare"],
    )  # fmt: skip
    coco = json.loads((data_dir / "hituav" / "val.json").read_text())
    cares = [a for a in coco["annotations"] if a["category_id"] != 4]
    assert found.classes == ("Person", "Car", "Bicycle", "OtherVehicle")
    assert found.objects + found.without_area == len(cares)
    assert sum(len(i.ignore) for i in found.images) > 0
    assert len(found.images) == 290
    assert np.all([i.labels.max(initial=0) < 4 for i in found.images])


def _truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_file_is_found_and_left_out_by_name(tmp_path: Path) -> None:
    boxes = [box(n, 7, 1, 1, 5, 5) for n in range(1, 5)]
    path = write_coco(tmp_path, [(80, 60)] * 4, boxes)
    _truncated(tmp_path / "2.png")  # its header is whole, and states the right size
    with Image.open(tmp_path / "2.png") as header:
        assert header.size == (80, 60)
    with pytest.raises(SourceError, match=r"1 of 4 images cannot be used.*2\.png"):
        read_training_set(path, tmp_path)
    with pytest.raises(SourceError, match="1 of 4"):
        read_training_set(path, tmp_path, max_bad_share=0.24)
    found = read_training_set(path, tmp_path, max_bad_share=0.25)
    assert [image.file_name for image in found.images] == ["1.png", "3.png", "4.png"]
    ((name, why),) = found.left_out
    assert name == "2.png"
    assert "truncated" in why or "end" in why


def test_what_was_decoded_is_not_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.training import usable

    path = write_coco(tmp_path, [(80, 60)] * 3, [box(1, 7, 1, 1, 5, 5)])
    for number in (1, 2):  # three different files
        Image.new("RGB", (80, 60), (number, 0, 0)).save(tmp_path / f"{number}.png")
    _truncated(tmp_path / "3.png")
    decoded: list[int] = []
    real = usable.decode
    monkeypatch.setattr(
        usable, "decode", lambda data, **how: decoded.append(len(data)) or real(data, **how)
    )
    memory = tmp_path / "checked.json"

    def read() -> tuple[tuple[str, str], ...]:
        return read_training_set(path, tmp_path, max_bad_share=0.5, checked=memory).left_out

    first = read()
    assert len(decoded) == 3
    assert read() == first
    assert len(decoded) == 3
    Image.new("RGB", (80, 60), (9, 9, 9)).save(tmp_path / "3.png")  # repaired
    assert read() == ()
    assert len(decoded) == 4
    memory.write_text('{"format": 1, "images": [')  # damaged: as if it were not there
    assert read() == ()
    assert len(decoded) == 7
