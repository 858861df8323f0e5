"""deploy/kuberay: fields that exist, one spec in both kinds, nothing let in, nothing secret."""

from __future__ import annotations

import copy
import itertools
import shlex
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import pytest
import yaml
from croniter import croniter

from pipelines.cluster.secrets import refuse_secrets, texts_in
from pipelines.config.run_config import load_config
from tests.deploy.manifests import ROOT, core_problems, documents, pod_problems, ray_problems

CORE = ["cronjob.yaml", "serviceaccount.yaml", "networkpolicy.yaml"]
RAY = ["rayjob.yaml", "raycronjob.yaml"]


def rayjob() -> dict[str, Any]:
    [found] = documents("deploy/kuberay/rayjob.yaml")
    return found


def pods(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = spec["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


@pytest.mark.parametrize("name", CORE)
def test_kubernetes_takes_its_kinds(name: str) -> None:
    found = documents(f"deploy/kuberay/{name}")
    assert found
    assert [problem for one in found for problem in core_problems(one)] == []


@pytest.mark.parametrize("name", RAY)
def test_kuberay_takes_its_kinds(name: str) -> None:
    [found] = documents(f"deploy/kuberay/{name}")
    assert ray_problems(found) == []


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown field shutdownAfterJobFinish": lambda s: s.update(shutdownAfterJobFinish=True),
    "headGroupSpec is missing": lambda s: s["rayClusterSpec"].pop("headGroupSpec"),
    "every value must be a text": lambda s: s["rayClusterSpec"]["headGroupSpec"][
        "rayStartParams"
    ].update({"num-cpus": 0}),
    "boolean is expected": lambda s: s.update(shutdownAfterJobFinishes="yes"),
    "integer is expected": lambda s: s.update(backoffLimit=True),
    "is expected": lambda s: s["rayClusterSpec"]["authOptions"].update(mode="on"),
    "unexpected": lambda s: s["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(
        serviceAccount_name="x"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("said", BREAKS)
def test_a_mistake_in_a_rayjob_is_found(said: str) -> None:
    broken = rayjob()
    BREAKS[said](broken["spec"])
    assert any(said in problem for problem in ray_problems(broken)), ray_problems(broken)


def test_a_mistake_in_a_pod_is_found() -> None:
    template = copy.deepcopy(rayjob()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"])
    template["spec"]["containers"][0]["volumMounts"] = []
    assert pod_problems(template)


def test_the_scheduled_run_is_the_run() -> None:
    [scheduled] = documents("deploy/kuberay/raycronjob.yaml")
    assert scheduled["spec"]["jobTemplate"] == rayjob()["spec"]


def test_the_cronjob_creates_what_the_kustomization_gives_it() -> None:
    [cron] = documents("deploy/kuberay/cronjob.yaml")
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    [kustomization] = documents("deploy/kuberay/kustomization.yaml")
    made = {one["name"]: one["files"] for one in kustomization["configMapGenerator"]}
    [mounted] = pod["volumes"]
    assert made[mounted["configMap"]["name"]] == ["rayjob.yaml"]
    [container] = pod["containers"]
    assert container["args"] == ["create", "-f", "/rayjob/rayjob.yaml"]
    assert "generateName" in rayjob()["metadata"], "a second night would find the name taken"
    assert rayjob()["metadata"].keys() & {"name"} == set()
    head, worker = pods(rayjob()["spec"])
    wanted = {v["configMap"]["name"] for pod in (head, worker) for v in pod["volumes"]
              if "configMap" in v}  # fmt: skip
    assert wanted <= made.keys()
    for name in itertools.chain(kustomization["resources"], *made.values()):
        assert (ROOT / "deploy/kuberay" / name).is_file()
    accounts = {one["metadata"]["name"] for one in documents("deploy/kuberay/serviceaccount.yaml")
                if one["kind"] == "ServiceAccount"}  # fmt: skip
    used = {pod["serviceAccountName"], head["serviceAccountName"], worker["serviceAccountName"]}
    assert used == accounts


@pytest.mark.parametrize("name", ["cronjob.yaml", "raycronjob.yaml"])
def test_the_schedules_are_schedules(name: str) -> None:
    [found] = documents(f"deploy/kuberay/{name}")
    assert croniter.is_valid(found["spec"]["schedule"])


def test_the_run_it_mounts_is_a_config_of_ours() -> None:
    config = load_config(str(ROOT / "deploy/kuberay/run.yaml"))
    spec = rayjob()["spec"]
    labelfleet, run, path = shlex.split(spec["entrypoint"])
    assert (labelfleet, run) == ("labelfleet", "run")
    [head, worker] = pods(spec)
    [mount] = [m for m in head["containers"][0]["volumeMounts"] if m["name"] == "run"]
    assert path == f"{mount['mountPath']}/run.yaml"
    # What the run asks for is what the autoscaler may start, and fits into a pod.
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    asked = worker["containers"][0]["resources"]["requests"]
    assert config.workers.count == group["maxReplicas"]
    assert str(config.workers.cpus) == f"{float(asked['cpu'])}"
    assert str(config.workers.gpus) == f"{float(asked['nvidia.com/gpu'])}"


def test_versions_are_ours() -> None:
    spec = rayjob()["spec"]
    assert spec["rayClusterSpec"]["rayVersion"] == version("ray")
    images = {container["image"] for pod in pods(spec) for container in pod["containers"]}
    assert images == {f"labelfleet:{version('labelfleet')}"}


def test_the_head_gives_no_core_and_is_never_on_spot() -> None:
    cluster = rayjob()["spec"]["rayClusterSpec"]
    head, worker = pods(rayjob()["spec"])
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    kinds = [
        term["matchExpressions"][0]["values"]
        for pod in (head, worker)
        for term in pod["affinity"]["nodeAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]["nodeSelectorTerms"]
    ]
    assert kinds == [["on-demand"], ["spot", "on-demand"]]


def test_access_is_closed_and_nothing_runs_as_root() -> None:
    spec = rayjob()["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for pod in pods(spec):
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    [policy] = documents("deploy/kuberay/networkpolicy.yaml")
    wanted = policy["spec"]["podSelector"]["matchLabels"].items()
    cluster = spec["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert wanted <= group["template"]["metadata"]["labels"].items()
    assert all(rule["from"] for rule in policy["spec"]["ingress"]), "an open door"


def test_no_secret_is_in_any_of_them() -> None:
    for path in (ROOT / "deploy").rglob("*.y*ml"):
        for one in yaml.safe_load_all(path.read_text()):
            refuse_secrets(one or {}, {})
            names = [p for p, _ in texts_in(one or {}) if p.endswith((".env", ".value"))]
            assert names == [], "a literal variable may hold anything"
