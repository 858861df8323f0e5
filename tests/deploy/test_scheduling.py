"""docs/scheduling.md and its examples: each is what its scheduler takes, and says what it quotes.

apache-airflow itself is not installed for this: it brings hundreds of packages. Its DAG is
compiled, and what it would run is read out of its syntax tree.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
from croniter import croniter
from hera.workflows.models import CronWorkflow

from pipelines.cli.main import app
from storage.errors import RunLocked
from tests.deploy.manifests import ROOT, core_problems, documents

EXAMPLES = ROOT / "examples/scheduling"
DOCS = (ROOT / "docs/scheduling.md").read_text()


def cron_lines() -> list[tuple[str, str]]:
    """(schedule, command) of the crontab."""
    lines = (EXAMPLES / "crontab").read_text().splitlines()
    entries = [line for line in lines if line and not re.match(r"#|[A-Z_]+=", line)]
    return [(" ".join(line.split()[:5]), line.split(None, 5)[5]) for line in entries]


def dag_operators() -> dict[str, dict[str, Any]]:
    """Keyword arguments of each BashOperator of the DAG, by its task_id."""
    tree = ast.parse((EXAMPLES / "airflow_dag.py").read_text())
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BashOperator":
            given = {
                word.arg: ast.literal_eval(word.value)
                for word in node.keywords
                if word.arg and not isinstance(word.value, ast.Call)
            }
            found[given["task_id"]] = given
    return found


def container_commands(found: Any) -> list[list[str]]:
    """`command` and `args` of every container in a manifest."""
    commands = []
    if isinstance(found, dict):
        if isinstance(found.get("command"), list):
            commands.append([*found["command"], *found.get("args", [])])
        found = list(found.values())
    if isinstance(found, list):
        commands += [command for inner in found for command in container_commands(inner)]
    return commands


def commands() -> list[list[str]]:
    """Every labelfleet command of the examples, in words."""
    said = [shlex.split(command.split(">")[0]) for _, command in cron_lines()]
    said += [shlex.split(given["bash_command"]) for given in dag_operators().values()]
    for name in ("kubernetes.yaml", "argo.yaml"):
        said += container_commands(documents(f"examples/scheduling/{name}"))
    said += [shlex.split(line) for line in re.findall(r"^labelfleet .*", DOCS, re.MULTILINE)]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_one_that_labelfleet_has(words: list[str]) -> None:
    name, command, *arguments = words
    assert name == "labelfleet"
    group: Any = typer.main.get_command(app)
    found = group.get_command(typer.Context(group), command)
    assert found is not None
    found.make_context(command, arguments)  # parses; runs nothing


def test_there_is_one_for_each_scheduler() -> None:
    used = [words[1] for words in commands()]
    assert used.count("submit") >= 4
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        "crontab", "kubernetes.yaml", "airflow_dag.py", "argo.yaml",
    }  # fmt: skip


def test_the_crontab_is_one() -> None:
    [(schedule, command)] = cron_lines()
    assert croniter.is_valid(schedule)
    assert "%" not in command, "cron would read it as a line break"


@pytest.mark.parametrize(("code", "ends", "mails"), [(0, 0, False), (75, 0, False), (3, 3, True)])
def test_cron_hears_of_failures_only(code: int, ends: int, mails: bool, tmp_path: Path) -> None:
    (tmp_path / "labelfleet").write_text(f"#!/bin/sh\necho what it says\nexit {code}\n")
    (tmp_path / "labelfleet").chmod(0o755)
    [(_, command)] = cron_lines()
    command = command.replace("/tmp/cells.log", str(tmp_path / "log"))
    done = subprocess.run(
        ["bash", "-c", command], env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == ends
    assert ("what it says" in done.stdout) == mails


def test_kubernetes_takes_its_cronjob() -> None:
    [found] = documents("examples/scheduling/kubernetes.yaml")
    assert core_problems(found) == []
    assert croniter.is_valid(found["spec"]["schedule"])
    pod = found["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    [rule] = found["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert RunLocked.exit_code in rule["onExitCodes"]["values"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_argo_takes_its_workflow() -> None:
    [found] = documents("examples/scheduling/argo.yaml")
    workflow = CronWorkflow.model_validate(found)
    # The model drops what it does not know: what comes back must be what went in.
    back = workflow.model_dump(by_alias=True, exclude_none=True, exclude_unset=True, mode="json")
    assert plain(back) == plain(found)
    spec = found["spec"]
    assert all(croniter.is_valid(schedule) for schedule in spec["schedules"])
    templates = {template["name"]: template for template in spec["workflowSpec"]["templates"]}
    steps = templates[spec["workflowSpec"]["entrypoint"]]["steps"]
    assert all(step["template"] in templates for group in steps for step in group)
    volumes = {volume["name"] for volume in spec["workflowSpec"]["volumes"]}
    for template in templates.values():
        for mount in template.get("container", {}).get("volumeMounts", []):
            assert mount["name"] in volumes


def plain(value: Any) -> Any:
    """Numbers and their texts alike, as Argo's IntOrString has it."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value if isinstance(value, bool) else str(value)


def test_the_dag_compiles_and_skips_where_another_has_the_run() -> None:
    text = (EXAMPLES / "airflow_dag.py").read_text()
    compile(text, "airflow_dag.py", "exec")
    assert dag_operators()["label"]["skip_on_exit_code"] == RunLocked.exit_code
    schedule = re.search(r'schedule="([^"]+)"', text)
    assert schedule is not None
    assert croniter.is_valid(schedule[1])


QUOTES = re.findall(r"<!-- (\S+) -->\n```\w*\n(.*?)```", DOCS, re.DOTALL)


@pytest.mark.parametrize(("path", "quoted"), QUOTES, ids=[path for path, _ in QUOTES])
def test_the_docs_quote_the_files_as_they_are(path: str, quoted: str) -> None:
    assert quoted in (ROOT / path).read_text()


def test_every_example_is_quoted_and_every_link_leads_somewhere() -> None:
    assert {path for path, _ in QUOTES} == {
        f"examples/scheduling/{found.name}" for found in EXAMPLES.iterdir() if found.is_file()
    }
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", DOCS):
        assert (ROOT / "docs" / link).exists(), link
