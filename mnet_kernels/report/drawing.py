"""Plots as lists of shapes: geometry here, SVG in charts.html.j2, colours in style.css.j2.

A shape's ``css`` is a class, so that one picture serves light, dark and paper. Lengths are CSS
pixels at the drawing's own width; text is 12 px there, and its width is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Of a phone, and of a column of a wide page.
NARROW, WIDE = 370, 900
#: Of an average character at 12 px, generously.
CHARACTER = 6.6

Point = tuple[float, float]
#: Left, top, right, bottom.
_Box = tuple[float, float, float, float]


@dataclass
class Drawing:
    """Shapes in painter's order, and how large they are together."""

    width: float
    height: float
    shapes: list[dict[str, Any]] = field(default_factory=list)

    def rect(self, x: float, y: float, width: float, height: float, css: str) -> None:
        self._add("rect", css, x=x, y=y, width=max(width, 0.5), height=height)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self._add("line", css, x1=x1, y1=y1, x2=x2, y2=y2)

    def path(self, points: Iterable[Point], css: str) -> None:
        self._add("path", css, d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points))

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start") -> None:
        self._add("text", css, x=x, y=y, text=text, anchor=anchor)

    def mark(self, x: float, y: float, shape: str, css: str, tip: str) -> None:
        self._add("mark", css, d=MARKS[shape], x=x, y=y, tip=tip)

    def _add(self, kind: str, css: str, **numbers: Any) -> None:
        told = {k: f"{v:.1f}" if isinstance(v, float) else v for k, v in numbers.items()}
        self.shapes.append({"kind": kind, "css": css, **told})


#: Paths about the origin, of about the same area.
MARKS = {
    "dot": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "square": "M-3.5-3.5h7v7h-7z",
    "diamond": "M0-5L5 0L0 5L-5 0z",
    "up": "M0-4.6L4.6 3.6H-4.6z",
    "down": "M0 4.6L4.6-3.6H-4.6z",
    "cross": "M-4-4L4 4M-4 4L4-4",
    "plus": "M-5 0H5M0-5V5",
}


@dataclass(frozen=True)
class Figure:
    """A picture in one size or two (for a phone, for a wide page), and what it shows in words."""

    title: str
    alt: str
    drawings: tuple[Drawing, ...]
    caption: str = ""
    #: (css, shape, words) of each kind of mark; shape "bar", "line" or one of MARKS.
    legend: tuple[tuple[str, str, str], ...] = ()


# ---- axes ----


@dataclass(frozen=True)
class Axis:
    """From values to a fraction of the axis' length."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies: 0 at the axis' low end, 1 at its high end."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return (value - low) / (high - low)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most about ``most`` round values and their texts."""
        values = self._log_ticks(most) if self.log else self._linear_ticks(most)
        return [(v, number_text(v)) for v in values if self.low <= v <= self.high * (1 + 1e-9)]

    def _linear_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            values = [d * 10.0**e for e in decades for d in digits]
            if len([v for v in values if self.low <= v <= self.high]) <= most:
                return values
        every = math.ceil(len(decades) / most)
        return [10.0**e for e in decades if e % every == 0]


