"""A suite: exports read as they are, each set measured once, continued, averaged by domain."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import parse_config
from pipelines.demo.run import checkpoint_path
from pipelines.dispatch.tally import Caller
from pipelines.evaluation.evaluate import evaluate_run
from pipelines.labelling.open_run import open_run
from pipelines.labelling.work import find_work
from pipelines.suite.config import SuiteConfig, load_suite_config
from pipelines.suite.result import SetResult, SuiteSummary
from pipelines.suite.run import run_suite
from pipelines.suite.splits import ANNOTATIONS, roboflow_splits
from pipelines.suite.view import markdown
from storage.errors import ConfigError, Interrupted, StorageError
from tests.support.patience import patient
from tests.support.samples.exports import write_export
from workers.labelling.assemble import open_labeller
from workers.spec import WorkerSpec

ARCH = checkpoint_path().with_name("digits_nano_arch.yaml")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two exports."""
    folder = tmp_path_factory.mktemp("exports")
    for seed, name in enumerate(("notes", "scans")):
        write_export(folder / f"made-{name}", seed=seed).rename(folder / name)
    return folder


def suite(output: Path, **fields: Any) -> SuiteConfig:
    given = {"output": str(output), "model": {"checkpoint": str(checkpoint_path())}, **fields}
    given["model"] = {"runtime": "torch", **given["model"]}
    return parse_config(SuiteConfig, given, where="suite")


class InProcess:
    """Labels in this process, without Ray; keeps what it was asked for."""

    def __init__(self, failing: str = "") -> None:
        self.runs: list[str] = []
        self.failing = failing

    def __call__(self, config: RunConfig, caller: Caller) -> None:
        self.runs.append(config.name)
        if config.name == self.failing:
            raise StorageError("the disk is full")
        run = open_run(config, cuda=False)
        labeller = open_labeller(WorkerSpec(run.model, run.source.url, run.manifest.url))
        try:
            for shard in find_work(run, config, None).shards:
                labeller.label(shard, f"try-{shard.shard_id}")
        finally:
            labeller.close()


@pytest.mark.slow
def test_exports_are_measured_as_they_are_and_averaged_by_domain(
    exports: Path, tmp_path: Path
) -> None:
    config = suite(tmp_path, exports=str(exports), domains={"paper": ["notes", "scans"]})
    label = InProcess()
    done = run_suite(config, label=label)
    assert label.runs == ["notes", "scans"]
    assert [(one.name, one.domain, one.images, one.classes) for one in done.sets] == [
        ("notes", "paper", 6, 10), ("scans", "paper", 6, 10),
    ]  # fmt: skip
    for one in done.sets:  # the figures are those of `evaluate` on the export's own file
        run = tmp_path / one.name / "run"
        found = evaluate_run(_manifest(run), exports / one.name / "test" / ANNOTATIONS)
        assert one.map_ == pytest.approx(found.map_)
        assert one.map50 == pytest.approx(found.map50)
        assert one.map50 > 0.5
    (domain,) = done.domains
    assert domain.map_ == pytest.approx(sum(one.map_ or 0 for one in done.sets) / 2)
    assert done.mean is not None
    assert (done.mean.sets, done.mean.map50) == (2, pytest.approx(domain.map50))
    page = (tmp_path / "suite.md").read_text()
    assert f"| mean |  |  |  | {domain.map50:.3f} | {domain.map_:.3f} | 2 data sets |" in page
    assert json.loads((tmp_path / "suite.json").read_text())["mean"]["sets"] == 2
    again = run_suite(config, label=label)
    assert len(label.runs) == 2  # nothing is done again
    assert again == replace(done, new=0)


def _manifest(url: Path) -> Any:
    from storage.runs.manifest import Manifest

    return Manifest.open(str(url))


@pytest.mark.slow
def test_a_set_that_fails_is_told_and_taken_up_again(exports: Path, tmp_path: Path) -> None:
    config = suite(tmp_path, exports=str(exports))
    done = run_suite(config, label=InProcess(failing="notes"))
    assert done.exit_code == 3
    assert [one.error for one in done.sets] == ["the disk is full", ""]
    assert done.mean is not None
    assert done.mean.sets == 1  # a failure is no zero
    assert "failed: the disk is full" in markdown(done)
    label = InProcess()
    assert run_suite(config, label=label).exit_code == 0
    assert label.runs == ["notes"]


