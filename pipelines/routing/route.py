"""Select images for review under a budget: a random audit, and what pays most.

One pass over the live rows, shard by shard; what stays in memory is as large as the budget. The
audit is a simple random sample of each stratum (the images one invocation saw first), so that
quality can be estimated; the rest goes by expected corrections per image or per minute, whichever
the budget is in. Nothing is shown twice, neither by name nor by pixels, over all invocations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from pipelines.policy.policy import Policy
from pipelines.routing.audit_draw import allocate
from pipelines.routing.candidates import Likeness
from pipelines.routing.cost import Budget, CostModel, learn_cost
from pipelines.routing.gold import draw_gold
from pipelines.routing.showing import Show, ShowRule
from pipelines.routing.signals import SIGNALS
from pipelines.routing.survey import Candidate, Earlier, RouteOptions, RunSurvey
from storage.coco.truth import Truth
from storage.errors import ConfigError
from storage.review.answers import Answer, read_answers, standing
from storage.review.frames import write_frame
from storage.review.gold import write_gold
from storage.review.queue import QueueHead, Reason, ReviewItem, Stratum, read_queue, write_queue
from storage.runs.manifest import Manifest

_RARE_SHARE = 0.5  # rare: less than half of what the class would have if all were equal
_REASONS = 3


@dataclass(frozen=True, slots=True)
class RouteSummary:
    """Result of a routing.

    Attributes:
        key: the queue part.
        invocation: who routed.
        audit, value: images to be shown, drawn at random and by value.
        gold: images to be shown whose boxes are known.
        audit_known: audit images whose pixels were in the queue already; not shown again.
        minutes: of human time expected for them.
        strata: as the part records them.
        passed_over: images not routed, by reason.
        repeated: True where this invocation had routed before, and nothing was done now.
    """

    key: str
    invocation: str
    audit: int
    value: int
    audit_known: int
    minutes: float
    strata: tuple[Stratum, ...]
    passed_over: dict[str, int]
    repeated: bool = False
    gold: int = 0


def route_run(
    manifest: Manifest,
    *,
    budget: str,
    policy: Policy,
    invocation: str,
    seed: int = 0,
    audit: float = 0.2,
    cost: CostModel | None = None,
    other_runs: Sequence[Manifest] = (),
    show: Show = "auto",
    gold: int = 0,
    gold_truth: Truth | None = None,
) -> RouteSummary:
    """Draw the review queue of one invocation. Needs no GPU; the caller holds the run's lock.

    Args:
        manifest: the run; its committed, live rows are read.
        budget: ``500 images`` or ``240 minutes``.
        policy: thresholds; boxes in between are what a person is asked about.
        invocation: names the queue part and the new stratum; routing it again changes nothing.
        seed: the same seed over the same rows draws the same queue.
        audit: share of the budget drawn at random, in [0, 1].
        cost: None: learned from lead times where 20 answers have one, else the stated model.
        other_runs: earlier rounds over the same images, as for ``decide.decide_run``: what is in
            their queues is not asked about again.
        show: which boxes people see, see ``ShowRule``.
        gold: images with known boxes to queue, part of the budget; see ``routing.gold``.
        gold_truth: a COCO file of images of the run; None: only what earlier rounds settled.

    Raises:
        ConfigError: the budget cannot be read, or the policy does not fit the run.
        ReviewError: another routing finished in the meantime.
    """
    if not 0 <= audit <= 1:
        raise ConfigError(f"an audit share of {audit}", hint="give a share between 0 and 1")
    runs = [manifest, *other_runs]
    stated = cost or cost_of(standing(*(read_answers(run.store) for run in runs)))
    if show not in get_args(Show):
        raise ConfigError(f"review.show {show!r}", hint=f"one of {', '.join(get_args(Show))}")
    rule = ShowRule.choose(show, stated)
    drawn = draw_gold(manifest, gold, gold_truth, other_runs, seed)
    options = RouteOptions(Budget.parse(budget), audit, seed, stated, show=rule, gold=drawn)
    return route(manifest, policy, invocation, options, other_runs)


def route(
    manifest: Manifest,
    policy: Policy,
    invocation: str,
    options: RouteOptions,
    other_runs: Sequence[Manifest] = (),
) -> RouteSummary:
    """As ``route_run``, with every option."""
    earlier = Earlier.read(manifest, other_runs)
    for key, head in earlier.heads.items():
        if head.invocation == invocation:
            items = list(read_queue(manifest.store, [key], hidden=True))
            return replace(_summary(key, head, items), repeated=True)
    survey = RunSurvey(manifest, policy, invocation, earlier, options)
    survey.run()
    strata, audit = _draw_audit(survey, earlier, invocation, options)
    gold = _choose_gold(survey, options, audit)
    value = _choose_value(survey, earlier, options, [*audit, *gold], manifest)
    items = _in_order(audit, _scattered(gold, value, options.seed), options.seed)
    shards = survey.new_shards()
    head = QueueHead(
        invocation=invocation,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=options.seed,
        budget=str(options.budget),
        audit=options.audit,
        cost=options.cost.to_fields(),
        policy=policy.to_fields(),
        model_sha256=manifest.record.identity.model_sha256,
        strata=strata,
        frame=write_frame(manifest.store, shards) if len(shards) else "",
        passed_over=dict(survey.passed_over),
        show=options.show.to_fields(),
    )
    if gold and options.gold.known:
        known = {item.sha256: options.gold.known[item.image_id, item.sha256] for item in gold}
        write_gold(manifest.store, invocation, known)
    key = write_queue(manifest.store, len(earlier.heads), head, items)
    return _summary(key, head, items)


def cost_of(answers: Iterable[Answer]) -> CostModel:
    """Return the cost model that the answers' lead times speak for, or the stated one."""
    shown, corrections, seconds = [], [], []
    for answer in answers:
        if answer.lead_time_s is not None and not answer.skipped:
            added = sum(box.origin == "added" for box in answer.boxes)
            kept = sum(box.origin == "kept" for box in answer.boxes)
            shown.append(len(answer.boxes) - added + len(answer.deleted))
            corrections.append(len(answer.boxes) - kept + len(answer.deleted))
            seconds.append(answer.lead_time_s)
    return learn_cost(shown, corrections, seconds, fallback=CostModel())


