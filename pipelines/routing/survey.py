"""A routing's single pass over live rows: counts, the audit's first images, and the best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.policy.box_batch import BoxBatch, box_batch
from pipelines.policy.policy import Policy
from pipelines.routing.audit_draw import StratumDraw, random_key
from pipelines.routing.candidates import BestPool
from pipelines.routing.cost import Budget, CostModel
from pipelines.routing.gold import GoldDraw
from pipelines.routing.showing import ShowRule
from pipelines.routing.signals import SIGNALS, Weighted, measure
from storage.review.answers import read_answers, standing
from storage.review.frames import Frames, read_frame, shard_numbers
from storage.review.queue import QueueHead, Stratum, queue_parts, read_head, read_queue
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest

NEAR_DUPLICATE_BITS = 4  # of 64: re-encoded, or a frame later; not merely alike
RARE_QUOTA = 0.1
_COLUMNS = (
    "image_id", "shard_id", "offset", "nbytes", "sha256", "phash", "width", "height",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """How a routing chooses.

    Attributes:
        budget: images or minutes, for this invocation.
        audit: share of the budget drawn at random.
        seed: of the random order and of the audit's places in the queue.
        cost: human time.
        near_duplicate_bits: Hamming distance of phash; None: keep near duplicates.
        rare_quota: share of the value budget kept for classes that are rare.
        signals: what speaks for a look.
        show: which boxes people see; their time is estimated for it.
        gold: images with known boxes, some of which are queued to measure annotators.
    """

    budget: Budget
    audit: float = 0.2
    seed: int = 0
    cost: CostModel = field(default_factory=CostModel)
    near_duplicate_bits: int | None = NEAR_DUPLICATE_BITS
    rare_quota: float = RARE_QUOTA
    signals: Mapping[str, Weighted] = field(default_factory=lambda: SIGNALS)
    show: ShowRule = field(default_factory=ShowRule)
    gold: GoldDraw = field(default_factory=GoldDraw)

    @property
    def most_images(self) -> int:
        """No routing shows more images than this."""
        if self.budget.unit == "images":
            return int(self.budget.units)
        return int(self.budget.units / max(self.cost.per_image_s, 0.1)) + 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that may be routed.

    Attributes:
        row: those of its annotation row's fields that a review item repeats.
        stratum: the invocation that saw it first.
        seconds: human time expected. ``amounts``: expected corrections, weighted, by signal.
        rare: (category id, corrections expected in it) where it stands for a rare class.
    """

    row: Mapping[str, Any]
    stratum: str
    seconds: float
    amounts: tuple[float, ...]
    rare: tuple[int, float] | None = None

    @property
    def value(self) -> float:
        """Corrections expected, weighted by signal."""
        return sum(self.amounts)


@dataclass(frozen=True, slots=True)
class Earlier:
    """What was routed before; small enough for memory, since people answer it.

    Attributes:
        heads: queue parts by key, oldest first.
        sha256s, phashes: of every image in the queue, of the run and of the others.
        answered: sha256 of images that were answered in any of the runs.
        audited: by stratum, the rank of each (image id, sha256) drawn for the audit.
        frames: the stratum of every shard.
    """

    heads: dict[str, QueueHead]
    sha256s: set[str]
    phashes: list[int | None]
    audited: dict[str, dict[tuple[str, str], int]]
    frames: Frames
    answered: set[str] = field(default_factory=set)

    @staticmethod
    def read(manifest: Manifest, other_runs: Sequence[Manifest] = ()) -> Earlier:
        """From the run's output; what other runs routed is known by its pixels only."""
        store = manifest.store
        heads = {key: read_head(store, key) for key in queue_parts(store)}
        framed = [(h.invocation, read_frame(store, h.frame)) for h in heads.values() if h.frame]
        earlier = Earlier(heads, set(), [], {}, Frames(framed))
        for item in read_queue(store, list(heads), hidden=True):
            earlier.sha256s.add(item.sha256)
            if item.show:
                earlier.phashes.append(item.phash)
            if item.part == "audit":
                ranks = earlier.audited.setdefault(item.stratum, {})
                ranks[item.image_id, item.sha256] = item.audit_rank
        for other in other_runs:
            for item in read_queue(other.store):
                earlier.sha256s.add(item.sha256)
                earlier.phashes.append(item.phash)
        stands = standing(*(read_answers(run.store) for run in (manifest, *other_runs)))
        earlier.answered.update(answer.sha256 for answer in stands if not answer.skipped)
        earlier.sha256s.update(earlier.answered)
        return earlier

    def strata(self) -> dict[str, Stratum]:
        """Return every known stratum as last recorded, oldest first."""
        return {s.name: s for head in self.heads.values() for s in head.strata}

    def seed_of(self, stratum: str, otherwise: int) -> int:
        """Return the seed of a stratum's random order: that of the routing which saw it first."""
        seeds = (h.seed for h in self.heads.values() if h.invocation == stratum)
        return next(seeds, otherwise)


@dataclass(frozen=True, slots=True)
class _Page:
    """The usable rows of one table with everything that was computed on them."""

    rows: list[dict[str, Any]]
    stratum: str
    keys: list[int]
    batch: BoxBatch
    per_box: NDArray[np.float64]
    amounts: NDArray[np.float64]
    seconds: NDArray[np.float64]
    price: NDArray[np.float64]

    def candidate(self, i: int, rare: tuple[int, float] | None = None) -> Candidate:
        amounts = tuple(float(a) for a in self.amounts[i])
        return Candidate(self.rows[i], self.stratum, float(self.seconds[i]), amounts, rare)


