"""The house keeps its shape: no import circle, no crowded folder, one sentence for each room."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
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


@cache
def parsed(path: Path) -> ast.Module:
    """A file's tree, read once for all tests of this file."""
    return ast.parse(path.read_text())


@pytest.fixture(scope="module", autouse=True)
def _forget_trees() -> Iterator[None]:
    yield
    parsed.cache_clear()  # 200 MB


def imported(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports anywhere, inside functions too."""
    for node in ast.walk(parsed(path)):
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


@pytest.mark.slow
def test_imports_form_no_circle_even_if_lazy() -> None:
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


@pytest.mark.slow
def test_every_name_is_imported_from_the_module_that_defines_it() -> None:
    made = {name: defined(parsed(path)) for name, path in MODULES.items()}
    made["pipelines"] |= set(pipelines.__all__)  # the face, which alone re-exports
    places = [p for part in (*PACKAGES, "tests", "benchmarks") for p in (ROOT / part).rglob("*.py")]
    elsewhere = {
        f"{path.relative_to(ROOT)}: {name} from {module}"
        for path in places
        for module, name in borrowed(parsed(path))
        if name not in made[module]
    }
    assert elsewhere == set()


def test_the_face_alone_re_exports() -> None:
    lists = {
        name
        for name, path in MODULES.items()
        if "__all__" in defined(parsed(path))
        or (path.name == "__init__.py" and len(parsed(path).body) > 1)
    }
    assert lists == {"pipelines"}


# Who may write to the terminal: the command line, what renders for it, and two scripts.
SPEAKERS = {
    "pipelines.config.reference",
    "pipelines.training.reference",
    "pipelines.rounds.reference",
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
    found = {name for name, path in MODULES.items() if speaks(parsed(path))}
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
        for node in ast.walk(parsed(path))
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
    docstring = ast.get_docstring(parsed(MODULES[name]))
    assert docstring
    assert docstring.splitlines()[0].endswith(".")


def test_to_fields_gives_a_dictionary_and_to_json_gives_bytes() -> None:
    promised = {"to_fields": "dict", "to_json": "bytes"}
    others = {
        f"{name}:{node.lineno} {node.name} -> {ast.unparse(node.returns) if node.returns else ''}"
        for name, path in MODULES.items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef)
        and node.name in promised
        and not (node.returns and ast.unparse(node.returns).startswith(promised[node.name]))
    }
    assert others == set()


Function = ast.FunctionDef | ast.AsyncFunctionDef
LONGEST, WIDEST = 60, 6  # lines, parameters besides self and cls
# Functions that are longer or take more, and why.
LARGER = {
    "pipelines.ingest.ingest.ingest": "part of the face: one keyword an option",
    "pipelines.routing.route.route_run": "part of the face: one keyword an option",
    "storage.shards.reading.read_shard": "how a shard is read: one keyword a question",
    "workers.checkpoints.description.description": "the fields of the description",
    "workers.checkpoints.file.save_checkpoint": "the fields of the file",
    "workers.training.trainer.__init__": "the parts of a trainer, each given by its caller",
}


def size_of(function: Function, *, command: bool) -> tuple[int, int]:
    """Return (lines, parameters); of a command, whose parameters are its options, the body's."""
    if command:
        return (function.end_lineno or 0) - function.body[0].lineno + 1, 0
    a = function.args
    names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return (function.end_lineno or 0) - function.lineno + 1, len({*names} - {"self", "cls"})


def test_functions_are_short_and_take_few_parameters() -> None:
    larger = {
        f"{name}.{node.name}": size
        for name, path in MODULES.items()
        for node in ast.walk(parsed(path))
        if isinstance(node, Function)
        for size in [size_of(node, command=name.startswith("pipelines.cli."))]
        if size[0] > LONGEST or size[1] > WIDEST
    }
    assert {where: size for where, size in larger.items() if where not in LARGER} == {}


def test_a_large_function_would_be_seen() -> None:
    (small,) = ast.parse("def f(self, a, b, *, c):\n    return a").body
    assert isinstance(small, ast.FunctionDef)
    assert size_of(small, command=False) == (2, 3)
    assert size_of(small, command=True) == (1, 0)


def test_private_names_stay_in_their_module() -> None:
    places = [p for part in (*PACKAGES, "tests", "benchmarks") for p in (ROOT / part).rglob("*.py")]
    private = {
        f"{path.relative_to(ROOT)}: {name} from {module}"
        for path in places
        for module, name in borrowed(parsed(path))
        if name.startswith("_") and not name.startswith("__")
    }
    assert private == set()


# Defined here, used from outside the three packages, and why that is right.
USED_OUTSIDE = {
    "pipelines.__getattr__": "Python asks it",
    "pipelines.__dir__": "Python asks it",
    "pipelines.cluster.spot_nodes.SpotFirstNodeProvider": "a cluster's YAML names it",
    "storage.runs.annotations.read_identity": "tests check an annotation object's header by it",
}


def used_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def top_level_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            if not any(_registers(decorator) for decorator in node.decorator_list):
                yield node.name
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _registers(decorator: ast.expr) -> bool:
    """Whether a decorator makes a function a command, which the command line calls by itself."""
    return ast.unparse(decorator).split("(")[0].endswith((".command", ".callback"))


def test_what_is_defined_is_used_by_the_product() -> None:
    trees = {name: parsed(path) for name, path in MODULES.items()}
    used = {name for tree in trees.values() for name in used_names(tree)} | set(pipelines.__all__)
    unused = {
        f"{module}.{name}"
        for module, tree in trees.items()
        for name in top_level_names(tree)
        if name not in used and name != "__all__"
    }
    assert unused - set(USED_OUTSIDE) == set()


def test_mypy_checks_all_python_but_the_tests() -> None:
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    others = {
        str(path.relative_to(ROOT))
        for folder in ROOT.iterdir()
        if folder.is_dir() and not folder.is_symlink() and folder.name[0] != "."
        for path in folder.rglob("*.py")
        if folder.name not in {"tests", "build", "runs"}
    }
    assert others, "no Python was found"
    covered = {name for name in others for place in checked if f"{name}/".startswith(f"{place}/")}
    assert covered == others


def test_a_merge_left_no_conflict_marks() -> None:
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    texts = [
        path
        for folder in ("pipelines", "workers", "storage", "tests", "docs", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".j2")
    ]
    assert texts
    left = [str(path) for path in texts if any(x.startswith(marks) for x in path.open())]
    assert left == []
