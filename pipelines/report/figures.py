"""The report's charts as inline SVG: crisp at any size, light or dark by the page's variables.

Text goes through ``Markup.format``, which escapes it. Bars carry their value as a tooltip, and
each figure a sentence for screen readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10

from markupsafe import Markup

from pipelines.evaluation.intervals import plain

_WIDTH, _HEIGHT = 560, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 12, 34


def columns(
    values: Sequence[float],
    labels: Sequence[str],
    *,
    says: str,
    x_title: str,
    tips: Sequence[str],
    classes: Sequence[str] | None = None,
) -> Markup:
    """Return a column chart.

    Args:
        values: heights, from 0.
        labels: below each column; '' for none.
        says: what the figure shows, for those who cannot see it.
        tips: the tooltip of each column.
        classes: a CSS class for each column, or None: ``bar`` for all.
    """
    top = _nice_top(max(values, default=0))
    step = (_WIDTH - _LEFT - _RIGHT) / max(len(values), 1)
    parts = [_y_axis(top)]
    for i, (value, label, tip) in enumerate(zip(values, labels, tips, strict=True)):
        x, y = _LEFT + i * step, _y(value, top)
        parts.append(
            Markup(
                '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1.5">'
                "<title>{}</title></rect>"
            ).format(
                classes[i] if classes else "bar",
                x + step * 0.08,
                y,
                step * 0.84,
                _HEIGHT - _BOTTOM - y,
                tip,
            )
        )
        if label:
            parts.append(_text(x + step / 2, _HEIGHT - _BOTTOM + 15, label, "middle"))
    parts.append(_x_title(x_title))
    return _svg(parts, says)


def area(
    edges: Sequence[float], values: Sequence[float], *, says: str, x_title: str, mean: float
) -> Markup:
    """Return a stepped line over intervals, filled, with a dashed line at the mean.

    Args:
        edges: borders of the intervals, ascending, one more than ``values``.
        mean: where the dashed line goes.
    """
    top = _nice_top(max([*values, mean], default=0))
    span = (edges[-1] - edges[0]) or 1.0
    wide = _WIDTH - _LEFT - _RIGHT

    def x(at: float) -> float:
        return _LEFT + wide * (at - edges[0]) / span

    line = " ".join(
        f"{x(a):.1f},{_y(v, top):.1f} {x(b):.1f},{_y(v, top):.1f}"
        for a, b, v in zip(edges, edges[1:], values, strict=False)
    )
    base = _HEIGHT - _BOTTOM
    parts = [
        _y_axis(top),
        Markup('<polygon class="area" points="{},{} {} {},{}"/>').format(
            _LEFT, base, line, _WIDTH - _RIGHT, base
        ),
        Markup('<polyline class="line" points="{}"/>').format(line),
        Markup('<line class="mean" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            _LEFT, _WIDTH - _RIGHT, _y(mean, top), _y(mean, top)
        ),
        _x_title(x_title),
    ]
    for i in range(5):
        at = edges[0] + span * i / 4
        anchor = "start" if i == 0 else "end" if i == 4 else "middle"
        parts.append(_text(x(at), base + 15, _seconds(at), anchor))
    return _svg(parts, says)


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]], *, says: str, x_title: str
) -> Markup:
    """Return curves over a common axis, each with a dot at its last point.

    Args:
        series: (name, points (x, y) by rising x); the first is drawn faint, the last strong.
        says: as in ``columns``.
    """
    points = [point for _, curve in series for point in curve]
    top = _nice_top(max((y for _, y in points), default=0))
    right = max((x for x, _ in points), default=0) or 1.0
    wide = _WIDTH - _LEFT - _RIGHT
    parts = [_y_axis(top)]
    for number, (name, curve) in enumerate(series):
        faint = "" if number == len(series) - 1 else " faint"
        at = [(_LEFT + wide * x / right, _y(y, top)) for x, y in curve]
        parts.append(
            Markup('<g><polyline class="line{}" points="{}"/>').format(
                faint, " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            )
        )
        for (x, y), (step, value) in zip(at, curve, strict=True):
            tip = f"{name}, {short(step)}: {plain(value)}"
            parts.append(
                Markup('<circle class="bar{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title>'
                       "</circle>").format(faint, x, y, tip)
            )  # fmt: skip
        parts.append(Markup("</g>"))
    for i in range(5):
        anchor = "start" if i == 0 else "end" if i == 4 else "middle"
        x = _LEFT + wide * i / 4
        parts.append(_text(x, _HEIGHT - _BOTTOM + 15, short(right * i / 4), anchor))
    parts.append(_x_title(x_title))
    return _svg(parts, says)


def differences(
    figures: Sequence[tuple[str, float | None, float, float]], *, says: str, x_title: str
) -> Markup:
    """Return differences with their intervals, one a line, around a line at 0.

    Args:
        figures: (label, value or None where it is unknown, low, high).
        says: as in ``columns``.
    """
    known = [max(abs(v), min(max(abs(a), abs(b)), 3 * abs(v) + 5)) for _, v, a, b in figures
             if v is not None]  # fmt: skip
    top = _nice_top(max(known, default=0))
    left, step, height = 150, 30, 30 * len(figures) + 44
    wide = _WIDTH - left - _RIGHT - 12

    def x(value: float) -> float:
        return left + wide * (min(max(value / top, -1.0), 1.0) + 1) / 2

    parts = []
    for i in range(5):
        value = top * (i - 2) / 2
        parts.append(
            Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="4" y2="{}"/>').format(
                "mean" if i == 2 else "grid", x(value), x(value), height - 38
            )
        )
        said = f"{'−' if value < 0 else '+' if value > 0 else ''}{short(abs(value))}"
        parts.append(_text(x(value), height - 24, said, "middle"))
    for i, (label, known_, low, high) in enumerate(figures):
        y = 18.0 + i * step
        parts.append(_text(left - 10, y + 4, label if len(label) < 20 else label[:19] + "…", "end"))
        if known_ is None:
            parts.append(_text(left + 6, y + 4, "unknown", "start"))
            continue
        kind = " up" if low > 0 else " down" if high < 0 else ""
        tip = f"{label}: {known_:+.1f} ({low:+.1f} to {high:+.1f})"
        parts.append(
            Markup(
                '<g><line class="whisker{}" x1="{:.1f}" x2="{:.1f}" y1="{y}" y2="{y}"/>'
                '<circle class="bar{}" cx="{:.1f}" cy="{y}" r="5.5"/><title>{}</title></g>'
            ).format(kind, x(low), x(high), kind, x(known_), tip, y=y)
        )
    parts.append(_text(left + wide / 2, height - 6, x_title, "middle"))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, height, says, Markup("").join(parts)
    )


def whiskers(
    figures: Sequence[tuple[str, float | None, float, float]],
    *,
    says: str,
    x_title: str,
    top: float | None = None,
) -> Markup:
    """Return figures with their intervals, one a line: a dot between two ends.

    Args:
        figures: (label, value or None where it is unknown, low, high); high may be infinite.
        says: as in ``columns``.
        top: the scale's end; None: chosen, at most four times the largest value.
    """
    if top is None:
        largest = max((v for _, v, _, _ in figures if v is not None), default=0.0)
        highest = max((min(h, 4 * largest) for _, v, _, h in figures if v is not None), default=0.0)
        top = _nice_top(max(highest, largest))
    left, step, height = 150, 34, 34 * len(figures) + 44
    wide = _WIDTH - left - _RIGHT - 12

    def x(value: float) -> float:
        return left + wide * min(max(value / top, 0.0), 1.0)

    parts = []
    for i in range(5):
        at = x(top * i / 4)
        parts.append(
            Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="4" y2="{}"/>').format(
                at, at, height - 38
            )
        )
        parts.append(_text(at, height - 24, short(top * i / 4), "middle"))
    for i, (label, value, low, high) in enumerate(figures):
        y = 20.0 + i * step
        parts.append(_text(left - 10, y + 4, label, "end"))
        if value is None:
            parts.append(_text(left + 6, y + 4, "unknown", "start"))
            continue
        parts.append(
            Markup(
                '<g><line class="whisker" x1="{:.1f}" x2="{:.1f}" y1="{y}" y2="{y}"/>'
                '<circle class="bar" cx="{:.1f}" cy="{y}" r="6"/><title>{}</title></g>'
            ).format(x(low), x(high), x(value), _interval(value, low, high), y=y)
        )
    parts.append(_text(left + wide / 2, height - 6, x_title, "middle"))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, height, says, Markup("").join(parts)
    )


def _y(value: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * value / top


def _y_axis(top: float) -> Markup:
    lines = []
    for i in range(5):
        value = top * i / 4
        y = _y(value, top)
        lines.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                _LEFT, _WIDTH - _RIGHT, y, y
            )
        )
        lines.append(_text(_LEFT - 6, y + 4, short(value), "end"))
    return Markup("").join(lines)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, text
    )


def _x_title(text: str) -> Markup:
    return _text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, _HEIGHT - 4, text, "middle")


def _svg(parts: Sequence[Markup], says: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, says, Markup("").join(parts)
    )


def _nice_top(highest: float) -> float:
    """Return the least of 1, 2, 4, 8, 10 × 10ⁿ that is not below.

    Quarters of it are round numbers.
    """
    if highest <= 0:
        return 1.0
    unit = 10.0 ** floor(log10(highest))
    return next(m * unit for m in (1, 2, 4, 8, 10) if m * unit >= highest * 0.999)


def short(value: float) -> str:
    """Return a number in a few characters: 950, 1.2k, 34k, 5.6M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            scaled = value / unit
            return f"{scaled:.0f}{name}" if scaled >= 10 else f"{scaled:.2g}{name}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _interval(value: float, low: float, high: float) -> str:
    return f"{plain(value)} ({plain(low)} to {plain(high)})"
