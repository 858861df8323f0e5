"""Several runs become one: joined by content, continued, read by every command that reads a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from pipelines.fusion.fuse import fuse_runs
from pipelines.fusion.record import FuseOptions
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import POLICY_KEY, Calibration, Curve, Policy
from pipelines.routing.route import route_run
from pipelines.runs.status import run_status
from pipelines.runs.verify import verify_run
from storage.errors import ConfigError, RunMismatch
from storage.records import AnnotationRow, Detections, Shard
from storage.review.queue import read_queue
from storage.runs.live_rows import live_rows
from storage.runs.manifest import RUN_KEY, Manifest, RunRecord
from storage.stores.memory import MemoryStore
from tests.support.samples.synthetic_run import (
    CLASSES,
    boxes,
    commit_rows,
    image_shard,
    make_run,
    row,
)

Drawn = Mapping[str, Detections]
BOX = (10.0, 10.0, 50.0, 50.0)
POLICY = Policy(accept=0.6, reject=0.1)


def sha_of(key: str) -> str:
    return f"{sum(key.encode()):064x}"


def rows_of(shard: Shard, drawn: Drawn) -> list[AnnotationRow]:
    return [
        replace(
            row(o.key, shard.shard_id, drawn.get(o.key, Detections.empty(3))),
            sha256=sha_of(o.key.rsplit("/", 1)[-1]),
            phash=(2**64 - 1) // (ord(o.key[-5]) - 90),  # no near duplicates
        )
        for o in shard.objects
    ]


def run_of(
    shards: Sequence[Shard],
    drawn: Drawn,
    *,
    unlabelled: Sequence[Shard] = (),
    classes: Sequence[str] = CLASSES,
) -> Manifest:
    labelled = {shard: rows_of(shard, drawn) for shard in shards}
    return make_run(MemoryStore(), labelled, unlabelled=unlabelled, classes=classes)


ONE, TWO = image_shard("a.jpg", "b.jpg"), image_shard("c.jpg", "d.jpg")


def two_runs() -> tuple[Manifest, Manifest]:
    first = run_of(
        [ONE, TWO], {"a.jpg": boxes([BOX], [0.9], [0]), "c.jpg": boxes([BOX], [0.8], [1])}
    )
    other = run_of(
        [ONE, TWO],
        {"a.jpg": boxes([(10, 10, 50, 48)], [0.6], [0]), "d.jpg": boxes([BOX], [0.7], [2])},
    )
    return first, other


def opened(store: MemoryStore) -> Manifest:
    return Manifest(store, RunRecord.from_json(store.get(RUN_KEY)))


def fused_rows(manifest: Manifest) -> dict[str, AnnotationRow]:
    return {one.image_id: one for one in live_rows(manifest)}


def test_rows_carry_votes_and_agreement() -> None:
    output = MemoryStore()
    done = fuse_runs(two_runs(), output)
    assert (done.committed, done.images, done.detections, done.exit_code) == (2, 4, 3, 0)
    rows = fused_rows(opened(output))
    assert list(rows) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    a, d = rows["a.jpg"].detections, rows["d.jpg"].detections
    assert a.run_scores is not None
    assert d.run_scores is not None
    assert_allclose(a.run_scores, [[0.9, 0.6]], rtol=1e-6)
    assert_allclose(a.boxes, [[10, 10, 50, (0.9 * 50 + 0.6 * 48) / 1.5]], rtol=1e-6)
    assert_allclose(a.scores, [0.75], rtol=1e-6)
    assert_allclose(a.agreement, [38 / 40 * 0.6 / 0.9], rtol=1e-5)
    assert_allclose(d.run_scores, [[np.nan, 0.7]], rtol=1e-6)
    assert_allclose(d.agreement, [0.0])
    assert a.box_std is None
    assert a.anchor is None
    assert len(rows["b.jpg"].detections) == 0


def test_a_fused_run_is_a_run() -> None:
    output = MemoryStore()
    fuse_runs(two_runs(), output)
    manifest = opened(output)
    verified = verify_run(manifest, complete=True)
    assert not verified.differences
    assert verified.exit_code == 0
    status = run_status(manifest)
    assert (status.listed, status.committed, status.images["ok"]) == (2, 2, 4)
    assert status.invocation is not None
    assert status.invocation.outcome == "done"
    route_run(manifest, budget="4 images", policy=POLICY, invocation="i1", audit=0)
    reasons = {item.image_id: {r.signal for r in item.reasons} for item in read_queue(output)}
    assert "disagreement" in reasons["d.jpg"]
    version = decide_run(manifest, POLICY)
    assert version.counts["labels"] == 1  # the other two have half their score


def test_runs_with_other_shards_are_joined_by_content() -> None:
    first, _ = two_runs()
    other = run_of(
        [image_shard("x/c.jpg"), image_shard("x/a.jpg", "x/b.jpg", "x/d.jpg", "x/other.jpg")],
        {"x/a.jpg": boxes([BOX], [0.5], [0])},
    )
    output = MemoryStore()
    done = fuse_runs([first, other], output)
    assert done.alone == {}
    a = fused_rows(opened(output))["a.jpg"].detections
    assert_allclose(a.run_scores, [[0.9, 0.5]], rtol=1e-6)


def test_an_image_that_a_run_lacks_is_fused_from_the_rest_and_says_so() -> None:
    first, _ = two_runs()
    other = run_of([image_shard("c.jpg")], {})
    output = MemoryStore()
    done = fuse_runs([first, other], output)
    shown = f"cells at {other.url.rpartition('/')[2]}"  # both runs are named cells
    assert done.alone == {shown: 3}
    a = fused_rows(opened(output))["a.jpg"]
    assert a.warning == f"no vote: {shown}"
    assert_allclose(a.detections.scores, [0.9], rtol=1e-6)
    assert a.detections.agreement is not None
    assert np.isnan(a.detections.agreement).all()
    assert_allclose(a.detections.run_scores, [[0.9, np.nan]], rtol=1e-6)


def test_runs_of_one_name_are_told_apart_by_their_places() -> None:
    first, other = two_runs()
    done = fuse_runs([first, other], MemoryStore())
    ends = [run.url.rpartition("/")[2] for run in (first, other)]
    assert f"cells at {ends[0]}, cells at {ends[1]}" in done.remarks[1]
    assert done.name == "2xcells"
    renamed = replace(other.record, identity=replace(other.record.identity, name="june"))
    done = fuse_runs([first, Manifest(other.store, renamed)], MemoryStore())
    assert ": cells, june (" in done.remarks[1]
    assert done.name == "cells+june"


def test_shards_wait_for_a_run_that_is_not_finished_and_are_fused_later() -> None:
    first, _ = two_runs()
    other = run_of([ONE], {}, unlabelled=[TWO])
    output = MemoryStore()
    done = fuse_runs([first, other], output)
    assert (done.committed, done.waiting, done.exit_code) == (1, 1, 3)
    commit_rows(other, TWO, rows_of(TWO, {"d.jpg": boxes([BOX], [0.7], [2])}))
    again = fuse_runs([first, other], output)
    assert (again.committed, again.before, again.waiting, again.exit_code) == (1, 1, 0, 0)
    assert len(fused_rows(opened(output))) == 4


def test_scores_are_calibrated_where_a_calibration_was_fitted() -> None:
    first, other = two_runs()
    curve = Curve(scores=(0.0, 1.0), probabilities=(0.0, 0.5))
    policy = Policy(
        accept=0.3,
        reject=0.1,
        calibration=Calibration(all=curve, classes={}, iou=0.5),
        model_sha256=first.record.identity.model_sha256,
    )
    first.store.put(POLICY_KEY, policy.to_yaml().encode())
    output = MemoryStore()
    done = fuse_runs([first, other], output)
    a = fused_rows(opened(output))["a.jpg"].detections
    assert_allclose(a.run_scores, [[0.45, 0.6]], rtol=1e-6)
    assert any("not calibrated: cells" in remark for remark in done.remarks)
    raw = MemoryStore()
    fuse_runs([first, other], raw, FuseOptions(calibrated=False))
    a = fused_rows(opened(raw))["a.jpg"].detections
    assert_allclose(a.run_scores, [[0.9, 0.6]], rtol=1e-6)


def test_class_names_are_joined_by_name_mapped_or_refused() -> None:
    first, _ = two_runs()
    drawn = {"a.jpg": boxes([BOX], [0.6], [2])}
    other = run_of([ONE, TWO], drawn, classes=("WBC", "thrombocyte", "erythrocyte"))
    with pytest.raises(ConfigError, match="thrombocyte, erythrocyte") as refused:
        fuse_runs([first, other], MemoryStore())
    assert refused.value.hint is not None
    assert "--map 'thrombocyte=NAME'" in refused.value.hint
    output = MemoryStore()
    renamed = {"erythrocyte": "RBC", "thrombocyte": ""}
    fuse_runs([first, other], output, FuseOptions(renamed=renamed))
    a = fused_rows(opened(output))["a.jpg"].detections
    assert_allclose(a.run_scores, [[0.9, 0.6]], rtol=1e-6)
    with pytest.raises(ConfigError, match="none of the runs has: car"):
        fuse_runs([first, other], MemoryStore(), FuseOptions(renamed={"car": "RBC"}))


def test_runs_that_share_no_image_are_refused_and_nothing_is_written() -> None:
    first, _ = two_runs()
    stranger = run_of([image_shard("q.jpg")], {})
    output = MemoryStore()
    with pytest.raises(ConfigError, match="shares no image with"):
        fuse_runs([first, stranger], output)
    assert "run.json" not in [o.key for o in output.list()]
    assert not [o for o in output.list() if o.key.startswith(("source/", "annotations/"))]


def test_wrong_use_is_said_in_a_line() -> None:
    first, other = two_runs()
    with pytest.raises(ConfigError, match="one run alone"):
        fuse_runs([first], MemoryStore())
    with pytest.raises(ConfigError, match="given twice"):
        fuse_runs([first, first], MemoryStore())
    with pytest.raises(ConfigError, match="one of the runs"):
        fuse_runs([first, other], first.store)
    with pytest.raises(ConfigError, match="1 weights for 2 runs"):
        fuse_runs([first, other], MemoryStore(), FuseOptions(weights=(1.0,)))
    output = MemoryStore()
    fuse_runs([first, other], output)
    with pytest.raises(RunMismatch, match=r"fusion\.iou"):
        fuse_runs([first, other], output, FuseOptions(iou=0.7))


def test_a_kill_between_shards_loses_nothing() -> None:
    runs, output = two_runs(), MemoryStore()

    def killed(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse_runs(runs, output, progress=killed)
    assert len(opened(output).committed()) == 1
    again = fuse_runs(runs, output)
    assert (again.before, again.committed) == (1, 1)
    whole = MemoryStore()
    fuse_runs(two_runs(), whole)
    one = fused_rows(opened(output))
    two = fused_rows(opened(whole))
    assert one.keys() == two.keys()
    for key, found in one.items():
        assert_allclose(found.detections.boxes, two[key].detections.boxes)
