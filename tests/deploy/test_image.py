"""deploy/Dockerfile: a linter is content, versions agree, and only the product is sent to it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.deploy.manifests import ROOT

DOCKERFILE = ROOT / "deploy/Dockerfile"


def test_hadolint_is_content() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_it_copies_is_let_through_and_is_the_product() -> None:
    text = DOCKERFILE.read_text()
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    }
    ignore = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    wanted = {name.rstrip("*") for name in packages} | {"pyproject.toml"}
    assert copied == wanted | {project["project"]["readme"]}
    assert all((ROOT / name).exists() for name in copied)


def test_it_is_built_as_the_project_says() -> None:
    text = DOCKERFILE.read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    minor = project["project"]["requires-python"].split(",")[0].removeprefix(">=")
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert all(base.startswith(f"python:{minor}.") for base in bases)
    uv = re.search(r"uv==(\S+)", (ROOT / "Makefile").read_text())
    assert uv is not None
    assert f"uv=={uv[1]}" in text
    assert f"uv=={uv[1]}" in (ROOT / "ray_cluster.yaml").read_text()
    assert f"labelfleet:{project['project']['version']}" in text


def test_it_runs_as_an_unprivileged_user() -> None:
    users = re.findall(r"^USER (\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert users == ["1000"]
