"""Whatever will stop a run stops it before a worker starts, in words; a good run opens once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config.run_config import RunConfig
from pipelines.config.source import group_shards
from pipelines.exports.export import ExportRequest, export_version
from pipelines.labelling.open_run import open_run, refresh_listing
from pipelines.labelling.plan import plan_run
from pipelines.labelling.work import find_work
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from pipelines.runs.status import run_status
from storage.errors import (
    AccessDenied,
    BucketNotFound,
    CheckpointError,
    ConfigError,
    LabelfleetError,
    RunMismatch,
    SourceEmpty,
)
from storage.objects.json_records import json_record
from storage.records import StoredObject
from storage.shards.selecting import classify
from tests.support.samples.synthetic_run import boxes, commit_rows, row
from tests.support.samples.tiny_run import fill_folder, run_config
from tests.support.servers.s3 import S3Server
from workers.checkpoints.description import Description
from workers.checkpoints.file import read_checkpoint, save_checkpoint
from workers.images.preprocessing import Preprocessing
from workers.yolo_nas.network import build_network

Make = Callable[..., RunConfig]
NANO_ARCH = Path(__file__).resolve().parents[3] / "pipelines/assets/digits_nano_arch.yaml"


@pytest.fixture
def config(tmp_path: Path, nano_checkpoint: Path) -> Make:
    """Configs of six images in a folder; sections are merged in."""
    fill_folder(tmp_path / "in", 6)

    def make(**sections: Any) -> RunConfig:
        source = sections.pop("folder", tmp_path / "in")
        output = sections.pop("output", tmp_path / "out")
        return run_config(source, output, nano_checkpoint, **sections)

    return make


def refused(config: RunConfig, kind: type[LabelfleetError], *, cuda: bool = False) -> str:
    """The message; it is one readable line."""
    with pytest.raises(kind) as caught:
        open_run(config, cuda=cuda)
    assert len(caught.value.message.splitlines()) == 1, caught.value.message
    return caught.value.message


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- a good run


def test_a_run_is_created_and_then_continued_untouched(config: Make, tmp_path: Path) -> None:
    first = open_run(config(), cuda=False)
    written = snapshot(tmp_path / "out")
    assert [name for name in written if not name.startswith(".")] == ["run.json"]
    again = open_run(config(), cuda=False)
    assert snapshot(tmp_path / "out") == written
    assert again.model == first.model
    assert again.manifest.record.to_json() == first.manifest.record.to_json()


def test_frames_are_recorded_where_all_of_them_are_labelled(config: Make, tmp_path: Path) -> None:
    first = open_run(config(), cuda=False).manifest.record.inference
    assert "max_frames" not in first
    labels_all = config(source={"frames": "all", "max_frames": 9}, output=tmp_path / "all")
    assert open_run(labels_all, cuda=False).manifest.record.inference["max_frames"] == 9


def test_what_auto_meant_is_recorded(config: Make, tmp_path: Path) -> None:
    open_run(config(), cuda=False)
    written = json.loads((tmp_path / "out/run.json").read_text())
    assert written["inference"]["device"] == "cpu"
    assert written["inference"]["precision"] == "fp32"
    assert written["identity"]["licence"] == "Apache-2.0"  # the checkpoint's own
    assert [c["name"] for c in written["identity"]["categories"]] == list("0123456789")


def test_no_secret_and_no_webhook_is_in_run_json(config: Make, tmp_path: Path) -> None:
    open_run(config(notify="https://hooks.example/T0/hunter2"), cuda=False)
    assert "hunter2" not in (tmp_path / "out/run.json").read_text()


def test_relative_paths_are_meant_from_the_working_folder(
    config: Make, tmp_path: Path, nano_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cells.safetensors").write_bytes(nano_checkpoint.read_bytes())
    monkeypatch.chdir(tmp_path)
    made = config(folder="in", output="out", model={"checkpoint": "cells.safetensors"})
    run = open_run(made, cuda=False)
    assert run.source.url == f"file://{tmp_path}/in"
    assert run.manifest.url == f"file://{tmp_path}/out"
    assert run.model.checkpoint == f"file://{tmp_path}/cells.safetensors"


def test_the_same_weights_elsewhere_continue_the_run(
    config: Make, tmp_path: Path, nano_checkpoint: Path
) -> None:
    open_run(config(), cuda=False)
    (tmp_path / "moved.safetensors").write_bytes(nano_checkpoint.read_bytes())
    open_run(config(model={"checkpoint": str(tmp_path / "moved.safetensors")}), cuda=False)


def test_workers_may_begin_before_the_listing_ends(config: Make, tmp_path: Path) -> None:
    fill_folder(tmp_path / "in", 6, first=6)
    told: list[int] = []
    made = config(source={"shard_size": 4})
    run = open_run(made, cuda=False)
    assert find_work(run, made, None, told.append).total == 3
    assert told == [1, 2, 3]  # one after the other, as they were found
    told.clear()
    assert find_work(run, made, 2, told.append).total == 2
    assert told == [2]  # known from the listing before
    told.clear()
    paid = config(source={"shard_size": 4}, max_cost=1, price_per_gpu_hour=1)
    assert find_work(run, paid, None, told.append).total == 3
    assert told == []  # who waits for a listing is paid for
    for shard in find_work(run, made, None).shards:
        commit_rows(run.manifest, shard, [row(o.key, shard.shard_id) for o in shard.objects])
    assert find_work(run, made, None, told.append).total == 0
    assert told == []  # nothing is left: no worker is started


def test_a_later_listing_adds_groups_and_regroups_nothing(config: Make, tmp_path: Path) -> None:
    run = open_run(config(), cuda=False)
    listing, change = refresh_listing(run, config())
    before = {s.shard_id: [o.key for o in s.objects] for s in listing.live_shards()}
    assert sorted(map(len, before.values())) == [2, 4]
    fill_folder(tmp_path / "in", 3, first=6)
    listing, change = refresh_listing(run, config(source={"shard_size": 50}))
    after = {s.shard_id: [o.key for o in s.objects] for s in listing.live_shards()}
    assert change.shards_added == 1
    assert before.items() <= after.items()
    assert sorted(key for keys in after.values() for key in keys) == [
        f"page-{i:04d}.png" for i in range(9)
    ]


# -- source and output


def test_a_missing_source(config: Make, tmp_path: Path) -> None:
    message = refused(config(folder=tmp_path / "none"), BucketNotFound)
    assert "none" in message
    assert not (tmp_path / "out").exists()


def test_an_empty_source(config: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no image")
    message = refused(config(folder=tmp_path / "empty"), SourceEmpty)
    assert "no images or tar shards" in message
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_a_file(config: Make, tmp_path: Path) -> None:
    message = refused(config(folder=tmp_path / "in/page-0000.png"), LabelfleetError)
    assert "page-0000.png" in message


@pytest.mark.parametrize("filters", [{"include": ["*.tif"]}, {"exclude": ["*"]}, {"kind": "tar"}])
def test_filters_that_leave_nothing(config: Make, filters: dict[str, Any]) -> None:
    message = refused(config(source=filters), SourceEmpty)
    assert ("match include/exclude/keys" in message) == ("kind" not in filters)


def test_keys_narrow_the_source(config: Make, tmp_path: Path) -> None:
    (tmp_path / "keys.csv").write_text("key\npage-0001.png\npage-0005.png\nelsewhere.png\n")
    narrowed = config(source={"keys": str(tmp_path / "keys.csv"), "max_absent_keys": 0.5})
    run = open_run(narrowed, cuda=False)
    listing, _ = refresh_listing(run, narrowed)
    assert run_status(run.manifest).left_out == {"filtered": 4, "keys that are not there": 1}
    keys = [o.key for shard in listing.live_shards() for o in shard.objects]
    assert keys == ["page-0001.png", "page-0005.png"]


@pytest.mark.parametrize("output", ["in", "in/", "in/labels", ".", "link", "link/labels"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_an_output_that_overlaps_the_source(
    config: Make, tmp_path: Path, output: str, scheme: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = snapshot(tmp_path)
    message = refused(config(output=f"{scheme}{tmp_path}/{output}"), ConfigError)
    assert "overlap" in message
    assert snapshot(tmp_path) == before


def test_an_output_that_cannot_be_written(config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(config(output=tmp_path / "file/out"), LabelfleetError)


def test_an_output_that_may_not_be_written(config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "readonly"
    folder.mkdir()
    folder.chmod(0o555)
    if os.geteuid() == 0:
        folder = Path("/proc/labelfleet")  # root may write anywhere else
    refused(config(output=folder / "out"), LabelfleetError)


def test_something_else_at_the_output(config: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for content in ("{}", "not json", "[]", '{"version": 2}'):
        (tmp_path / "out/run.json").write_text(content)
        assert "run.json" in refused(config(), ConfigError)
        assert (tmp_path / "out/run.json").read_text() == content


@pytest.mark.slow
def test_a_bucket_that_does_not_exist(config: Make, moto_s3: S3Server) -> None:
    storage = {"endpoint_url": moto_s3.endpoint_url, "attempts": 2}
    message = refused(config(folder="s3://no-such-bucket/x", storage=storage), BucketNotFound)
    assert "no-such-bucket" in message
    message = refused(config(output="s3://no-such-bucket/x", storage=storage), BucketNotFound)
    assert "no-such-bucket" in message


@pytest.mark.slow
def test_credentials_that_are_wrong(
    config: Make, weed_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = weed_s3.fresh_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    storage = {"endpoint_url": weed_s3.endpoint_url, "attempts": 2}
    for where in ({"folder": f"s3://{bucket}/in"}, {"output": f"s3://{bucket}/out"}):
        message = refused(config(storage=storage, **where), AccessDenied)
        assert bucket in message
        assert "hunter2" not in message


# -- the model


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"model": {"score_floor": 0.3}}, ["score_floor (0.05 there, 0.3 now)"]),
        ({"model": {"nms_iou": 0.5, "max_detections": 9}}, ["nms_iou", "max_detections"]),
        ({"model": {"keep": ["3"]}}, ["keep"]),
        ({"max_pixels": 1000}, ["max_pixels"]),
        ({"source": {"frames": "all"}}, ["max_frames"]),
    ],
)
def test_a_run_with_another_inference_config_is_refused_with_the_keys_named(
    config: Make, tmp_path: Path, sections: dict[str, Any], named: list[str]
) -> None:
    open_run(config(), cuda=False)
    before = snapshot(tmp_path / "out")
    message = refused(config(**sections), RunMismatch)
    assert all(name in message for name in named)
    assert "source" not in message
    assert snapshot(tmp_path / "out") == before


def test_a_run_of_another_source_is_refused(config: Make, tmp_path: Path) -> None:
    open_run(config(), cuda=False)
    fill_folder(tmp_path / "other", 1)
    assert "source.url" in refused(config(folder=tmp_path / "other"), RunMismatch)


def test_settings_that_move_no_box_may_change(config: Make) -> None:
    open_run(config(), cuda=False)
    open_run(
        config(
            workers={"batch_size": 2, "count": 1},
            policy={"accept": 0.9},
            attempts=5,
            source={"shard_size": 9},
        ),
        cuda=False,
    )


def test_a_run_made_on_gpus_is_not_continued_without(config: Make, tmp_path: Path) -> None:
    open_run(config(), cuda=False)
    path = tmp_path / "out/run.json"
    fields = json.loads(path.read_text())
    fields["inference"]["device"] = "cuda"
    path.write_bytes(json_record(fields))
    assert "created on GPUs" in refused(config(), ConfigError)


def test_a_wrong_number_of_classes(config: Make, tmp_path: Path) -> None:
    message = refused(config(model={"classes": ["a", "b", "c"]}), ConfigError)
    assert "3 names" in message
    assert "10" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.safetensors", None),
        ("zeros.safetensors", bytes(4096)),
        ("empty.pth", b""),
        ("text.pth", b"<html>404</html>"),
        # A pickle that calls os.system when it is loaded.
        ("bomb.pth", b"cos\nsystem\n(S'touch bomb-went-off'\ntR."),
    ],
)
def test_a_checkpoint_that_is_corrupt_or_hostile(
    config: Make, tmp_path: Path, nano_checkpoint: Path, name: str, content: bytes | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    raw = nano_checkpoint.read_bytes()[:100_000] if content is None else content
    (tmp_path / name).write_bytes(raw)
    message = refused(config(model={"checkpoint": str(tmp_path / name)}), CheckpointError)
    assert name in message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "bomb-went-off").exists()


def test_a_missing_checkpoint(config: Make, tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    assert "none.safetensors" in refused(config(model={"checkpoint": str(path)}), CheckpointError)


def test_another_digest_than_expected(config: Make) -> None:
    assert "sha256" in refused(config(model={"sha256": "0" * 64}), CheckpointError)


# -- shards


suffixes = st.sampled_from([".tar", ".tar.gz", ".jpg", ".png"])
listings = st.lists(
    st.builds(lambda n, s: StoredObject(f"{n:05d}{s}", n + 1, "e"), st.integers(0, 9999), suffixes),
    unique_by=lambda o: o.key,
).map(lambda found: sorted(found, key=lambda o: o.key))


@given(listings, st.integers(1, 7))
def test_grouping_takes_every_object_once(listed: list[StoredObject], size: int) -> None:
    shards = list(group_shards(iter(listed), size))
    keys = [o.key for shard in shards for o in shard.objects]
    assert sorted(keys) == [o.key for o in listed]
    assert len({shard.shard_id for shard in shards}) == len(shards)
    for shard in shards:
        assert {classify(o.key) for o in shard.objects} == {
            "tar" if shard.kind == "tar" else "image"
        }
        assert len(shard.objects) <= (1 if shard.kind == "tar" else size)
    partial = [s for s in shards if s.kind == "images" and len(s.objects) < size]
    assert len(partial) <= 1


# -- what was assumed about the model


@pytest.fixture
def silent(nano_checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """The model section for the same weights in a file that says nothing about itself."""
    known = read_checkpoint(nano_checkpoint)
    torch.save({"net": known.load_state_dict()}, tmp_path / "silent.pth")
    (tmp_path / "arch.yaml").write_text(str(known.arch_params))
    return {
        "checkpoint": str(tmp_path / "silent.pth"),
        "arch": str(tmp_path / "arch.yaml"),
        "classes": list("0123456789"),
        "runtime": "torch",
    }


def test_an_assumed_preprocessing_is_said_in_run_json_and_plan(
    config: Make, silent: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assumed, notes = config(model=silent), list[str]()
    (remark,) = plan_run(assumed).model_remarks
    assert remark.startswith("silent.pth does not say how its training images were prepared")
    open_run(assumed, cuda=False, note=notes.append)
    assert json.loads((tmp_path / "out/run.json").read_text())["remarks"] == [remark]
    assert notes == [f"note: {remark}"]
    assert capsys.readouterr() == ("", "")  # the caller decides what is printed
    assert open_run(assumed, cuda=False).manifest.record.remarks == (remark,)


def test_a_stated_preprocessing_counts(
    config: Make, silent: dict[str, Any], tmp_path: Path
) -> None:
    stated = {"size": [256, 320], "fit": [252, 316], "place": "top_left", "channels": "BGR"}
    run = open_run(config(model={**silent, "preprocessing": stated}), cuda=False)
    assert run.model.preprocessing == Preprocessing(
        size=(256, 320), resize_to=(252, 316), padding="bottom_right", channels="BGR"
    )
    assert json.loads((tmp_path / "out/run.json").read_text())["remarks"] == []


def test_a_run_of_a_version_without_remarks_continues(config: Make, tmp_path: Path) -> None:
    open_run(config(), cuda=False)
    record = tmp_path / "out/run.json"
    fields = json.loads(record.read_text())
    del fields["remarks"], fields["digest"]  # nor did that version write one
    record.write_text(json.dumps(fields))
    assert open_run(config(), cuda=False).manifest.record.remarks == ()


def test_the_category_ids_of_the_training_set_travel_to_the_export(
    config: Make, tmp_path: Path
) -> None:
    """COCO's ids are no positions: 7 and 90 are what a person finds in the file again."""
    arch = json.dumps(yaml.safe_load(NANO_ARCH.read_text()))
    path = tmp_path / "trained.safetensors"
    said = Description(
        name="yolo_nas_s", arch_params=arch, classes=("train", "toothbrush"), official_ids=(7, 90),
        licence=None, preprocessing=Preprocessing(size=(64, 64), resize_to=(60, 60)), training={},
    )  # fmt: skip
    save_checkpoint(path, build_network("yolo_nas_s", arch, 2).state_dict(), said)
    asked = config(model={"checkpoint": str(path)})
    run = open_run(asked, cuda=False)
    listing, _ = refresh_listing(run, asked)
    for shard in listing.live_shards():
        found = boxes([(1, 1, 9, 9), (20, 20, 40, 40)], [0.9, 0.8], [0, 1])
        commit_rows(run.manifest, shard, [row(o.key, shard.shard_id, found) for o in shard.objects])
    decide_run(run.manifest, Policy(accept=0.5))
    export_version(run.manifest, str(tmp_path / "coco"), ExportRequest("coco"))
    coco = json.loads((tmp_path / "coco" / "annotations.json").read_text())
    assert {c["id"]: c["name"] for c in coco["categories"]} == {7: "train", 90: "toothbrush"}
    assert {a["category_id"] for a in coco["annotations"]} == {7, 90}
