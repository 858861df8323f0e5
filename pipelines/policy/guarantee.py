"""``labelfleet fit --guarantee``: a share of right boxes that holds with a stated confidence.

The audit is a random draw of images, so what it shows of the accepted boxes can be said of all
images with a confidence that assumes nothing about the model, the scores or how errors bunch. For
every class and over all, this finds the lowest raw score from which "at least so large a share of
the accepted boxes is right" was shown (see ``sequence`` and ``betting``), or says how many more
audit images would do. Raw scores are tested, not probabilities: a curve fitted on the same answers
would use them twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.policy.betting import MOST_STRATA
from pipelines.policy.policy import ClassThresholds, Policy
from pipelines.policy.sequence import (
    GRID,
    AuditedStratum,
    Proven,
    prove,
    prove_classes,
    start_of,
    would_do,
)
from pipelines.policy.statement import By, Guarantee
from pipelines.truth.audit_images import (
    AuditImage,
    audit_images,
    nothing_counts,
    sampled_truth,
)
from storage.coco.truth import Truth
from storage.errors import ConfigError
from storage.records import Category, RunIdentity
from storage.review.frames import Frames, read_frame
from storage.review.queue import queue_parts, read_head
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest

ALL = "all classes"
_GRID32 = GRID.astype(np.float32)
_MOST_TIMES = 64  # the largest audit that is proposed, in audits like this one
_TRUTH_ASSUMES = (
    "It assumes that the images with ground truth are a random sample of the run's images."
)
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ClassProof:
    """The result of the tests for one class, or for all.

    Attributes:
        name: of the class, or ``ALL``.
        threshold: lowest raw score that holds; None: none was shown to.
        accepted: boxes of the whole run from there on.
        right: share of the audited boxes that is right from there on; without a threshold, from
            where the tests began. None: no box.
        more: audit images that would do if errors stay as frequent; None: no number up to 64
            times this audit would, or none is needed.
    """

    name: str
    threshold: float | None
    accepted: int
    right: float | None
    more: int | None


@dataclass(frozen=True, slots=True)
class Guaranteed:
    """Statements by class and over all, and the policy that carries the chosen one.

    ``guarantee`` None: nothing was shown, and the policy is the one that was given.
    """

    policy: Policy
    guarantee: Guarantee | None
    all: ClassProof
    classes: tuple[ClassProof, ...]

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        said = None if self.guarantee is None else self.guarantee.sentence
        return {"sentence": said, "all": asdict(self.all), "classes": [*map(asdict, self.classes)]}


@dataclass(frozen=True, slots=True)
class Asked:
    """The statement that is wanted.

    Attributes:
        target: share of accepted boxes that is right.
        confidence: how often such statements are to hold.
        by: over all accepted boxes, or of every class.

    Raises:
        ConfigError: the statement makes no sense.
    """

    target: float
    confidence: float = 0.9
    by: By = "all"

    def __post_init__(self) -> None:
        if not 0 < self.target < 1 or not 0.5 <= self.confidence < 1:
            raise ConfigError(
                f"a guarantee of {self.target} with confidence {self.confidence}",
                hint="give a share below 1, such as 0.95, and a confidence from 0.5 to below 1",
            )


def guarantee_run(
    manifest: Manifest,
    policy: Policy,
    asked: Asked,
    truth: Truth | None = None,
    *,
    allow_missing: bool = False,
    count_bulk: bool = False,
) -> Guaranteed:
    """Prove the statement from the audit, or from ground truth for some of the images.

    Args:
        manifest: the run; its live images are the population.
        policy: to carry the thresholds that hold.
        asked: the statement.
        truth: COCO ground truth of some images; None: the audit's answers.
        allow_missing: leave out truth images that the run has no row for.
        count_bulk: predictions accepted in bulk count as answers.

    Raises:
        ConfigError: no image was audited.
        TruthMismatch, ReviewError: see ``judge``.
    """
    if truth is None:
        drawn = audit_images(manifest, count_bulk=count_bulk)
    else:
        drawn = {"": sampled_truth(manifest, truth, allow_missing=allow_missing)}
    drawn = _largest({name: images for name, images in drawn.items() if images})
    if not drawn:
        raise nothing_counts(manifest, count_bulk=count_bulk, so=": nothing can be guaranteed")
    categories = manifest.record.identity.categories
    population = _Population(len(categories), by_stratum=truth is None)
    population.read(manifest, set(drawn))
    found = _prove(population, drawn, categories, asked)
    basis = _Basis(
        run=manifest.url,
        images=population.images,
        audited=sum(len(images) for images in drawn.values()),
        source="audit answers" if truth is None else truth.source,
        assumes=population.limits if truth is None else _TRUTH_ASSUMES,
    )
    return _stated(manifest.record.identity, policy, asked, found, basis)


@dataclass(frozen=True, slots=True)
class _Basis:
    """What a guarantee rests on: fields of ``Guarantee``."""

    run: str
    images: int
    audited: int
    source: str
    assumes: str


def _largest(drawn: dict[str, list[AuditImage]]) -> dict[str, list[AuditImage]]:
    ranked = sorted(drawn, key=lambda name: (-len(drawn[name]), name))
    return {name: drawn[name] for name in ranked[:MOST_STRATA]}


@dataclass(slots=True)
class _Population:
    """Accepted boxes an image, counted over all live images of the strata that were drawn from.

    ``sizes[stratum]`` is int64 [classes + 1, G, L]: images by count; the last class is all.
    ``others`` counts the live images of all other strata.
    """

    n_classes: int
    by_stratum: bool
    sizes: dict[str, _Ints] = field(default_factory=dict)
    others: int = 0

    def read(self, manifest: Manifest, strata: set[str]) -> None:
        frames = _frames(manifest)
        for shard_id, table in live_tables(manifest, ["status", "detections"]):
            name = (frames.stratum_of(shard_id) or "?") if self.by_stratum else ""
            ok = table.filter(pc.equal(table.column("status").cast(pa.string()), "ok"))
            if name not in strata:
                self.others += ok.num_rows
            elif ok.num_rows:
                self._add(name, ok.column("detections"))

    def _add(self, name: str, detections: pa.ChunkedArray) -> None:
        column = detections.combine_chunks()
        lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        flat = column.flatten()
        scores = flat.field("score").to_numpy().astype(np.float32)
        ids = flat.field("category_id").to_numpy().astype(np.int64)
        image = np.repeat(np.arange(len(lengths)), lengths)
        longest = int(lengths.max(initial=0)) + 1
        for k in range(self.n_classes + 1):
            own = np.ones(len(ids), np.bool_) if k == self.n_classes else ids == k
            counts = accepted_counts(scores[own], image[own], len(lengths))
            self._count(name, k, counts, longest)

    def _count(self, name: str, k: int, counts: _Ints, longest: int) -> None:
        held = self.sizes.get(name, np.zeros((self.n_classes + 1, len(GRID), 1), np.int64))
        if held.shape[2] < longest:
            held = np.pad(held, ((0, 0), (0, 0), (0, longest - held.shape[2])))
        cell = np.arange(len(GRID))[:, None] * held.shape[2] + counts
        found = np.bincount(cell.ravel(), minlength=len(GRID) * held.shape[2])
        held[k] += found.reshape(len(GRID), -1)
        self.sizes[name] = held

    @property
    def images(self) -> int:
        """Live images of the strata."""
        return sum(int(sizes[-1, 0].sum()) for sizes in self.sizes.values())

    @property
    def limits(self) -> str:
        """What the statement leaves out; '' if it speaks for every live image."""
        if not self.others:
            return ""
        return f"{self.others:,} of {self.images + self.others:,} live images are not covered."


def accepted_counts(scores: NDArray[np.float32], image: _Ints, images: int) -> _Ints:
    """int64 [G, images]: boxes of each image that every threshold accepts."""
    first = np.searchsorted(-_GRID32, -scores, side="left")  # the strictest that accepts the box
    kept = first < len(GRID)
    cell = first[kept] * images + image[kept]
    found = np.bincount(cell, minlength=len(GRID) * images).reshape(len(GRID), images)
    return np.asarray(np.cumsum(found, axis=0), np.int64)


def _frames(manifest: Manifest) -> Frames:
    store = manifest.store
    heads = [read_head(store, key) for key in queue_parts(store)]
    return Frames([(h.invocation, read_frame(store, h.frame)) for h in heads if h.frame])


def _prove(
    population: _Population,
    drawn: dict[str, list[AuditImage]],
    categories: Sequence[Category],
    asked: Asked,
) -> dict[str, tuple[Proven, list[AuditedStratum]]]:
    """By class name and for ``ALL``: what was shown, and of what."""
    risk = 1 - asked.confidence
    audited = {
        name: _audited(population, drawn, k)
        for k, name in enumerate([*(c.name for c in categories), ALL])
    }
    everything = audited.pop(ALL)
    with_boxes = {n: s for n, s in audited.items() if sum(one.sizes[-1, 1:].sum() for one in s)}
    proven = prove_classes(with_boxes, asked.target, risk) if with_boxes else {}
    start = start_of(everything, asked.target, risk)
    found = {n: (proven.get(n, Proven(None, None)), s) for n, s in audited.items()}
    return found | {ALL: (prove(everything, asked.target, risk, start), everything)}


def _audited(
    population: _Population, drawn: dict[str, list[AuditImage]], k: int
) -> list[AuditedStratum]:
    out = []
    for name, images in drawn.items():
        sizes = population.sizes.get(name, np.zeros((population.n_classes + 1, 1, 1), np.int64))[k]
        if len(images) > (there := int(sizes[0].sum())):
            raise ConfigError(
                f"the audit drew {len(images)} images from {name or 'the run'}, which has {there} "
                "now: its source has changed since",
                hint="draw a new audit: `labelfleet review route`",
            )
        own = [
            i.ids == k if k < population.n_classes else np.ones(len(i.ids), bool) for i in images
        ]
        accepted = _columns((i.scores[o] for i, o in zip(images, own, strict=True)), len(images))
        wrong = _columns(
            (i.scores[o & ~i.right] for i, o in zip(images, own, strict=True)), len(images)
        )
        out.append(AuditedStratum(sizes, wrong, accepted))
    return out


def _columns(scores: Iterable[NDArray[np.float32]], images: int) -> _Ints:
    """int64 [G, images] of each image's boxes by threshold."""
    lists = list(scores)
    image = np.repeat(np.arange(images), [len(one) for one in lists])
    flat = np.concatenate([np.zeros(0, np.float32), *lists])
    return accepted_counts(flat, image, images)


