"""What an installation without all extras lacks, in words that say which extra brings it."""

from __future__ import annotations

from typing import Final

from storage.errors import NotInstalled

# Top-level package -> extra of pyproject.toml. The formats' extras are named where they decode.
EXTRA_OF: Final = {
    "ray": "run",
    "torch": "run",
    "torchvision": "run",
    "safetensors": "run",
    "onnx": "run",
    "onnxruntime": "run",
    "openvino": "openvino",
    "nncf": "openvino",
    "obstore": "clouds",
    "label_studio_sdk": "review",
    "duckdb": "browse",
    "starlette": "browse",
    "uvicorn": "browse",
    "super_gradients": "super-gradients",
    "data_gradients": "super-gradients",
}


def not_installed(exc: ModuleNotFoundError) -> NotInstalled | None:
    """Translate a failed import of an optional package; None: the package is not optional."""
    package = (exc.name or "").partition(".")[0]
    extra = EXTRA_OF.get(package)
    if extra is None:
        return None
    if extra == "super-gradients":
        hint = (
            "pip install 'labelfleet[train]', then pip install --no-deps super-gradients==3.7.1 "
            "data-gradients==0.3.2: see docs/installation.md"
        )
    else:
        hint = f"pip install 'labelfleet[{extra}]'"
    return NotInstalled(
        f"this needs {package.replace('_', '-')}, which is not installed", hint=hint
    )
