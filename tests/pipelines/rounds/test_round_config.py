"""The config of a round: what it refuses before anything is spent, and how sets are split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.rounds import reference
from pipelines.rounds.labelled import keys_file, labelled_sets
from pipelines.rounds.round import check_config
from pipelines.rounds.round_config import ROUND_PAGE, RoundConfig, load_round_config
from pipelines.rounds.state import StepRecord
from pipelines.rounds.steps.machine import fit_fields, training_inputs
from pipelines.rounds.work import RoundWork, merged
from pipelines.training.config import DataConfig
from storage.errors import ConfigError, SourceEmpty
from tests.support.samples.training_samples import box, write_coco

ROOT = Path(__file__).resolve().parents[3]
STUDENT = StepRecord("student", "begun", 1, {})


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    """The least that works."""
    boxes = [box(number, 7, 4, 4, 20, 20) for number in range(1, 11)]
    truth = write_coco(tmp_path / "truth", [(64, 64)] * 10, boxes)
    test = write_coco(tmp_path / "test", [(64, 64)] * 2, [box(1, 7, 4, 4, 20, 20)])
    return {
        "name": "cells",
        "output": str(tmp_path / "out"),
        "pool": {"url": str(tmp_path / "pool")},
        "truth": {"annotations": str(truth), "images": str(truth.parent)},
        "test": {"annotations": str(test), "images": str(test.parent)},
    }


def load(fields: dict[str, Any], folder: Path, *overrides: str) -> RoundConfig:
    path = folder / "round.yaml"
    path.write_text(yaml.safe_dump(fields))
    return load_round_config(str(path), overrides)


def test_few_fields_are_enough(fields: dict[str, Any], tmp_path: Path) -> None:
    config = load(fields, tmp_path)
    work = RoundWork.of(config)
    check_config(work)
    training = work.train_config("student", STUDENT, train=config.truth.model_dump())
    assert training.epochs == 30
    assert training.output == tmp_path / "out" / "work" / "student"
    assert config.skips("gate") == "the config has no `gate`"
    assert config.skips("label") == ""


def test_without_reviewers_the_steps_around_people_are_skipped(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    config = load(fields, tmp_path)
    for step in ("route", "push", "pull"):
        assert config.skips(step) == "the config has no `review`"
    skipping = load({**fields, "skip": ["compile", "review"]}, tmp_path)
    assert skipping.skips("pull") == "skip lists review"
    assert skipping.skips("compile") == "skip lists compile"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pol": {}}, "pool"),
        ({"train": {"output": "x"}}, "the round itself sets output"),
        ({"run": {"source": {}}}, "the round itself sets source"),
        ({"skip": ["label"]}, "skip"),
        ({"previous": "runs/a", "teacher": {"checkpoint": "a.pth"}}, "either previous or teacher"),
        ({"truth_share": 0}, "truth_share"),
        ({"truth": {"annotations": "absent.json", "images": "."}}, "absent.json is not there"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    fields: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load({**fields, **changes}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"stepz": 3}}, "stepz"),
        ({"student": {"lr": -1}}, "lr"),
        ({"run": {"workers": {"cout": 1}}}, "cout"),
        ({"fit": {"guarantee": 0.95}}, "people's answers"),
    ],
)
def test_parts_for_other_commands_are_checked_before_the_first_step(
    fields: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    work = RoundWork.of(load({**fields, **changes}, tmp_path))
    with pytest.raises(ConfigError, match=message):
        check_config(work)


def test_the_student_has_its_own_fields_over_those_of_both(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    train = {"steps": 10, "model": {"name": "yolo_nas_m", "licence": "MIT"}}
    student = {"steps": 20, "model": {"name": "yolo_nas_s"}}
    config = load({**fields, "train": train, "student": student}, tmp_path)
    work = RoundWork.of(config)
    made = [
        work.train_config(role, STUDENT, train=config.truth.model_dump())
        for role in ("teacher", "student")
    ]
    assert [(one.steps, one.model.name) for one in made] == [(10, "yolo_nas_m"), (20, "yolo_nas_s")]
    assert made[1].model.licence == "MIT"
    assert [one.name for one in made] == ["cells-teacher", "cells"]


def test_trainings_reach_storage_as_the_round_does(fields: dict[str, Any], tmp_path: Path) -> None:
    storage = {"endpoint_url": "http://127.0.0.1:9", "region": "here"}
    work = RoundWork.of(load({**fields, "storage": storage}, tmp_path))
    for role in ("teacher", "student"):
        made = work.train_config(role, STUDENT, train=work.config.truth.model_dump())
        assert made.storage.options() == work.options
        assert made.storage.endpoint_url == "http://127.0.0.1:9"


def test_where_a_student_trains_is_none_of_a_steps_inputs(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    """`--only student` on a machine with GPUs continues what another one planned."""

    def inputs(**train: Any) -> dict[str, Any]:
        work = RoundWork.of(load({**fields, "train": train}, tmp_path))
        made = work.train_config("student", STUDENT, train=work.config.truth.model_dump())
        return training_inputs(work, made)

    elsewhere = {"workers": {"count": 2, "gpus": 1}, "cache": {"size": "9GB"}, "threads": 3}
    assert inputs(**elsewhere, report=["tensorboard"]) == inputs()
    assert inputs(lr=0.5) != inputs()


def test_the_labelled_images_are_split_by_their_names_alone(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    truth = DataConfig(**fields["truth"])
    first = labelled_sets(truth, None, tmp_path / "a")
    known = json.loads(truth.annotations.read_text())
    shuffled = {**known, "images": known["images"][::-1]}
    truth.annotations.write_text(json.dumps(shuffled))
    second = labelled_sets(truth, None, tmp_path / "b")

    def names(part: DataConfig) -> set[str]:
        return {i["file_name"] for i in json.loads(part.annotations.read_text())["images"]}

    assert names(first.val) == names(second.val)
    assert len(names(first.val)) == 5  # as many as a fit takes
    assert names(first.train) | names(first.val) == {f"{n}.png" for n in range(1, 11)}
    assert not names(first.train) & names(first.val)
    boxes = json.loads(first.val.annotations.read_text())["annotations"]
    assert len(boxes) == 5
    own = DataConfig(**fields["test"])
    assert labelled_sets(truth, own, tmp_path / "c").val == own


def test_a_split_leaves_enough_to_fit_on_and_is_the_same_where_fit_is_skipped(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    def sizes(**more: Any) -> list[int]:
        made = RoundWork.of(load({**fields, **more}, tmp_path)).labelled
        files = (made.train.annotations, made.val.annotations)
        return [len(json.loads(file.read_text())["images"]) for file in files]

    assert sizes() == [5, 5]
    assert sizes(skip=["fit"]) == [5, 5]


def test_a_truth_without_enough_to_fit_on_is_refused(tmp_path: Path) -> None:
    boxes = [box(n, 7, 1, 1, 9, 9) for n in range(1, 6)]
    path = write_coco(tmp_path / "five", [(32, 32)] * 5, boxes)
    truth = DataConfig(annotations=path, images=path.parent)
    with pytest.raises(SourceEmpty, match="names 5 images, too few to learn from and set 5"):
        labelled_sets(truth, None, tmp_path / "w", least=5)
    made = labelled_sets(truth, None, tmp_path / "w")  # enough where nothing is fitted
    assert len(json.loads(made.val.annotations.read_text())["images"]) == 2


def test_a_bound_on_the_ignored_area_changes_the_thresholds_only_where_it_is_given(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    def decided(**fit: Any) -> dict[str, Any]:
        return fit_fields(load({**fields, "fit": fit}, tmp_path).fit)

    assert decided() == {"precision": 0.9, "lost": 0.02, "force": False}  # as older records have it
    assert decided(ignore_area=0.2) == {**decided(), "ignore_area": 0.2}


def test_a_single_image_cannot_be_split(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "one", [(32, 32)], [box(1, 7, 1, 1, 9, 9)])
    with pytest.raises(SourceEmpty, match="too few"):
        labelled_sets(DataConfig(annotations=path, images=path.parent), None, tmp_path / "w")


def test_a_set_narrows_a_run_to_its_images(fields: dict[str, Any], tmp_path: Path) -> None:
    from pipelines.config.keys import read_keys
    from storage.objects.protocols import StorageOptions

    path = keys_file(DataConfig(**fields["test"]), tmp_path / "keys.csv")
    assert read_keys(str(path), StorageOptions()) == {"1.png", "2.png"}


def test_values_go_over_others_at_any_depth() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "d": {"e": 5}}) == {
        "a": {"b": 1, "c": 4},
        "d": {"e": 5},
    }


def test_the_reference_page_lists_every_field_and_hints_lead_to_it(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    page = (ROOT / ROUND_PAGE).read_text()
    assert page == reference.page(), f"run `python -m pipelines.rounds.reference > {ROUND_PAGE}`"
    for name, field in RoundConfig.model_fields.items():
        assert f"| `{name}` |" in page
        assert field.description, name
    assert "[a section](configuration.md#model)" in page
    with pytest.raises(ConfigError) as refused:
        load({**fields, "teachr": {}}, tmp_path)
    assert ROUND_PAGE in str(refused.value.hint)
