"""What travels with a run: the config, the files it names, nothing else; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cluster import bundle as submit_bundle
from pipelines.cluster.bundle import CONFIG_NAME, bundle_run
from pipelines.config.run_config import load_config
from storage.errors import ConfigError
from storage.stores.open import open_store
from tests.support.samples.tiny_run import run_fields
from tests.support.servers.s3 import S3Server


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a user submits from, with files that do not belong to the run."""
    monkeypatch.chdir(tmp_path)
    for name in ("cells.pth", "policy.yaml", "keys.csv", ".env", "notes.txt", "id_rsa"):
        (tmp_path / name).write_text(f"content of {name}")
    return tmp_path


def fields(**sections: Any) -> dict[str, Any]:
    return run_fields("s3://plates/in", "s3://plates/out", Path("cells.pth"), **sections)


def write(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "cells.yaml"
    path.write_text("# a private comment\n" + yaml.safe_dump(content))
    return str(path)


def test_the_config_and_the_files_it_names_travel_and_nothing_else(here: Path) -> None:
    config = fields(source={"keys": "keys.csv"}, policy="policy.yaml")
    bundle = bundle_run(write(here, config))
    (dest := here / "packed").mkdir()
    bundle.write(dest)
    assert sorted(p.name for p in dest.iterdir()) == [
        "model.checkpoint-cells.pth", "policy-policy.yaml", CONFIG_NAME, "source.keys-keys.csv",
    ]  # fmt: skip
    packed = (dest / CONFIG_NAME).read_text()
    assert "nobody" not in packed
    assert (dest / "model.checkpoint-cells.pth").read_text() == "content of cells.pth"


def test_in_its_folder_the_packed_config_means_the_same(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_run(write(here, fields()), ("model.score_floor=0.2", "workers.depth=2"))
    (dest := here / "packed").mkdir()
    bundle.write(dest)
    monkeypatch.chdir(dest)
    config = load_config(CONFIG_NAME)
    assert (config.model.score_floor, config.workers.depth) == (0.2, 2)
    assert Path(config.model.checkpoint).is_file()
    assert config.source.url == "s3://plates/in"


def test_folders_are_named_as_the_cluster_must_see_them(here: Path) -> None:
    (here / "in").mkdir()
    weights = {"checkpoint": "s3://plates/cells.pth"}
    bundle = bundle_run(write(here, run_fields("in", "out", Path("x"), model=weights)))
    assert bundle.fields["source"]["url"] == f"file://{here}/in"
    assert bundle.fields["output"] == f"file://{here}/out"
    assert bundle.files == {}


def test_a_file_that_only_the_cluster_has_stays_named(here: Path) -> None:
    config = run_fields("s3://plates/in", "s3://plates/out", Path("/mnt/models/cells.pth"))
    bundle = bundle_run(write(here, config))
    assert bundle.fields["model"]["checkpoint"] == "/mnt/models/cells.pth"


def test_a_missing_file_is_reported_before_anything_is_submitted(here: Path) -> None:
    config = run_fields("s3://plates/in", "s3://plates/out", Path("cels.pth"))
    with pytest.raises(ConfigError, match=r"model\.checkpoint: there is no file .*cels\.pth"):
        bundle_run(write(here, config))


def test_weights_too_large_to_travel(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit_bundle, "MAX_BYTES", 10)
    with pytest.raises(ConfigError, match="object storage"):
        bundle_run(write(here, fields()))


def test_a_secret_in_the_config_or_in_what_is_set(here: Path) -> None:
    hook = "https://hooks.slack.com/services/T0/B0/xyz"
    with pytest.raises(ConfigError, match="notify holds a webhook"):
        bundle_run(write(here, fields(notify=hook)))
    with pytest.raises(ConfigError, match="notify holds a webhook"):
        bundle_run(write(here, fields(notify="https://intranet.example/x")))
    with pytest.raises(ConfigError, match="--set notify: it is a secret"):
        bundle_run(write(here, fields()), (f"notify={hook}",))
    with pytest.raises(ConfigError, match="--env MY_TOKEN"):
        bundle_run(write(here, fields()), (), {"MY_TOKEN": "x"})


def test_the_digest_tells_versions_apart(here: Path) -> None:
    path = write(here, fields())
    assert bundle_run(path).digest == bundle_run(path).digest
    before = bundle_run(path).digest
    assert before != bundle_run(path, ("attempts=2",)).digest
    (here / "cells.pth").write_bytes(b"other weights under the same name")
    assert before != bundle_run(path).digest


@pytest.mark.slow
def test_a_config_at_a_url_is_read_there_and_may_hold_what_must_not_travel(
    here: Path, moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in moto_s3.env().items():
        monkeypatch.setenv(name, value)
    bucket = moto_s3.fresh_bucket()
    url = f"s3://{bucket}/cells.yaml"
    content = run_fields(
        "s3://plates/in", "s3://plates/out", Path("cells.pth"),
        model={"checkpoint": "s3://plates/cells.pth"},
        notify="https://hooks.slack.com/services/T0/B0/xyz",
    )  # fmt: skip
    store = open_store(f"s3://{bucket}", moto_s3.options)
    store.put("cells.yaml", yaml.safe_dump(content).encode())
    bundle = bundle_run(url, ("attempts=2",))
    assert (bundle.url, bundle.files) == (url, {})
    assert bundle.config.attempts == 2
    (dest := here / "packed").mkdir()
    bundle.write(dest)
    assert list(dest.iterdir()) == []
    with pytest.raises(ConfigError, match="it is a secret"):
        bundle_run(url, ("notify=https://hooks.slack.com/services/T0/B0/other",))
    with pytest.raises(ConfigError, match=r"model\.checkpoint is the relative path"):
        bundle_run(url, ("model.checkpoint=cells.pth",))


@pytest.mark.parametrize("query", ["X-Amz-Signature=0123456789abcdef", "token=0123456789"])
def test_a_configs_own_signed_url_does_not_travel_in_the_jobs_command(query: str) -> None:
    with pytest.raises(ConfigError, match="the config's own URL is a signed URL") as refused:
        bundle_run(f"https://plates.example/cells.yaml?{query}")  # refused before it is read
    assert query not in str(refused.value)
