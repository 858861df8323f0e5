"""The listing of a fused run: that of its first run, also after the source was moved."""

from __future__ import annotations

import shlex
import tempfile
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

from storage.errors import AlreadyExists, RunMismatch
from storage.objects.protocols import ObjectStore
from storage.runs.generations import (
    OPS,
    Generations,
    GenerationWriter,
    move_key,
    moves_of,
)
from storage.runs.listing import Listing
from storage.urls import shown_url


def copy_listing(source: ObjectStore, output: ObjectStore, place: str) -> None:
    """Give a run the listing of another, generation by generation; what is there stays.

    Args:
        source: of the run that has the listing.
        output: of the run that gets it. Each may have been relocated on its own.
        place: URL of the images, for messages.

    Raises:
        RunMismatch: the output has another listing, such as that of the place where the images
            were before.
    """
    theirs, ours = Listing(source).generations(), Listing(output).generations()
    if len(ours) > len(theirs):
        raise _another(source, output, place)
    for their_key, our_key in zip(theirs, ours, strict=False):
        if not _is_same(source, their_key, output, our_key):
            raise _another(source, output, place)
    moves, ours_moved = moves_of(source), moves_of(output)
    if not ours or moves == ours_moved:
        _copy_as_it_is(source, output, len(ours))
        if moves > ours_moved:  # last: generations of a move count from here on
            with suppress(AlreadyExists):
                output.create(move_key(moves), source.get(move_key(moves)))
    else:
        _rewrite(source, theirs, output, len(ours), ours_moved)
    if len(Listing(output).generations()) != len(theirs):
        raise _another(source, output, place)


def _copy_as_it_is(source: ObjectStore, output: ObjectStore, begin: int) -> None:
    read = Generations(source, source.url)
    for key in Listing(source).generations()[begin:]:
        for part in read.parts(key):
            body = source.get(part)
            try:
                output.create(part, body)
            except AlreadyExists:  # of a copy that was interrupted
                if output.get(part) != body:
                    output.put(part, body)


def _rewrite(
    source: ObjectStore, keys: list[str], output: ObjectStore, begin: int, moves: int
) -> None:
    """Write the generations from ``begin`` on under the names that count at the output."""
    read = Generations(source, source.url)
    with tempfile.TemporaryDirectory(prefix="labelfleet-") as folder:
        for number in range(begin, len(keys)):
            writer = GenerationWriter(output, number, Path(folder), moves=moves)
            for op in OPS:
                for shard in read.shards(keys[number], op):
                    writer.write(op, shard.shard_id, shard.kind, shard.objects)
            writer.commit()


def _is_same(source: ObjectStore, their_key: str, output: ObjectStore, our_key: str) -> bool:
    """Whether two generations say the same, in whatever parts they were written."""
    if source.get(their_key) == output.get(our_key):
        return True
    theirs, ours = Generations(source, source.url), Generations(output, output.url)
    return all(
        one == other
        for op in OPS
        for one, other in zip_longest(theirs.shards(their_key, op), ours.shards(our_key, op))
    )


def _another(source: ObjectStore, output: ObjectStore, place: str) -> RunMismatch:
    if moves_of(source) or moves_of(output):
        return RunMismatch(
            f"the listing of {output.url} is not that of {source.url}, whose source was moved",
            hint="relocate the fused run first: "
            + shlex.join(["labelfleet", "relocate", shown_url(output.url), shown_url(place)]),
        )
    return RunMismatch(
        f"the listing of {output.url} is not that of {source.url}",
        hint="give the same first run, or choose another --out",
    )


def refuse_old_place(source: ObjectStore, output_source: str, output: ObjectStore, at: str) -> None:
    """Raise RunMismatch where the first run's source was moved and the fused run's was not."""
    if output_source != at and moves_of(source):
        raise _another(source, output, at)
