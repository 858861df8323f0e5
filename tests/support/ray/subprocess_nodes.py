"""Machines for `ray up` that are folders: a node is a home folder, its shell a subprocess.

Ray's own commands, in Ray's own order, run on this machine: what ssh and rsync do elsewhere is done
by bash and copies here. Loaded by `ray up` and by the autoscaler on the "head", which share a
file. Nothing is ended here: the process that started `ray up` ends its descendants.
"""

from __future__ import annotations

import fcntl
import fnmatch
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.autoscaler._private.command_runner import _with_environment_variables
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

# Ports that two nodes on one machine cannot both have; each node gets its own.
PORTS = {"--object-manager-port=8076", "--metrics-export-port=8080"}


class SubprocessNodes(NodeProvider):
    """Nodes of one cluster.

    ``provider`` in the cluster's config has: ``folder``, where homes and state are; ``image``, a
    virtual environment that has everything installed, with the ``installed`` stamp that says so;
    ``rewrite``, texts of the start commands by what stands for them here.
    """

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        for _ in range(count):
            with self._state() as nodes:
                node = f"node-{len(nodes)}"
                nodes[node] = {"tags": {**tags, TAG_RAY_CLUSTER_NAME: self.cluster_name}}
            self._bake(self.home(node))

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self._state() as nodes:
            return [
                name
                for name, node in nodes.items()
                if not node.get("gone") and tag_filters.items() <= node["tags"].items()
            ]

    def is_running(self, node_id: str) -> bool:
        with self._state() as nodes:
            return not nodes[node_id].get("gone")

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        with self._state() as nodes:
            return dict(nodes[node_id]["tags"])

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self._state() as nodes:
            nodes[node_id]["tags"].update(tags)

    def internal_ip(self, node_id: str) -> str:
        """Loopback has more addresses than one."""
        return f"127.0.0.{1 + int(node_id.removeprefix('node-'))}"

    external_ip = internal_ip

    def terminate_node(self, node_id: str) -> None:
        with self._state() as nodes:
            nodes[node_id]["gone"] = True

    def get_command_runner(
        self, log_prefix: str, node_id: str, *_: object, **__: object
    ) -> CommandRunnerInterface:
        return Shell(self.home(node_id), self.internal_ip(node_id), self.provider_config)

    def home(self, node_id: str) -> Path:
        return Path(self.provider_config["folder"], node_id)

    def _bake(self, home: Path) -> None:
        """What an image brings: uv, and an environment in which this very checkout is installed."""
        environment = home / "labelfleet" / ".venv"
        environment.mkdir(parents=True)
        for part in Path(self.provider_config["image"]).iterdir():
            (environment / part.name).symlink_to(part)
        (environment / ".installed").write_text(self.provider_config["installed"])
        (home / ".uv/bin").mkdir(parents=True)
        (home / ".uv/bin/uv").symlink_to(environment / "bin/uv")

    @contextmanager
    def _state(self) -> Iterator[dict[str, Any]]:
        path = Path(self.provider_config["folder"], "nodes.json")
        with path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            nodes = json.loads(file.read() or "{}")
            yield nodes
            path.write_text(json.dumps(nodes))


class Shell(CommandRunnerInterface):
    """A node's shell, in its home folder."""

    def __init__(self, home: Path, address: str, provider_config: dict[str, Any]) -> None:
        self.home, self.address, self.provider_config = home, address, provider_config

    def run(
        self,
        cmd: str | None = None,
        timeout: int = 120,
        with_output: bool = False,
        environment_variables: dict[str, object] | None = None,
        **_: object,
    ) -> str:
        command = self._rewritten(cmd or "")
        if environment_variables:
            command = _with_environment_variables(command, environment_variables)
        log = self.home / "commands.log"
        # To a file: what a command leaves running keeps its output open.
        timeout = max(timeout, 200)
        with log.open("a") as sink:
            sink.write(f"$ {command}\n")
            sink.flush()
            began = sink.tell()
            done = subprocess.run(
                ["bash", "-c", command], cwd=self.home, stdout=sink, stderr=sink, timeout=timeout,
                stdin=subprocess.DEVNULL, env=self._environment(), check=False,
            )  # fmt: skip
        said = log.read_text()[began:]
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode} of {command}\n{said}")
        return said if with_output else ""

    def run_rsync_up(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        patterns = [p.removeprefix("**/") for p in (options or {}).get("rsync_exclude") or []]
        there = Path(target.replace("~", str(self.home), 1))
        if Path(source).is_dir():
            left_out = shutil.ignore_patterns(*patterns)
            shutil.copytree(source, there, ignore=left_out, dirs_exist_ok=True)
        elif not any(fnmatch.fnmatch(Path(source).name, pattern) for pattern in patterns):
            shutil.copy(source, there)

    def run_rsync_down(
        self, source: str, target: str, options: dict[str, Any] | None = None
    ) -> None:
        raise NotImplementedError

    def remote_shell_command_str(self) -> str:
        return f"HOME={self.home} bash"

    def _environment(self) -> dict[str, str]:
        """As after a login: nothing of the environment that the test itself was started in."""
        given = {
            name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ
        }
        return {**given, **self.provider_config["environment"], "HOME": str(self.home)}

    def _rewritten(self, command: str) -> str:
        """Return the command, on this machine's free ports and on this node's address."""
        for text, here in self.provider_config["rewrite"].items():
            command = command.replace(text, here.get(self.home.name, here["*"]))
        return re.sub(r"\bray start\b", f"ray start --node-ip-address={self.address}", command)