def _draw_audit(
    survey: RunSurvey, earlier: Earlier, invocation: str, options: RouteOptions
) -> tuple[tuple[Stratum, ...], list[ReviewItem]]:
    """Return every stratum as it now stands, and the audit items, in random order."""
    left = {
        name: draw.images - survey.audited[name]
        for name, draw in survey.draws.items()
        if name != invocation
    }
    new = survey.draws[invocation].images if invocation in survey.draws else 0
    for_new, more = allocate(_audit_size(survey, options), new, left)
    more[invocation] = for_new
    items, strata = [], []
    for name, draw in survey.draws.items():
        stratum = Stratum(name, draw.images, survey.audited[name] + more[name])
        known = earlier.audited.get(name, {})
        fresh = [c for c in draw.first(stratum.drawn) if _identity(c) not in known]
        next_rank = max(known.values(), default=-1) + 1
        signals = tuple(options.signals)
        items += [_audit_item(c, stratum, rank, signals) for rank, c in enumerate(fresh, next_rank)]
        strata.append(stratum)
    return tuple(strata), _hide_known(items, earlier.sha256s)


def _identity(candidate: Candidate) -> tuple[str, str]:
    return candidate.row["image_id"], candidate.row["sha256"]


def _audit_size(survey: RunSurvey, options: RouteOptions) -> int:
    """Audit images that the budget's share pays for, at what an image costs on average.

    The average is over all images and not over those drawn: a draw that stopped when its own
    minutes were spent would favour cheap images.
    """
    if not options.audit or not survey.population:
        return 0
    share = options.audit * options.budget.units
    if options.budget.unit == "images":
        return max(1, round(share)) if options.budget.units >= 1 else 0
    return int(share / (sum(survey.seconds.values()) / survey.population))


def _audit_item(
    candidate: Candidate, stratum: Stratum, rank: int, signals: Sequence[str]
) -> ReviewItem:
    inclusion = stratum.drawn / stratum.images
    note = f"drawn at random, {stratum.drawn} of {stratum.images}"
    return ReviewItem(
        **candidate.row,
        order=0,
        part="audit",
        show=True,
        stratum=candidate.stratum,
        audit_rank=rank,
        inclusion=inclusion,
        value=candidate.value,
        seconds=candidate.seconds,
        # Annotators see the reasons for an image, but not that it is in the audit.
        reasons=(
            Reason("audit", inclusion, note),
            *_reasons(replace(candidate, rare=None), signals, ()),
        ),
    )


def _hide_known(items: list[ReviewItem], sha256s: set[str]) -> list[ReviewItem]:
    """Pixels that are in the queue already, or twice in this draw, are asked about once."""
    seen, out = set(sha256s), []
    for item in items:
        out.append(replace(item, show=item.sha256 not in seen))
        seen.add(item.sha256)
    return out


def _choose_gold(
    survey: RunSurvey, options: RouteOptions, audit: Sequence[ReviewItem]
) -> list[ReviewItem]:
    """Return gold items in random order, none of them in the audit, as far as the budget goes."""
    left = options.budget.units - sum(_price(i.seconds, options) for i in audit if i.show)
    taken = {item.sha256 for item in audit}
    items: list[ReviewItem] = []
    for identity in options.gold.known or ():
        candidate = survey.gold.get(identity)
        if len(items) >= options.gold.wanted:
            break
        if candidate is None or identity[1] in taken:
            continue
        price = _price(candidate.seconds, options)
        if price > left:
            continue
        left -= price
        taken.add(identity[1])
        # The reasons are those that any image would have; none says that it is gold.
        items.append(replace(_value_item(candidate, tuple(options.signals), ()), part="gold"))
    return items


