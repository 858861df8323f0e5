"""Detect the end of a tar: distinguish zero blocks written by a tar program from damage.

An archive ends with two zero blocks and is padded to a record (IEEE Std 1003.1, "ustar Interchange
Format"): 20 blocks unless told otherwise. A disk or a transfer that failed leaves zeros too, a
block or a page of them, in the middle of an archive. The length of a run and the place where it
ends tell the two apart; in doubt it is damage, since an alarm costs less than lost images.
"""

from __future__ import annotations

from storage.shards.tar_header import BLOCK

_PAGE = 4096
_GNU_RECORD = 20 * BLOCK
_RECORDS = (10 * BLOCK, _GNU_RECORD)  # pax and GNU tar, by default
_LARGE_RECORDS = tuple(BLOCK << power for power in range(5, 16))  # tar -b 32 to -b 32768
_LONGEST = 41  # zero blocks: an end, its padding, and another record of padding


def ends_here(zeros: int, nbytes: int) -> bool:
    """Return whether a run of ``zeros`` zero blocks that ends the file is an end that a program
    wrote.

    Args:
        nbytes: of the archive, its zeros included.
    """
    if zeros <= 2:
        return zeros > 0
    if 10 < zeros <= _LONGEST:  # more zeros than necessary may have been appended
        return any(_fills(zeros - extra, nbytes - extra * BLOCK, _RECORDS) for extra in range(20))
    return _fills(zeros, nbytes, _RECORDS + _LARGE_RECORDS)


def may_be_followed(zeros: int, nbytes: int, position: int) -> bool:
    """Return whether something other than zeros may follow a run of zero blocks, such as another
    archive.

    That is so behind a record that is filled up, as GNU tar, bsdtar and Python write it. Archives
    that end with two blocks alone and were joined are read in full, but called damaged: zeros of
    that length may have been members.

    Args:
        nbytes: of the archive so far, its zeros included.
        position: in the file; a zeroed page ends at a multiple of its size.
    """
    if position % _PAGE == 0 and zeros <= _PAGE // BLOCK:
        return False
    return _fills(zeros, nbytes, (_GNU_RECORD,))


def _fills(zeros: int, nbytes: int, records: tuple[int, ...]) -> bool:
    """Return whether these zeros are an end marker and what it takes to fill a record of such a
    size."""
    return any(nbytes % size == 0 and 2 <= zeros <= size // BLOCK + 1 for size in records)
