"""JPEGs decoded an image a second: nvJPEG through torchvision beside simplejpeg on the CPU cores.

    python -m benchmarks.jpeg_decoders [--photos FOLDER] [--images 512] [--batch 32]

simplejpeg (libjpeg-turbo) is what a worker uses, here with one thread and with one for each core;
its pixels end in host memory. torchvision's ``decode_jpeg(…, device="cuda")`` takes batches of
--batch, and its pixels end on the card, where a letterbox would have to follow. Their mean
difference is told in grey levels: `predict()`'s pixels are libjpeg-turbo's. Where torchvision
has no nvJPEG, only the CPU is measured, and the facts say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import simplejpeg

from benchmarks.photos import photo_bytes
from benchmarks.rounds import Report, Rounds, images_per_s, parser, plain, say
from benchmarks.worker import CORES

Work = Callable[[], object]


def on_cpu(photos: Sequence[bytes], threads: int) -> Work:
    """Return a function that decodes all photos in a number of threads."""

    def work() -> None:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(simplejpeg.decode_jpeg, photos):
                pass

    return work


def on_card(photos: Sequence[bytes], batch: int) -> Work:
    """Return a decoding of all photos by nvJPEG.

    Raises:
        RuntimeError, ImportError: this torchvision cannot.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = [torch.from_numpy(np.frombuffer(photo, np.uint8).copy()) for photo in photos]

    def work() -> object:
        found = None
        for at in range(0, len(encoded), batch):
            found = decode_jpeg(encoded[at : at + batch], mode=ImageReadMode.RGB, device="cuda")
        torch.cuda.synchronize()
        return found

    first = decode_jpeg(encoded[:1], mode=ImageReadMode.RGB, device="cuda")
    apart = np.abs(
        first[0].permute(1, 2, 0).cpu().numpy().astype(int)
        - simplejpeg.decode_jpeg(photos[0]).astype(int)
    )
    say(f"nvJPEG's pixels differ by {apart.mean():.3f} levels on average, {apart.max()} at most")
    return work


def main() -> None:
    made = parser(__doc__, images=512, rounds=3)
    made.add_argument("--batch", type=int, default=32)
    options = made.parse_args()
    photos = photo_bytes(options.photos, options.images)
    threads = sorted({1, CORES})
    sides: dict[str, Work] = {f"simplejpeg, {n} threads": on_cpu(photos, n) for n in threads}
    report = Report("jpeg_decoders", "images/s", plain(options))
    if options.device == "cuda":
        try:
            sides["nvJPEG"] = on_card(photos, options.batch)
        except (ImportError, RuntimeError) as exc:
            report.facts["no nvJPEG"] = f"{exc!s:.200}"
            say(f"this torchvision has no nvJPEG: {exc!s:.200}")
    rounds = Rounds()
    for side in sides.values():
        side()  # warm
    rounds.run(
        {name: lambda w=work: images_per_s(len(photos), w) for name, work in sides.items()},  # type: ignore[misc]
        options.rounds,
    )
    report.values = rounds.values
    if "nvJPEG" in sides:
        cpu = f"simplejpeg, {threads[-1]} threads"
        report.add(f"nvJPEG ÷ {cpu}", rounds.per_round(lambda row: row["nvJPEG"] / row[cpu]))
    report.write(options.out)


if __name__ == "__main__":
    main()
