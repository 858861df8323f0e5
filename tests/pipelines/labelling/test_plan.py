"""plan: exact where it can be, an honest estimate elsewhere, and it touches nothing."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from pipelines.config.run_config import RunConfig
from pipelines.labelling.open_run import open_run, refresh_listing
from pipelines.labelling.plan import Plan, plan_run
from pipelines.labelling.view import plan_table
from storage.errors import ConfigError, RunMismatch, SourceEmpty
from storage.records import Shard
from storage.runs import ledger
from storage.runs.ledger import LedgerEntry, LedgerWriter
from storage.runs.manifest import RUN_KEY, Manifest
from tests.support.samples.synthetic_run import commit_rows, row
from tests.support.samples.tar_samples import tar_of, zipped
from tests.support.samples.tiny_run import fill_folder, run_config


class Bench:
    """A source folder, an output, and runs made between them."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self.checkpoint = folder, checkpoint

    def config(self, **sections: Any) -> RunConfig:
        return run_config(self.folder / "in", self.folder / "out", self.checkpoint, **sections)

    def tars(self, *images: int) -> None:
        (self.folder / "in").mkdir(exist_ok=True)
        for number, count in enumerate(images):
            members = [(f"{i}.png", bytes(2000)) for i in range(count)]
            (self.folder / f"in/{number:03d}.tar").write_bytes(tar_of(*members))

    def listed(self) -> tuple[Manifest, list[Shard]]:
        """The run as created and listed, with nothing labelled."""
        run = open_run(self.config(), cuda=False)
        listing, _ = refresh_listing(run, self.config())
        return run.manifest, list(listing.live_shards())

    def snapshot(self) -> dict[str, tuple[int, int]]:
        found = sorted(self.folder.rglob("*"))
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


@pytest.fixture
def bench(tmp_path: Path, nano_checkpoint: Path) -> Bench:
    return Bench(tmp_path, nano_checkpoint)


def label(manifest: Manifest, shard: Shard) -> None:
    """Commit the shard as a worker would."""
    rows = [row(o.key, shard.shard_id) for o in shard.objects]
    commit_rows(manifest, shard, rows)


def counts(plan: Plan) -> tuple[int, int, int, int]:
    return plan.shards, plan.images, plan.shards_left, plan.images_left


def shown(plan: Plan) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(plan_table(plan))
    return captured.get()


def test_what_is_left_out_is_counted_and_said(bench: Bench) -> None:
    fill_folder(bench.folder / "in", 2)
    for name in ("a.txt", "b.txt", "README"):
        (bench.folder / "in" / name).write_text("no image")
    planned = plan_run(bench.config())
    assert planned.left_out == {".txt": 2, "no suffix": 1}
    assert planned.to_fields()["left_out"] == {".txt": 2, "no suffix": 1}


def test_loose_images_are_counted_exactly(bench: Bench) -> None:
    fill_folder(bench.folder / "in", 10)
    plan = plan_run(bench.config())
    assert counts(plan) == (3, 10, 3, 10)
    assert plan.images_exact
    assert not plan.output_exists
    nbytes = sum(p.stat().st_size for p in (bench.folder / "in").iterdir())
    assert plan.gib == pytest.approx(nbytes / 2**30)


def test_few_tars_are_counted_exactly(bench: Bench) -> None:
    bench.tars(5, 7)
    fill_folder(bench.folder / "in", 3)
    plan = plan_run(bench.config())
    assert counts(plan) == (3, 15, 3, 15)
    assert plan.images_exact


def test_frames_of_tars_are_counted_and_of_loose_files_unknown(bench: Bench) -> None:
    (bench.folder / "in").mkdir()
    file = io.BytesIO()
    pages = [Image.new("L", (9, 9), shade) for shade in range(5)]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    tar = tar_of(("a.tif", file.getvalue()), ("b.png", b"no picture"))
    (bench.folder / "in/a.tar").write_bytes(tar)
    config = bench.config(source={"frames": "all"})
    planned = plan_run(config)
    assert (planned.images, planned.images_exact) == (6, True)
    assert plan_run(bench.config()).images == 2
    (bench.folder / "in/loose.tif").write_bytes(file.getvalue())
    planned = plan_run(config)
    assert (planned.images, planned.images_exact) == (7, False)


def test_many_tars_are_estimated_from_a_sample_and_said_to_be(bench: Bench) -> None:
    bench.tars(*[20] * 12)
    plan = plan_run(bench.config())
    assert plan.shards == 12
    assert not plan.images_exact
    assert plan.images == pytest.approx(240, rel=0.05)
    assert "~" in shown(plan)