@pytest.mark.slow
def test_other_settings_or_annotations_are_measured_anew(exports: Path, tmp_path: Path) -> None:
    export = write_export(tmp_path / "made", sizes={"test": 3})
    sets = [{"name": "notes", "export": str(export)}]
    label = InProcess()
    first = run_suite(suite(tmp_path / "out", sets=sets), label=label)
    truth = export / "test" / ANNOTATIONS
    coco = json.loads(truth.read_text())
    coco["annotations"] = coco["annotations"][:-1]
    truth.write_text(json.dumps(coco))
    second = run_suite(suite(tmp_path / "out", sets=sets), label=label)
    assert len(label.runs) == 2
    assert first.sets[0].fingerprint != second.sets[0].fingerprint


@pytest.mark.slow
def test_other_weights_under_the_same_name_are_noticed(tmp_path: Path) -> None:
    """A result counts for the bytes that it was measured with; the run of those stays theirs."""
    export = write_export(tmp_path / "made", sizes={"test": 3})
    weights = tmp_path / "model.safetensors"
    shutil.copy(checkpoint_path(), weights)
    config = suite(
        tmp_path / "out",
        model={"checkpoint": str(weights)},
        sets=[{"name": "notes", "export": str(export)}],
    )
    label = InProcess()
    first = run_suite(config, label=label)
    kept = (tmp_path / "out/notes/result.json").read_bytes()
    with safe_open(weights, "np") as file:
        meta = file.metadata()
    tensors = load_file(weights)
    tensors[min(tensors)] *= 2
    save_file(tensors, weights, metadata=meta)
    (told,) = run_suite(config, label=label).sets
    assert label.runs == ["notes", "notes"]
    assert told.fingerprint != first.sets[0].fingerprint
    assert "holds a run that differs in: " in told.error
    assert "choose another `output`" in told.error
    assert (tmp_path / "out/notes/result.json").read_bytes() == kept
    shutil.copy(checkpoint_path(), weights)
    assert run_suite(config, label=label).sets == first.sets
    assert len(label.runs) == 2


@pytest.mark.slow
def test_sets_are_trained_on_their_own_splits(exports: Path, tmp_path: Path) -> None:
    training = {
        "model": {"checkpoint": str(checkpoint_path())}, "image_size": 64, "batch_size": 2,
        "steps": 1, "warmup_steps": 0, "device": "cpu", "threads": 1,
    }  # fmt: skip
    config = parse_config(
        SuiteConfig,
        {"output": str(tmp_path), "model": {"runtime": "torch"}, "training": training,
         "sets": [{"name": "notes", "export": str(exports / "notes")}]},
        where="suite",
    )  # fmt: skip
    (one,) = run_suite(config, label=InProcess()).sets
    assert (one.error, one.images, one.classes) == ("", 6, 10)
    assert Path(one.checkpoint) == tmp_path / "notes" / "model" / "notes.safetensors"
    summary = json.loads((tmp_path / "notes" / "model" / "summary.json").read_text())
    assert summary["images"] == 4  # of train; the group of all digits is not a class to learn
    assert summary["classes"] == [str(digit) for digit in range(10)]
    assert one.train_seconds > 0


