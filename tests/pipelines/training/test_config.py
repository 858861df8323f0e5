"""The training config: what is refused, and what makes two trainings the same."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from rich.text import Text

from pipelines.training.config import TrainConfig, load_train_config
from pipelines.training.view import TrainView
from storage.errors import ConfigError
from workers.training.trainer import StepReport

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def fields(folder: Path, **more: Any) -> dict[str, Any]:
    truth = folder / "truth.json"
    truth.write_text("{}")
    part = {"annotations": str(truth), "images": str(folder)}
    base = {"name": "x", "output": str(folder / "out"), "train": part, "val": part, "steps": 10}
    return {**base, **more}


def load(folder: Path, **more: Any) -> TrainConfig:
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(fields(folder, **more)))
    return load_train_config(str(path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batchsize": 4}, "did you mean `batch_size`"),
        ({"augment": {"flip": 1}}, "augment.flip: unknown key"),
        ({"epochs": 3}, "either steps or epochs"),
        ({"image_size": 300}, "multiple of 32"),
        ({"augment": {"scale": [2, 1]}}, "low ≤ high"),
        ({"lr": 0}, "lr: "),
        ({"val": {"annotations": "nowhere.json", "images": "."}}, r"val\.annotations: nowhere"),
        ({"model": {"arch": "gone.yaml"}}, r"model\.arch: there is nothing at gone\.yaml"),
        ({"model": {"checkpoint": "gone.pth"}}, r"model\.checkpoint: there is nothing at gone"),
        ({"distill": {"mode": "teacher", "teacher": "gone.pth"}}, r"distill\.teacher: there is no"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **more)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = {"annotations": "~/truth.json", "images": "~"}
    config = load(tmp_path, output="~/out", train=[at_home], val=at_home, cache={"dir": "~/kept"})
    assert config.output == tmp_path / "out"
    assert (config.val.annotations, config.val.images) == (tmp_path / "truth.json", tmp_path)
    assert (config.sources[0].annotations, config.sources[0].images) == (
        tmp_path / "truth.json",
        tmp_path,
    )
    assert config.cache is not None
    assert config.cache.dir == tmp_path / "kept"
    assert load(tmp_path, output="~no-one-is-called-so").output == Path("~no-one-is-called-so")
    assert load(tmp_path, output="s3://bucket/~/x").remote == "s3://bucket/~/x"


def test_epochs_become_steps(tmp_path: Path) -> None:
    config = load(tmp_path, steps=None, epochs=2.5, batch_size=8)
    assert config.steps_for(100) == 31
    assert config.steps_for(1) == 1
    assert load(tmp_path, steps=7).steps_for(100) == 7


def test_inference_is_told_the_letterbox_of_training(tmp_path: Path) -> None:
    config = load(tmp_path, image_size=[256, 320], padding="bottom_right")
    assert config.preprocessing.size == (256, 320)
    assert config.preprocessing.resize_to == (252, 316)
    assert config.preprocessing.padding == "bottom_right"


def test_only_what_moves_weights_is_in_the_fingerprint(tmp_path: Path) -> None:
    first = load(tmp_path).fingerprint(precision="fp32")
    assert load(tmp_path, output="elsewhere", threads=3).fingerprint(precision="fp32") == first
    assert load(tmp_path, eval_every=5).fingerprint(precision="fp32") == first
    assert load(tmp_path, seed=1).fingerprint(precision="fp32") != first
    assert load(tmp_path).fingerprint(precision="bf16") != first
    changed = load(tmp_path)
    (tmp_path / "truth.json").write_text("{ }")
    assert changed.fingerprint(precision="fp32") != first


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/train.yaml")), ids=lambda p: p.parent.name)
def test_the_examples_are_valid(path: Path) -> None:
    raw = yaml.safe_load(path.read_text())
    config = TrainConfig.model_validate(raw)
    assert config.model.arch is not None
    assert (EXAMPLES.parent / config.model.arch).is_file()


def test_nobody_mirrors_digits() -> None:
    raw = yaml.safe_load((EXAMPLES / "digits" / "train.yaml").read_text())
    augment = TrainConfig.model_validate(raw).augment
    assert augment.flip_horizontal == augment.flip_vertical == 0


@pytest.mark.parametrize("url", ["s3://plates/train.json", "https://x/train.json"])
def test_what_is_not_a_local_file_is_refused_as_that(tmp_path: Path, url: str) -> None:
    for part in ({"annotations": url, "images": "i"}, {"annotations": "a.json", "images": url}):
        with pytest.raises(ConfigError, match=r"train\.\w+: `train` reads local files, and"):
            load(tmp_path, train=part)


def test_a_line_a_minute_where_no_bar_can_be_drawn() -> None:
    written = io.StringIO()
    now = iter([0.0, *np.arange(1, 400, 10).tolist()] * 2)
    steps = 20
    view = TrainView(
        Console(file=written, force_terminal=False, width=100), 0, steps, clock=lambda: next(now)
    )
    with view:
        for step in range(1, steps + 1):
            view.step(StepReport(step, 2.0, (1.0, 0.5, 0.5), 0.001))
    lines = written.getvalue().splitlines()
    assert all(line.startswith("step ") for line in lines)  # and no bar at the end
    assert 2 <= len(lines) <= 4  # in some 200 to 400 seconds
    assert lines[0].endswith("of 20: loss 2.000")


def test_a_log_gets_no_bar_where_colours_are_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    now = itertools.count(0.0, 100.0)
    with (
        (tmp_path / "log").open("w+") as written,
        TrainView(Console(file=written, width=100), 0, 1, clock=lambda: next(now)) as view,
    ):
        view.step(StepReport(1, 2.0, (1.0, 0.5, 0.5), 0.001))
    assert Text.from_ansi((tmp_path / "log").read_text()).plain == "step 1 of 1: loss 2.000\n"


# Configs of the version before there were early_stop, range, stages and the fields of the recipe,
# and what it made of them.
OLDER = {
    "9deafdca7e5af9d3": {},
    "e2fdb5d104dcf358": {
        "augment": {"scale": [0.8, 1.2], "flip_vertical": 0.5},
        "early_stop": 3, "image_size": [256, 320], "steps": None, "epochs": 2.5,
        "ignore_categories": ["a"],
    },
}  # fmt: skip


def older(**more: Any) -> TrainConfig:
    part = {"annotations": "truth.json", "images": "images"}
    base = {"name": "x", "output": "out", "train": part, "val": part, "steps": 10}
    return TrainConfig.model_validate({**base, **more})


@pytest.mark.parametrize("known", list(OLDER))
def test_trainings_of_earlier_versions_continue(
    known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truth.json").write_text("{}")
    precision = "fp32" if not OLDER[known] else "bf16"
    assert older(**OLDER[known]).fingerprint(precision=precision) == known


@pytest.mark.parametrize(
    "more",
    [
        {"freeze": "stem"},
        {"lr_factors": {"backbone": 0.1}},
        {"clip_norm": 10},
        {"accumulate": 2},
        {"multi_scale": [0.8, 1.2]},
        {"compile": True},
        {"channels_last": True},
        {"early_stop": 3},
        {"augment": {"mosaic": 0.5}},
        {"augment": {"mixup": 0.1}},
        {"augment": {"rotate_deg": 5}},
        {"augment": {"shear_deg": 2}},
        {"augment": {"blur": 0.1}},
        {"augment": {"pseudo": {"blur": 0.5}}},
    ],
    ids=str,
)
def test_each_field_of_the_recipe_makes_another_training(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truth.json").write_text("{}")
    assert older(**more).fingerprint(precision="fp32") != next(iter(OLDER))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"accumulate": 3}, "batch_size 8 does not split into 3 equal parts"),
        ({"multi_scale": [2, 1]}, "low ≤ high"),
        ({"freeze": "neck"}, "freeze: one of `none`, `stem`, `backbone`"),
        ({"lr_factors": {"head": 1}}, "did you mean `heads`"),
        ({"augment": {"mosaic": 2}}, "augment.mosaic: a number from 0 to 1"),
        ({"augment": {"pseudo": {"shift": 1}}}, "augment.pseudo.shift: unknown key"),
        ({"augment": {"rotate_deg": 90}}, "augment.rotate_deg: a number from 0 to 45"),
        ({"clip_norm": 0}, "clip_norm: a number above 0"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_named(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **more)


def test_pseudo_overrides_what_it_gives_and_inherits_the_rest(tmp_path: Path) -> None:
    from pipelines.training.start import augmentations

    augment = {"mosaic": 0.3, "hue_deg": 9, "pseudo": {"blur": 0.5, "mosaic": 1.0}}
    people, pseudo = augmentations(load(tmp_path, augment=augment))
    assert (people.mosaic, people.blur, people.hue_deg) == (0.3, 0.0, 9)
    assert (pseudo.mosaic, pseudo.blur, pseudo.hue_deg) == (1.0, 0.5, 9)


def test_the_reference_page_lists_every_field_and_hints_lead_to_it(tmp_path: Path) -> None:
    from pipelines.training import reference

    root = Path(__file__).resolve().parents[3]
    page = (root / "docs/train_configuration.md").read_text()
    assert page == reference.page(), (
        "run `python -m pipelines.training.reference > docs/train_configuration.md`"
    )
    for name, field in TrainConfig.model_fields.items():
        assert f"| `{name}` |" in page
        assert field.description, name
    for text in ("name: x\nlearning: 3\n", "- a list\n"):
        (tmp_path / "t.yaml").write_text(text)
        with pytest.raises(ConfigError) as refused:
            load_train_config(str(tmp_path / "t.yaml"))
        assert "docs/train_configuration.md" in str(refused.value.hint)
