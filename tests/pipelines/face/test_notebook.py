"""The public face, as a notebook uses it: one process, two runs, no terminal, nothing printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pipelines
from pipelines.demo.digits import make_pages
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[3]

NOTEBOOK = """
import json, shutil, signal, sys
from pathlib import Path

from pipelines import Run, decide, export, fit, label_run, load_config
from pipelines.dispatch.tally import Caller

folder, pages = Path(sys.argv[1]), Path(sys.argv[2])
found = {"before": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]}


class Follower:
    images = 0

    def update(self, tally):
        self.images = tally.images

    def note(self, text):
        pass


follower = Follower()
first = label_run(load_config(str(folder / "run.yaml")), caller=Caller(follower))
found["first"] = [first.images, first.left, first.exit_code, follower.images]
for page in sorted((pages / "late").iterdir()):
    shutil.move(page, pages / "images" / page.name)
second = label_run(load_config(str(folder / "run.yaml")))
found["second"] = [second.images, second.new_images, second.exit_code]

run = Run(second.output)
found["rates"] = [second.images_per_s, round(run.status().invocation.images_per_s, 2)]
rows = list(run.rows())
found["rows"] = len({row.image_id for row in rows})
found["arrow"] = sum(table.num_rows for table in run.tables(["status"]))
found["bytes"] = sum(len(raw) == row.nbytes for row, raw in run.images(rows))
fitted = fit(run, str(pages / "instances.json"))
version = decide(run)
found["labels"] = [run.label_versions(), sum(1 for _ in run.labels())]
export(run, str(folder / "coco"), "coco")
found["exported"] = sorted(p.name for p in (folder / "coco").rglob("*.json"))
found["after"] = [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
Path(sys.argv[3]).write_text(json.dumps(found))
"""


def test_importing_the_face_is_light() -> None:
    code = (
        "import sys, pipelines; dir(pipelines); "
        "print(sorted({'ray', 'torch', 'pyarrow', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", pipelines.__all__)
def test_each_name_is_there_and_documented(name: str) -> None:
    assert getattr(pipelines, name).__doc__
    assert f"`{name}" in (ROOT / "docs" / "python.md").read_text()


def test_another_name_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'label'"):
        _ = pipelines.label  # type: ignore[attr-defined]  # that is the point


@pytest.mark.slow
def test_a_notebook_labels_twice_reads_fits_decides_and_exports(
    tmp_path: Path, nano_checkpoint: Path
) -> None:
    made = make_pages(tmp_path / "pages", images=16, seed=3, broken=False)
    late = tmp_path / "pages" / "late"
    late.mkdir()
    for page in sorted(made.images.iterdir())[12:]:
        page.rename(late / page.name)
    config = {
        "name": "notebook",
        "source": {"url": str(made.images), "shard_size": 4},
        "output": str(tmp_path / "run"),
        "model": {"checkpoint": str(nano_checkpoint), "runtime": "torch"},
        "workers": {"count": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    truth = made.truth.rename(tmp_path / "pages" / "instances.json")
    assert truth.is_file()
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, tmp_path / "notebook.py", tmp_path, tmp_path / "pages", out],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patient(560), check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout, done.stderr) == ("", "")
    found = json.loads(out.read_text())
    assert found["first"] == [12, 0, 0, 12]
    assert found["second"] == [16, 4, 0]
    assert (found["rows"], found["arrow"], found["bytes"]) == (16, 16, 16)
    assert found["rates"][0] == found["rates"][1] > 0  # one definition
    assert found["labels"] == [["v0001"], 16]
    assert found["exported"]
    assert found["after"] == found["before"]