def number_text(value: float) -> str:
    """A round value for an axis: 0.5, 20, 1,000; small ones as powers of ten."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.6g}" if value < 10 else f"{value:,.0f}"


def around(values: Sequence[float], log: bool = False, margin: float = 0.06) -> Axis:
    """An axis on which all of ``values`` have some room."""
    low, high = min(values), max(values)
    if log:
        span = max(math.log(high / low), 0.3)
        return Axis(low * math.exp(-margin * span), high * math.exp(margin * span), True)
    span = (high - low) or abs(high) or 1.0
    return Axis(low - margin * span, high + margin * span)


def text_width(text: str) -> float:
    """Estimated: browsers know the true one, we do not."""
    return CHARACTER * len(text)


# ---- bars ----


@dataclass(frozen=True)
class Bar:
    """One bar: it ends at ``value``; the whisker spans ``low`` to ``high``."""

    value: float
    text: str
    css: str
    low: float | None = None
    high: float | None = None


def bars(
    rows: Sequence[tuple[str, Sequence[Bar]]], axis: Axis, base: float, most_ticks: int = 5
) -> Drawing:
    """Horizontal bars, a label and one or more bars a row; they begin at ``base``.

    Args:
        axis: of the values; its ticks are drawn below.
    """
    width = NARROW
    ends = max(text_width(bar.text) for _, group in rows for bar in group) + 8
    labels = max(text_width(label) for label, _ in rows) + 10
    above = 18.0 if labels > 0.5 * width else 0.0
    left = 2.0 if above else labels
    right = width - ends
    tall = [above + 16.0 * len(group) + 6 for _, group in rows]
    drawing = Drawing(width, sum(tall) + 26)

    def x(value: float) -> float:
        return left + (right - left) * min(max(axis.at(value), 0.0), 1.0)

    bottom = drawing.height - 22
    for value, text in axis.ticks(most_ticks):
        drawing.line(x(value), 0, x(value), bottom, "base" if value == base else "grid")
        drawing.text(x(value), bottom + 14, text, "tick", "middle")
    y = 0.0
    for (label, group), height in zip(rows, tall, strict=True):
        middle = y + above + 8 * len(group) + 3
        drawing.text(0, y + 15 if above else middle + 4, label, "label")
        for i, bar in enumerate(group):
            top = y + above + 4 + 16 * i
            thick = 11.0 if i == 0 else 6.0
            begin, end = sorted((x(base), x(bar.value)))
            drawing.rect(begin, top + (11 - thick) / 2, end - begin, thick, bar.css)
            if bar.low is not None and bar.high is not None:
                drawing.line(x(bar.low), top + 5.5, x(bar.high), top + 5.5, "whisker")
            drawing.text(width, top + 10, bar.text, "value", "end")
        y += height
    return drawing


# ---- plots with two axes ----


@dataclass(frozen=True)
class Mark:
    """A point of a plot. ``tip`` is shown where a pointer rests on it, ``label`` always."""

    x: float
    y: float
    css: str
    tip: str
    shape: str = "dot"
    label: str = ""


@dataclass(frozen=True)
class Curve:
    """A line of a plot."""

    points: tuple[Point, ...]
    css: str
    label: str = ""
    begin: bool = False  #: its label stands above its left end, not above its right end


def plot(
    width: float, height: float, x: Axis, y: Axis, x_label: str, y_label: str,
    curves: Sequence[Curve] = (), marks: Sequence[Mark] = (),
) -> Drawing:  # fmt: skip
    """Curves below, marks above. A mark's label stands beside it, where there is room; where there
    is none it is left out (the mark's tip still has it)."""
    drawing = Drawing(width, height)
    y_ticks = y.ticks(6)
    left = max(text_width(text) for _, text in y_ticks) + 8 if y_ticks else 8.0
    right, top, bottom = width - 8, 22.0, height - 38

    def at(px: float, py: float) -> Point:
        return left + (right - left) * x.at(px), bottom - (bottom - top) * y.at(py)

    for value, text in y_ticks:
        level = at(x.low, value)[1]
        drawing.line(left, level, right, level, "grid")
        drawing.text(left - 6, level + 4, text, "tick", "end")
    for value, text in x.ticks(10 if width > 600 else 5):
        across = at(value, y.low)[0]
        drawing.line(across, top, across, bottom, "grid")
        across = min(max(across, text_width(text) / 2), width - text_width(text) / 2)
        drawing.text(across, bottom + 15, text, "tick", "middle")
    drawing.text(0, 11, y_label, "axis")
    drawing.text(right, height - 5, x_label, "axis", "end")
    taken: list[_Box] = []
    spots: list[tuple[float, float, str]] = []
    for curve in curves:
        points = [at(*point) for point in curve.points]
        drawing.path(points, f"curve {curve.css}")
        if curve.label:
            wide = text_width(curve.label)
            px, py = points[0] if curve.begin else points[-1]
            px = px + 4 if curve.begin else min(px, right) - wide
            drawing.text(px, py - 7, curve.label, "label")
            taken.append((px, py - 18, px + wide, py - 4))
    for mark in marks:
        px, py = at(mark.x, mark.y)
        drawing.mark(px, py, mark.shape, f"mark {mark.css}", mark.tip)
        taken.append((px - 4, py - 4, px + 4, py + 4))
        if mark.label:
            spots.append((px, py, mark.label))
    for px, py, label in sorted(spots, key=lambda spot: spot[1]):  # from the top
        _label(drawing, taken, (px, py), label, (left, top, right, bottom))
    return drawing


def _label(
    drawing: Drawing, taken: list[_Box], point: Point, label: str, inside: _Box
) -> None:  # fmt: skip
    """Left of the point, else right, above, below; nowhere if it would cover something."""
    px, py = point
    wide = text_width(label)
    places = (
        (px - 7, py + 4, "end", px - 7 - wide),
        (px + 7, py + 4, "start", px + 7),
        (px, py - 9, "middle", px - wide / 2),
        (px, py + 17, "middle", px - wide / 2),
    )
    for x, y, anchor, begin in places:
        box = (begin, y - 11, begin + wide, y + 3)
        fits = (
            box[0] >= inside[0] and box[1] >= inside[1]
            and box[2] <= inside[2] and box[3] <= inside[3]
        )  # fmt: skip
        free = all(
            box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in taken
        )
        if fits and free:
            drawing.text(x, y, label, "label", anchor)
            taken.append(box)
            return
