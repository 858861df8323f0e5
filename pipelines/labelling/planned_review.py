"""Routing at the end of a labelling run, as its config's ``review:`` section says."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.config.run_config import ReviewConfig, RunConfig
from pipelines.policy.policy import Policy
from pipelines.routing.route import route_run
from storage.coco.truth import Truth, read_truth
from storage.review.queue import queue_parts
from storage.review.settings import ReviewSettings, read_settings, write_settings
from storage.runs.ledger import new_invocation
from storage.runs.manifest import Manifest


@dataclass(frozen=True, slots=True)
class PlannedReview:
    """A review section with its policy read, so that a wrong one fails before labelling starts.

    ``part`` None: the config has no such section, and nothing is routed. ``stated`` False: the
    config has no policy, and one that ``fit`` left with the run comes before the default.
    ``others``: earlier runs whose questions are not asked again. ``gold_truth``: what is known of
    gold images.
    """

    part: ReviewConfig | None
    policy: Policy
    stated: bool = True
    others: tuple[Manifest, ...] = ()
    gold_truth: Truth | None = None

    @staticmethod
    def of(config: RunConfig) -> PlannedReview:
        """Raises ConfigError when policy, gold truth or a run of ``answers_from`` is unreadable."""
        if config.review is None:
            return PlannedReview(None, Policy())
        if isinstance(config.policy, str):
            policy = Policy.load(config.policy, config.storage.options())
        else:
            policy = Policy.from_config(config.policy)
        options = config.storage.options()
        others = tuple(Manifest.open(url, options) for url in config.review.answers_from)
        part = config.review
        gold = read_truth(part.gold_truth, options) if part.gold and part.gold_truth else None
        return PlannedReview(part, policy, "policy" in config.model_fields_set, others, gold)

    def route(self, manifest: Manifest, new_shards: int) -> int:
        """Draw this invocation's queue and remember where it goes. The caller holds the run's lock.

        An invocation that labelled nothing new draws nothing more, unless nothing was ever drawn.

        Returns:
            Images routed to be shown.
        """
        if self.part is None:
            return 0
        kept = read_settings(manifest.store) or ReviewSettings()
        settings = replace(
            kept.at(self.part.url, self.part.project),
            audit_blind=self.part.audit_blind,
            classes=self.part.classes,
            overlap=(self.part.overlap.share, self.part.overlap.people),
            people=self.part.people,
            instructions=self.part.instructions,
            show=self.part.show,
            show_why=self.part.show_why,
        )
        write_settings(manifest.store, settings)
        if not new_shards and queue_parts(manifest.store):
            return 0
        fitted = None if self.stated else Policy.of_run(manifest.store, manifest.url)
        summary = route_run(
            manifest,
            budget=self.part.budget,
            policy=fitted or self.policy,
            invocation=new_invocation(),
            seed=self.part.seed,
            audit=self.part.audit,
            other_runs=self.others,
            show=self.part.show,
            gold=self.part.gold,
            gold_truth=self.gold_truth,
        )
        return summary.audit + summary.value + summary.gold
