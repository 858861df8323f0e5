"""Entry point of fusion: several runs over the same images become one run, without a GPU.

The fused run has the listing, the shards and the classes of the first run. Each of its shards is
read once, the rows of the others are found by the images' sha256, and the fused rows are committed
by one conditional put, like any run's. The same call continues it.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.fusion.boxes import FusedBoxes, fuse_boxes
from pipelines.fusion.inputs import FusionInput, calibration_of, class_map
from pipelines.fusion.listing_copy import copy_listing, refuse_old_place
from storage.errors import ConfigError
from storage.objects.preflight import check_output
from storage.objects.protocols import ObjectStore
from storage.records import AnnotationRow, Detections, RunIdentity, Shard
from storage.runs.annotations import RowWriter, ShardFooter, read_rows
from storage.runs.ledger import LedgerEntry, LedgerWriter, new_invocation
from storage.runs.listing import Listing
from storage.runs.lock import run_lock
from storage.runs.manifest import (
    RUN_KEY,
    Manifest,
    RunRecord,
    annotation_key,
    config_hash,
    distinct_names,
)
from storage.runs.rows_by_sha import RowsBySha
from storage.shards.frames import FRAMES_KEY

FUSION_VERSION = 1
_TOPK = 5


@dataclass(frozen=True, slots=True)
class FuseOptions:
    """How runs are fused.

    Attributes:
        name: of the fused run; '': the runs' names, joined; `2xcells` of two runs named cells.
        iou: boxes that overlap by more are one object.
        weights: how much each run counts; empty: all alike.
        renamed: class names of later runs by the first run's; '' leaves a class out.
        calibrated: use the calibration that ``fit`` left with a run.
        score_floor: fused boxes below it are dropped.
        max_boxes: of an image at most, the highest scores.
    """

    name: str = ""
    iou: float = 0.55
    weights: tuple[float, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    calibrated: bool = True
    score_floor: float = 0.01
    max_boxes: int = 300


@dataclass(frozen=True, slots=True)
class FuseSummary:
    """What a call of ``fuse_runs`` did, and where the run stands.

    Attributes:
        committed: shards of this call. ``before``: those that were there.
        waiting: shards that one of the runs has not labelled yet; a later call takes them.
        images, detections: of this call.
        alone: images of this call that a run has no row for, by the run's name.
        remarks: what a person should know about how the runs were understood.
    """

    url: str
    name: str
    runs: tuple[str, ...]
    committed: int
    before: int
    waiting: int
    images: int
    detections: int
    alone: dict[str, int]
    remarks: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0: all is fused; 3: some shards wait for one of the runs."""
        return 3 if self.waiting else 0

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def fuse_runs(
    runs: Sequence[Manifest],
    output: ObjectStore,
    options: FuseOptions | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FuseSummary:
    """Fuse runs into a new run, or continue one that was begun.

    Args:
        runs: two or more; the first one gives listing and classes.
        output: of the fused run.
        options: how.
        progress: told (shards done, of how many).

    Raises:
        ConfigError: the runs cannot be fused: their classes differ, or one of them
            shares no image with the first.
        RunMismatch: the output holds another run, or the images were moved and only the first
            run was relocated.
    """
    options = options or FuseOptions()
    _check(runs, output, options)
    inputs = _inputs(runs, options)
    record = _record(inputs, options)
    place = str(record.source["url"])
    with ExitStack() as stack:
        lock = stack.enter_context(run_lock(output, f"labelfleet fuse {record.identity.name}"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="labelfleet-fuse-")))
        found = [stack.enter_context(closing(RowsBySha(run, folder))) for run in runs[1:]]
        if not output_has_run(output):
            check_output(output)
            _refuse_strangers(runs, found)
        else:
            there = RunRecord.from_json(output.get(RUN_KEY)).source
            refuse_old_place(runs[0].store, str(there["url"]), output, place)
        manifest = Manifest.create_or_continue(output, record)
        copy_listing(runs[0].store, output, place)
        work = _Fusion(manifest, inputs, found, options, folder)
        return work.run(lock.check, progress)


