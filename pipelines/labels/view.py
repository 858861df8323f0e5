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

# What each count is of, in the order in which they are shown.
_COUNTED = {
    "images_model": "images labelled by the model",
    "images_human": "images labelled by people",
    "images_human_empty": "  of them without a box",
    "labels": "boxes that are labels",
    "labels_unseen": "  of them hidden from the people who answered",
    "ignored": "boxes ignored: neither label nor background",
    "ignored_unseen": "  of them hidden from the people who answered",
    "rejected": "boxes rejected",
    "rejected_outside": "  of them outside of their image",
    "rejected_alternative": "  of them a second box of one object",
    "answers_used": "answers used: images that they settle",
    "answers_unused": "answers to images that are not in the run",
    "answers_skipped": "images that people only skipped",
    "answers_unusable": "images whose answers hold no usable box",
    "answers_set_aside": "answers set aside",
}
_LEFT_OUT = "left_out_"


def _counts(lineage: LabelVersion) -> list[tuple[str, str]]:
    """Return rows of the table; a count that this version does not know has its own name."""
    known = [name for name in _COUNTED if name in lineage.counts]
    others = [name for name in lineage.counts if name not in _COUNTED]
    return [(_what(name), f"{lineage.counts[name]:,}") for name in (*known, *others)]


def _what(name: str) -> str:
    if name.startswith(_LEFT_OUT):
        return f"images left out: {name.removeprefix(_LEFT_OUT).replace('_', ' ')}"
    return _COUNTED.get(name, name.replace("_", " "))


def render_version(lineage: LabelVersion, set_aside: Sequence[SetAside] = ()) -> RenderableType:
    """Return what a label version holds, and the answers that it could not take."""
    rows = _counts(lineage)
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
