"""Colours: of classes, the same in reports and in Label Studio, and of stages in the report."""

from __future__ import annotations

import colorsys

# Distinct at a thin line's width on light and dark images alike, and for the colour-blind.
PALETTE = (
    "#e6194b", "#0a9396", "#f58231", "#4363d8", "#b5e61d", "#911eb4", "#42d4f4", "#f032e6",
    "#ffe119", "#3cb44b", "#fabed4", "#9a6324",
)  # fmt: skip


def color_of(category_id: int) -> str:
    """Return the colour of a class, '#rrggbb'; the first few hundred classes all differ."""
    if category_id < len(PALETTE):
        return PALETTE[category_id]
    # Hues by the golden angle lie far from all before them; three rings tell neighbours apart.
    at = category_id - len(PALETTE)
    lightness, saturation = _RINGS[at % len(_RINGS)]
    rgb = colorsys.hls_to_rgb((at * _GOLDEN) % 1.0, lightness, saturation)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


_GOLDEN = 0.61803398875
_RINGS = ((0.45, 0.85), (0.65, 0.75), (0.32, 0.7))