def test_compressed_and_cut_tars_are_counted_as_far_as_they_go(bench: Bench) -> None:
    (bench.folder / "in").mkdir()
    whole = tar_of(*[(f"{i}.png", bytes(2000)) for i in range(8)])
    (bench.folder / "in/a.tar.gz").write_bytes(zipped(whole))
    (bench.folder / "in/b.tar").write_bytes(whole[: len(whole) // 2])
    assert 8 < plan_run(bench.config()).images < 16


def test_a_tar_that_alone_cannot_be_read_ends_no_plan_as_it_ends_no_run(bench: Bench) -> None:
    bench.tars(5, 7)
    (bench.folder / "in/002.tar").touch()
    plan = plan_run(bench.config())
    assert (plan.shards, plan.images, plan.exit_code) == (3, 12, 0)
    assert plan.unreadable == ("002.tar is not a tar archive: it is empty",)
    assert "002.tar is not a tar archive: it is empty; the run puts" in shown(plan)


@pytest.mark.parametrize("exists", [False, True])
def test_it_touches_nothing(bench: Bench, exists: bool) -> None:
    bench.tars(4, 4, 4, 4)
    if exists:
        manifest, shards = bench.listed()
        label(manifest, shards[0])
        bench.tars(4, 4, 4, 4, 6)
    before = bench.snapshot()
    plan_run(bench.config())
    assert bench.snapshot() == before


def test_what_is_committed_is_not_left_to_do(bench: Bench) -> None:
    fill_folder(bench.folder / "in", 10)
    manifest, shards = bench.listed()
    label(manifest, shards[0])
    plan = plan_run(bench.config())
    done = len(shards[0].objects)
    assert counts(plan) == (3, 10, 2, 10 - done)
    assert plan.output_exists
    for shard in shards[1:]:
        label(manifest, shard)
    plan = plan_run(bench.config())
    assert counts(plan) == (3, 10, 0, 0)
    assert plan.gib_left == 0


def test_images_that_were_missing_are_told_apart_from_what_is_left(bench: Bench) -> None:
    fill_folder(bench.folder / "in", 4)
    manifest, (shard,) = bench.listed()
    assert plan_run(bench.config()).missing == 0
    rows = [row(o.key, shard.shard_id) for o in shard.objects]
    rows[0] = replace(rows[0], status="missing", error="it is gone")
    commit_rows(manifest, shard, rows)
    plan = plan_run(bench.config())
    assert (plan.images_left, plan.missing) == (0, 1)
    assert "1 image that could not be read before; `run` looks again" in shown(plan)


def test_damaged_results_stop_no_plan(bench: Bench) -> None:
    fill_folder(bench.folder / "in", 4)
    manifest, (shard,) = bench.listed()
    label(manifest, shard)
    (rows,) = (bench.folder / "out/annotations").glob("*.parquet")
    rows.write_bytes(rows.read_bytes()[:-9])
    plan = plan_run(bench.config())
    assert (plan.images, plan.images_left, plan.missing) == (4, 0, None)
    assert "`labelfleet verify` says which" in shown(plan)


def test_new_changed_and_deleted_images_count_as_the_next_run_would_see_them(bench: Bench) -> None:
    keys = fill_folder(bench.folder / "in", 8)
    manifest, shards = bench.listed()
    for shard in shards:
        label(manifest, shard)
    fill_folder(bench.folder / "in", 3, first=8)
    (bench.folder / "in" / keys[0]).unlink()
    (bench.folder / "in" / keys[1]).write_bytes((bench.folder / "in" / keys[2]).read_bytes())
    config = bench.config(source={"max_drop": 1})  # one is gone on purpose
    planned = plan_run(config)
    assert (planned.images, planned.images_left) == (10, 4)
    run = open_run(config, cuda=False)
    listing, change = refresh_listing(run, config)
    assert change.shards_added == planned.shards_left
    committed = manifest.committed()
    new = [s for s in listing.live_shards() if s.shard_id not in committed]
    assert sum(len(s.objects) for s in new) == planned.images_left


def measured(manifest: Manifest, *, gpus: float, workers: int = 2) -> None:
    """An invocation: start-up of 100 s, then 60 images in 30 s."""
    writer = LedgerWriter(manifest.store, "20260131T120000Z-1f3a9c")
    writer.write(LedgerEntry("start", 0.0, note={"workers": workers, "gpus": gpus}))
    writer.write(LedgerEntry("ready", 100.0, note={"alive": 1}))
    writer.write(LedgerEntry("ready", 101.0, note={"alive": 2}))
    for at, shard_id in ((115.0, "a"), (130.0, "b")):
        writer.write(LedgerEntry("shard", at, shard_id=shard_id, counts={"ok": 29, "missing": 1}))
    writer.write(LedgerEntry("end", 130.0, note={"outcome": "done"}))
    writer.flush()


def test_the_ledgers_of_a_run_are_read_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_folder(bench.folder / "in", 10)
    manifest, _ = bench.listed()
    measured(manifest, gpus=1)
    read, parts = list[str](), ledger.ledger_parts

    def noted(store: Any, invocation: str) -> Any:
        read.append(invocation)
        return parts(store, invocation)

    monkeypatch.setattr(ledger, "ledger_parts", noted)
    assert plan_run(bench.config()).images_per_s is not None
    assert read == ledger.invocations(manifest.store)


def test_hours_come_only_from_a_measured_run(bench: Bench) -> None:
    fill_folder(bench.folder / "in", 10)
    plan = plan_run(bench.config(price_per_gpu_hour=3))
    assert (plan.images_per_s, plan.hours_left, plan.cost_left) == (None, None, None)
    assert "unknown until this run was measured" in shown(plan)


def test_hours_and_cost_at_the_measured_pace_without_the_start_up(bench: Bench) -> None:
    fill_folder(bench.folder / "in", 10)
    manifest, _ = bench.listed()
    measured(manifest, gpus=2)
    plan = plan_run(bench.config(price_per_gpu_hour=3))
    assert plan.images_per_s == pytest.approx(2.0)
    assert plan.measured_workers == 2
    assert plan.hours_left == pytest.approx(5 / 3600)
    assert plan.cost_left == pytest.approx(5 / 3600 * 3 * 2)
    assert "2 workers" in shown(plan)


def test_a_second_run_costs_all_images_again_and_a_new_run_is_planned_like_a_measured_one(
    bench: Bench,
) -> None:
    fill_folder(bench.folder / "in", 10)
    manifest, shards = bench.listed()
    measured(manifest, gpus=2)
    for shard in shards:
        label(manifest, shard)
    plan = plan_run(bench.config(price_per_gpu_hour=3))
    assert (plan.hours_left, plan.like) == (0, None)
    assert plan.hours_second == pytest.approx(5 / 3600)  # all ten, at two a second
    assert plan.cost_second == pytest.approx(5 / 3600 * 3 * 2)
    assert "a second run over all images" in shown(plan)
    config = bench.config(price_per_gpu_hour=3, model={"view": {"flip": True}})
    second = config.model_copy(update={"output": str(bench.folder / "second")})
    assert plan_run(second).hours_left is None
    like = plan_run(second, manifest)
    assert (like.hours_left, like.like) == (pytest.approx(5 / 3600), manifest.url)
    assert "as measured in" in shown(like)


def test_without_a_price_or_a_gpu_no_cost_is_stated(bench: Bench) -> None:
    fill_folder(bench.folder / "in", 10)
    manifest, _ = bench.listed()
    measured(manifest, gpus=0)
    assert plan_run(bench.config(price_per_gpu_hour=3)).cost_left is None
    assert plan_run(bench.config()).cost_left is None


def test_an_invocation_that_labelled_nothing_is_not_measured(bench: Bench) -> None:
    fill_folder(bench.folder / "in", 10)
    manifest, _ = bench.listed()
    measured(manifest, gpus=1)
    later = LedgerWriter(manifest.store, "20260201T120000Z-000000")
    later.write(LedgerEntry("start", 0.0, note={"workers": 1}))
    later.flush()
    assert plan_run(bench.config()).images_per_s == pytest.approx(2.0)


def test_an_output_of_another_run_is_refused_as_the_run_refuses_it(bench: Bench) -> None:
    fill_folder(bench.folder / "in", 3)
    bench.listed()
    before = bench.snapshot()
    fill_folder(bench.folder / "other", 3)
    for sections, named in (
        ({"source": {"url": str(bench.folder / "other")}}, "source.url"),
        ({"model": {"score_floor": 0.2}}, r"score_floor \(0\.05 there, 0\.2 now\)"),
        ({"model": {"precision": "bf16"}}, "precision"),
        ({"source": {"frames": "all"}}, "frames"),
    ):
        config = bench.config(**sections)
        with pytest.raises(RunMismatch, match=named) as planned:
            plan_run(config)
        with pytest.raises(RunMismatch) as run:
            open_run(config, cuda=False)
        assert planned.value.message == run.value.message
    assert {p: s for p, s in bench.snapshot().items() if p in before} == before


def test_a_run_of_another_machines_runtime_is_planned_here(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan needs neither the GPU nor the runtime that the run was created with."""
    fill_folder(bench.folder / "in", 3)
    manifest, _ = bench.listed()
    there = {**manifest.record.inference, "device": "cuda", "runtime": "tensorrt"}
    there["precision"] = "fp16"
    manifest.store.put(RUN_KEY, replace(manifest.record, inference=there).to_json())
    config = bench.config(model={"runtime": "auto", "precision": "auto"})
    assert plan_run(config).output_exists


def test_what_would_stop_the_run_stops_the_plan(bench: Bench) -> None:
    (bench.folder / "in").mkdir()
    with pytest.raises(SourceEmpty):
        plan_run(bench.config())
    fill_folder(bench.folder / "in", 1)
    (bench.folder / "out").mkdir()
    (bench.folder / "out/run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json"):
        plan_run(bench.config())
