"""Prevents the side effects of importing super-gradients.

Left alone, the import tees stdout and stderr into files in the home directory, takes over the
root logger, installs a crash handler, and prints. onnxruntime, which comes with it, writes a
telemetry database, matplotlib a font list. None of that may happen in a worker, or in a command
that prints JSON. And it imports all of super-gradients, for several times the CPU time of the
modules that YOLO-NAS needs.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

from workers.local_folders import cache_folder, own_folder
from workers.yolo_nas.lazy_packages import lazy_packages

_PACKAGES = ("super_gradients", "torchvision")
_DEFERRED = ("matplotlib", "matplotlib.pyplot", "onnx", "onnxsim", "pkg_resources", "requests")

_SETTINGS = {
    "CRASH_HANDLER": "FALSE",
    "CONSOLE_LOG_LEVEL": "ERROR",
    "FILE_LOG_LEVEL": "ERROR",
    "UPLOAD_LOGS": "FALSE",
    "ORT_DISABLE_TELEMETRY": "1",
}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Import super-gradients inside this: streams, root logger and home stay as they were.

    Of its packages, and of torchvision's, only the modules asked for are imported.
    """
    _prepare_environment()
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    # It wraps whatever sys.stdout is at that moment; leaving the block puts the real one back.
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
        lazy_packages(_PACKAGES, _DEFERRED),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for handler in set(root.handlers) - set(handlers):
                handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)


def _prepare_environment() -> None:
    """Settings it reads once, at import; what the user set stays."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))
    if "SUPER_GRADIENTS_LOG_DIR" not in os.environ:
        folder = own_folder("sg")
        # Registered before its own exit hook, so run after it: that one writes there once more.
        atexit.register(folder.cleanup)
        os.environ["SUPER_GRADIENTS_LOG_DIR"] = folder.name
