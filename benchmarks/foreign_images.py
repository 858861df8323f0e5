"""Compare labelfleet's decoder with two independent ones on a folder of foreign image files.

    python -m benchmarks.foreign_images FOLDER [--json OUT.jsonl] [--tars]

Every file below FOLDER is read and decoded as a worker would (with ``--tars`` from a tar a folder
that is packed first), and by OpenCV and libvips (tifffile with
imagecodecs in place of libvips for TIFFs, which labelfleet gives to libvips itself). A file is
suspicious where its row would be ``ok`` without a warning although

* another decoder that knows the format refuses it, and the other one does not agree with us, or
* the pixels differ from those of every other decoder that reads it by more than 3 grey levels in
  the mean.

It is refused needlessly where its row would not be ``ok`` although both others read it and agree.
The pixels of all decoders are compared as upright 8-bit RGB with alpha dropped, colour profiles
ignored, opaque pixels only. The last lines count every file once. Needs the ``dev`` extra.

Known reasons for what it lists: an orientation that only XMP or a text chunk states, which the
others ignore; 5 bits scaled to 8 (255 here, 248 in OpenCV); and what OpenCV reads differently: BMPs
with bit masks, top-down RLE or a gap before the pixels, palettes of JPEG 2000, ASCII PNM with a
maximum other than 255. Of these, two BMPs and one palette were viewed; for the rest, the file's
header says which reading is right.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from storage.errors import ImageError
from storage.records import warning_kinds
from storage.shards.reading import read_shard
from storage.shards.selecting import tar_shards
from storage.stores.memory import MemoryStore
from workers.images.decode import decode
from workers.images.pixels import upright, vips_samples
from workers.images.signatures import format_of
from workers.images.tiff.directories import read_pages

MAX_PIXELS = 178_956_970
_ABOUT_PIXELS = {"premature end", "corrupt data", "narrow range", "ignored bands"}
OFF = 3.0  # grey levels, mean over the image
Pixels = NDArray[np.uint8]


def by_opencv(data: bytes) -> Pixels:
    """Upright RGB by OpenCV."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise ValueError("OpenCV refuses it")
    return np.ascontiguousarray(pixels[..., ::-1])


def by_vips(data: bytes) -> Pixels:
    """Upright RGB by libvips, the first page."""
    import pyvips

    image = pyvips.Image.new_from_buffer(data, "", fail_on="error").autorot()
    return eight_bits(vips_samples(image), image.interpretation)


