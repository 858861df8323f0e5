"""Packages entered lazily: only what is asked for runs, and everything can be asked for."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.yolo_nas.lazy_packages import lazy_packages

FILES = {
    "__init__.py": "__version__ = '1.2'\nfrom lazytest.heavy import trainer\n"
    "from .models import Net as Model\n__all__ = ['Model', 'trainer']\nf()\n",
    "heavy.py": "trainer = 'trainer'\n__version__ = '3.4'\n",
    "models/__init__.py": "from .net import *\nfrom . import zoo\nimport lazytest.heavy as h\n",
    "models/net.py": "from . import zoo\nclass Net: pass\n",
    "models/zoo.py": "animals = 3\n",
    "defines/__init__.py": "from lazytest import heavy\nTABLE = {'heavy': heavy}\n",
    "broken.py": "import lazytest.models\nlazytest.models.nothing\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, text in FILES.items():
        path = tmp_path / "lazytest" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with lazy_packages(["lazytest"], ["lazytest.heavy"]):
        yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "lazytest"]:
        del sys.modules[name]


def loaded() -> set[str]:
    return {n for n in sys.modules if n.startswith("lazytest")}


def test_only_what_is_asked_for_is_imported(package: None) -> None:
    zoo = importlib.import_module("lazytest.models.zoo")
    assert zoo.animals == 3
    assert loaded() == {"lazytest", "lazytest.models", "lazytest.models.zoo"}


def test_every_name_of_an_init_can_be_asked_for(package: None) -> None:
    lazytest = importlib.import_module("lazytest")
    assert lazytest.trainer == "trainer"
    assert lazytest.Model is importlib.import_module("lazytest.models.net").Net
    assert lazytest.models.net.Net is lazytest.Model  # a module that the star brings along
    assert lazytest.models.h.trainer == "trainer"
    assert lazytest.models.zoo.animals == 3
    assert lazytest.Model is lazytest.models.Net  # by its star
    with pytest.raises(AttributeError, match="'lazytest' has no attribute 'nothing'"):
        _ = lazytest.nothing
    with pytest.raises(AttributeError, match=r"'lazytest\.models' has no attribute 'nothing'"):
        importlib.import_module("lazytest.broken")


def test_versions_and_stars_are_those_of_the_whole_package(package: None) -> None:
    lazytest = importlib.import_module("lazytest")
    assert lazytest.__version__ == "1.2"
    assert loaded() == {"lazytest"}
    names: dict[str, object] = {}
    exec("from lazytest import *", names)
    assert names["trainer"] == "trainer"
    assert names["Model"] is lazytest.models.Net
    assert importlib.import_module("lazytest.heavy").__version__ == "3.4"


def test_a_deferred_module_knows_its_version_before_anything_else(package: None) -> None:
    assert importlib.import_module("lazytest.heavy").__version__ == "3.4"


def test_a_deferred_module_may_look_names_up_itself(package: None, tmp_path: Path) -> None:
    (tmp_path / "lazytest/heavy.py").write_text("def __getattr__(name): return name * 2\n")
    heavy = importlib.import_module("lazytest.heavy")
    assert heavy.__version__ == "__version__" * 2
    assert heavy.ab == "abab"


def test_who_asks_afterwards_gets_all_of_a_package(tmp_path: Path) -> None:
    files = {
        "registry.py": "known = []\n",
        "__init__.py": "from . import one\nfrom .two import *\nfrom .gone import nothing\n",
        "one.py": "from lazyreg.registry import known\nknown.append('one')\n",
        "two.py": "from lazyreg.registry import known\nknown.append('two')\ndef get(): ...\n",
    }
    (tmp_path / "lazyreg").mkdir()
    for name, text in files.items():
        (tmp_path / "lazyreg" / name).write_text(text)
    try:
        sys.path.insert(0, str(tmp_path))
        with lazy_packages(["lazyreg"]):
            lazyreg = importlib.import_module("lazyreg")
            known = importlib.import_module("lazyreg.registry").known
            assert lazyreg.one
            assert known == ["one"]
        assert callable(lazyreg.get)
        assert known == ["one", "two"]
        with pytest.raises(ImportError):
            _ = lazyreg.nothing
    finally:
        sys.path.remove(str(tmp_path))
        for name in [n for n in sys.modules if n.partition(".")[0] == "lazyreg"]:
            del sys.modules[name]


def test_an_init_that_defines_something_runs(package: None) -> None:
    defines = importlib.import_module("lazytest.defines")
    assert defines.TABLE["heavy"].trainer == "trainer"


def test_a_deferred_module_runs_once_at_the_first_look(package: None, tmp_path: Path) -> None:
    (tmp_path / "lazytest/heavy.py").write_text(
        "import time, lazytest.heavy as me\n"
        "count = globals().get('count', 0) + 1\n"
        "time.sleep(0.05)\n"
        "assert not hasattr(me, 'later')\nlater = count\n"
    )
    heavy = importlib.import_module("lazytest.heavy")
    assert importlib.import_module("lazytest.heavy") is heavy
    assert "count" not in vars(heavy)
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(heavy.later)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 4
    with pytest.raises(AttributeError):
        _ = heavy.nothing


def test_other_packages_are_left_alone(package: None, tmp_path: Path) -> None:
    (tmp_path / "lazytest_not").mkdir()
    (tmp_path / "lazytest_not/__init__.py").write_text("from lazytest.models import zoo\n")
    importlib.import_module("lazytest_not")
    assert "lazytest.models.zoo" in sys.modules
    del sys.modules["lazytest_not"]
