"""notebooks/: readable on a forge as they are, and every cell runs."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.notebooks import Notebook, read_notebook, source_of
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[3]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PATHS = re.compile(
    r"(?:file://|(?<![\w.:/]))/(?:tmp|home|root|work|usr|var|opt|mnt|private|Users)/|[A-Z]:\\\\"
)


def _code(notebook: Notebook) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _outputs(notebook: Notebook) -> list[dict[str, Any]]:
    return [output for cell in _code(notebook) for output in cell["outputs"]]


def _pictures(notebook: Notebook) -> list[Image.Image]:
    found = [data for o in _outputs(notebook) for kind, data in o.get("data", {}).items()
             if kind.startswith("image/")]  # fmt: skip
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_there_are_notebooks_and_the_docs_name_each() -> None:
    page = (ROOT / "docs" / "notebooks.md").read_text()
    assert NOTEBOOKS
    assert re.findall(r"`(\w+\.ipynb)`", page) == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_shows_its_outputs_and_pictures(path: Path) -> None:
    notebook = read_notebook(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert {cell["cell_type"] for cell in cells} == {"code", "markdown"}
    counts = [cell["execution_count"] for cell in _code(notebook)]
    assert counts == list(range(1, len(counts) + 1))  # run once, from top to bottom
    assert {o["output_type"] for o in _outputs(notebook)} <= {"stream", "execute_result"}
    assert not [o for o in _outputs(notebook) if o.get("name") == "stderr"]
    assert min(min(picture.size) for picture in _pictures(notebook)) > 100


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_small_and_names_no_path_of_a_machine(path: Path) -> None:
    assert path.stat().st_size < 1_000_000
    pictures = ("image/png", "image/jpeg")
    for output in _outputs(read_notebook(path)):
        data = {k: v for k, v in output.get("data", {}).items() if k not in pictures}
        text = json.dumps([output.get("text", ""), data], ensure_ascii=False)
        assert not PATHS.search(text), text[:500]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_notebooks_lead_somewhere(path: Path) -> None:
    texts = [source_of(c) for c in read_notebook(path)["cells"] if c["cell_type"] == "markdown"]
    for link in re.findall(r"\]\(([^)]+)\)", "\n".join(texts)):
        assert link.startswith("https://") or (path.parent / link.split("#")[0]).is_file(), link


def test_paths_of_a_machine_are_found() -> None:
    for path in ("/tmp/labelfleet-1/run", "'/home/me/x'", "file:///tmp/x", "at /Users/me/"):
        assert PATHS.search(path), path
    assert not PATHS.search("runs/tmp/x https://example.org/home/x")


@pytest.mark.slow
def test_every_cell_runs_and_shows_as_much_as_the_stored_one(tmp_path: Path) -> None:
    copies = []
    for path in NOTEBOOKS:
        notebook = read_notebook(path)
        for cell in _code(notebook):
            ast.parse(source_of(cell))
            cell["outputs"] = []
        copies.append(tmp_path / path.name)
        copies[-1].write_text(json.dumps(notebook))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.notebooks", "--write", *copies],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd=tmp_path,
        timeout=patient(240),
        env={**os.environ, "PYTHONPATH": str(ROOT), "LABELFLEET_NOTEBOOKS_SMALL": "1",
             "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for stored, ran in zip(NOTEBOOKS, copies, strict=True):
        before, after = read_notebook(stored), read_notebook(ran)
        assert len(_pictures(after)) == len(_pictures(before)) > 0
        kinds = [[o["output_type"] for o in cell["outputs"]] for cell in _code(after)]
        assert kinds == [[o["output_type"] for o in cell["outputs"]] for cell in _code(before)]