def test_a_group_with_boxes_of_its_own_stays_a_class(tmp_path: Path) -> None:
    export = write_export(tmp_path / "made", sizes={"test": 3})
    truth = export / "test" / ANNOTATIONS
    parts = roboflow_splits(export).write(tmp_path / "a")
    names = [c["name"] for c in json.loads(parts["test"].annotations.read_text())["categories"]]
    assert names == [str(digit) for digit in range(10)]
    coco = json.loads(truth.read_text())
    coco["annotations"][0]["category_id"] = 0
    truth.write_text(json.dumps(coco))
    parts = roboflow_splits(export).write(tmp_path / "b")
    assert len(json.loads(parts["test"].annotations.read_text())["categories"]) == 11


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "neither `sets` nor `exports`"),
        ({"exports": "/nowhere"}, "there is no folder /nowhere"),
        ({"sets": [{"name": "a", "export": "/nowhere"}]}, "data set a: /nowhere is not a Roboflow"),
        ({"sets": [{"name": "a"}]}, "give `export`, or `images` and `test`"),
        ({"exports": "E", "sets": [{"name": "notes", "export": "E/notes"}]}, "two data sets"),
        ({"exports": "E", "domains": {"x": ["letters"]}}, "does not have: letters"),
        ({"exports": "E", "run": {"output": "x"}}, "run.output is filled in"),
        ({"exports": "E", "model": {"image_size": 33}}, "33 is not a multiple of 32"),
        ({"exports": "E", "training": {"steps": 1}}, "`training` makes the checkpoint"),
        ({"exports": "E", "output": "s3://b/x"}, "a local folder is expected"),
        ({"exports": "E", "sets": [{"name": "x", "images": "E", "test": "no.json"}]},
         "test: no.json is not there"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_is_labelled(
    exports: Path, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    placed = json.loads(json.dumps(fields).replace('"E', f'"{exports}'))
    model = {"checkpoint": str(checkpoint_path()), **placed.pop("model", {})}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "model": model, **placed}))
    with pytest.raises(ConfigError, match=said.replace(".", r"\.").replace("`", ".")):
        run_suite(load_suite_config(str(path)), label=InProcess(failing="none"))


def test_training_needs_its_splits(exports: Path, tmp_path: Path) -> None:
    export = write_export(tmp_path / "made", sizes={"test": 3})
    fields = {
        "output": str(tmp_path / "out"), "training": {"steps": 1},
        "sets": [{"name": "a", "export": str(export)}],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no train split"):
        run_suite(parse_config(SuiteConfig, fields, where="suite"), label=InProcess())


@pytest.mark.slow
def test_a_stop_is_not_a_failure_of_a_set(exports: Path, tmp_path: Path) -> None:
    def stopped(config: RunConfig, caller: Caller) -> None:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        run_suite(suite(tmp_path, exports=str(exports)), label=stopped)
    assert len(run_suite(suite(tmp_path, exports=str(exports)), label=InProcess()).sets) == 2


def test_means_count_sets_not_images() -> None:
    sets = [
        SetResult("a", "x", "0", 900, 1, 0.2, 0.4),
        SetResult("b", "x", "0", 1, 1, 0.6, 0.8),
        SetResult("c", "", "0", 5, 1, None, None),
        SetResult("d", "y", "0", error="no"),
    ]
    done = SuiteSummary.of("s", "out", sets, 4)
    assert done.mean is not None
    assert (done.mean.sets, done.mean.map_, done.mean.map50) == (
        2, pytest.approx(0.4), pytest.approx(0.6),
    )  # fmt: skip
    assert [mean.name for mean in done.domains] == ["x"]


@pytest.mark.slow
def test_killed_and_continued_on_one_ray(exports: Path, tmp_path: Path) -> None:
    """SIGKILL after the first set; the second call measures the other one alone."""
    path, output = tmp_path / "suite.yaml", tmp_path / "out"
    fields = {
        "output": str(output), "exports": str(exports),
        "model": {"checkpoint": str(checkpoint_path()), "runtime": "torch"},
        "run": {"workers": {"count": 1}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(fields))
    command = [sys.executable, "-m", "pipelines.cli.main", "suite", str(path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        until_s = time.monotonic() + patient(120)
        while not (output / "notes" / "result.json").exists():
            assert first.poll() is None
            assert time.monotonic() < until_s
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    kept = (output / "notes" / "result.json").read_bytes()
    assert not (output / "scans" / "result.json").exists()
    second = subprocess.run(command, capture_output=True, text=True, timeout=patient(180))
    assert second.returncode == 0, second.stderr[-2000:]
    told = json.loads(second.stdout.splitlines()[-1])
    assert (told["new"], told["mean"]["sets"]) == (1, 2)
    assert (output / "notes" / "result.json").read_bytes() == kept