def _stated(
    identity: RunIdentity,
    policy: Policy,
    asked: Asked,
    found: dict[str, tuple[Proven, list[AuditedStratum]]],
    basis: _Basis,
) -> Guaranteed:
    """Proofs as figures, and the policy with the thresholds that were shown to hold."""
    risk = 1 - asked.confidence
    shares = {ALL: risk} | {n: risk / (len(found) - 1) for n in found if n != ALL}
    proofs = {n: _proof(n, *one, asked, shares[n]) for n, one in found.items()}
    over_all = proofs.pop(ALL)
    chosen = [over_all] if asked.by == "all" else list(proofs.values())
    thresholds = {p.name: p.threshold for p in chosen if p.threshold is not None}
    guarantee = None
    if thresholds:
        guarantee = Guarantee(
            target=asked.target,
            confidence=asked.confidence,
            by=asked.by,
            thresholds=thresholds,
            model_sha256=identity.model_sha256,
            precision=identity.precision,
            **asdict(basis),
        )
        policy = carry(policy, guarantee, [c.name for c in identity.categories])
    return Guaranteed(policy, guarantee, over_all, tuple(proofs.values()))


def carry(policy: Policy, guarantee: Guarantee, names: Sequence[str]) -> Policy:
    """Return the policy, accepting exactly what the guarantee speaks for.

    A class that it does not speak for accepts nothing.
    """
    classes = {}
    for name in names:
        key = ALL if guarantee.by == "all" else name
        least = guarantee.thresholds.get(key)
        accept, reject = policy.of(name)
        if least is not None:
            curve = None if policy.calibration is None else policy.calibration.of(name)
            at = float(curve(np.array([least]))[0]) if curve else least
            accept = max(0.0, round(at - 1e-6, 6))
        own = policy.classes.get(name)
        classes[name] = ClassThresholds(
            accept=accept,
            reject=min(accept, reject),
            accept_score=1.0 if least is None else least,
            known=None if own is None else own.known,
        )
    fields = {"classes": classes, "guarantee": guarantee, "model_sha256": guarantee.model_sha256}
    return policy.model_copy(update=fields)


