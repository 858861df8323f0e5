"""The steps around people: route, push, pull (and wait), decide."""

from __future__ import annotations

from typing import Any

from pipelines.label_studio.connect import open_server
from pipelines.label_studio.serving import choose_serving
from pipelines.labelling.planned_review import PlannedReview
from pipelines.labels.decide import decide_run
from pipelines.policy.guarantee import Asked, guarantee_run
from pipelines.policy.policy import Policy
from pipelines.review.pull import pull_run
from pipelines.review.push import PushOptions, push_run
from pipelines.review.rounds import earlier_runs, join_round, refresh_rounds, runs_besides
from pipelines.review.settings import choose_settings, may_create
from pipelines.review.status import review_status
from pipelines.rounds.costs import human_minutes
from pipelines.rounds.state import StepRecord
from pipelines.rounds.steps.machine import policy_of
from pipelines.rounds.work import RoundWork
from storage.errors import ConfigError, WaitingForPeople
from storage.labels.rows import label_rows
from storage.labels.versions import read_label_tables, read_version
from storage.review.answers import answer_parts, read_answers, standing
from storage.review.settings import write_settings
from storage.runs.lock import run_lock
from storage.runs.manifest import Manifest
from storage.stores.open import open_store

Fields = dict[str, Any]
# What people see or when the round goes on moves no label.
_FREE = {"wait", "instructions", "people", "overlap"}


def _pool(work: RoundWork) -> Manifest:
    return Manifest.open(work.state.result("label")["run"], work.options)


# route


def route_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return the pool's run, the thresholds and what is asked of people."""
    review = work.config.review
    return {
        "run": work.state.result("label")["run"],
        "policy": policy_of(work, _pool(work)).digest(),
        "review": None if review is None else review.model_dump(mode="json", exclude=_FREE),
    }


def route_pool(work: RoundWork, record: StepRecord) -> Fields:
    """Draw the images that people shall see; a queue that was drawn before stays."""
    pool, part = _pool(work), work.config.review
    others = tuple(Manifest.open(url, work.options) for url in part.answers_from) if part else ()
    review = PlannedReview(part, policy_of(work, pool), stated=False, others=others)
    with run_lock(pool.store, "labelfleet round: route"):
        return {"routed": review.route(pool, 0)}


# push


def push_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return the queue's run, and where it goes."""
    review = work.config.review
    return {
        "run": work.state.result("label")["run"],
        "url": review.url if review else "",
        "project": review.project if review else "",
    }


def push_queue(work: RoundWork, record: StepRecord) -> Fields:
    """Push the queue to Label Studio."""
    pool = _pool(work)
    settings = choose_settings(pool, None, None, None)
    serving = choose_serving(pool.store, work.options)
    with open_server(settings.url) as server, run_lock(pool.store, "labelfleet round: push"):
        options = PushOptions(
            create=may_create(settings, None), earlier=earlier_runs(pool, work.options)
        )
        source = open_store(pool.record.source["url"], work.options)
        summary = push_run(pool, server, settings, source=source, serving=serving, options=options)
        write_settings(pool.store, join_round(pool, server, settings))
    return {"pushed": summary.created + summary.there, **summary.to_fields()}


# pull


def pull_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return where the answers come from."""
    return push_inputs(work, record)


def pull_answers(work: RoundWork, record: StepRecord) -> Fields:
    """Fetch the answers. Raises WaitingForPeople while some are missing and the config waits."""
    pool, part = _pool(work), work.config.review
    settings = choose_settings(pool, None, None, None)
    with open_server(settings.url) as server, run_lock(pool.store, "labelfleet round: pull"):
        pull_run(pool, server, settings)
        refresh_rounds(pool, server)
        found = review_status(pool, settings, server)
    settled = found.answered + found.skipped
    asked = found.queued if found.pushed is None else found.pushed
    if part is not None and part.wait and settled < asked:
        raise WaitingForPeople(
            f"people have answered {settled} of {asked} images in the project {found.project} at "
            f"{found.url}; about {found.minutes_left:.0f} minutes of their time are left",
            hint="the same command continues when they are done; `--set review.wait=false` goes on "
            "with what there is",
        )
    answers = [a for a in standing(read_answers(pool.store)) if not a.skipped]
    return {
        "asked": asked,
        "answered": found.answered,
        "skipped": found.skipped,
        "people": found.people,
        "human_minutes": human_minutes(answers),
        "answers": _parts(pool, work),
    }


def _parts(pool: Manifest, work: RoundWork) -> list[str]:
    others = runs_besides(pool, (), alone=False, options=work.options)
    return [f"{run.url}/{key}" for run in (pool, *others) for key in answer_parts(run.store)]


# decide


def decide_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return the run, the thresholds and the answers that count."""
    pool, fit = _pool(work), work.config.fit
    pulled = work.state.read("pull")
    return {
        "run": pool.url,
        "policy": policy_of(work, pool).digest(),
        "answers": pulled.result.get("answers", []) if pulled else [],
        "guarantee": None if fit.guarantee is None else [fit.guarantee, fit.confidence],
    }


def decide_labels(work: RoundWork, record: StepRecord) -> Fields:
    """Merge model, thresholds and answers into a label version."""
    pool = _pool(work)
    policy, proven = _guaranteed(work, pool, policy_of(work, pool))
    others = runs_besides(pool, (), alone=False, options=work.options)
    with run_lock(pool.store, "labelfleet round: decide"):
        version = decide_run(pool, policy, answers_from=others)
    if not version.counts["labels"]:
        raise ConfigError(
            f"the label version {version.version} has no box to learn: the thresholds reject all",
            hint="label more images for the teacher, or ask for less `fit.precision`",
        )
    return {
        "run": pool.url,
        "version": version.version,
        "attempt": version.attempt,
        "counts": dict(version.counts),
        "guarantee": version.guarantee,
        "not_proven": proven,
        "licence": version.run["licence"],
        "by_class": _by_class(pool, version.version),
    }


def _guaranteed(work: RoundWork, pool: Manifest, policy: Policy) -> tuple[Policy, str]:
    """Return the policy with the guarantee that the audit shows, and why there is none."""
    part = work.config.fit
    if part.guarantee is None:
        return policy, ""
    found = guarantee_run(pool, policy, Asked(part.guarantee, part.confidence))
    if found.guarantee is None:
        return policy, f"the audit does not show {part.guarantee:g} with the answers so far"
    return found.policy, ""


def _by_class(pool: Manifest, version: str) -> Fields:
    """Count accepted and ignored boxes by class, from machines and from people."""
    lineage = read_version(pool.store, version)
    counts = {c.name: {"model": 0, "human": 0, "ignored": 0} for c in lineage.categories}
    names = list(counts)
    for table in read_label_tables(pool.store, lineage):
        for row in label_rows(table):
            for label in row.labels:
                kind = "ignored" if label.ignore else row.source
                counts[names[label.category_id]][kind] += 1
    return counts
