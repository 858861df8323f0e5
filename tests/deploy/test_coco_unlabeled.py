"""examples/coco_unlabeled: its files are what the commands take, on a zip laid out as COCO's."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
import typer.main

from pipelines.cli.main import app
from pipelines.config.run_config import RunConfig, load_config
from pipelines.config.yaml_files import parse_config, read_yaml
from pipelines.demo.run import checkpoint_path
from pipelines.ingest.ingest import ingest
from pipelines.labelling.open_run import open_run
from pipelines.labelling.plan import plan_run
from pipelines.labelling.published import SPEEDS
from pipelines.labelling.work import find_work
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from pipelines.rounds.round_config import RoundConfig
from pipelines.runs.status import run_status
from storage.labels.versions import read_version
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from tests.deploy.manifests import ROOT
from workers.labelling.assemble import open_labeller
from workers.spec import WorkerSpec

EXAMPLE = ROOT / "examples/coco_unlabeled"
IMAGES = 123_403


@pytest.fixture(scope="module")
def archive(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos as unlabeled2017.zip holds them: one folder, named by twelve digits."""
    photos = sorted((data_dir / "coco_ccby/images").rglob("*.jpg"))
    if not photos:
        pytest.skip("needs the photos of coco_ccby, see CONTRIBUTING.md")
    path = tmp_path_factory.mktemp("zip") / "unlabeled2017.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as made:
        made.writestr("unlabeled2017/", b"")
        for photo in photos:
            made.write(photo, f"unlabeled2017/{int(photo.stem):012d}.jpg")
    return path


def configured(folder: Path, shards: Path) -> RunConfig:
    """The example's config, for our small network in place of the COCO weights."""
    texts = (
        f"source.url={shards}", f"output={folder / 'run'}", f"policy={EXAMPLE / 'policy.yaml'}",
        f"model={{checkpoint: {checkpoint_path()}, runtime: torch}}",
    )  # fmt: skip
    return load_config(str(EXAMPLE / "run.yaml"), texts)


def label(config: RunConfig) -> Manifest:
    run = open_run(config, cuda=False)
    labeller = open_labeller(WorkerSpec(run.model, run.source.url, run.manifest.url))
    try:
        for number, shard in enumerate(find_work(run, config, None).shards):
            labeller.label(shard, f"try-{number}")
    finally:
        labeller.close()
    return run.manifest


@pytest.mark.slow
def test_a_zip_of_the_official_layout_goes_from_ingest_to_labels(
    archive: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(archive) as zipped:
        names = [name for name in zipped.namelist() if name.endswith(".jpg")]
        first = zipped.read(names[0])
    packed = ingest(str(archive), str(tmp_path / "shards"), images_per_shard=20)
    assert (packed.images, packed.errors) == (len(names), 0)
    config = configured(tmp_path, tmp_path / "shards")
    plan = plan_run(config)
    assert (plan.images, plan.shards) == (len(names), -(-len(names) // 20))
    manifest = label(config)
    rows = {row.image_id.rsplit("/", 1)[-1]: row for row in live_rows(manifest)}
    assert set(rows) == {Path(name).name for name in names}
    assert {row.status for row in rows.values()} == {"ok"}
    assert rows[Path(names[0]).name].nbytes == len(first)
    assert run_status(manifest).left == 0
    version = decide_run(manifest, Policy.load(str(EXAMPLE / "policy.yaml")))
    kept = read_version(manifest.store, version.version).counts
    assert sum(n for name, n in kept.items() if name.startswith("images")) == len(names)


def test_the_hours_in_the_readme_are_the_published_milliseconds_times_the_images() -> None:
    readme = (EXAMPLE / "README.md").read_text()
    price = load_config(str(EXAMPLE / "run.yaml")).price_per_gpu_hour
    assert price is not None
    for letter in "sml":
        fp16, int8 = (s for s in SPEEDS if s.model == f"yolo_nas_{letter}")
        cells = [
            f"{value:.2f}"
            for speed in (fp16, int8)
            for value in (speed.milliseconds, speed.hours(IMAGES), price * speed.hours(IMAGES))
        ]
        assert f"| {letter.upper()} | {' | '.join(cells)} |" in readme
    assert f"{IMAGES:,}" in readme


def test_every_command_of_the_readme_exists_and_names_files_of_this_folder() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]  # a group
    commands = re.findall(r"^labelfleet (\w+)(.*)$", (EXAMPLE / "README.md").read_text(), re.M)
    assert len(commands) >= 8
    for name, rest in commands:
        assert name in known, name
        for file in re.findall(r"examples/coco_unlabeled/\w+\.yaml", rest):
            assert (ROOT / file).is_file()


def test_the_round_is_one_that_the_command_takes() -> None:
    path = str(EXAMPLE / "round.yaml")
    config = parse_config(RoundConfig, read_yaml(path), where=path)
    run = load_config(str(EXAMPLE / "run.yaml"))
    policy = Policy.load(str(EXAMPLE / "policy.yaml"))
    assert config.teacher is not None
    assert config.teacher.checkpoint == run.model.checkpoint
    assert (config.pool.url, config.pool.kind) == (run.source.url, run.source.kind)
    assert not isinstance(config.policy, str)
    assert (config.policy.accept, config.policy.reject) == (policy.accept, policy.reject)
