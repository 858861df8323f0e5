"""verify, shard by shard: every annotation object, and with a source every image in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from pipelines.runs.verification import Verification
from pipelines.runs.verify_source import SourceCheck, check_against_source
from storage.errors import ObjectChanged, ObjectNotFound
from storage.objects.prefetch import in_order
from storage.records import STATUSES, Shard, StoredObject, printable, shard_id_of
from storage.runs.annotation_check import ObjectCheck, check_footer, check_object
from storage.runs.listing import Listing
from storage.runs.manifest import QUARANTINE, Manifest, annotation_key
from storage.shards.frames import frames_labelled
from storage.shards.reading import SupportsShards

_AHEAD_BYTES = 256 << 20
_FOOTER_NBYTES = 64 << 10

Counts = tuple[int, ...]  # rows by STATUSES, then boxes


@dataclass(slots=True)
class ShardCheck:
    """The shards of one verification."""

    manifest: Manifest
    listing: Listing
    annotated: dict[str, StoredObject]  # by key; those of live shards are taken out
    quarantined: set[str]
    ledger: dict[str, Counts]
    result: Verification
    _tombstoned: dict[str, set[str]] = field(default_factory=dict)

    def shards(
        self,
        source: SupportsShards | None,
        readers: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Check every live shard, in listing order."""
        self._tombstoned = self.listing.dropped()
        checked = in_order(
            self._committed(),
            lambda shard: (shard, self._look(shard, source)),
            self._nbytes,
            readers=readers,
            ahead_bytes=_AHEAD_BYTES,
        )
        with closing(checked):
            for shard, (found, compared) in checked:
                self._note(shard, found, compared)
                progress(self.result.committed, self.result.listed)

    def _nbytes(self, shard: Shard) -> int:
        nbytes = self.annotated[annotation_key(shard.shard_id)].nbytes
        return min(nbytes, _FOOTER_NBYTES) if self.result.quick else nbytes

    def _committed(self) -> Iterator[Shard]:
        """Live shards that have an object; the others are counted as they come by."""
        for shard in self.listing.live_shards():
            if not self.listing.moved and shard_id_of(shard.objects) != shard.shard_id:
                self.result.differs("source/", shard.shard_id, "its id is not that of its objects")
            if annotation_key(shard.shard_id) in self.annotated:
                yield shard
            else:
                self._uncommitted(shard)

    def _uncommitted(self, shard: Shard) -> None:
        key, result = annotation_key(shard.shard_id), self.result
        # What gc removed while the shard was not live is labelled again when it comes back.
        lost = shard.shard_id in self.ledger and not self.listing.returned(shard.shard_id)
        lost = lost and not _only_missing(self.ledger[shard.shard_id])
        if lost:
            result.differs(key, shard.shard_id, "the ledger saw it labelled; it is gone")
        if shard.shard_id in self.quarantined:
            result.quarantined += 1
        else:
            result.left += 1
        if result.complete and not lost:
            state = "quarantined" if shard.shard_id in self.quarantined else "not labelled yet"
            result.differs(key, shard.shard_id, f"{state}: {printable(shard.key)}")

    def _look(
        self, shard: Shard, source: SupportsShards | None
    ) -> tuple[ObjectCheck | None, SourceCheck]:
        """In one of the readers' threads. None: the object is gone."""
        store, run = self.manifest.store, self.manifest.record.identity
        key = annotation_key(shard.shard_id)
        nothing = SourceCheck()
        try:
            if self.result.quick:
                return check_footer(store, self.annotated[key], shard, run), nothing
            raw = store.get(key)
        except (ObjectNotFound, ObjectChanged):
            return None, nothing
        inference = self.manifest.record.inference
        found = check_object(raw, key, shard, run, framed=bool(frames_labelled(inference)))
        if source is None or not found.readable:
            return found, nothing
        dropped = self._tombstoned.get(shard.shard_id, set())
        return found, check_against_source(raw, key, shard, source, dropped, inference)

    def _note(self, shard: Shard, found: ObjectCheck | None, compared: SourceCheck) -> None:
        key, result = annotation_key(shard.shard_id), self.result
        result.nbytes += self.annotated.pop(key).nbytes
        result.committed += 1
        if found is None:
            result.differs(key, shard.shard_id, "it changed or vanished while it was verified")
            return
        result.images += found.images
        result.detections += found.detections
        result.unsealed += not found.sealed
        result.tars_reread += compared.is_tar_reread
        result.images_rehashed += compared.hashed
        result.images_changed += compared.changed
        for problem in (*found.problems, *compared.problems):
            result.differs(key, shard.shard_id, problem)
        if found.footer is not None and found.footer.source_truncated:
            result.remarks.append(printable(f"{shard.key}: {found.footer.source_truncated}"))
        said = self.ledger.get(shard.shard_id)
        if found.readable and said is not None and said != found.totals():
            result.differs(key, shard.shard_id, "the ledger counted other rows or boxes")
        if shard.shard_id in self.quarantined:
            result.remarks.append(
                f"{QUARANTINE}{shard.shard_id}.json: the shard is labelled; the next run, or gc, "
                "removes the record"
            )

    def orphans(self) -> Iterator[tuple[str, int, str, bool]]:
        """(key, bytes, why, whether it is a difference) of what belongs to no live shard."""
        if not self.annotated:
            return
        ever = {annotation_key(shard_id) for shard_id in self.listing.all_ids()}
        for key, found in self.annotated.items():
            if key in ever:
                why = "its shard is no longer live; `labelfleet gc` removes it"
                yield key, found.nbytes, why, False
            elif key.endswith(".parquet"):
                why = "no listing has its shard, but readers of annotations/*.parquet read it"
                yield key, found.nbytes, why, True
            else:
                yield key, found.nbytes, "not one of labelfleet's", False


def _only_missing(counts: Counts) -> bool:
    """Return whether a shard had no labels: its commit goes when its images can be read again."""
    return sum(counts[: len(STATUSES)]) == counts[STATUSES.index("missing")]
