"""The house keeps its shape: no import circle, no crowded folder, one sentence for each room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipelines

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipelines", "workers", "storage")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            part = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(part) > 1:
                found.append(sorted(part))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def import_graph() -> dict[str, set[str]]:
    return {
        name: {other for other in imported(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }


def test_there_is_no_import_circle_not_even_a_lazy_one() -> None:
    assert circles(import_graph()) == []


def test_a_circle_would_be_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [["b", "c"]]


def defined(tree: ast.Module) -> set[str]:
    """Names that a module itself makes, at its top level or below an `if` or `try` there."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def borrowed(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of what is imported from ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES and not node.level:
            for alias in node.names:
                if f"{node.module}.{alias.name}" not in MODULES:
                    yield str(node.module), alias.name


def test_every_name_is_imported_from_the_module_that_defines_it() -> None:
    made = {name: defined(ast.parse(path.read_text())) for name, path in MODULES.items()}
    made["pipelines"] |= set(pipelines.__all__)  # the face, which alone re-exports
    places = [p for part in (*PACKAGES, "tests", "benchmarks") for p in (ROOT / part).rglob("*.py")]
    elsewhere = {
        f"{path.relative_to(ROOT)}: {name} from {module}"
        for path in places
        for module, name in borrowed(ast.parse(path.read_text()))
        if name not in made[module]
    }
    assert elsewhere == set()


def test_the_face_alone_re_exports() -> None:
    lists = {
        name
        for name, path in MODULES.items()
        if "__all__" in defined(ast.parse(path.read_text()))
        or (path.name == "__init__.py" and len(ast.parse(path.read_text()).body) > 1)
    }
    assert lists == {"pipelines"}


# Who may write to the terminal: the command line, what renders for it, and two scripts.
SPEAKERS = {
    "pipelines.config.reference",
    "pipelines.training.reference",
    "pipelines.demo.digits",
    "pipelines.dispatch.progress",
}


def speaks(tree: ast.Module) -> bool:
    """Whether a module prints, or writes to this process's own streams, or makes a console."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("print", "HarmlessConsole"):
                return True
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) in (("sys", "stdout"), ("sys", "stderr"))
        ):
            return True
    return False


def test_no_pipeline_prints() -> None:
    found = {name for name, path in MODULES.items() if speaks(ast.parse(path.read_text()))}
    others = {
        name
        for name in found - SPEAKERS
        if not name.startswith(("pipelines.cli.", "pipelines.display."))
        and not name.endswith("view")
    }
    # storage.logs is where Python's log goes.
    assert others == {"storage.logs"}


def test_handlers_of_signals_are_installed_for_the_command_line_alone() -> None:
    installs = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) == ("signal", "signal")
    }
    assert installs == {"pipelines.cli.main", "pipelines.dispatch.stopping"}


def test_no_folder_holds_more_than_twelve_modules() -> None:
    crowded = {
        str(folder.relative_to(ROOT)): count
        for folder in {path.parent for path in MODULES.values()}
        if (count := len([p for p in folder.glob("*.py") if p.name != "__init__.py"])) > 12
    }
    assert crowded == {}


@pytest.mark.parametrize("name", [n for n, p in MODULES.items() if p.name == "__init__.py"])
def test_a_room_says_in_one_line_what_it_is(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text()))
    assert docstring
    assert docstring.splitlines()[0].endswith(".")


def test_to_fields_gives_a_dictionary_and_to_json_gives_bytes() -> None:
    promised = {"to_fields": "dict", "to_json": "bytes"}
    others = {
        f"{name}:{node.lineno} {node.name} -> {ast.unparse(node.returns) if node.returns else ''}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name in promised
        and not (node.returns and ast.unparse(node.returns).startswith(promised[node.name]))
    }
    assert others == set()
