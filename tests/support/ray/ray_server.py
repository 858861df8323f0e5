"""A Ray on this machine in a process of its own, which others join by their environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support.patience import patient
from tests.support.servers.s3 import end_with_parent


@contextmanager
def ray_server(env: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Start it; gives what a process needs in its environment to join: the address, where the
    token lies, and that it is on loopback.

    Args:
        env: what its workers find in their environment, on top of this process's.
    """
    process, said = _start(env)
    if not said:  # on a busy machine Ray gives up waiting for its own node
        process.wait(timeout=patient(60))
        process, said = _start(env)
    try:
        yield json.loads(said)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=patient(60))


def _start(env: Mapping[str, str]) -> tuple[subprocess.Popen[str], str]:
    """Return the process, and the line it says when it is ready; empty if it ended before."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.ray.ray_server"],
        cwd=Path(__file__).parents[3],
        env={**os.environ, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=end_with_parent,
    )
    assert process.stdout is not None
    return process, process.stdout.readline()


def main() -> None:
    """Serve until stdin is closed."""
    import ray

    from pipelines.cluster.ray_cluster import ray_cluster

    before = set(os.environ)
    with ray_cluster("local"):
        added = {name: os.environ[name] for name in set(os.environ) - before}
        address = ray.get_runtime_context().gcs_address
        # The user's own token; where there is none, what is added names this Ray's.
        token = str(Path.home() / ".ray/auth_token")
        said = {"RAY_AUTH_TOKEN_PATH": token, **added, "RAY_ADDRESS": address}
        print(json.dumps(said), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
