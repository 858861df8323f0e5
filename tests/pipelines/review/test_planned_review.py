"""A run's ``review:`` section: routed once an invocation, remembered, wrong policies said early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import parse_config
from pipelines.labelling.planned_review import PlannedReview
from pipelines.policy.choose import choose_policy
from pipelines.policy.policy import POLICY_KEY, Policy
from pipelines.review.settings import choose_settings
from storage.errors import ConfigError
from storage.review.queue import queue_parts, read_head, read_queue
from storage.review.settings import ReviewSettings, read_settings
from storage.runs.listing import Listing
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.support.samples.review_runs import add_shards, random_run, random_shards


def config(**fields: Any) -> RunConfig:
    plain = {
        "name": "cells", "source": {"url": "in"}, "output": "out", "model": {"checkpoint": "c.pth"},
    }  # fmt: skip
    return parse_config(RunConfig, {**plain, **fields}, where="test")


REVIEW = {"project": "cells", "budget": "8 images", "url": "http://ls:8080", "audit_blind": True}


def test_without_the_section_nothing_is_routed() -> None:
    manifest = random_run(MemoryStore(), 2, 10)
    assert PlannedReview.of(config()).route(manifest, 2) == 0
    assert queue_parts(manifest.store) == []
    assert read_settings(manifest.store) is None


def test_each_invocation_that_labelled_something_draws_its_budget_once() -> None:
    manifest = random_run(MemoryStore(), 2, 20)
    planned = PlannedReview.of(config(review=REVIEW))
    assert planned.route(manifest, 2) == 8
    assert planned.route(manifest, 0) == 0  # run again, nothing new
    add_shards(manifest, list(Listing(manifest.store).live_shards()), random_shards(1, 20, first=2))
    assert planned.route(manifest, 1) == 8
    drawn = [item.image_id for item in read_queue(manifest.store)]
    assert len(drawn) == len(set(drawn)) == 16


def test_a_run_that_was_labelled_before_it_had_the_section_is_routed_now() -> None:
    manifest = random_run(MemoryStore(), 1, 20)
    assert PlannedReview.of(config(review=REVIEW)).route(manifest, 0) == 8


@pytest.mark.parametrize(("stated", "accept"), [({}, 0.42), ({"policy": {"accept": 0.6}}, 0.6)])
def test_a_fitted_policy_counts_unless_the_config_states_one(
    stated: dict[str, Any], accept: float
) -> None:
    manifest = random_run(MemoryStore(), 1, 20)
    manifest.store.put(POLICY_KEY, Policy(accept=0.42).to_yaml().encode())
    PlannedReview.of(config(review=REVIEW, **stated)).route(manifest, 1)
    assert read_head(manifest.store, queue_parts(manifest.store)[0]).policy["accept"] == accept


def test_the_section_is_remembered_for_push_and_pull_and_options_go_first() -> None:
    manifest = random_run(MemoryStore(), 1, 5)
    PlannedReview.of(config(review=REVIEW)).route(manifest, 1)
    kept = ReviewSettings("http://ls:8080", "cells", True)
    assert choose_settings(manifest, None, None, None) == kept
    given = choose_settings(manifest, "http://other", "plates", False)
    assert given == ReviewSettings("http://other", "plates", False)


def test_without_settings_the_project_is_called_like_the_run() -> None:
    manifest = random_run(MemoryStore(), 1, 5)
    assert choose_settings(manifest, None, None, None).project == "cells"


def test_a_policy_may_lie_at_any_url() -> None:
    store = open_store("memory://policies")
    store.put("cells.yaml", Policy(accept=0.33).to_yaml().encode())
    planned = PlannedReview.of(config(review=REVIEW, policy="memory://policies/cells.yaml"))
    assert planned.policy.accept == 0.33


def test_a_policy_that_cannot_be_read_is_an_error_before_labelling(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("accept: [1\n")
    with pytest.raises(ConfigError, match="not YAML"):
        PlannedReview.of(config(review=REVIEW, policy=str(tmp_path / "policy.yaml")))


def test_decide_takes_the_routing_s_policy_unless_told_otherwise() -> None:
    manifest = random_run(MemoryStore(), 1, 5)
    planned = PlannedReview.of(config(review=REVIEW, policy={"accept": 0.6, "reject": 0.2}))
    planned.route(manifest, 1)
    assert choose_policy(manifest, None, None, None).of("RBC") == (0.6, 0.2)
    assert choose_policy(manifest, None, 0.9, None).of("RBC") == (0.9, 0.2)
    with pytest.raises(ConfigError, match="above accept"):
        choose_policy(manifest, None, 0.1, None)


def test_projects_of_the_same_server_stay_known() -> None:
    first = ReviewSettings("http://ls:8080", "cells", project_id=3)
    second = first.at("http://ls:8080", "plates")
    assert (second.project_id, second.projects) == (0, {"3": "cells"})
    pushed = replace(second, project_id=5, projects={**second.projects, "5": "plates"})
    assert pushed.at("http://ls:8080", "cells").project_id == 3
    assert pushed.at("http://other", "cells") == ReviewSettings("http://other", "cells")
