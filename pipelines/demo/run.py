"""The whole job on generated input: pages → shards → labels on Ray → mAP → report.

Everything lies below one folder, and the config it writes there works with ``labelfleet run``. A
second demo in the same folder continues the first: what is there is not made again.
"""

from __future__ import annotations

import re
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.config.run_config import load_config
from pipelines.demo.digits import Pages, make_pages
from pipelines.dispatch.tally import Caller
from pipelines.display.console import unbroken
from pipelines.evaluation.evaluate import evaluate_run
from pipelines.evaluation.result import Evaluation
from pipelines.ingest.ingest import ingest
from pipelines.labelling.run import label_run
from pipelines.labelling.summary import RunSummary
from pipelines.labelling.view import run_table
from pipelines.report.page import write_report
from storage.runs.manifest import Manifest

IMAGES = 300
IMAGES_PER_SHARD = 48  # 300 images: seven shards
CHECKPOINT = "digits_nano.safetensors"


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """The result of the demo.

    Attributes:
        run: the labelling run's summary.
        map_, map50, map75: on all readable pages; ``plain_map50`` and ``hard_map50`` apart.
        config, pages, source, truth, output, report: where things are.
        total_seconds: of everything, not of the labelling alone.
    """

    run: RunSummary
    map_: float | None
    map50: float | None
    map75: float | None
    plain_map50: float | None
    hard_map50: float | None
    config: str
    pages: str
    source: str
    truth: str
    output: str
    report: str
    total_seconds: float

    def to_fields(self) -> dict[str, Any]:
        """Return the run's fields, with the demo's own beside them: mAP, plain_mAP50, …"""
        own = {re.sub(r"map_?", "mAP", k): v for k, v in asdict(self).items() if k != "run"}
        return {**own, **self.run.to_fields()}


def run_demo(dest: Path, *, images: int = IMAGES, caller: Caller | None = None) -> DemoSummary:
    """Run the demo below ``dest``, or continue one.

    Args:
        dest: a folder for everything it makes.
        images: how many pages to draw.
        caller: follows the run, gets a note for each step, and may stop it.

    Raises:
        LabelfleetError: as ingest, label_run, evaluate_run and write_report do.
    """
    began_s, caller = time.monotonic(), caller or Caller()
    note = caller.watcher.note
    note(f"drawing {images} pages of handwritten digits, a few of them broken on purpose")
    pages = make_pages(dest / "pages", images=images)
    note("packing them into tar shards")
    ingest(str(pages.images), str(dest / "shards"), images_per_shard=IMAGES_PER_SHARD)
    config = _write_config(dest)
    note(f"labelling on Ray, as {config} says")
    run = label_run(load_config(str(config)), caller=caller)
    manifest = Manifest.open(run.output)
    note("comparing with the ground truth, and writing the report")
    whole = evaluate_run(manifest, pages.truth)
    parts = [evaluate_run(manifest, truth) for truth in (pages.truth_plain, pages.truth_hard)]
    write_report(manifest, evaluation=whole)
    return _summary(dest, pages, run, whole, parts, time.monotonic() - began_s)


def checkpoint_path() -> Path:
    """Return the path of the compact YOLO-NAS that ships with labelfleet; see its MODEL_CARD.md."""
    return Path(__file__).resolve().parents[1] / "assets" / CHECKPOINT


def _write_config(dest: Path) -> Path:
    config = {
        "name": "demo",
        "source": {"url": str(dest / "shards")},
        "output": str(dest / "run"),
        "model": {"checkpoint": str(checkpoint_path()), "licence": "Apache-2.0"},
    }
    path = dest / "demo.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def _summary(
    dest: Path,
    pages: Pages,
    run: RunSummary,
    whole: Evaluation,
    parts: list[Evaluation],
    seconds: float,
) -> DemoSummary:
    plain, hard = parts
    return DemoSummary(
        run=run,
        map_=whole.map_,
        map50=whole.map50,
        map75=whole.map75,
        plain_map50=plain.map50,
        hard_map50=hard.map50,
        config=str(dest / "demo.yaml"),
        pages=str(pages.images),
        source=str(dest / "shards"),
        truth=str(pages.truth),
        output=str(dest / "run"),
        report=str(dest / "run" / "report" / "index.html"),
        total_seconds=round(seconds, 1),
    )


def demo_text(summary: DemoSummary) -> RenderableType:
    """Render the run's table, its mAP, where everything lies, and what to try next."""
    quality = Table("pages", "mAP", "mAP50", box=None)
    quality.add_row("all", _figure(summary.map_), _figure(summary.map50), style="bold")
    quality.add_row("plain", "", _figure(summary.plain_map50))
    quality.add_row("hard, unlike the training", "", _figure(summary.hard_map50))
    places = Table(show_header=False, box=None)
    for name in ("report", "config", "pages", "truth", "source"):
        places.add_row(name, Text(getattr(summary, name), overflow="fold"))
    places.add_row("annotations", Text(f"{summary.output}/annotations/*.parquet"))
    return Group(run_table(summary.run), Text(), quality, Text(), places, Text(), _next(summary))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _next(summary: DemoSummary) -> Text:
    run = shlex.join(["labelfleet", "run", summary.config])
    evaluate = shlex.join(["labelfleet", "evaluate", summary.output, "--truth", summary.truth])
    lines = (
        f"Done in {summary.total_seconds:.0f} s. What to try next:",
        "  open the report above in a browser",
        f"  {run}        # again: nothing is left to do",
        f"  {shlex.join(['labelfleet', 'status', summary.output])}",
        f"  {evaluate}",
        "  copy the config, point source.url at a folder of your own images and",
        "  model.checkpoint at your own YOLO-NAS weights",
    )
    return unbroken("\n".join(lines))