def _check(runs: Sequence[Manifest], output: ObjectStore, options: FuseOptions) -> None:
    urls = [run.url for run in runs]
    if len(urls) < 2:
        raise ConfigError("one run alone cannot be fused", hint="name two or more runs")
    if twice := [url for url, n in Counter(urls).items() if n > 1]:
        raise ConfigError(f"{twice[0]} is given twice", hint="name each run once")
    if output.url in urls:
        raise ConfigError(f"{output.url} is one of the runs", hint="choose another --out")
    if options.weights and len(options.weights) != len(runs):
        raise ConfigError(
            f"{len(options.weights)} weights for {len(runs)} runs", hint="one --weight for each run"
        )
    if any(not weight > 0 for weight in options.weights):
        raise ConfigError("a run with weight 0 or less", hint="leave the run out instead")


def _inputs(runs: Sequence[Manifest], options: FuseOptions) -> list[FusionInput]:
    classes = [c.name for c in runs[0].record.identity.categories]
    every = {c.name for run in runs for c in run.record.identity.categories}
    if strange := [name for name in options.renamed if name not in every]:
        raise ConfigError(
            f"--map names a class that none of the runs has: {strange[0]}",
            hint=f"they have {', '.join(sorted(every))}",
        )
    weights = options.weights or (1.0,) * len(runs)
    inputs = []
    for run, weight, shown in zip(runs, weights, distinct_names(runs), strict=True):
        to_fused = class_map(run, classes, {} if run is runs[0] else options.renamed)
        knows = np.isin(np.arange(len(classes)), to_fused)
        calibration = calibration_of(run) if options.calibrated else None
        inputs.append(FusionInput(run, to_fused, knows, calibration, weight, shown))
    return inputs


def _record(inputs: Sequence[FusionInput], options: FuseOptions) -> RunRecord:
    first = inputs[0].manifest.record
    name = options.name or _default_name([run.name for run in inputs])
    settings: dict[str, Any] = {
        "name": f"fusion of {' and '.join(run.name for run in inputs)}",
        "fusion": {
            "version": FUSION_VERSION,
            "method": "weighted boxes fusion",
            "iou": options.iou,
            "one_vote": True,
            "max_boxes": options.max_boxes,
            "runs": [run.settings() for run in inputs],
        },
        "score_floor": options.score_floor,
    }
    for limit in ("max_image_bytes", FRAMES_KEY):
        if limit in first.inference:
            settings[limit] = first.inference[limit]
    digest = config_hash(settings)
    identities = [run.manifest.record.identity for run in inputs]
    identity = RunIdentity(
        name=name,
        config_hash=digest,
        model_sha256=sha256(f"labelfleet fusion {digest}".encode()).hexdigest(),
        licence=_joined([one.licence for one in identities]),
        runtime="fusion",
        precision=_joined([one.precision for one in identities]),
        code_version=version("labelfleet"),
        categories=first.identity.categories,
    )
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    return RunRecord(identity, first.source, settings, created_at, tuple(_remarks(inputs)))


def _default_name(names: Sequence[str]) -> str:
    """Return the names, joined; one that several runs have stands once, with their number."""
    return "+".join(name if n == 1 else f"{n}x{name}" for name, n in Counter(names).items())


def _joined(values: Sequence[str]) -> str:
    return " + ".join(dict.fromkeys(values))


def _remarks(inputs: Sequence[FusionInput]) -> Iterator[str]:
    yield "fused from " + ", ".join(run.manifest.url for run in inputs)
    raw = [run.shown for run in inputs if run.calibration is None]
    if raw:
        yield (
            f"scores that count as they are, not calibrated: {', '.join(raw)} "
            "(`labelfleet fit` leaves a calibration with a run)"
        )
    classes = [c.name for c in inputs[0].manifest.record.identity.categories]
    for run in inputs[1:]:
        lacking = [name for name, known in zip(classes, run.knows, strict=True) if not known]
        if lacking:
            yield f"{run.shown} does not know, and does not vote on: {', '.join(lacking)}"


