"""A network that cannot fit is refused before anything is read, labelled or trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config.yaml_files import parse_config
from pipelines.rounds.round import Selection, run_round
from pipelines.rounds.round_config import RoundConfig
from pipelines.training.config import TrainConfig
from pipelines.training.run import train
from pipelines.training.start import check_fits
from storage.errors import ConfigError
from tests.support.samples.training_samples import box, write_coco

pytestmark = pytest.mark.slow  # builds networks
NANO = Path(__file__).resolve().parents[3] / "pipelines" / "assets" / "digits_nano_arch.yaml"


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    truth = write_coco(tmp_path / "truth", [(32, 32)] * 2, [box(1, 7, 1, 1, 9, 9)])
    return {"annotations": str(truth), "images": str(truth.parent)}


@pytest.fixture
def huge(tmp_path: Path) -> str:
    """The demo's network, every layer 300 times as wide."""
    arch = yaml.safe_load(NANO.read_text())
    _widen(arch, 300)
    path = tmp_path / "huge.yaml"
    path.write_text(yaml.safe_dump(arch))
    return str(path)


def _widen(part: Any, factor: int) -> None:
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        if isinstance(value, dict | list):
            _widen(value, factor)
        elif key in ("out_channels", "hidden_channels"):
            part[key] = value * factor


def config(data: dict[str, str], folder: Path, **more: Any) -> TrainConfig:
    fields = {"name": "x", "output": str(folder), "train": data, "val": data, "steps": 2}
    return TrainConfig.model_validate({**fields, **more})


def test_what_training_keeps_of_a_network_is_compared_with_the_memory(
    data: dict[str, str], tmp_path: Path
) -> None:
    asked = config(data, tmp_path / "out", model={"arch": str(NANO)})
    check_fits(asked, "cpu")
    check_fits(asked, "cpu", memory=30_000_000)
    with pytest.raises(ConfigError, match=r"1,30\d,\d+ weights.*0\.0 GB, and the GPU has 0\.0 GB"):
        check_fits(asked, "cuda", memory=20_000_000)
    frozen = asked.model_copy(update={"freeze": "backbone"})  # no gradients, no moments
    check_fits(frozen, "cuda", memory=20_000_000)


def test_a_training_refuses_it_before_it_reads_an_image(
    data: dict[str, str], huge: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"takes at least 1,681\.7 GB, and this machine has"):
        train(config(data, output, model={"arch": huge}))
    assert not list(output.glob("*"))


def test_a_round_refuses_such_a_student_before_its_teacher_begins(
    data: dict[str, str], huge: str, tmp_path: Path
) -> None:
    fields = {
        "name": "x", "output": str(tmp_path / "out"), "pool": {"url": str(tmp_path)},
        "truth": data, "val": data, "test": data, "train": {"steps": 2},
        "student": {"model": {"arch": huge}},
    }  # fmt: skip
    asked = parse_config(RoundConfig, fields, where="round")
    with pytest.raises(ConfigError, match="takes at least 1,681"):
        run_round(asked)
    assert not (tmp_path / "out" / "state").exists()
    with pytest.raises(ConfigError, match="label"):  # a step without training is not concerned
        run_round(asked, Selection(only="fit"))
