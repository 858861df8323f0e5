"""ray_cluster.yaml by Ray's own validation, and what it must say whatever else it says."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.manifests import ROOT

TEXT = (ROOT / "ray_cluster.yaml").read_text()


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    prepared = prepare_config(yaml.safe_load(TEXT))
    assert isinstance(prepared, dict)
    return prepared


@pytest.mark.slow
def test_ray_accepts_it(config: dict[str, Any]) -> None:
    validate_config(config)


def test_ray_would_refuse_a_mistake(config: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="Additional properties"):
        validate_config({**config, "worker_start_commands": []})


def test_the_head_runs_no_work_and_workers_start_at_none(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == head["max_workers"] == 0
    assert [kind["min_workers"] for kind in types.values()] == [0]
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]


def test_the_dashboard_is_on_loopback_behind_a_token(config: dict[str, Any]) -> None:
    start = config["head_start_ray_commands"][-1]
    assert re.findall(r"--dashboard-host=(\S+)", start) == ["127.0.0.1"]
    for name in ("head", "worker"):
        command = config[f"{name}_start_ray_commands"][-1]
        assert re.search(r"export [^;]*\bRAY_AUTH_MODE=token\b[^;]*;.*\bray start\b", command)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["provider"]["use_internal_ips"]


def test_versions_are_pinned_and_ours(config: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [ray] = [d for d in project["optional-dependencies"]["run"] if d.startswith("ray[")]
    found = re.search(r"found == \('(.+)', '(.+)'\)", config["setup_commands"][-1])
    assert found is not None
    assert found.groups() == (ray.partition("==")[2], project["version"])
    assert not any(re.search(r"ray-wheels|\.dev0|ray\[", c) for c in config["setup_commands"])


def test_what_is_mounted_is_there_and_is_the_product(config: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    mounts = {k: v for k, v in config["file_mounts"].items() if k.startswith("~/labelfleet/")}
    assert set(mounts.values()) == {
        *(name.rstrip("*") for name in packages), "pyproject.toml", project["project"]["readme"],
    }  # fmt: skip
    assert all((ROOT / path).exists() for path in mounts.values())


def test_no_key_of_aws_is_in_it() -> None:
    assert not re.search(r"aws_access|aws_secret|aws_credentials|AKIA|KeyName", TEXT, re.IGNORECASE)
    for kind in yaml.safe_load(TEXT)["available_node_types"].values():
        assert kind["node_config"]["IamInstanceProfile"]["Name"].startswith("labelfleet-")
