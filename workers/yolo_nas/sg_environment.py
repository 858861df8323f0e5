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
import os
import threading
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


_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Import super-gradients inside this: streams, root logger and home stay as they were.

    Of its packages, and of torchvision's, only the modules asked for are imported: what replaces
    the streams is not among them. Other threads may print, log and set up logging meanwhile.
    """
    _prepare_environment()
    with _one_at_a_time, warnings.catch_warnings(), lazy_packages(_PACKAGES, _DEFERRED):
        warnings.simplefilter("ignore")
        _keep_root_logger()
        with _audible():
            yield


def _keep_root_logger() -> None:
    """Make its one configuration of the root logger, due at the first import, do nothing.

    (To let it replace all handlers, and to put them back, would undo what another thread sets up.)
    """
    from super_gradients.common.auto_logging.auto_logger import AutoLoggerConfig

    own = AutoLoggerConfig._setup_logging
    AutoLoggerConfig._setup_logging = lambda *_, **__: None
    try:
        AutoLoggerConfig.get_instance()
    finally:
        AutoLoggerConfig._setup_logging = own  # its Trainer may ask for a log file later


@contextlib.contextmanager
def _audible() -> Iterator[None]:
    """Inside, it does not mute the process, which each of its loggers does where LOCAL_RANK, as
    Ray Train and torchrun set it, is above 0: stdout would be gone, and every logger's level ERROR.
    """
    from super_gradients.common.abstractions import mute_processes

    own = mute_processes.mute_current_process
    mute_processes.mute_current_process = lambda: None
    try:
        yield
    finally:
        mute_processes.mute_current_process = own


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
