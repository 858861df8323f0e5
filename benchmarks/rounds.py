"""What every benchmark shares: interleaved rounds, medians of ratios, a JSON file and a plot."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_FLAGS = ("amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx512f", "avx2")
_PACKAGES = ("torch", "onnxruntime", "openvino", "super-gradients", "ray", "simplejpeg", "numpy")


@dataclass(slots=True)
class Rounds:
    """What the sides measured, round by round. One drift hits all: sides run in turn.

    Attributes:
        values: by side, what it returned.
        cpu_s: by side, CPU seconds that this process spent on it, which other work on the
            machine changes little.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)

    def run(self, sides: Mapping[str, Callable[[], float]], rounds: int) -> None:
        """Every side once a round; in every other round in the opposite order."""
        for number in range(rounds):
            names = list(sides) if number % 2 == 0 else list(sides)[::-1]
            for name in names:
                before_s = time.process_time()
                value = sides[name]()
                cpu_s = time.process_time() - before_s
                self.values.setdefault(name, []).append(value)
                self.cpu_s.setdefault(name, []).append(cpu_s)
                say(f"  round {number + 1}: {name} {value:.4g} ({cpu_s:.1f} s of CPU)")

    def median(self, name: str) -> float:
        """Return the median over rounds."""
        return statistics.median(self.values[name])

    def per_round(
        self, ratio: Callable[[Mapping[str, float]], float], *, cpu: bool = False
    ) -> Ratio:
        """Return a figure made of the sides' values (or CPU seconds) in one round, for every
        round."""
        source = self.cpu_s if cpu else self.values
        count = min(map(len, source.values()))
        rows = [{name: values[i] for name, values in source.items()} for i in range(count)]
        found = sorted(ratio(row) for row in rows)
        return Ratio(statistics.median(found), found[0], found[-1])


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median, lowest and highest over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(slots=True)
class Report:
    """What a benchmark found: printed as it comes, written at the end.

    Attributes:
        ratios: what it is for; ``wanted`` by name where there is a target.
        values: every measurement by side, with its unit in ``unit``.
    """

    name: str
    unit: str
    options: dict[str, Any]
    ratios: dict[str, Ratio] = field(default_factory=dict)
    wanted: dict[str, float] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, ratio: Ratio, *, at_least: float | None = None) -> None:
        """A ratio, and what it is to be."""
        self.ratios[name] = ratio
        if at_least is not None:
            self.wanted[name] = at_least
        aim = "" if at_least is None else f"   (wanted: at least {at_least:g})"
        say(f"{name:58s} {ratio}{aim}")

    def write(self, folder: Path) -> None:
        """``<folder>/<name>.json`` and, where there are ratios and matplotlib, ``<name>.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        found = {
            "benchmark": self.name,
            "machine": machine(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "options": self.options,
            "unit": self.unit,
            "ratios": {
                name: {"median": r.median, "low": r.low, "high": r.high,
                       **({"wanted": self.wanted[name]} if name in self.wanted else {})}
                for name, r in self.ratios.items()
            },
            "values": self.values,
            "facts": self.facts,
        }  # fmt: skip
        path.write_text(json.dumps(found, indent=1, default=str) + "\n")
        say(f"{machine()}; {path}")
        if self.ratios:
            with suppress(ImportError):
                _plot(self, path.with_suffix(".png"))


def _plot(report: Report, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(report.ratios)[::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.42 * len(names)), layout="constrained")
    for at, name in enumerate(names):
        ratio = report.ratios[name]
        axes.barh(at, ratio.median, color="#4c78a8", height=0.6)
        axes.plot([ratio.low, ratio.high], [at, at], color="#222222", linewidth=1.5)
        if name in report.wanted:
            axes.plot([report.wanted[name]] * 2, [at - 0.4, at + 0.4], color="#d62728", linewidth=2)
        axes.text(ratio.high, at, f"  {ratio.median:.3g}", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_xlim(
        min(0.0, *(r.low for r in report.ratios.values())),
        1.15 * max(0.01, *(r.high for r in report.ratios.values()), *report.wanted.values()),
    )
    title = f"{report.name}: medians and ranges; red: wanted"
    figure.suptitle(f"{title}\n{machine()}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def machine() -> str:
    """Return the machine in words: cores, what they can, GPU, memory."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        flags = set(re.findall(r"\w+", text.split("flags", 1)[-1].split("\n", 1)[0]))
        able = next((flag for flag in _FLAGS if flag in flags), "no AVX2")
        model = re.search(r"model name\s*:\s*(.*)", text)
        cpu = model[1].strip() if model else platform.machine()
        vnni = "VNNI" if {"avx512_vnni", "avx_vnni"} & flags else "no VNNI"
        return f"{cores} CPU cores ({cpu}, {able.upper()}, {vnni}), {_gpu()}"
    return f"{cores} CPU cores ({platform.machine()}), {_gpu()}"


def _gpu() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "no GPU"
    return str(torch.cuda.get_device_name(0))


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def images_per_s(images: int, work: Callable[[], object]) -> float:
    """Return how fast ``work`` does that many."""
    began_s = time.perf_counter()
    work()
    return images / (time.perf_counter() - began_s)


def parser(doc: str | None, *, images: int, rounds: int) -> argparse.ArgumentParser:
    """Return the options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--photos", type=Path, help="folder of JPEGs; default: 640×480 made up")
    made.add_argument("--images", type=int, default=images, help=f"per run; default {images}")
    made.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    made.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="for JSON and plot")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return made


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """Options for the JSON file, without local folders."""
    return {key: value for key, value in vars(options).items() if not isinstance(value, Path)}


def say(line: str) -> None:
    """Answer the waiting side."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def chosen(names: Sequence[str], text: str | None) -> list[str]:
    """Return a comma-separated choice of ``names``; None: all."""
    wanted = list(names) if text is None else [part.strip() for part in text.split(",")]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(names)}")
    return wanted
