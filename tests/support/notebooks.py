"""Run a notebook as Jupyter would, without Jupyter: ``python -m tests.support.notebooks FILE``.

Each code cell runs in one namespace; what it prints and the value of its last expression become
its outputs. ``--write`` stores them in the file, which is how the pictures in notebooks/ are made.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image

Notebook = dict[str, Any]


def read_notebook(path: Path) -> Notebook:
    """Return a notebook's JSON."""
    found: Notebook = json.loads(path.read_text(encoding="utf-8"))
    return found


def source_of(cell: dict[str, Any]) -> str:
    """Return a cell's text; the format allows one string or its lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def execute(notebook: Notebook) -> None:
    """Run the code cells in order and replace their outputs. An exception of a cell ends it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, start=1):
        cell["execution_count"] = number
        cell["outputs"] = _run(source_of(cell), f"<cell {number}>", namespace)


def _run(source: str, name: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    out, err, value = io.StringIO(), io.StringIO(), None
    with redirect_stdout(out), redirect_stderr(err):
        exec(compile(tree, name, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
        shown = None if value is None else _shown(value)
    number = namespace["_number"] = namespace.get("_number", 0) + 1
    outputs = [_stream(kind, text.getvalue()) for kind, text in (("stdout", out), ("stderr", err))]
    found = [output for output in outputs if output["text"]]
    if shown is not None:
        found.append({"output_type": "execute_result", "execution_count": number,
                      "metadata": {}, "data": shown})  # fmt: skip
    return found


def _stream(name: str, text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text.splitlines(keepends=True)}


def _shown(value: Any) -> dict[str, Any]:
    """Return a value by MIME type; a picture as PNG or JPEG, whichever is smaller."""
    if isinstance(value, Image.Image):
        best = min((_encoded(value, kind) for kind in ("PNG", "JPEG")), key=lambda e: len(e[1]))
        text = f"<PIL image {value.width}x{value.height}>"
        return {best[0]: base64.b64encode(best[1]).decode(), "text/plain": [text]}
    return {"text/plain": repr(value).splitlines(keepends=True)}


def _encoded(image: Image.Image, kind: str) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, optimize=True)
    return f"image/{kind.lower()}", buffer.getvalue()


def main(arguments: list[str]) -> None:
    """Run the notebooks named in ``arguments``; with ``--write`` among them, keep their outputs."""
    for path in (Path(name) for name in arguments if name != "--write"):
        notebook = read_notebook(path)
        execute(notebook)
        if "--write" in arguments:
            text = json.dumps(notebook, indent=1, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
