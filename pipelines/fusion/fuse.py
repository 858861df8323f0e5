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
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.fusion.boxes import FusedBoxes, fuse_boxes
from pipelines.fusion.inputs import FusionInput
from pipelines.fusion.listing_copy import copy_listing, refuse_old_place
from pipelines.fusion.record import FuseOptions, check_runs, fused_record, inputs_of
from storage.errors import ConfigError
from storage.objects.preflight import check_output
from storage.objects.protocols import ObjectStore
from storage.records import AnnotationRow, Detections, Shard
from storage.runs.annotations import RowWriter, ShardFooter, read_rows
from storage.runs.ledger import LedgerEntry, LedgerWriter, new_invocation
from storage.runs.listing import Listing
from storage.runs.lock import run_lock
from storage.runs.manifest import (
    RUN_KEY,
    Manifest,
    RunRecord,
    annotation_key,
)
from storage.runs.rows_by_sha import RowsBySha

_TOPK = 5


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
    check_runs(runs, output, options)
    inputs = inputs_of(runs, options)
    record = fused_record(inputs, options)
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
