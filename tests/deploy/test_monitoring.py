"""Prometheus and Grafana files: real PromQL, over metrics and tags that the code exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest

from pipelines.dispatch.metrics import METRICS, RUN
from tests.deploy.manifests import ROOT, documents

BOARD = json.loads((ROOT / "deploy/grafana/labelfleet.json").read_text())
# Ray puts its own name first.
KNOWN = {f"ray_{name}": metric for name, metric in METRICS.items()}


def board_queries() -> list[str]:
    return [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


def alert_rules() -> list[dict[str, Any]]:
    [found] = documents("deploy/prometheus/alerts.yml")
    return [rule for group in found["groups"] for rule in group["rules"]]


def selectors(query: str) -> Iterator[promql_parser.VectorSelector]:
    """Every metric that a query asks for, wherever it stands."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(query.replace("$run", "all")), visit)
    yield from found


QUERIES = [*board_queries(), *(rule["expr"] for rule in alert_rules())]


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_asks_for_metrics_that_there_are(query: str) -> None:
    asked = list(selectors(query))
    assert asked
    for selector in asked:
        assert selector.name in KNOWN, selector.name
        tags = {RUN, *KNOWN[selector.name].tags}
        assert {matcher.name for matcher in selector.matchers.matchers} <= tags
    for names in re.findall(r"by \(([^)]*)\)", query):
        tags = {RUN}.union(*(KNOWN[s.name].tags for s in asked))
        assert {name.strip() for name in names.split(",")} <= tags


@pytest.mark.parametrize("query", QUERIES)
def test_counters_are_rated_and_gauges_are_not(query: str) -> None:
    for selector in selectors(query):
        rated = re.search(rf"(rate|increase)\({selector.name}\b", query)
        assert bool(rated) == (KNOWN[selector.name].kind == "counter")


def test_the_board_shows_what_was_asked_for() -> None:
    titles = " ".join(panel["title"].lower() for panel in BOARD["panels"])
    for wanted in ("images a second", "gpu wait share", "shards left", "retries", "quarantine",
                   "review queue"):  # fmt: skip
        assert wanted in titles
    asked = {s.name for query in board_queries() for s in selectors(query)}
    assert asked == KNOWN.keys(), "a metric that no panel shows"


def test_the_board_is_one_that_grafana_lays_out() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["description"]
    assert {one["name"] for one in BOARD["templating"]["list"]} == {"datasource", "run"}


def test_the_alerts_say_what_to_do() -> None:
    for rule in alert_rules():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_scrape_finds_ray_and_the_pods() -> None:
    [config] = documents("deploy/prometheus/prometheus.yml")
    assert config.keys() == {"global", "rule_files", "scrape_configs"}
    for name in config["rule_files"]:
        assert (ROOT / "deploy/prometheus" / name).is_file()
    jobs = {job.pop("job_name"): job for job in config["scrape_configs"]}
    assert jobs["ray"]["file_sd_configs"][0]["files"] == [
        "/tmp/ray/prom_metrics_service_discovery.json"
    ]
    read = {
        label for rule in jobs["ray-pods"]["relabel_configs"] for label in rule["source_labels"]
    }
    [rayjob] = documents("deploy/kuberay/rayjob.yaml")
    cluster = rayjob["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        annotations = group["template"]["metadata"]["annotations"]
        ports = {p["name"]: p["containerPort"]
                 for p in group["template"]["spec"]["containers"][0]["ports"]}  # fmt: skip
        assert annotations["prometheus.io/scrape"] == "true"
        assert annotations["prometheus.io/port"] == str(ports["metrics"])
    for annotation in ("prometheus.io/scrape", "prometheus.io/port"):
        label = re.sub(r"\W", "_", annotation)
        assert f"__meta_kubernetes_pod_annotation_{label}" in read
