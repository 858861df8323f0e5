"""Label versions, shown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.display.tables import MOST_NAMED, summary_table
from pipelines.labels.diff import LabelDiff
from pipelines.truth.usable import SetAside
from storage.labels.versions import LabelVersion


def render_version(lineage: LabelVersion, set_aside: Sequence[SetAside] = ()) -> RenderableType:
    """Return what a label version holds, and the answers that it could not take."""
    rows = [(name.replace("_", " "), f"{count:,}") for name, count in lineage.counts.items()]
    rows += [("answers from", url) for url in lineage.answers]
    lines = [Text(f"policy {lineage.policy}")]
    if lineage.guarantee:
        lines.append(Text(lineage.guarantee))
    lines += [Text(f"set aside: {one}", style="yellow") for one in set_aside[:MOST_NAMED]]
    if len(set_aside) > MOST_NAMED:
        lines.append(Text(f"… and {len(set_aside) - MOST_NAMED} more", style="yellow"))
    return Group(summary_table(f"labels {lineage.version}", rows), *lines)


def render_diff(diff: LabelDiff) -> RenderableType:
    """Return what changed between two versions."""
    images = [(f"images {kind.replace('_', ' ')}", f"{n:,}") for kind, n in diff.images.items()]
    boxes = [(f"boxes {kind.replace('_', ' ')}", f"{n:,}") for kind, n in diff.boxes.items()]
    classes = Table("class", diff.old, diff.new, box=None)
    for name, (old, new) in diff.labels_by_class.items():
        classes.add_row(Text(name), f"{old:,}", f"{new:,}")
    changed = [Text(f"changed: {image_id}") for image_id in diff.examples[:MOST_NAMED]]
    return Group(summary_table(f"{diff.old} → {diff.new}", [*images, *boxes]), classes, *changed)
