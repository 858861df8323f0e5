"""Import some modules of a package without running what its ``__init__`` files import.

super-gradients' packages import each other entirely: importing YOLO-NAS loads every architecture,
the trainer, its data sets and its exporters, and with them pandas, scipy, TensorBoard and ONNX.
Inside ``lazy_packages`` a package is entered with its path only. What its ``__init__`` would have
imported is read from its source, and imported when that name is first requested; ``__version__``
and ``__all__`` are there as it states them; calls that it makes are left out. An ``__init__`` that
defines anything is run as it stands.

Afterwards, who asks such a package for a name gets all that its ``__init__`` imports: registries
that fill while modules are imported (``models.get("resnet50")``) are whole for people who use
the packages themselves.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

# What people ask of a module themselves. Python and its libraries ask every module they see for
# other names of this form, which must not run anything.
_ASKED = ("__version__", "__all__")


@contextlib.contextmanager
def lazy_packages(roots: Collection[str], deferred: Collection[str] = ()) -> Iterator[None]:
    """Inside, ``import`` enters packages lazily; what was imported before stays as it is.

    Args:
        roots: top-level packages which are entered lazily, with all packages below them.
        deferred: modules that run at the first look at one of their attributes.
    """
    finder = _Finder(roots, deferred)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _inside() -> bool:
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


class _Finder(MetaPathFinder):
    def __init__(self, roots: Collection[str], deferred: Collection[str]) -> None:
        self.roots = roots
        self.deferred = deferred

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        inside = fullname.partition(".")[0] in self.roots
        if not inside and fullname not in self.deferred:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None or spec.origin is None:
            return spec
        if fullname in self.deferred:
            spec.loader = _Deferred(spec.loader)
        elif spec.submodule_search_locations is not None:
            init = ast.parse(Path(spec.origin).read_bytes())
            if not any(map(_defines, init.body)):
                spec.loader = _LazyPackage(fullname, init)
        return spec


def _defines(node: ast.stmt) -> bool:
    """Return whether a statement makes anything that is not imported."""
    if isinstance(node, ast.Assign):
        names = [t.id for t in node.targets if isinstance(t, ast.Name)]
        return not all(name.startswith("__") for name in names)
    return not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)


class _Deferred(Loader):
    """Runs the module when an attribute is missing for the first time.

    (importlib's LazyLoader runs it at the second ``import`` already.)
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.lock = threading.RLock()
        self.started = False

    def exec_module(self, module: ModuleType) -> None:
        def look_up(name: str) -> Any:
            if not name.startswith("__") or name in _ASKED:
                self._run(module)
                if name in module.__dict__:
                    return module.__dict__[name]
                if (own := module.__dict__["__getattr__"]) is not look_up:
                    return own(name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__dict__["__getattr__"] = look_up

    def _run(self, module: ModuleType) -> None:
        with self.lock:  # another thread waits; this one, inside the module's own imports, does not
            if not self.started:
                self.started = True
                self.loader.exec_module(module)


class _LazyPackage(Loader):
    """Gives the package a ``__getattr__`` in place of its ``__init__``."""

    def __init__(self, package: str, init: ast.Module) -> None:
        self.package = package
        self.names: dict[str, tuple[str, str]] = {}  # module and its attribute; "": the module
        self.stars: list[str] = []
        self.stated: dict[str, Any] = {}  # __version__, __all__
        self.complete = False
        for node in init.body:
            if isinstance(node, ast.Import):
                self._take_import(node)
            elif isinstance(node, ast.ImportFrom):
                self._take_import_from(node)
            elif isinstance(node, ast.Assign):
                self._take_statement(node)

    def _take_statement(self, node: ast.Assign) -> None:
        with contextlib.suppress(ValueError):  # computed, not stated
            value = ast.literal_eval(node.value)
            self.stated.update((t.id, value) for t in node.targets if isinstance(t, ast.Name))

    def _take_import(self, node: ast.Import) -> None:
        for alias in node.names:
            module = alias.name if alias.asname else alias.name.partition(".")[0]
            self.names[alias.asname or module] = (module, "")

    def _take_import_from(self, node: ast.ImportFrom) -> None:
        relative = "." * node.level + (node.module or "")
        module = importlib.util.resolve_name(relative, self.package)
        for alias in node.names:
            if alias.name == "*":
                self.stars.append(module)
            else:
                self.names[alias.asname or alias.name] = (module, alias.name)

    def exec_module(self, module: ModuleType) -> None:
        def look_up(name: str) -> Any:
            if not self.complete and not name.startswith("__") and not _inside():
                self.complete = True
                self._import_all()
            value = self._find(name)
            setattr(module, name, value)
            return value

        module.__dict__.update(self.stated, __getattr__=look_up)

    def _import_all(self) -> None:
        for module in [*self.stars, *(origin for origin, _ in self.names.values())]:
            with contextlib.suppress(ImportError):  # raised when one of its names is requested
                importlib.import_module(module)
        for name in self.names:
            with contextlib.suppress(ImportError, AttributeError):
                self._find(name)

    def _find(self, name: str) -> Any:
        if name in self.names:
            origin, attribute = self.names[name]
            owner = importlib.import_module(origin)
            if not attribute:
                return owner
            if origin != self.package and hasattr(owner, attribute):
                return getattr(owner, attribute)
            return importlib.import_module(f"{origin}.{attribute}")
        if not name.startswith("__"):
            # One that the imports of the __init__ would have brought along.
            if importlib.util.find_spec(f"{self.package}.{name}"):
                return importlib.import_module(f"{self.package}.{name}")
            for origin in self.stars:
                owner = importlib.import_module(origin)
                if hasattr(owner, name):
                    return getattr(owner, name)
        raise AttributeError(f"module {self.package!r} has no attribute {name!r}")
