"""Label versions, shown."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.display.tables import MOST_NAMED, summary_table
from pipelines.labels.diff import LabelDiff
from storage.labels.versions import LabelVersion


def render_version(lineage: LabelVersion) -> RenderableType:
    """What a label version holds."""
    rows = [(name.replace("_", " "), f"{count:,}") for name, count in lineage.counts.items()]
    lines = [f"policy {lineage.policy}", *([lineage.guarantee] if lineage.guarantee else [])]
    return Group(summary_table(f"labels {lineage.version}", rows), *map(Text, lines))


def render_diff(diff: LabelDiff) -> RenderableType:
    """What changed between two versions."""
    images = [(f"images {kind.replace('_', ' ')}", f"{n:,}") for kind, n in diff.images.items()]
    boxes = [(f"boxes {kind.replace('_', ' ')}", f"{n:,}") for kind, n in diff.boxes.items()]
    classes = Table("class", diff.old, diff.new, box=None)
    for name, (old, new) in diff.labels_by_class.items():
        classes.add_row(Text(name), f"{old:,}", f"{new:,}")
    changed = [Text(f"changed: {image_id}") for image_id in diff.examples[:MOST_NAMED]]
    return Group(summary_table(f"{diff.old} → {diff.new}", [*images, *boxes]), classes, *changed)
