"""Which package builds the network in a test: super-gradients, or modern-yolonas alone."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from workers.yolo_nas.network import Package, installed_package

PACKAGES: tuple[Package, ...] = ("super-gradients", "modern-yolonas")
MODULES = {"super-gradients": "super_gradients", "modern-yolonas": "modern_yolonas"}


def build_with(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``build_network`` see that package only, as where the other is not installed."""
    for other in set(PACKAGES) - {package}:
        hide(other, monkeypatch)
    if importlib.util.find_spec(MODULES[package]) is None:
        pytest.skip(f"{package} is not installed")
    assert installed_package() == package


def hide(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a package unknown to the import system."""
    monkeypatch.setitem(sys.modules, MODULES[package], None)
    for name in list(sys.modules):  # a loaded submodule is found without its package
        if name.startswith(f"{MODULES[package]}."):
            monkeypatch.delitem(sys.modules, name)
