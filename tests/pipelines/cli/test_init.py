"""The first five minutes: --version, completion, init, and the schema that it names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipelines.cli.init import schema_of
from pipelines.cli.main import main
from pipelines.config.run_config import RunConfig, load_config
from pipelines.labelling.first_config import SCHEMA_NAME
from pipelines.labelling.first_model import FILL_IN_ARCH, FILL_IN_CHECKPOINT
from tests.support.samples.family_graphs import write_graph
from tests.support.samples.tiny_run import fill_folder
from workers.checkpoints.file import read_checkpoint
from workers.images.preprocessing import Preprocessing

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    fill_folder(tmp_path / "my photos", 3)
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_the_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"labelfleet {version('labelfleet')}\n", "")


def test_the_shell_completes_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli.main"], capture_output=True, text=True, check=False,
        env={**os.environ, "_LABELFLEET_COMPLETE": "complete_bash", "COMP_WORDS": "labelfleet ver",
             "COMP_CWORD": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split() == ["verify"], done.stderr


def test_a_folder_and_a_checkpoint_give_a_config_that_loads(
    here: Path, nano_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "init", "../my photos", "--checkpoint", nano_checkpoint)
    assert (code, err) == (0, "")
    assert "3 images (3 png)" in out
    text = (here / "my-photos.yaml").read_text()
    assert text.splitlines()[0] == f"# yaml-language-server: $schema={SCHEMA_NAME}"
    assert "TO DO" not in text
    config = load_config("my-photos.yaml")
    assert config.source.url == str(here.parent / "my photos")
    assert config.model.checkpoint == str(nano_checkpoint)
    assert config.output == "runs/my-photos"
    schema = json.loads((here / SCHEMA_NAME).read_text())
    assert set(RunConfig.model_fields) == set(schema["properties"])
    code, _, err = call(capsys, "init", "../my photos", "--checkpoint", nano_checkpoint)
    assert code == 2
    assert "is there already" in err
    code, out, _ = call(capsys, "plan", "my-photos.yaml", "--json")
    assert code == 0
    assert json.loads(out)["images"] == 3


def test_the_next_command_can_be_pasted_whatever_the_names(
    here: Path, nano_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--checkpoint", nano_checkpoint, "--truth", "tr uth.json", "--out", "my run.yaml")
    (here / "tr uth.json").write_text('{"images": [], "annotations": [], "categories": []}')
    code, out, err = call(capsys, "init", "../my photos", *given)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "next: labelfleet plan 'my run.yaml'"
    text = (here / "my run.yaml").read_text()
    assert "# labelfleet evaluate runs/my-photos --truth 'tr uth.json' --allow-missing" in (
        text.replace("#   ", "# ")
    )
    code, _, err = call(capsys, "plan", "../my photos")
    assert code == 2
    assert "`labelfleet init '../my photos'` writes a config for its images" in err
    code, _, err = call(capsys, "train", "my run.yaml")
    assert err.splitlines()[-1] == "  -> labelfleet run 'my run.yaml'"


def test_without_a_checkpoint_it_says_what_to_fill_in(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "init", here.parent / "my photos", "--json")
    said = json.loads(out)
    assert code == 0
    assert said["missing"] == ["model.checkpoint: your YOLO-NAS weights, a path or URL"]
    assert load_config(said["config"]).model.checkpoint == FILL_IN_CHECKPOINT
    code, _, err = call(capsys, "plan", said["config"])
    assert code == 2
    assert "still to be filled in: model.checkpoint, now FILL-IN.pth\n" in err
    assert "name your weights" in err


def test_classes_come_from_a_roboflow_export_and_truth_is_pointed_at(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = here.parent / "my photos"
    (photos / "data.yaml").write_text("names: ['red: cell', 'no']\nnc: 2\n")
    (photos / "_annotations.coco.json").write_text("{}")
    assert call(capsys, "init", photos)[0] == 0
    text = (here / "my-photos.yaml").read_text()
    assert "names 2 classes: ['red: cell', 'no']" in text
    assert "_annotations.coco.json" in text


def test_a_list_of_classes_that_goes_on_says_so(
    here: Path, nano_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for known, said in ((20, "names 20 classes: [c01,"), (21, "classes, the first of them: [c01,")):
        categories = [{"id": n, "name": f"c{n:02}"} for n in range(1, known + 1)]
        (here / "t.json").write_text(
            json.dumps({"images": [], "annotations": [], "categories": categories})
        )
        given = ("--checkpoint", nano_checkpoint, "--truth", "t.json", "--out", f"{known}.yaml")
        assert call(capsys, "init", "../my photos", *given)[0] == 0
        text = (here / f"{known}.yaml").read_text()
        assert said in text
        assert "c20]" in text


def test_a_source_around_this_folder_gets_an_output_beside_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_folder(here, 1)
    assert call(capsys, "init", ".", "--out", here.parent / "a.yaml")[0] == 0
    config = load_config(str(here.parent / "a.yaml"))
    assert config.output == str(here.parent / "work-labels")
    assert config.source.url == str(here)


@pytest.mark.parametrize("there", ["empty", "nothing", "notes"])
def test_a_source_without_images_is_told(
    here: Path, capsys: pytest.CaptureFixture[str], there: str
) -> None:
    if there != "nothing":
        (here / there).mkdir()
    if there == "notes":
        (here / there / "a.txt").write_text("x")
    code, _, err = call(capsys, "init", there)
    assert code in (1, 2)
    assert "error:" in err
    assert list(here.glob("*.yaml")) == []
    assert ("only 1 other file\n" in err) == (there == "notes")


def test_a_checkpoint_without_its_arch_and_classes_is_said_at_once(
    here: Path, nano_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = here / "bare.pth"
    torch.save({"net": read_checkpoint(nano_checkpoint).load_state_dict()}, bare)
    (here.parent / "my photos" / "data.yaml").write_text("names: [a, b]\n")
    code, out, _ = call(capsys, "init", "../my photos", "--checkpoint", bare, "--json")
    missing = json.loads(out)["missing"]
    assert code == 0
    assert missing[0].startswith("model.arch: the arch_params yaml")
    assert missing[1].startswith("model.classes: its")
    assert "(the data set names 2)" in missing[1]
    text = (here / "my-photos.yaml").read_text()
    assert text.count("# TO DO") == 2
    assert load_config("my-photos.yaml").model.arch == FILL_IN_ARCH
    code, _, err = call(capsys, "plan", "my-photos.yaml")
    assert "still to be filled in: model.arch, now FILL-IN-arch.yaml\n" in err
    assert "recipes/arch_params" in err
    stated = text.replace(f"arch: {FILL_IN_ARCH}", "licence: x").replace("  # licence", "  # was")
    (here / "my-photos.yaml").write_text(stated)
    code, out, _ = call(capsys, "plan", "my-photos.yaml")
    assert code == 2
    assert "the model cannot be used: model.classes is missing" in " ".join(out.split())
    named = stated.replace("licence: x", "classes: [a, b]")
    (here / "my-photos.yaml").write_text(named)
    for command in ("plan", "run"):
        code, out, err = call(capsys, command, "my-photos.yaml")
        assert code == 2
        assert "model.classes has 2 names" in " ".join((out + err).split())
    assert not (here / "runs").exists()  # no lock is left behind


def test_what_init_comments_can_be_uncommented(
    here: Path, nano_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(capsys, "init", "../my photos", "--checkpoint", nano_checkpoint)
    path = here / "my-photos.yaml"
    text = path.read_text()
    for field in ("arch", "image_size"):
        assert f"\n  # {field}: " in text
    path.write_text(text.replace("\n  # preprocessing:", "\n  preprocessing:"))
    found = load_config(str(path)).model.preprocessing
    assert found is not None
    assert found.preprocessing() == Preprocessing(size=(640, 640), resize_to=(636, 636))


@pytest.mark.parametrize("family", ["yolox", None])
def test_an_onnx_graph_gives_its_family_or_a_line_to_fill_in(
    here: Path, capsys: pytest.CaptureFixture[str], family: str | None
) -> None:
    rows = np.zeros((126 if family else 100, 5 + 80), np.float32)  # 8 × 12 + 4 × 6 + 2 × 3 cells
    graph = write_graph(here / "graph.onnx", {"output": rows})
    code, out, _ = call(capsys, "init", "../my photos", "--checkpoint", graph, "--json")
    missing = json.loads(out)["missing"]
    text = (here / "my-photos.yaml").read_text()
    assert code == 0
    assert "images tensor(float) [?, 3, 64, 96] → output tensor(float) [?, " in text
    code, out, _ = call(capsys, "plan", "my-photos.yaml")
    if family is None:
        assert missing[0].startswith("model.family: yolox, d-fine, rt-detr, rf-detr, or the graph")
        assert "\n  # family: FILL-IN " in text
        assert code == 2
        assert "model.family does not say of which family" in " ".join(out.split())
    else:
        assert (missing, code) == ([], 0)
        model = load_config("my-photos.yaml").model
        assert (model.family, model.classes) == ("yolox", "coco")


@pytest.mark.parametrize("line_break", ["\n", "\r", "\x85", "\u2028", "\u2029"])
def test_names_in_a_graph_or_a_source_write_no_field(
    here: Path, capsys: pytest.CaptureFixture[str], line_break: str
) -> None:
    name = f"x{line_break}output: elsewhere{line_break}#"
    graph = write_graph(here / "graph.onnx", {name: np.zeros((126, 85), np.float32)})
    (here.parent / "my photos" / f"{name}_annotations.coco.json").write_text("{}")
    (here.parent / "my photos" / f"instances{name}.json").write_text("{}")
    assert call(capsys, "init", "../my photos", "--checkpoint", graph)[0] == 0
    text = (here / "my-photos.yaml").read_text()
    assert text.count("output: elsewhere") == 2
    assert load_config("my-photos.yaml").output == "runs/my-photos"


def test_a_config_that_cannot_be_written_says_what_to_do(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "init", "../my photos", "--out", "nowhere/c.yaml")
    assert code == 2
    assert "nowhere/c.yaml cannot be written: No such file" in err
    assert "in a folder that is there and yours to write" in err


def test_an_existing_file_is_said_before_anything_is_read(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "nowhere.yaml").write_text("")
    code, _, err = call(capsys, "init", "nowhere", "--checkpoint", "none.pth")
    assert code == 2
    assert "is there already" in err


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (("plan", "../my photos"), "is a folder, and a config is a YAML file", "labelfleet init"),
        (("gate", "labels"), "is the output of a run", "the YAML file that the run was made with"),
        (("report", "c.yaml"), "is a config, and this command takes a run's output", "give out"),
        (("plan", "c.yaml"), "there is nothing", "nothing is there: put images"),
        (("plan", "c.yaml", "--set", "source.url=notes"), "there are 1 .txt", "by their suffix"),
        (("frobnicate",), "No such command 'frobnicate'.\n", "labelfleet --help"),
        (("relocat",), "Did you mean 'relocate'?", "labelfleet --help"),
    ],
)
def test_mixed_up_arguments_say_what_is_expected(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str, hint: str
) -> None:
    for folder in ("labels", "none", "notes"):
        (here / folder).mkdir()
    (here / "labels" / "run.json").write_text("{}")
    (here / "notes" / "a.txt").write_text("x")
    (here / "c.yaml").write_text(
        "name: c\nsource: {url: none}\noutput: out\nmodel: {checkpoint: c.pth}\n"
    )
    code, _, err = call(capsys, *arguments)
    assert code in (1, 2)
    assert said in err
    assert hint in err


@pytest.mark.parametrize("kind", ["run", "train"])
def test_the_schema_knows_every_field_and_refuses_others(kind: str) -> None:
    schema: dict[str, Any] = json.loads(schema_of(kind))
    assert schema["additionalProperties"] is False
    assert schema["properties"]["name"]["description"]


def test_the_schema_takes_what_the_demo_writes() -> None:
    """Checked by hand where no validator is installed: required fields and sections."""
    jsonschema = pytest.importorskip("jsonschema")
    whole = yaml.safe_load(
        "name: a\nsource: {url: in}\noutput: out\nmodel: {checkpoint: c.pth, classes: coco}\n"
    )
    jsonschema.validate(whole, json.loads(schema_of("run")))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**whole, "modle": {}}, json.loads(schema_of("run")))
