"""Real runs through the console script: a config file, a subprocess, what it left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipelines.runs.verify import verify_run
from storage.errors import BucketNotFound
from storage.objects.protocols import StorageOptions
from storage.records import AnnotationRow
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parent.parent.parent
DIGITS = ROOT / "pipelines" / "assets" / "digits_nano.safetensors"
# One image at a time, on one worker: a run is still going when a test has seen it begin.
SLOW_MODEL = {"checkpoint": str(DIGITS), "runtime": "torch"}
SLOW_WORKERS = {"count": 1, "batch_size": 1}
LABELFLEET = str(Path(sys.executable).parent / "labelfleet")


@dataclass
class Job:
    """One run config and the commands on it.

    Attributes:
        folder: for the config file.
        source, output: URLs.
        env: on top of this process's.
        fields: further config.
    """

    folder: Path
    source: str
    output: str
    env: Mapping[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    options: StorageOptions = field(default_factory=StorageOptions)

    def config(self) -> Path:
        """Write the config file."""
        config = {
            "name": "digits",
            "source": {"url": self.source, "shard_size": 8},
            "output": self.output,
            "model": {"checkpoint": str(DIGITS)},
            **self.fields,
        }
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """`labelfleet run CONFIG …` in a session of its own; killed at the end if it still runs."""
        command = [LABELFLEET, "run", str(self.config()), "--json", *arguments]
        process = subprocess.Popen(
            command,
            env={**os.environ, **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)

    def run(self, *arguments: str, timeout_s: float = 280) -> tuple[int, dict[str, Any], str]:
        """Run to the end: exit code, the JSON object of the last line, stderr."""
        with self.started(*arguments) as process:
            out, err = process.communicate(timeout=patient(timeout_s))
        last = out.strip().splitlines()[-1] if out.strip() else "{}"
        return process.returncode, json.loads(last), err

    def commits(self) -> int:
        """How many shards are committed; 0 before there is an output."""
        try:
            return sum(1 for _ in open_store(self.output, self.options).list("annotations/"))
        except BucketNotFound:
            return 0

    def has_committed(self, driver: subprocess.Popen[str], shards: int) -> None:
        """Wait for this many committed shards; fail with the driver's output if it gives up."""
        wait_until(lambda: self.commits() >= shards or driver.poll() is not None)
        assert not driver.poll(), driver.communicate()

    def manifest(self) -> Manifest:
        """The run as it stands."""
        return Manifest.open(self.output, self.options)

    def rows(self) -> dict[str, AnnotationRow]:
        """Live rows by image id; fails if one is there twice, or the run does not verify."""
        assert verify_run(self.manifest()).differences == []
        found: dict[str, AnnotationRow] = {}
        for row in live_rows(self.manifest()):
            assert row.image_id not in found, f"{row.image_id} twice"
            found[row.image_id] = row
        return found


def wait_until(true: Callable[[], bool], timeout_s: float = 240) -> None:
    """Poll until something is so."""
    limit = time.monotonic() + patient(timeout_s)
    while not true():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.05)