def _proof(
    name: str, proven: Proven, strata: Sequence[AuditedStratum], asked: Asked, risk: float
) -> ClassProof:
    g = proven.lowest if proven.lowest is not None else proven.start
    seen = 0 if g is None else sum(int(s.accepted[g].sum()) for s in strata)
    wrong = 0 if g is None else sum(int(s.wrong[g].sum()) for s in strata)
    held = proven.lowest
    counts = [] if held is None else [s.sizes[held] @ np.arange(s.sizes.shape[1]) for s in strata]
    return ClassProof(
        name=name,
        threshold=None if held is None else float(GRID[held]),
        accepted=int(sum(counts)),
        right=1 - wrong / seen if seen else None,
        more=None if held is not None else _more(strata, asked.target, risk),
    )


def _more(strata: Sequence[AuditedStratum], target: float, risk: float) -> int | None:
    """Further audit images that would show some threshold, if it is as right as it looks."""
    now = [s.wrong.shape[1] for s in strata]
    images = [int(s.sizes[0].sum()) for s in strata]
    audits, times = [now], 1.0  # ever larger ones, up to all images
    while times < _MOST_TIMES and any(n < most for n, most in zip(audits[-1], images, strict=True)):
        times *= 1.25
        audits.append([min(m, int(np.ceil(n * times))) for n, m in zip(now, images, strict=True)])
    if len(audits) == 1 or not _would_show(strata, audits[-1], target, risk):
        return None
    short, long = 0, len(audits) - 1
    while long - short > 1:
        middle = (short + long) // 2
        if _would_show(strata, audits[middle], target, risk):
            long = middle
        else:
            short = middle
    return sum(audits[long]) - sum(now)


def _would_show(
    strata: Sequence[AuditedStratum], counts: Sequence[int], target: float, risk: float
) -> bool:
    """Return whether audits of these sizes, with errors as now, would mostly show a threshold."""
    start = start_of(strata, target, risk, draws=counts)
    if start is None:
        return False
    seen = sum(int(s.accepted[start].sum()) for s in strata)
    wrong = sum(int(s.wrong[start].sum()) for s in strata)
    share = (wrong + (1 - target) / 3) / (seen + 1)  # a third of what is permitted, if few are seen
    return would_do(strata, start, counts, target, risk, share / (1 - target))
