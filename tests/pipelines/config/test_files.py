"""A config that names a file which does not exist is refused by the field's name, exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.config.files import check_files, refuse_below_a_file
from pipelines.config.run_config import RunConfig
from pipelines.config.source import check_places
from storage.errors import ConfigError


def config(folder: Path, **sections: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "name": "x",
        "source": {"url": str(folder)},
        "output": str(folder / "out"),
        "model": {"checkpoint": "w.pth"},
    }
    for name, value in sections.items():
        fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("field", "sections"),
    [
        ("model.arch", {"model": {"arch": "gone.yaml"}}),
        ("source.keys", {"source": {"keys": "gone.csv"}}),
        ("policy", {"policy": "memory://gone/policy.yaml"}),
        ("gate.truth", {"gate": {"truth": "gone.json", "min_map": 0.5}}),
        ("review.gold_truth", {"review": {"project": "p", "gold": 3, "gold_truth": "gone.json"}}),
    ],
)
def test_an_absent_file_is_named_by_its_field(
    tmp_path: Path, field: str, sections: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: there is nothing at .*(gone)") as refused:
        check_files(config(tmp_path, **sections))
    assert refused.value.exit_code == 2


def test_all_absent_files_are_named_at_once(tmp_path: Path) -> None:
    wrong = config(tmp_path, model={"arch": "gone.yaml"}, policy="no.yaml")
    with pytest.raises(ConfigError, match=r"model\.arch: .*; policy: "):
        check_files(wrong)


def test_files_that_are_there_pass(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{}")
    check_files(config(tmp_path, model={"arch": str(tmp_path / "a.yaml")}))
    check_files(config(tmp_path))


@pytest.mark.parametrize("below", ["", "/deeper/out"])
def test_an_output_below_a_file_is_refused_by_name(tmp_path: Path, below: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "file").write_text("")
    wrong = config(tmp_path / "in", output=f"{tmp_path}/file{below}")
    with pytest.raises(ConfigError, match=rf"needs a folder where {tmp_path}/file is a file") as no:
        check_places(wrong)
    assert no.value.hint == "choose a place that is not below a file"
    check_places(config(tmp_path / "in", output=f"{tmp_path}/new{below}"))


def test_a_place_that_may_not_be_looked_at_is_left_to_the_store(tmp_path: Path) -> None:
    refuse_below_a_file("output", f"{tmp_path}/{'n' * 300}/out")  # the system has no such names
