"""What all tests share: where optional real data lies, and nothing that talks to the outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no failure: no test judges how long an example took.
settings.register_profile("labelfleet", deadline=None)
settings.load_profile("labelfleet")

ROOT = Path(__file__).resolve().parent.parent


def _optional_folder(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    if not path.is_dir():
        pytest.skip(f"needs the folder {path} (or set {variable}); it is not there")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real images with ground truth: bccd, hituav, coco_ccby."""
    return _optional_folder("LABELFLEET_DATA", "data")


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """A small trained YOLO-NAS to start with."""
    return _optional_folder("LABELFLEET_MODELS", "models")
