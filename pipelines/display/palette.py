"""Colours: of classes, the same in reports and in Label Studio, and of stages in the report."""

from __future__ import annotations

# Distinct at a thin line's width on light and dark images alike, and for the colour-blind.
PALETTE = (
    "#e6194b", "#0a9396", "#f58231", "#4363d8", "#b5e61d", "#911eb4", "#42d4f4", "#f032e6",
    "#ffe119", "#3cb44b", "#fabed4", "#9a6324",
)  # fmt: skip


def color_of(category_id: int) -> str:
    """Return the colour of a class, '#rrggbb'."""
    return PALETTE[category_id % len(PALETTE)]
