"""Review on this machine: a Label Studio on loopback with the demo run's queue in it.

    python examples/review/demo.py start runs/demo     # make review-demo
    python examples/review/demo.py stop runs/demo      # make review-demo-stop

State (database, log, pid, token) lies in ``<demo>/label-studio``; a second start finds it again.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / ".venv-label-studio" / "bin" / "label-studio"
LABELFLEET = Path(sys.executable).with_name("labelfleet")
EMAIL = "demo@example.org"
BUDGET = "40 images"
_READY_TIMEOUT_S = 300


def start(demo: Path) -> None:
    """Start the server unless it runs, route unless that is done, push, and say where to look."""
    run, state = demo / "run", demo / "label-studio"
    if not (run / "run.json").exists():
        raise SystemExit(f"no run at {run}: `make demo` makes one")
    server = _running(state) or _launch(demo, state)
    env = {**os.environ, "LABEL_STUDIO_API_KEY": server["token"]}
    if not any((run / "review" / "queue").glob("*.parquet")):
        _labelfleet(env, "review", "route", str(run), "--budget", BUDGET)
    where = ("--url", server["url"], "--project", "labelfleet demo", "--create")
    _labelfleet(env, "review", "push", str(run), *where)
    sys.stdout.write(
        f"""
Label Studio runs at {server["url"]}
  login     {EMAIL}
  password  {server["password"]}

Open the project `labelfleet demo`, press `Label All Tasks`, correct a few pages, then:
  export PATH={LABELFLEET.absolute().parent}:$PATH
  export LABEL_STUDIO_API_KEY={server["token"]}
  labelfleet review pull {run}
  labelfleet decide {run}
  labelfleet review status {run}
`make review-demo-stop` ends it.
"""
    )


def stop(demo: Path) -> None:
    """End the server that ``start`` started, and no other."""
    server = _running(demo / "label-studio")
    if server is None:
        sys.stdout.write("no Label Studio of this demo runs\n")
        return
    os.kill(server["pid"], signal.SIGTERM)
    limit = time.monotonic() + 20
    while _is_ours(server["pid"]) and time.monotonic() < limit:
        time.sleep(0.2)
    if _is_ours(server["pid"]):
        os.kill(server["pid"], signal.SIGKILL)
    sys.stdout.write(f"Label Studio (pid {server['pid']}) has ended\n")


def _running(state: Path) -> dict[str, Any] | None:
    """What ``start`` wrote down, if that process still is there and answers."""
    try:
        server: dict[str, Any] = json.loads((state / "server.json").read_text())
    except (OSError, ValueError):
        return None
    return server if _is_ours(server["pid"]) and _answers(server["url"]) else None


def _launch(demo: Path, state: Path) -> dict[str, Any]:
    state.mkdir(parents=True, exist_ok=True)
    secret = state / "login.json"
    if not secret.exists():  # of the database beside it: fixed at its first start
        secret.touch(mode=0o600)
        login = {"token": secrets.token_hex(20), "password": secrets.token_urlsafe(9)}
        secret.write_text(json.dumps(login))
    login = json.loads(secret.read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    env = {
        **os.environ,
        "LABEL_STUDIO_BASE_DATA_DIR": str((state / "data").resolve()),
        "LABEL_STUDIO_USERNAME": EMAIL,
        "LABEL_STUDIO_PASSWORD": login["password"],
        "LABEL_STUDIO_USER_TOKEN": login["token"],
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(demo.resolve()),
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
    }
    command = [str(PROGRAM), "start", "--no-browser", "--internal-host", "127.0.0.1",
               "--port", str(port), "--host", url]  # fmt: skip
    with (state / "log").open("ab") as log:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    sys.stdout.write("starting Label Studio; the first time takes a minute\n")
    sys.stdout.flush()
    limit = time.monotonic() + _READY_TIMEOUT_S
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            raise SystemExit(f"Label Studio did not start: see {state / 'log'}")
        time.sleep(0.5)
    server = {"url": url, "pid": process.pid, **login}
    record = state / "server.json"
    record.touch(mode=0o600)
    record.write_text(json.dumps(server))
    return server


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _is_ours(pid: int) -> bool:
    """Whether the process is there and is a Label Studio: pids are given anew."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True
    return b"label-studio" in command


def _labelfleet(env: dict[str, str], *arguments: str) -> None:
    done = subprocess.run([str(LABELFLEET), *arguments], env=env, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("start", "stop"))
    parser.add_argument("demo", type=Path)
    given = parser.parse_args()
    {"start": start, "stop": stop}[given.what](given.demo)


if __name__ == "__main__":
    main()