class RunSurvey:
    """Reads every live row once; holds what a budget's worth of choosing needs.

    Attributes:
        draws: by stratum, the audit's random order as far as it may be needed.
        audited: by stratum, how many of its live images were drawn by earlier routings; they are
            the first of its random order.
        best: the best images by value per price; ``rare``: likewise by category id, counting
            only that category's boxes.
        class_mass: expected objects by category id.
        seconds: expected human time of all images, by stratum.
        population: live images of status ok.
        passed_over: images that cannot be routed, by reason.
        gold: the live images of ``options.gold``, by (image id, sha256).
    """

    def __init__(
        self,
        manifest: Manifest,
        policy: Policy,
        invocation: str,
        earlier: Earlier,
        options: RouteOptions,
    ) -> None:
        identity = manifest.record.identity
        self._manifest, self._invocation = manifest, invocation
        self._earlier, self._options = earlier, options
        self._thresholds = policy.for_run(identity)
        most, bits = options.most_images, options.near_duplicate_bits
        self._audit_most = int(np.ceil(most * options.audit)) + 1 if options.audit else 0
        self.draws = {
            name: StratumDraw[Candidate](stratum.drawn + self._audit_most)
            for name, stratum in earlier.strata().items()
        }
        self.best = BestPool[Candidate](2 * most + self._audit_most + 64, bits)
        self.audited: Counter[str] = Counter()
        n_classes = len(identity.categories)
        quota = int(np.ceil(most * options.rare_quota))
        room = min(quota, max(64, 4 * quota // max(n_classes, 1)))
        self.rare = [BestPool[Candidate](room, bits) for _ in range(n_classes)]
        self.class_mass = np.zeros(n_classes)
        self.seconds: dict[str, float] = {}
        self.population = 0
        self.passed_over: Counter[str] = Counter()
        self.gold: dict[tuple[str, str], Candidate] = {}
        self._shards: list[str] = []

    def run(self) -> None:
        """Make the pass."""
        columns = [*_COLUMNS, "status", "detections"]
        for shard_id, table in live_tables(self._manifest, columns):
            ok = table.filter(pc.equal(table.column("status").cast(pa.string()), "ok"))
            self.passed_over["not_ok"] += table.num_rows - ok.num_rows
            stratum = self._stratum_of(shard_id)
            if ok.num_rows:
                page = self._page(ok, stratum)
                self._see_audit(page)
                self._see_value(page)
                self._see_classes(page)
        self.passed_over["near_duplicate"] += self.best.near_duplicates

    def new_shards(self) -> NDArray[np.uint64]:
        """Shards that no routing saw before."""
        return np.unique(shard_numbers(self._shards))

    def _stratum_of(self, shard_id: str) -> str:
        stratum = self._earlier.frames.stratum_of(shard_id)
        if stratum is not None:
            return stratum
        if not self._shards or self._shards[-1] != shard_id:  # a shard has several row groups
            self._shards.append(shard_id)
        return self._invocation

    def _page(self, table: pa.Table, stratum: str) -> _Page:
        batch = box_batch(table, self._thresholds)
        per_box, amounts = measure(batch, self._options.signals)
        seconds = self._options.show.seconds(batch, self._options.cost)
        rows = table.select(list(_COLUMNS)).to_pylist()
        seed = self._earlier.seed_of(stratum, self._options.seed)
        keys = [random_key(seed, row["image_id"]) for row in rows]
        price = self._options.budget.price(seconds)
        return _Page(rows, stratum, keys, batch, per_box, amounts, seconds, price)

    def _see_audit(self, page: _Page) -> None:
        self.population += len(page.rows)
        before = self.seconds.get(page.stratum, 0.0)
        self.seconds[page.stratum] = before + float(page.seconds.sum())
        draw = self.draws.setdefault(page.stratum, StratumDraw(self._audit_most))
        known = self._earlier.audited.get(page.stratum, {})
        for i, (key, row) in enumerate(zip(page.keys, page.rows, strict=True)):
            self.audited[page.stratum] += (row["image_id"], row["sha256"]) in known
            if draw.count(key):
                draw.take(key, row["image_id"], page.candidate(i))

    def _see_value(self, page: _Page) -> None:
        values = page.amounts.sum(axis=1)
        for i, row in enumerate(page.rows):
            if (identity := (row["image_id"], row["sha256"])) in self._options.gold:
                self.gold[identity] = page.candidate(i)
            if row["sha256"] in self._earlier.answered:
                self.passed_over["answered_before"] += 1
            elif row["sha256"] in self._earlier.sha256s:
                self.passed_over["queued_before"] += 1
            elif values[i] > 0:
                rank = (float(values[i] / page.price[i]), page.keys[i])
                if self.best.wants(rank):
                    self.best.offer(rank, row["phash"], page.candidate(i))

    def _see_classes(self, page: _Page) -> None:
        batch, n = page.batch, len(self.rare)
        mass = np.where(batch.standing, batch.right, 0.0)
        self.class_mass += np.bincount(batch.category_ids, weights=mass, minlength=n)
        cell = batch.image * n + batch.category_ids
        amounts = np.bincount(cell, weights=page.per_box, minlength=batch.images * n)
        for at in np.flatnonzero(amounts):
            i, category_id = divmod(int(at), n)
            rank = (float(amounts[at] / page.price[i]), page.keys[i])
            pool = self.rare[category_id]
            if pool.wants(rank) and page.rows[i]["sha256"] not in self._earlier.sha256s:
                rare = (category_id, float(amounts[at]))
                pool.offer(rank, page.rows[i]["phash"], page.candidate(i, rare))
