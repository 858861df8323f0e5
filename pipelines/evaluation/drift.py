"""Test whether a run has left the distribution of another, from its rows.

Two cases. Where the runs labelled other images (two dates of one job), the new run's images are
ranked among the old one's. Where they labelled the same images (two models), the differences of
each image are tested for a direction. Either way the answer holds for any number of looks.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.evaluation.exchangeability import Floats, Gambler, RankTest, SignTest
from storage.errors import ConfigError
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest

SHOWN_SCORE = 0.25
_UNSURE = (0.1, 0.5)
_MOST_CLASSES = 4  # with a separate statistic: the most frequent of the reference
MOST_IMAGES = 5000  # of each run: a random draw, where it has more
RISK = 0.01
_COLUMNS = ["image_id", "sha256", "status", "width", "height", "nbytes", "detections"]

Kind = Literal["other images", "same images"]


@dataclass(frozen=True, slots=True)
class ImageStatistics:
    """What the rows say of M images, in a random order that depends on their content alone.

    Attributes:
        names: of the statistics. ``values``: float64 [M, statistics].
        sha256: of the images.
        scores: int64 [20], boxes by score in steps of 0.05; ``classes``: int64, boxes by class.
    """

    names: tuple[str, ...]
    values: Floats
    sha256: tuple[str, ...]
    scores: NDArray[np.int64]
    classes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StatisticDrift:
    """One statistic: its evidence, and its mean before and after.

    Attributes:
        evidence: the largest capital on the way, as log10; 2 would be a chance of 1 in 100.
    """

    name: str
    evidence: float
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Drift:
    """The result of a test.

    Attributes:
        kind: which of the two cases.
        risk: largest probability of a false alarm, however often the test is looked at.
        reference, images: images that were compared.
        alarm_after: the image at which it was clear, None: it is not.
        statistics: strongest evidence first.
    """

    kind: Kind
    risk: float
    reference: int
    images: int
    alarm_after: int | None
    statistics: tuple[StatisticDrift, ...]

    @property
    def alarm(self) -> bool:
        """Whether the distribution was left."""
        return self.alarm_after is not None

    @property
    def sentence(self) -> str:
        """The result for people."""
        if not self.images or not self.reference:
            return "nothing to compare"
        if self.alarm_after is None:
            return (
                f"no drift found in {self.images:,} images against {self.reference:,} "
                f"(false alarms: at most {self.risk:.0%})"
            )
        shown = [s for s in self.statistics if s.evidence >= _threshold(self)][:3]
        moved = ", ".join(f"{s.name} {s.before:.3g} → {s.after:.3g}" for s in shown)
        return f"left the distribution, clear after {self.alarm_after:,} images: {moved}"

    def to_fields(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"alarm": self.alarm, "sentence": self.sentence}


def _threshold(drift: Drift) -> float:
    return float(np.log10(len(drift.statistics) / drift.risk))


def read_statistics(
    manifest: Manifest,
    classes: Sequence[str],
    *,
    only: Set[str] | None = None,
    most: int = MOST_IMAGES,
    names: Sequence[str] | None = None,
) -> ImageStatistics:
    """Read a run's live rows once.

    Args:
        manifest: the run.
        classes: class names that both runs have; others are not counted by class.
        only: shard ids, None: all.
        most: images; of more, a draw by content.
        names: class names with a separate statistic; None: the most frequent ones.
    """
    own = [c.name for c in manifest.record.identity.categories]
    to_common = np.array([classes.index(n) if n in classes else -1 for n in own], np.int64)
    scores, counts = np.zeros(20, np.int64), np.zeros(len(classes), np.int64)
    drawn: list[tuple[int, str, Floats, NDArray[np.int64]]] = []
    for _, table in live_tables(manifest, _COLUMNS, only=only):
        for key, sha, values, by_class in _of_table(table, to_common, len(classes), scores):
            counts += by_class
            entry = (-key, sha, values, by_class)
            if len(drawn) < most:
                heapq.heappush(drawn, entry)
            elif -key > drawn[0][0]:
                heapq.heapreplace(drawn, entry)
    drawn.sort(key=lambda one: -one[0])
    frequent = [classes[i] for i in np.argsort(-counts, kind="stable")[:_MOST_CLASSES] if counts[i]]
    chosen = list(frequent if names is None else names)
    columns = [classes.index(name) for name in chosen]
    rows = [np.concatenate([one[2], one[3][columns]]) for one in drawn]
    width = len(_BASIC) + len(chosen)
    return ImageStatistics(
        names=(*_BASIC, *(f"boxes of {name}" for name in chosen)),
        values=np.array(rows, np.float64).reshape(-1, width),
        sha256=tuple(one[1] for one in drawn),
        scores=scores,
        classes=counts,
    )


_BASIC = (
    "boxes", "unsure boxes", "mean score", "highest score", "relative size of boxes",
    "edge entropy", "bytes a pixel", "pixels",
)  # fmt: skip


def _of_table(
    table: pa.Table, to_common: NDArray[np.int64], classes: int, scores: NDArray[np.int64]
) -> Iterator[tuple[int, str, Floats, NDArray[np.int64]]]:
    """(random key, sha256, basic statistics, shown boxes by class) of each usable image."""
    table = table.filter(pc.equal(table.column("status").cast(pa.string()), "ok")).combine_chunks()
    if not table.num_rows:
        return
    found = table.column("detections").chunk(0)
    lengths = found.value_lengths().to_numpy(zero_copy_only=False)
    flat = found.flatten()
    score = np.asarray(flat.field("score").to_numpy(), np.float64)
    ids = to_common[flat.field("category_id").to_numpy().astype(np.int64)]
    boxes = np.asarray(flat.field("bbox").flatten().to_numpy(), np.float64).reshape(-1, 4)
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    scores += np.histogram(score, bins=20, range=(0, 1))[0]
    entropy = flat.field("box_entropy").to_numpy(zero_copy_only=False).astype(np.float64)
    entropy = np.nan_to_num(entropy, nan=0.0)  # of a detector that does not say
    ends = np.cumsum(lengths)
    sizes = [table.column(n).to_numpy().astype(np.float64) for n in ("width", "height", "nbytes")]
    for i, sha in enumerate(table.column("sha256").to_pylist()):
        at = slice(int(ends[i] - lengths[i]), int(ends[i]))
        pixels = sizes[0][i] * sizes[1][i]
        values = _basic(score[at], areas[at] / pixels, entropy[at], (sizes[2][i] / pixels, pixels))
        shown = ids[at][score[at] >= SHOWN_SCORE]
        by_class = np.bincount(shown[shown >= 0], minlength=classes).astype(np.int64)
        yield random_place(sha), sha, values, by_class


def _basic(
    score: Floats, relative: Floats, entropy: Floats, of_file: tuple[float, float]
) -> Floats:
    shown = score >= SHOWN_SCORE
    unsure = (score >= _UNSURE[0]) & (score < _UNSURE[1])
    return np.array(
        [
            shown.sum(),
            unsure.sum(),
            score[shown].mean() if shown.any() else 0.0,
            score.max(initial=0.0),
            np.sqrt(np.median(relative[shown])) if shown.any() else 0.0,
            entropy[shown].mean() if shown.any() else 0.0,
            *of_file,
        ]
    )


def random_place(sha256: str) -> int:
    """Return a place in a random order that content alone decides."""
    return int.from_bytes(hashlib.sha256(f"drift {sha256}".encode()).digest()[:8], "big") >> 1


class DriftTest:
    """Sees new images one by one; may be asked at any time.

    Args:
        names: of the statistics.
        reference: float64 [N, statistics]; None: differences are seen instead of values.
        risk: of a false alarm, over all looks.
        seed: breaks ties.
    """

    def __init__(
        self,
        names: Sequence[str],
        reference: Floats | None,
        *,
        risk: float = RISK,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self._names, self._reference, self._risk = tuple(names), reference, risk
        self._tests: list[RankTest | SignTest] = [
            SignTest(rng) if reference is None else RankTest(reference[:, k], rng)
            for k in range(len(names))
        ]
        self.images = 0
        self.alarm_after: int | None = None

    def see(self, values: Floats) -> None:
        """See the next image: its statistics, or their differences."""
        for test, value in zip(self._tests, values, strict=True):
            test.see(float(value))
        self.images += 1
        needed = np.log(len(self._names) / self._risk)
        if self.alarm_after is None and max(g.most for g in self._gamblers()) >= needed:
            self.alarm_after = self.images

    def _gamblers(self) -> list[Gambler]:
        return [test.gambler for test in self._tests]

    def result(self, before: Floats, after: Floats, reference: int) -> Drift:
        """Return the result so far.

        ``before`` and ``after``: float64 [statistics], means to show.
        """
        found = [
            StatisticDrift(name, gambler.most / float(np.log(10)), float(a), float(b))
            for name, gambler, a, b in zip(
                self._names, self._gamblers(), before, after, strict=True
            )
        ]
        found.sort(key=lambda one: -one.evidence)
        kind: Kind = "same images" if self._reference is None else "other images"
        return Drift(kind, self._risk, reference, self.images, self.alarm_after, tuple(found))


def drift_between(
    old: ImageStatistics, new: ImageStatistics, *, risk: float = RISK, seed: int = 0
) -> Drift:
    """Test the new images against the old ones.

    Images that both have are compared with themselves where they are most of the new ones; else
    they are left out.
    """
    at_old = {sha: i for i, sha in enumerate(old.sha256)}
    shared = [(at_old[sha], i) for i, sha in enumerate(new.sha256) if sha in at_old]
    if shared and 2 * len(shared) >= len(new.sha256):
        pairs = np.array(shared)
        before, after = old.values[pairs[:, 0]], new.values[pairs[:, 1]]
        return _run(DriftTest(old.names, None, risk=risk, seed=seed), before, after, after - before)
    after = new.values[[i for i, sha in enumerate(new.sha256) if sha not in at_old]]
    if not len(old.values) or not len(after):
        raise ConfigError("one of the runs has no labelled image to compare")
    test = DriftTest(old.names, old.values, risk=risk, seed=seed)
    return _run(test, old.values, after, after)


def _run(test: DriftTest, before: Floats, after: Floats, seen: Iterable[Floats]) -> Drift:
    for values in seen:
        test.see(values)
    return test.result(before.mean(axis=0), after.mean(axis=0), len(before))


def common_classes(old: Manifest, new: Manifest) -> list[str]:
    """Return names of classes that both runs have. Raises ConfigError where there are none."""
    names = {c.name for c in new.record.identity.categories}
    common = [c.name for c in old.record.identity.categories if c.name in names]
    if not common:
        raise ConfigError(
            f"{old.url} and {new.url} have no class in common",
            hint="only runs with common class names can be compared",
        )
    return common


def shares(counts: NDArray[np.int64], names: Sequence[str]) -> Mapping[str, float]:
    """Return counts as shares, by name."""
    total = max(int(counts.sum()), 1)
    return {name: round(float(n) / total, 4) for name, n in zip(names, counts, strict=True)}