def by_tifffile(data: bytes) -> Pixels:
    """Upright RGB by tifffile and imagecodecs, the first page that is not reduced."""
    import tifffile

    pages = read_pages(data)
    if pages is None:
        raise ValueError("no image directory")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[pages.index]
        if isinstance(page, tifffile.TiffFrame):
            page = page.aspage()  # a frame leaves out the tags that it shares with its key page
        samples = page.asarray()
        if page.axes.startswith("S"):
            samples = np.moveaxis(samples, 0, -1)
        photometric = int(page.photometric)
        if photometric == 3:
            colormap = np.asarray(page.colormap)
            samples = np.moveaxis(colormap[:, samples], 0, -1)
            if samples.max() > 255:
                samples = (samples >> 8).astype(np.uint8)
        elif photometric in (0, 1, 2) and page.bitspersample < 8:
            samples = (samples.astype(np.uint32) * 255 // (2**page.bitspersample - 1)).astype("u1")
        if photometric == 0:
            samples = np.iinfo(samples.dtype).max - samples
        if photometric not in (0, 1, 2, 3, 5, 6):
            raise ValueError(f"photometric {photometric}")
    model = "cmyk" if photometric == 5 else "rgb"
    return upright(eight_bits(samples, model), pages.main.orientation)


def eight_bits(samples: NDArray[Any], model: str) -> Pixels:
    """Samples of any of the decoders as RGB."""
    if samples.ndim == 2:
        samples = samples[..., None]
    if samples.dtype == np.bool_:
        samples = samples.astype(np.uint8) * 255
    if samples.dtype == np.uint16:
        samples = (samples >> 8).astype(np.uint8)
    if samples.dtype != np.uint8 or model in ("lab", "labs"):
        raise ValueError(f"samples of {samples.dtype}, {model}")
    if model == "cmyk":
        samples = np.asarray(Image.fromarray(samples[..., :4], "CMYK").convert("RGB"))
    colour = samples[..., :3] if samples.shape[2] >= 3 else samples[..., :1]
    return np.ascontiguousarray(np.broadcast_to(colour, (*samples.shape[:2], 3)))


def attempt(read: Callable[[bytes], Pixels], data: bytes) -> Pixels | str:
    """Return the pixels, or why there are none."""
    try:
        return read(data)
    except Exception as exc:  # noqa: BLE001 - foreign decoders on foreign files
        return " ".join(f"{type(exc).__name__}: {exc}".split())[:120]


def opaque(data: bytes) -> NDArray[np.bool_] | None:
    """Return where the image is opaque, upright; None: all of it, or not known."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if not image.has_transparency_data:
                return None
            image.load()
            alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
            mask: NDArray[np.bool_] = np.asarray(alpha) == 255
            return mask
    except Exception:  # noqa: BLE001 - as above
        return None


def off(ours: Pixels, theirs: Pixels | str, mask: NDArray[np.bool_] | None = None) -> float | None:
    """Mean difference in grey levels; infinite for another size; None where there is none."""
    if isinstance(theirs, str):
        return None
    if ours.shape != theirs.shape:
        return float("inf")
    difference = np.abs(ours.astype(np.int16) - theirs)
    if mask is not None and mask.shape == difference.shape[:2]:
        difference = difference[mask]
    return float(difference.mean()) if difference.size else 0.0


def examine(data: bytes) -> dict[str, Any]:
    """One file: what its row would say, and what the others make of it."""
    kind = format_of(data)
    second = by_tifffile if kind == "TIFF" else by_vips
    others = {"opencv": attempt(by_opencv, data), second.__name__[3:]: attempt(second, data)}
    found: dict[str, Any] = {"format": kind, "status": "ok", "warning": None, "error": None}
    try:
        image = decode(data, max_pixels=MAX_PIXELS)
    except ImageError as exc:
        found |= {"status": exc.status, "error": exc.message}
        read = [o for o in others.values() if not isinstance(o, str)]
        agree = len(read) == 2 and (off(read[0], read[1]) or 0) <= OFF
        found["verdict"] = "refused needlessly" if agree else "refused"
    else:
        mask = opaque(data)
        differences = {name: off(image.pixels, o, mask) for name, o in others.items()}
        found |= {"warning": image.warning, "frames": image.frames, "off": differences}
        found["verdict"] = _verdict(image.warning, list(differences.values()))
    found["others"] = {n: o if isinstance(o, str) else list(o.shape) for n, o in others.items()}
    return found


def _verdict(warning: str | None, differences: list[float | None]) -> str:
    known = [d for d in differences if d is not None]
    if any(d <= OFF for d in known):
        return "agrees"
    if set(warning_kinds(warning)) & _ABOUT_PIXELS:
        return "warned"
    return "differs" if known else "read by no other"


def from_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every file below ``folder``."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        yield str(path.relative_to(folder)), path.read_bytes()


def from_tars(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the same, from one tar for each first-level folder, through the reader of a run."""
    for inner in sorted(p for p in folder.iterdir() if p.is_dir()):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, data in from_folder(inner):
                # Every file is to be read, so each has a name that an image may have.
                member = tarfile.TarInfo(f"{name}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        store = MemoryStore()
        store.put("x.tar", file.getvalue())
        (shard,) = tar_shards(store.list())
        for record in read_shard(store, shard, max_image_bytes=1 << 30):
            name = record.image_id.removeprefix("x.tar/").removesuffix(".jpg")
            yield f"{inner.name}/{name}", record.data or b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="write one line for each file")
    parser.add_argument("--tars", action="store_true", help="pack each folder as a tar first")
    arguments = parser.parse_args()
    lines, verdicts, statuses = [], Counter[str](), Counter[str]()
    by_format: dict[str, Counter[str]] = defaultdict(Counter)
    read = from_tars if arguments.tars else from_folder
    for name, data in read(arguments.folder):
        found = {"file": name, **examine(data)}
        lines.append(json.dumps(found))
        verdicts[found["verdict"]] += 1
        statuses[found["status"]] += 1
        kind = found["format"] or "no format that is labelled"
        by_format[kind].update(("files", found["status"], found["verdict"]))
        if found["verdict"] in ("differs", "read by no other", "refused needlessly"):
            detail = found.get("off") or found["error"]
            print(f"{found['verdict']}: {found['file']} ({found['format']}): {detail}")
    if arguments.json:
        arguments.json.write_text("\n".join(lines) + "\n")
    print("\n".join(table(by_format)))
    print(f"{len(lines)} files: {dict(statuses)}; {dict(verdicts)}")


COLUMNS = (
    "files", "ok", "unsupported", "undecodable", "too_large",
    "agrees", "warned", "differs", "read by no other", "refused needlessly",
)  # fmt: skip


def table(by_format: dict[str, Counter[str]]) -> Iterator[str]:
    """Yield the counts by format, as a Markdown table."""
    yield f"| format | {' | '.join(COLUMNS)} |"
    yield "|---" * (1 + len(COLUMNS)) + "|"
    for kind, counts in sorted(by_format.items(), key=lambda item: -item[1]["files"]):
        yield f"| {kind} | {' | '.join(str(counts[column]) for column in COLUMNS)} |"


if __name__ == "__main__":
    main()
