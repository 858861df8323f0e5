"""The demo's input: a folder of pages with handwritten digits, and their ground truth.

``python -m pipelines.demo.digits DEST --split train --images 2000`` writes ``DEST/images/`` and
``DEST/truth.json`` (COCO, upright pixels); the same arguments give the same bytes. ``hard`` pages
also get a truth file of their own, so that both kinds can be measured apart.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.demo.handwriting import (
    CLASSES,
    SPLITS,
    Page,
    Samples,
    Split,
    draw_page,
    load_samples,
)
from pipelines.demo.oddities import BROKEN, ODD, Encoder, jpeg, png
from storage.errors import ConfigError

HARD_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Pages:
    """What ``make_pages`` wrote.

    Attributes:
        images: folder of the image files.
        truth: COCO JSON of every readable page; ``truth_plain`` and ``truth_hard`` split it.
        files: image files written, broken ones included.
        broken: names of the files no decoder can read.
        odd: names of the files that are readable in an unusual way.
        objects: digits in ``truth``.
    """

    images: Path
    truth: Path
    truth_plain: Path
    truth_hard: Path
    files: int
    broken: tuple[str, ...]
    odd: tuple[str, ...]
    objects: int


@dataclass(frozen=True, slots=True)
class _Sheet:
    """One file of the folder: its name, encoding and content."""

    name: str
    kind: str
    hard: bool
    page: Page


def make_pages(
    dest: Path,
    *,
    images: int = 300,
    seed: int = 0,
    split: Split = "unseen",
    hard_share: float = HARD_SHARE,
    broken: bool = True,
) -> Pages:
    """Write ``images`` files under ``dest``, deterministically for the same arguments.

    Args:
        dest: created if needed; ``images/`` below it is empty or holds these very pages, which are
            then not written again.
        split: whose handwriting is drawn; no sample is in two splits.
        hard_share: share of pages that look unlike ordinary ones.
        broken: whether to mix in the odd and the unreadable files of ``pipelines.demo.oddities``.

    Raises:
        ConfigError: ``images/`` holds other files.
    """
    folder = dest / "images"
    folder.mkdir(parents=True, exist_ok=True)
    samples = load_samples(split)
    kinds = _kinds(images, seed) if broken else {}
    sheets: list[_Sheet] = []
    for number in range(images):
        sheet, encoded = _sheet(number, samples, seed, split, hard_share, kinds.get(number))
        _write_once(folder / sheet.name, encoded)
        sheets.append(sheet)
    foreign = {path.name for path in folder.iterdir()} - {sheet.name for sheet in sheets}
    if foreign:
        raise ConfigError(
            f"{folder} also holds {len(foreign)} files that are none of these pages, such as "
            f"{min(foreign)}",
            hint="choose an empty folder",
        )
    return _write_truth(dest, sheets)


def _write_once(path: Path, encoded: bytes) -> None:
    # A rewritten file has a new modification time, and would be taken for a changed image.
    if not path.exists() or path.read_bytes() != encoded:
        path.write_bytes(encoded)


def _kinds(images: int, seed: int) -> dict[int, str]:
    """Choose the page numbers that become odd or broken files, spread over the folder."""
    names = [*ODD, *BROKEN]
    rng = np.random.default_rng([seed, 1])
    chosen = rng.choice(images, size=min(len(names), images), replace=False)
    return dict(zip((int(n) for n in chosen), names, strict=False))


def _sheet(
    number: int, samples: Samples, seed: int, split: Split, hard_share: float, kind: str | None
) -> tuple[_Sheet, bytes]:
    # Seeded per page, so that page 7 is the same page in a folder of 10 and of 10,000.
    rng = np.random.default_rng([seed, 0, list(SPLITS).index(split), number])
    hard = bool(rng.random() < hard_share)
    page = draw_page(samples, rng, hard=hard)
    ending, encode = _encoding(kind, rng)
    name = f"page_{number:05d}" + (f"_{kind}" if kind else "") + ending
    return _Sheet(name, kind or "plain", hard, page), encode(page.pixels)


def _encoding(kind: str | None, rng: np.random.Generator) -> tuple[str, Encoder]:
    if kind is not None:
        return (ODD | BROKEN)[kind]
    quality = int(rng.integers(55, 96))
    if rng.random() < 0.1:
        return ".png", png

    def encode(pixels: NDArray[np.uint8]) -> bytes:
        return jpeg(pixels, quality)

    return ".jpg", encode


def _write_truth(dest: Path, sheets: Sequence[_Sheet]) -> Pages:
    readable = [s for s in sheets if s.kind not in BROKEN]
    paths = {part: dest / f"truth{part}.json" for part in ("", "_plain", "_hard")}
    paths[""].write_text(json.dumps(_coco(readable)))
    paths["_plain"].write_text(json.dumps(_coco([s for s in readable if not s.hard])))
    paths["_hard"].write_text(json.dumps(_coco([s for s in readable if s.hard])))
    return Pages(
        images=dest / "images",
        truth=paths[""],
        truth_plain=paths["_plain"],
        truth_hard=paths["_hard"],
        files=len(sheets),
        broken=tuple(s.name for s in sheets if s.kind in BROKEN),
        odd=tuple(s.name for s in sheets if s.kind in ODD),
        objects=sum(len(s.page.labels) for s in readable),
    )


def _coco(sheets: Sequence[_Sheet]) -> dict[str, object]:
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for sheet in sheets:
        height, width = sheet.page.pixels.shape[:2]
        image_id = len(images) + 1
        images.append(
            {"id": image_id, "file_name": sheet.name, "width": width, "height": height,
             "hard": sheet.hard, "kind": sheet.kind}
        )  # fmt: skip
        for (x1, y1, x2, y2), label in zip(
            sheet.page.boxes.tolist(), sheet.page.labels.tolist(), strict=True
        ):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": label,
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            )  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: make one split's pages."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo.digits", description=__doc__)
    parser.add_argument("dest", type=Path)
    parser.add_argument("--split", choices=tuple(SPLITS), default="unseen")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hard-share", type=float, default=HARD_SHARE)
    parser.add_argument("--broken", action="store_true", help="mix in odd and unreadable files")
    args = parser.parse_args(arguments)
    pages = make_pages(
        args.dest, images=args.images, seed=args.seed, split=args.split,
        hard_share=args.hard_share, broken=args.broken,
    )  # fmt: skip
    print(f"{pages.files} pages with {pages.objects} digits in {pages.images}")


if __name__ == "__main__":
    main()