def output_has_run(output: ObjectStore) -> bool:
    """Return whether a run was created at an output."""
    return any(o.key == RUN_KEY for o in output.list(RUN_KEY))


def _refuse_strangers(runs: Sequence[Manifest], found: Sequence[RowsBySha]) -> None:
    """Raise ConfigError where a run shares no image with the first one."""
    first = runs[0]
    strangers = dict(enumerate(found))
    live = list(Listing(first.store).live_ids())
    committed = first.committed()
    for shard_id in (one for one in live if one in committed):
        for row in read_rows(first.store, annotation_key(shard_id)):
            for at in [at for at, rows in strangers.items() if row.sha256]:
                if strangers[at].find(shard_id, row.sha256) is not None:
                    del strangers[at]
            if not strangers:
                return
    if not any(one in committed for one in live):
        raise ConfigError(f"{first.url} has no labels yet", hint="label it first")
    urls = ", ".join(runs[at + 1].url for at in strangers)
    raise ConfigError(
        f"{urls} shares no image with {first.url}",
        hint="images are joined by the sha256 of their bytes: label the same files with each run",
    )


class _Waits(Exception):
    """A run that is not finished has no row for an image of the shard yet."""


class _Fusion:
    """The pass over the first run's shards."""

    def __init__(
        self,
        manifest: Manifest,
        inputs: Sequence[FusionInput],
        others: Sequence[RowsBySha],
        options: FuseOptions,
        folder: Path,
    ) -> None:
        self._manifest, self._inputs, self._others = manifest, inputs, others
        self._options, self._folder = options, folder
        self._invocation = new_invocation()
        self._ledger = LedgerWriter(manifest.store, self._invocation)
        self._alone: Counter[str] = Counter()
        self._done: list[ShardFooter] = []

    def run(self, guard: Callable[[], None], progress: Callable[[int, int], None]) -> FuseSummary:
        first = self._inputs[0].manifest
        listing = Listing(self._manifest.store)
        live = set(listing.live_ids())
        before = live & self._manifest.committed()
        left = live - before
        todo = left & first.committed()
        waiting = len(left - todo)
        self._tell("start", note={"workers": 1})
        outcome = "interrupted"
        try:
            for n, shard in enumerate(listing.live_shards(skip=live - todo)):
                guard()
                progress(n, len(todo))
                waiting += not self._fuse_shard(shard)
            progress(len(todo), len(todo))
            outcome = "done"
        finally:
            self._tell("end", note={"outcome": outcome})
            self._ledger.flush()
        return FuseSummary(
            url=self._manifest.url,
            name=self._manifest.record.identity.name,
            runs=tuple(run.manifest.url for run in self._inputs),
            committed=len(self._done),
            before=len(before),
            waiting=waiting,
            images=sum(footer.images for footer in self._done),
            detections=sum(footer.detections for footer in self._done),
            alone=dict(self._alone),
            remarks=self._manifest.record.remarks,
        )

    def _fuse_shard(self, shard: Shard) -> bool:
        """Fuse and commit one shard; False where a run has yet to label some of it."""
        began_s = time.monotonic()
        spool = self._folder / "rows.parquet"
        first = self._inputs[0].manifest
        writer = RowWriter(spool, self._manifest.record.identity)
        alone: Counter[str] = Counter()
        try:
            for row in read_rows(first.store, annotation_key(shard.shard_id)):
                writer.write(self._fused_row(row, alone))
        except _Waits:
            writer.abandon()
            return False
        except BaseException:
            writer.abandon()
            raise
        truncated = first.footer(shard.shard_id).source_truncated
        seconds = {"infer": time.monotonic() - began_s}
        footer = writer.finish(
            shard.shard_id,
            shard.key,
            secrets.token_hex(8),
            source_truncated=truncated,
            seconds=seconds,
        )
        if self._manifest.commit(footer, spool).won:
            self._alone += alone
            self._done.append(footer)
            self._tell(
                "shard",
                shard_id=shard.shard_id,
                counts=footer.counts,
                detections=footer.detections,
                seconds=seconds,
                note={"won": True, "warnings": footer.warnings},
            )
        return True

    def _fused_row(self, row: AnnotationRow, alone: Counter[str]) -> AnnotationRow:
        rows: list[AnnotationRow | None] = [row]
        for run, found in zip(self._inputs[1:], self._others, strict=True):
            other = found.find(row.shard_id, row.sha256) if row.sha256 else None
            if other is None and row.sha256 and found.unfinished:
                raise _Waits
            rows.append(other)
            if other is None and row.status == "ok":
                alone[run.shown] += 1
        seen = next((one for one in rows if one is not None and one.status == "ok"), None)
        if seen is None:
            return replace(row, detections=Detections.empty())
        base = replace(
            seen,
            image_id=row.image_id,
            shard_id=row.shard_id,
            offset=row.offset,
            nbytes=row.nbytes,
        )
        lacking = [
            run.shown
            for run, one in zip(self._inputs, rows, strict=True)
            if one is None or one.status != "ok" or (one.width, one.height) != _size(seen)
        ]
        usable = [
            one if one is not None and one.status == "ok" and (one.width, one.height) == _size(seen)
            else None
            for one in rows
        ]  # fmt: skip
        warning = "; ".join(filter(None, [base.warning, *(f"no vote: {n}" for n in lacking)]))
        return replace(base, warning=warning or None, detections=self._fused_boxes(usable))

    def _fused_boxes(self, rows: Sequence[AnnotationRow | None]) -> Detections:
        at = [i for i, row in enumerate(rows) if row is not None]
        voting = [(self._inputs[i], row) for i, row in enumerate(rows) if row is not None]
        cast = [run.votes(row) for run, row in voting]
        fused = fuse_boxes([votes for votes, _ in cast], self._options.iou, one_vote=True)
        keep = np.flatnonzero(fused.scores >= self._options.score_floor)[: self._options.max_boxes]
        if not len(keep):
            return Detections.empty()
        run_scores = np.full((len(keep), len(rows)), np.nan, np.float32)
        run_scores[:, at] = fused.run_scores[keep]
        tops = [(run, row, which) for (run, row), (_, which) in zip(voting, cast, strict=True)]
        ids, scores = _topk(fused, keep, tops, len(self._inputs[0].knows))
        return Detections(
            boxes=fused.boxes[keep].astype(np.float32),
            scores=np.clip(fused.scores[keep], 0, 1).astype(np.float32),
            category_ids=fused.category_ids[keep].astype(np.int16),
            topk_ids=ids,
            topk_scores=scores,
            box_std=None,
            box_entropy=None,
            anchor=None,
            run_scores=run_scores,
            agreement=fused.agreement[keep].astype(np.float32),
        )

    def _tell(self, event: str, **fields: Any) -> None:
        self._ledger.write(LedgerEntry(event=event, at=time.time(), **fields))


def _size(row: AnnotationRow) -> tuple[int, int]:
    return row.width, row.height


def _topk(
    fused: FusedBoxes,
    keep: np.ndarray[Any, Any],
    tops: Sequence[tuple[FusionInput, AnnotationRow, np.ndarray[Any, Any]]],
    classes: int,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """int16 and float32 [N, K]: the members' raw class scores, averaged, the best first."""
    k = min(_TOPK, classes)
    ids = np.zeros((len(keep), k), np.int16)
    scores = np.zeros((len(keep), k), np.float32)
    for i, box in enumerate(keep):
        mean = np.zeros(classes)
        for run_at, vote_at in fused.members[box]:
            run, row, which = tops[run_at]
            at = which[vote_at]
            to = run.to_fused[row.detections.topk_ids[at].astype(np.int64)]
            np.add.at(mean, to[to >= 0], row.detections.topk_scores[at][to >= 0])
        mean /= len(fused.members[box])
        order = np.argsort(-mean, kind="stable")[:k]
        ids[i], scores[i] = order, np.clip(mean[order], 0, 1)
    return ids, scores
