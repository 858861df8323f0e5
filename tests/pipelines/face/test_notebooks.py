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
DATA = Path(os.environ.get("LABELFLEET_DATA", ROOT.parent / "shared" / "data"))
DRONES = "4_drone_round.ipynb"
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


def _runs_as_stored(paths: list[Path], folder: Path, environment: dict[str, str]) -> None:
    """Run copies of notebooks on small inputs; each cell must show what the stored one shows."""
    copies = []
    for path in paths:
        notebook = read_notebook(path)
        for cell in _code(notebook):
            ast.parse(source_of(cell))
            cell["outputs"] = []
        copies.append(folder / path.name)
        copies[-1].write_text(json.dumps(notebook))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.notebooks", "--write", *copies],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd=folder,
        timeout=patient(300),
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder),
             "LABELFLEET_NOTEBOOKS_SMALL": "1", "LABELFLEET_DATA": str(DATA)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for path, ran in zip(paths, copies, strict=True):
        before, after = read_notebook(path), read_notebook(ran)
        assert len(_pictures(after)) == len(_pictures(before)) > 0
        kinds = [[o["output_type"] for o in cell["outputs"]] for cell in _code(after)]
        assert kinds == [[o["output_type"] for o in cell["outputs"]] for cell in _code(before)]


@pytest.mark.slow
def test_every_cell_runs_and_shows_as_much_as_the_stored_one(
    tmp_path: Path, shared_ray: dict[str, str]
) -> None:
    _runs_as_stored([p for p in NOTEBOOKS if p.name != DRONES], tmp_path, shared_ray)


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "hituav").is_dir(),
    reason=f"{DRONES} needs the pictures of HIT-UAV, which are not in the repository",
)
def test_the_round_on_drone_pictures_runs(tmp_path: Path, shared_ray: dict[str, str]) -> None:
    _runs_as_stored([ROOT / "notebooks" / DRONES], tmp_path, shared_ray)
