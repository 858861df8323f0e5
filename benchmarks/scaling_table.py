"""What a run of very many images asks of S3, of the driver and of a purse; every assumption named.

    python benchmarks/scaling_table.py [--images 1e9] [--gpus 500] [--images-per-s 300] …

Nothing here is measured: it is arithmetic over assumptions, which are options, and over what one
shard costs in requests by the code as it is. Prints the tables of docs/scaling.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields

GETS_A_PREFIX_S, PUTS_A_PREFIX_S = 5500, 3500  # S3's documented rates for one prefix
KEYS_A_PAGE = 1000
PREFIXES = 16  # a shard id's first hex digit


@dataclass(frozen=True)
class Assumed:
    """What is taken for granted.

    Attributes:
        images, gpus: of the run. ``images_per_s``: of one GPU, at its own pace.
        image_kb: mean size. ``shard_images``: in one tar, or in one group of loose images.
        row_kb: annotation bytes an image.
        page_s: seconds that S3 takes for one page of a listing.
        gpu_hour: price of one GPU with its share of the machine, US$.
        get_1000, put_1000: US$ for a thousand requests; LIST costs as PUT.
        gb_month: US$ for a GB in a month.
    """

    images: float = 1e9
    gpus: int = 500
    images_per_s: float = 300
    image_kb: float = 150
    shard_images: int = 1000
    row_kb: float = 4
    page_s: float = 0.1
    gpu_hour: float = 0.5
    get_1000: float = 0.0004
    put_1000: float = 0.005
    gb_month: float = 0.023

    @property
    def shards(self) -> float:
        """Units of work."""
        return self.images / self.shard_images

    @property
    def pace(self) -> float:
        """Images a second, all GPUs."""
        return self.gpus * self.images_per_s

    @property
    def hours(self) -> float:
        """From the first to the last image."""
        return self.images / self.pace / 3600


def rates(a: Assumed) -> Iterator[tuple[str, str, str, str]]:
    """(what, tars, loose images, limit): requests and bytes a second while all GPUs work."""
    shards_s = a.pace / a.shard_images
    gets = a.pace / GETS_A_PREFIX_S
    yield "images GET/s", f"{shards_s:,.0f}", f"{a.pace:,.0f}", f"{GETS_A_PREFIX_S:,} a prefix"
    yield "prefixes that takes", "1", f"{max(1, -(-gets // 1)):,.0f}", "S3 splits hot ones slowly"
    yield "commits PUT/s", f"{shards_s:,.0f}", f"{shards_s:,.0f}", f"{PUTS_A_PREFIX_S:,} a prefix"
    yield "ledger PUT/s", "0.2", "0.2", ""
    gbit = a.pace * a.image_kb * 8 / 1e6
    yield "read, Gbit/s", f"{gbit:,.0f}", f"{gbit:,.0f}", f"{gbit / a.gpus:.2f} a GPU"
    yield "driver, shards/s", f"{shards_s:,.0f}", f"{shards_s:,.0f}", "see the Dispatcher above"


def times(a: Assumed) -> Iterator[tuple[str, str, str]]:
    """(what, tars, loose images): what a run's start takes of the storage."""
    listing = [n / KEYS_A_PAGE * a.page_s for n in (a.shards, a.images)]
    tars, loose = map(_duration, listing)
    yield "listing the source, one page after the other", tars, loose
    committed = _duration(a.shards / KEYS_A_PAGE / PREFIXES * a.page_s)
    yield f"listing the commits, {PREFIXES} prefixes at once", committed, committed
    tars, loose = (f"{max(1, -(-n * 30 // (64 << 20))):,.0f}" for n in (a.shards, a.images))
    yield "frozen listing, objects of 64 MiB", tars, loose


def costs(a: Assumed) -> Iterator[tuple[str, str, str]]:
    """(what, tars, loose images) in US$."""
    gpu = a.gpus * a.hours * a.gpu_hour
    reads = [n * a.get_1000 / 1000 for n in (a.shards, a.images)]
    commits = a.shards * a.put_1000 / 1000
    lists = [(n + a.shards) / KEYS_A_PAGE * a.put_1000 / 1000 for n in (a.shards, a.images)]
    rows = a.images * a.row_kb / 1e6 * a.gb_month
    total = [gpu + r + commits + li + rows for r, li in zip(reads, lists, strict=True)]
    for what, (tars, loose) in {
        f"{a.gpus * a.hours:,.0f} GPU hours": (gpu, gpu),
        "reading, GET": reads,
        "commits, PUT": (commits, commits),
        "listings, LIST": lists,
        f"{a.images * a.row_kb / 1e9:,.1f} TB of rows, a month": (rows, rows),
        "together": total,
    }.items():
        yield what, _money(tars), _money(loose)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"


def _money(dollars: float) -> str:
    return f"{dollars:,.0f}" if dollars >= 10 else f"{dollars:,.2f}"


def markdown(a: Assumed) -> str:
    """Return the tables."""
    lines = [
        f"{a.images:,.0f} images on {a.gpus:,} GPUs at {a.images_per_s:g} images/s each: "
        f"{a.hours:,.1f} hours, {a.shards:,.0f} shards.",
        "",
        "| a second | tars | loose images | limit |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rates(a)),
        "",
        "| at the start | tars | loose images |",
        "|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in times(a)),
        "",
        "| US$ | tars | loose images |",
        "|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in costs(a)),
    ]
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in fields(Assumed):
        kind = float if field.type == "float" else int
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            help="%(default)s",
        )
    print(markdown(Assumed(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
