"""Free ports of this machine, each for one test process alone."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

_OURS: dict[int, socket.socket] = {}  # until this process ends


def free_ports(count: int) -> list[int]:
    """Return that many free ports of 127.0.0.1.

    They lie below the system's ephemeral ports and below Ray's, so that no other process takes one
    before the server starts.
    """
    return sorted(_chosen(range(20_000, 32_000), count, "127.0.0.1"))


def quiet_ports(count: int) -> list[int]:
    """Return free ports outside the system's ephemeral range, free at every address: Ray binds some
    of them a minute after they were chosen."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    low, high = map(int, given.read_text().split()) if given.exists() else (32768, 60999)
    quiet = [p for p in range(20_000, 65_000) if not low <= p <= high]  # Ray's workers lie below
    return _chosen(quiet, count, "0.0.0.0")


def _chosen(among: Sequence[int], count: int, address: str) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().choice(among)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((address, port))
            if port not in found and _reserved(port):
                found.append(port)
    return found


def _reserved(port: int) -> bool:
    """Keep a port from this and all other test processes, which may choose it before it is bound:
    of a name in Linux's abstract space there can be one."""
    if port in _OURS:
        return False
    if sys.platform == "linux":
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0labelfleet-tests-port-{port}")
        except OSError:
            name.close()
            return False
        _OURS[port] = name
    return True
