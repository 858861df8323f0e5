"""A config is understood, or refused in words that a person can act on."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.config import reference as config_reference
from pipelines.config.messages import section_in
from pipelines.config.part import Part
from pipelines.config.run_config import RunConfig, load_config
from pipelines.config.yaml_files import parse_config
from pipelines.rounds.round_config import load_round_config
from pipelines.suite.config import load_suite_config
from pipelines.training.config import load_train_config
from storage.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
LEAST: dict[str, Any] = {
    "name": "cells",
    "source": {"url": "in"},
    "output": "out",
    "model": {"checkpoint": "m.pth"},
}
JARGON = ("Input should", "validation", "pydantic", "instance of", "literal", "Tuple", "RunConfig")


def fields(path: str = "", value: Any = None) -> dict[str, Any]:
    """The least config, with ``a.b`` set."""
    made = copy.deepcopy(LEAST)
    if path:
        at = made
        *parents, last = path.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    return made


def parse(path: str = "", value: Any = None) -> RunConfig:
    return parse_config(RunConfig, fields(path, value), where="cells.yaml")


def problems(path: str, value: Any) -> list[str]:
    """The lines that explain what is wrong, each without its indentation."""
    with pytest.raises(ConfigError) as caught:
        parse(path, value)
    first, *lines = caught.value.message.splitlines()
    assert first == "cells.yaml cannot be used:"
    assert caught.value.hint
    assert not [word for word in JARGON if word in caught.value.message]
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("sorce", "source"),
        ("ouput", "output"),
        ("source.shardsize", "shard_size"),
        ("model.chekpoint", "checkpoint"),
        ("model.scorefloor", "score_floor"),
        ("workers.batchsize", "batch_size"),
        ("policy.acept", "accept"),
        ("storage.endpoint", "endpoint_url"),
        ("image_size", "model.image_size"),  # right name, wrong section
        ("model.batch_size", "workers.batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(path: str, nearest: str) -> None:
    assert problems(path, 1) == [f"{path}: unknown key; did you mean `{nearest}`?"]


def test_an_unknown_key_like_no_other_lists_the_valid_ones() -> None:
    (line,) = problems("policy.xyzzy", 1)
    assert line == "policy.xyzzy: unknown key; valid are accept, reject"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("source", "s3://b/x", "a section with `url`"),
        ("workers", None, "not nothing"),
        ("source.include", "*.jpg", "a list of texts is expected"),
        ("source.shard_size", 0, "a whole number from 1 to 100,000 is expected, not 0"),
        ("source.kind", "tars", "one of `auto`, `tar`, `images`"),
        ("model.score_floor", "low", "a number from 0 to 1"),
        ("model.score_floor", 1.5, "a number from 0 to 1 is expected, not 1.5"),
        ("model.score_floor", float("nan"), "a number from 0 to 1 is expected, not nan"),
        ("workers.hang_after_s", float("inf"), "not inf"),
        ("model.max_detections", True, "not true"),
        ("model.image_size", "big", "a whole number or a list of 2 whole numbers is expected"),
        ("model.image_size", [320, 320, 3], "a whole number or a list of 2 whole numbers"),
        ("model.image_size", [320, "x"], "a whole number or a list of 2 whole numbers"),
        ("model.image_size", 600, "600 is not a multiple of 32"),
        ("model.image_size", 0, "0 is not a multiple of 32"),
        ("model.image_size", [320, 8192], "8192 is not a multiple of 32"),
        ("workers.count", "many", "`auto` or a whole number from 1 to 100,000 is expected"),
        ("workers.count", 0, "`auto` or a whole number from 1 to 100,000 is expected, not 0"),
        ("workers.gpus", -1, "`auto` or a number of at least 0 is expected, not -1"),
        ("workers.cpus", 0, "`auto` or a number above 0 is expected, not 0"),
        ("policy", 3, "a section with `accept`, `reject` or a URL or path is expected"),
        ("policy", {"accept": 2}, "a number from 0 to 1"),
        ("policy", {"accept": 0.1, "reject": 0.7}, "reject 0.7 is above accept 0.1"),
        ("model.classes", "coc", "a list of texts or `coco` is expected"),
        ("model.classes", [1, 2], "put it in quotes"),
        ("model.classes", ["a", False], "put it in quotes"),  # what YAML makes of `no`
        ("model.classes", [], "an empty list"),
        ("model.classes", ["a", "a"], "a name twice: a"),
        ("model.tiles", {"size": 640, "overlap": 700}, "an overlap of 700 is no share of a tile"),
        ("model.tiles", {"size": 100, "overlap": 0.95}, "tiles of 100 px that overlap by 95 px"),
        ("model.sha256", "abc", "64 hex digits"),
        ("model.range", [600, 100], "the first must be below the second"),
        ("model.decode", "half", "one of `exact`, `fast` is expected"),
        ("name", "two words", "no spaces"),
        ("name", 7, "put it in quotes"),
        ("review", {}, "missing"),
        ("review", {"project": "p", "budget": "lots"}, "write `500 images` or `240 minutes`"),
        ("source.url", "", "not an empty text"),
        ("max_cost", 5, "max_cost needs price_per_gpu_hour"),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_is_expected(
    path: str, value: Any, said: str
) -> None:
    (line,) = problems(path, value)
    assert said in line
    assert path.split(".")[0] in line


def test_every_problem_is_reported_at_once() -> None:
    wrong = fields("source.shard_size", 0)
    wrong["model"]["checkpont"] = wrong["model"].pop("checkpoint")
    del wrong["output"]
    with pytest.raises(ConfigError) as caught:
        parse_config(RunConfig, wrong, where="cells.yaml")
    paths = [line.split(":")[0].strip() for line in caught.value.message.splitlines()[1:]]
    assert sorted(paths) == [
        "model.checkpoint", "model.checkpont", "output", "source.shard_size",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "meant"),
    [
        ("model.image_size", [320, 640], (320, 640)),
        ("model.image_size", 320, 320),
        ("policy", "s3://b/policy.yaml", "s3://b/policy.yaml"),
        ("model.classes", "coco", "coco"),
        ("model.classes", ["a", "b"], ("a", "b")),
        ("workers.count", 3, 3),
        ("workers.count", "auto", "auto"),
        ("workers.gpus", 0.5, 0.5),
        ("model.range", "data", "data"),
        ("model.range", [100, 4095], (100.0, 4095.0)),
        ("model.decode", "fast", "fast"),
    ],
)
def test_unions_take_each_of_their_forms(path: str, value: Any, meant: Any) -> None:
    found: Any = parse(path, value)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == meant


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAID:hunter2@bucket/x",
        "S3://AKIAID:hunter2@bucket/x",
        "s3://AKIAID:hunt/er2@bucket/x",  # secret keys hold slashes
        "https://hunter2@host/x",
        "https://me:hunter2@host:9000/x",
    ],
)
@pytest.mark.parametrize("path", ["source.url", "output", "model.checkpoint", "policy", "notify"])
def test_credentials_in_a_url_are_refused_and_not_repeated(path: str, url: str) -> None:
    (line,) = problems(path, url)
    assert line.startswith(f"{path}: a URL with credentials in it")
    assert "hunt" not in line
    assert "AKIAID" not in line


@pytest.mark.parametrize(
    "url", ["s3://bucket/a:b@c/x", "http://host:9000/mail@x", "plain/a@b", "/tmp/x:y@z"]
)
def test_an_at_sign_elsewhere_is_not_a_credential(url: str) -> None:
    assert parse("source.url", url).source.url == url


def test_a_secret_in_a_wrong_place_is_not_repeated() -> None:
    for path in ("model.classes", "workers.count", "source", "model.name"):
        assert "hunter2" not in problems(path, "hunter2")[0]


# -- the file


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "cells.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def refused(path: str, *sets: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, sets)
    assert len(caught.value.message.splitlines()) == 1
    assert caught.value.hint
    assert caught.value.exit_code == 2
    return caught.value


MINIMAL = "name: c\nsource: {url: in}\noutput: out\nmodel: {checkpoint: m.pth}\n"


def test_a_config_is_read_from_a_file(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL))
    assert (config.name, config.source.url, config.model.score_floor) == ("c", "in", 0.05)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: }\n", "line 2, column 2"),
        ("name: c\n\tsource: x\n", "line 2, column 1"),
        ("password: hunter2\n  x: [", "line 2"),
        (b"name: caf\xe9\n", "not text in UTF-8"),
        ("", "it is empty"),
        ("# nothing but a comment\n", "it is empty"),
        ("- a\n- b\n", "not a list"),
        ("hunter2", "not a text"),
    ],
)
def test_a_file_that_is_not_a_config_says_where(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    error = refused(written(tmp_path, text))
    assert said in error.message
    assert "hunter2" not in error.message


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert "none.yaml does not exist" in refused(str(tmp_path / "none.yaml")).message
    assert "is not a file" in refused(str(tmp_path)).message


def test_set_overrides_fields_and_makes_sections(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path, MINIMAL + "workers:\n"),
        (
            "model.score_floor=0.2",
            "workers.batch_size=4",  # `workers:` is there, and empty
            "storage.endpoint_url=http://127.0.0.1:9000/?a=b",
            "model.classes=[RBC, WBC]",
            "source.include=['*.jpg']",
            "model.score_floor=0.3",
        ),
    )
    assert config.model.score_floor == 0.3
    assert config.workers.batch_size == 4
    assert config.storage.endpoint_url == "http://127.0.0.1:9000/?a=b"
    assert config.model.classes == ("RBC", "WBC")


def test_a_single_override_is_one_text_and_not_its_letters(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    assert load_config(path, "model.score_floor=0.2").model.score_floor == 0.2
    assert load_config(path, ["model.score_floor=0.2"]).model.score_floor == 0.2


_FIELDS = {
    "run": MINIMAL,
    "train": "name: a\noutput: b\ntrain: {}\nval: {}\nmodel: {}\n",
    "round": "name: a\noutput: b\npool: {}\ntruth: {}\ntest: {}\ntrain: {}\n",
    "suite": "output: b\nsets: []\ntraining: {}\nmodel: {}\n",
}
_LOADERS: dict[str, Callable[[str], object]] = {
    "run": load_config,
    "train": load_train_config,
    "round": load_round_config,
    "suite": load_suite_config,
}


@pytest.mark.parametrize("wanted", list(_LOADERS))
@pytest.mark.parametrize("given", list(_FIELDS))
def test_a_config_of_another_command_is_told_with_the_command(
    tmp_path: Path, given: str, wanted: str
) -> None:
    path = written(tmp_path, _FIELDS[given])
    if given == wanted:
        with contextlib.suppress(ConfigError):  # too little is in it, but it is of that command
            _LOADERS[wanted](path)
        return
    with pytest.raises(ConfigError, match=f"is a config of `labelfleet {given}`") as refused:
        _LOADERS[wanted](path)
    assert f"a config of `labelfleet {wanted}` is expected" in refused.value.message
    assert str(refused.value.hint).startswith(f"labelfleet {given} ")


def test_a_rounds_train_and_val_do_not_make_it_a_training(tmp_path: Path) -> None:
    a_set = {"annotations": "a.json", "images": "a"}
    both = {"name": "x", "output": "o", "truth": a_set, "test": a_set, "train": {}, "val": a_set}
    with pytest.raises(ConfigError, match="pol: unknown key; did you mean `pool`"):
        load_round_config(written(tmp_path, json.dumps({**both, "pol": {"url": "in"}})))
    with pytest.raises(ConfigError, match="is a config of `labelfleet round`"):
        load_train_config(written(tmp_path, json.dumps({**both, "pool": {"url": "in"}})))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.score_floor", "key=value is expected"),
        ("=3", "key=value is expected"),
        ("model..name=3", "key=value is expected"),
        ("name.sub=3", "name is a value, not a section"),
        ("model.classes=[a", "not YAML"),
    ],
)
def test_a_malformed_set_says_how_it_is_written(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, MINIMAL), (override,))
    assert said in caught.value.message
    assert "\n" not in caught.value.message


# -- what the models promise


def sections(model: type[Part] = RunConfig) -> list[type[Part]]:
    inner = [section_in(field.annotation) for field in model.model_fields.values()]
    return [model, *(s for part in inner if part for s in sections(part))]  # type: ignore[arg-type]


def test_every_field_says_what_it_is_for() -> None:
    for section in sections():
        undescribed = [n for n, f in section.model_fields.items() if not f.description]
        assert not undescribed, section


def test_a_config_is_frozen_and_hashable() -> None:
    config = parse()
    with pytest.raises(ValidationError):
        config.model.score_floor = 0.5  # type: ignore[misc]  # that is the point
    assert hash(config) == hash(parse())


def test_the_reference_page_lists_every_field_as_the_models_have_it() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    assert page == config_reference.page(), "run `python -m pipelines.config.reference`"
    for section in sections():
        for name, field in section.model_fields.items():
            (row,) = {line for line in page.splitlines() if line.startswith(f"| `{name}` |")
                      and str(field.description).replace("|", "&#124;") in line}  # fmt: skip
            if not field.is_required() and isinstance(field.default, int | float | str):
                assert f"`{str(field.default).lower()}`" in row.lower()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: 2026-13-45", "not a valid date or number"),
        ("name: !!int x", "not a valid date or number"),
        ("name: !!timestamp x", "not a valid date or number"),
        ("[" * 5000, "nested too deeply"),
        ("name: !!python/object/apply:os.system [id]", "line 1"),
    ],
)
def test_yaml_that_its_parser_stumbles_over_is_a_readable_error(
    tmp_path: Path, text: str, said: str
) -> None:
    assert said in refused(written(tmp_path, text)).message


def test_the_webhook_is_never_shown(tmp_path: Path) -> None:
    config = parse("notify", "https://hooks.example/T0/hunter2")
    assert config.notify is not None
    assert config.notify.get_secret_value() == "https://hooks.example/T0/hunter2"
    for shown in (repr(config), str(config), str(config.model_dump()), config.model_dump_json()):
        assert "hunter2" not in shown
    said = refused(written(tmp_path, "name: x"), "notify=https://hooks.example/T0/hunter2").message
    assert "command line is visible to all" in said
    assert "hunter2" not in said
    assert "web address" in problems("notify", "ftp://hooks.example/hunter2")[0]


@pytest.mark.parametrize("path", ["source.url", "output"])
def test_a_folder_has_no_query_where_a_secret_could_be(path: str) -> None:
    (line,) = problems(path, "https://host/folder?sig=hunter2")
    assert "query" in line
    assert "hunter2" not in line
