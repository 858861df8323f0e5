"""Whether obstore can be called in this process.

Its threads start with the first call and do not survive a fork; a call in the child would wait for
them for ever, without an error (``multiprocessing`` forks by default on Linux, and so do the
workers of a PyTorch DataLoader).
"""

from __future__ import annotations

import os

_first_used_in = 0


def obstore_works_here() -> bool:
    """Return whether obstore's threads are, or will be, in this process; call it before each use
    that could be the first."""
    global _first_used_in  # as obstore's threads: one set a process
    _first_used_in = _first_used_in or os.getpid()
    return _first_used_in == os.getpid()