def _scattered(
    gold: Sequence[ReviewItem], value: Sequence[ReviewItem], seed: int
) -> list[ReviewItem]:
    """Return the items by value in their order, with gold ones at random places among them."""
    total = len(gold) + len(value)
    rng = np.random.default_rng([seed, 1])
    places = set(rng.choice(total, len(gold), replace=False).tolist())
    rest, known = iter(value), iter(gold)
    return [next(known) if place in places else next(rest) for place in range(total)]


def _choose_value(
    survey: RunSurvey,
    earlier: Earlier,
    options: RouteOptions,
    audit: Sequence[ReviewItem],
    manifest: Manifest,
) -> list[ReviewItem]:
    shown = [item for item in audit if item.show]
    left = options.budget.units - sum(_price(item.seconds, options) for item in shown)
    pick = _Picker(options, left)
    for phash in (*earlier.phashes, *(item.phash for item in shown)):
        pick.likeness.add(phash)
    pick.sha256s |= {item.sha256 for item in audit}
    rare = _rare_classes(survey.class_mass)
    for category_id in rare:
        pick.take(survey.rare[category_id].best_first(), left * options.rare_quota / len(rare))
    pick.take(survey.best.best_first(), left)
    survey.passed_over["near_duplicate"] += pick.near_duplicates
    names = [c.name for c in manifest.record.identity.categories]
    ranked = sorted(pick.taken, key=lambda c: (-c.value / c.seconds, c.row["image_id"]))
    return [_value_item(candidate, tuple(options.signals), names) for candidate in ranked]


class _Picker:
    """Takes candidates in the order given while they fit, no pixels and no likeness twice."""

    def __init__(self, options: RouteOptions, left: float) -> None:
        self._options = options
        self._left = left
        self.likeness = Likeness(options.near_duplicate_bits)
        self.sha256s: set[str] = set()
        self.taken: list[Candidate] = []
        self.near_duplicates = 0

    def take(self, ordered: Iterable[Candidate], at_most: float) -> None:
        """Spend up to ``at_most`` budget units, and never more than is left in all."""
        left = min(at_most, self._left)
        for candidate in ordered:
            price = _price(candidate.seconds, self._options)
            if candidate.row["sha256"] in self.sha256s or price > left:
                continue
            if self.likeness.has_like(candidate.row["phash"]):
                self.near_duplicates += 1
                continue
            self.sha256s.add(candidate.row["sha256"])
            self.likeness.add(candidate.row["phash"])
            self.taken.append(candidate)
            left -= price
            self._left -= price


def _price(seconds: float, options: RouteOptions) -> float:
    return float(options.budget.price(np.array([seconds]))[0])


def _rare_classes(mass: NDArray[np.float64]) -> list[int]:
    """Return category ids that are there, but far fewer than the rest; the rarest first."""
    limit = _RARE_SHARE * mass.sum() / max(len(mass), 1)
    return [int(k) for k in np.argsort(mass, kind="stable") if 0 < mass[k] < limit]


def _reasons(
    candidate: Candidate, signals: Sequence[str], categories: Sequence[str]
) -> tuple[Reason, ...]:
    """Return the reasons for an image, strongest first."""
    strongest = sorted(zip(signals, candidate.amounts, strict=True), key=lambda pair: -pair[1])
    reasons = [
        Reason(name, amount, SIGNALS[name].says if name in SIGNALS else "")
        for name, amount in strongest[:_REASONS]
        if amount > 0
    ]
    if candidate.rare is not None:
        category_id, amount = candidate.rare
        reasons.insert(0, Reason("rare_class", amount, categories[category_id]))
    return tuple(reasons)


def _value_item(
    candidate: Candidate, signals: Sequence[str], categories: Sequence[str]
) -> ReviewItem:
    return ReviewItem(
        **candidate.row,
        order=0,
        part="value",
        show=True,
        stratum=candidate.stratum,
        audit_rank=-1,
        inclusion=0.0,
        value=candidate.value,
        seconds=candidate.seconds,
        reasons=_reasons(candidate, signals, categories),
    )


def _in_order(
    audit: Sequence[ReviewItem], value: Sequence[ReviewItem], seed: int
) -> list[ReviewItem]:
    """Order the queue: what pays most first, audit images at random places, in their own order."""
    total = len(audit) + len(value)
    places = np.random.default_rng(seed).choice(total, len(audit), replace=False)
    audit_places = set(places.tolist())
    rest, drawn = iter(value), iter(audit)
    merged = [next(drawn) if place in audit_places else next(rest) for place in range(total)]
    return [replace(item, order=order) for order, item in enumerate(merged)]


def _summary(key: str, head: QueueHead, items: Sequence[ReviewItem]) -> RouteSummary:
    shown = [item for item in items if item.show]
    return RouteSummary(
        key=key,
        invocation=head.invocation,
        audit=sum(item.part == "audit" for item in shown),
        value=sum(item.part == "value" for item in shown),
        gold=sum(item.part == "gold" for item in shown),
        audit_known=len(items) - len(shown),
        minutes=sum(item.seconds for item in shown) / 60.0,
        strata=head.strata,
        passed_over=head.passed_over,
    )
