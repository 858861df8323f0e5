"""CI runs as on a fresh machine: nothing of this one's environment gets into the tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MAKE = """#!/bin/sh
{ echo "target=$1"; env; } >> "$PIP_CACHE_DIR/seen"
echo -- >> "$PIP_CACHE_DIR/seen"
test -d "$HOME" && touch "$HOME/written"
"""


def test_ci_inherits_only_the_index_settings_and_tries_an_odd_home(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/make").write_text(MAKE)
    (tmp_path / "bin/make").chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    given = {
        "PATH": path, "HOME": str(tmp_path), "PIP_CACHE_DIR": str(tmp_path), "UV_OFFLINE": "0",
        "SSL_CERT_FILE": "/etc/ssl/ca.pem", "PYTHONUNBUFFERED": "1", "PYTHONPATH": "/nowhere",
        "LANG": "de_DE.UTF-8", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "AWS_PROFILE": "mine",
        "PIP_FIND_LINKS": "/a folder/with spaces",
    }  # fmt: skip
    subprocess.run([ROOT / ".ci/run"], check=True, env=given, timeout=60)
    first, second, _ = (tmp_path / "seen").read_text().split("--\n")

    def names(part: str) -> set[str]:
        return {line.partition("=")[0] for line in part.splitlines()} - {"_", "PWD", "SHLVL"}

    shared = {"target", "PATH", "HOME", "PIP_CACHE_DIR", "PIP_FIND_LINKS", "UV_OFFLINE"}
    shared |= {"SSL_CERT_FILE"}
    assert names(first) == shared
    assert names(second) == shared | {"LANG"}
    assert "target=test\n" in first
    assert f"HOME={tmp_path}\n" in first
    assert "PIP_FIND_LINKS=/a folder/with spaces\n" in first
    assert "target=odd\n" in second
    assert "LANG=C\n" in second
    (home,) = (line for line in second.splitlines() if line.startswith("HOME="))
    assert home.endswith("/my höme")
    assert not os.path.exists(home.removeprefix("HOME="))  # noqa: PTH110 - removed afterwards
