"""Display a compilation: one line per step on stderr, and the artefact at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text


@dataclass(frozen=True, slots=True)
class CompileSummary:
    """The artefact that was made or found, and what its ``artefact.json`` says.

    Attributes:
        runtime, precision: what the run will use.
        artefact, sha256: where it lies, and the digest of its JSON; None where torch runs.
        facts: calibration, figures, versions, layers kept in float32.
        new: whether it was made now.
        checked: mAP of a model that was there already on the ground truth given now, else None.
    """

    runtime: str
    precision: str
    artefact: str | None
    sha256: str | None
    facts: Mapping[str, Any]
    new: bool
    checked: Mapping[str, Any] | None = None

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        facts = {k: v for k, v in self.facts.items() if k != "files"}
        return {
            "runtime": self.runtime,
            "precision": self.precision,
            "artefact": self.artefact,
            "sha256": self.sha256,
            "new": self.new,
            "checked": self.checked,
            "facts": facts,
        }


def compiled_table(summary: CompileSummary) -> RenderableType:
    """Render the result for people."""
    if summary.artefact is None:
        return Text(f"{summary.runtime} loads the checkpoint itself: nothing to compile")
    made = "made" if summary.new else "there already"
    lines = [f"{summary.runtime} {summary.precision}, {made}: {summary.artefact}"]
    facts = summary.facts
    if (parity := facts.get("parity")) and facts.get("graph_precision") == "fp32":
        lines.append(
            f"fp32 differs from torch by at most {parity['box_px']} px and {parity['score']} in "
            f"score, on {parity['anchors']} anchors"
        )
    if calibration := facts.get("calibration"):
        lines.append(f"calibrated on {calibration['images']} images of the source")
        lines.append(f"in float32: {', '.join(facts['kept'])}")
    for figures in filter(None, (facts.get("measured"), summary.checked)):
        lines.append(_figures(figures))
    return Group(*(Text(line, overflow="fold") for line in lines))


def _figures(figures: Mapping[str, Any]) -> str:
    """Say what INT8 loses; measured against fp32 it is an agreement, not an mAP."""
    on = f"on {figures['images']} images"
    low, high = figures.get("loss_interval", (None, None))  # earlier artefacts have none
    sure = "" if low is None else f" [{low:+.2f}, {high:+.2f}]"
    same = figures.get("agreement")
    also = "" if same is None else f"; {same:.1%} of sure boxes are as in fp32"
    if figures["against"] == "fp32":
        return (
            f"agreement with fp32: {figures['int8_map']:.1f} of 100, {figures['loss']:+.2f} points "
            f"lost{sure} {on} (no ground truth given){also}"
        )
    return (
        f"mAP {figures['int8_map']:.2f}, fp32 {figures['fp32_map']:.2f}: {figures['loss']:+.2f} "
        f"points lost{sure} {on} of {figures['against']}{also}"
    )
