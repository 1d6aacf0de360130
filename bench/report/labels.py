"""Where the labels of a chart go, so that they overlap neither each other nor the marks.

Vega-Lite cannot do this. Positions are found on the plot of a narrow phone; on anything wider the
labels only move apart, because their size and the plot's height stay.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# Of the plot, in pixels: the height everywhere, the width on a narrow phone.
HEIGHT = 340
WIDTH = 265
_LINE = 15
# Characters that fit across the narrow plot.
_LONGEST = 35


class Point(NamedTuple):
    """A labelled point with its interval; x is on a log scale."""

    text: str
    x: float
    low: float
    mean: float
    high: float


class Line(NamedTuple):
    """A labelled horizontal line."""

    text: str
    y: float


class _Label(NamedTuple):
    """A possible place, in pixels: `x` is where the text is anchored, `y` its middle."""

    text: str
    x: float
    y: float
    align: str

    def box(self) -> _Box:
        width = text_width(self.text)
        left = self.x - {"left": 0.0, "center": width / 2, "right": width}[self.align]
        return _Box(left, self.y - _LINE / 2, left + width, self.y + _LINE / 2)


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Box) -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0) * max(height, 0)

    def outside(self) -> float:
        """The area that is cut off at the plot's edges."""
        area = (self.right - self.left) * (self.bottom - self.top)
        return area - self.overlap(_Box(0, 0, WIDTH, HEIGHT))


def text_width(text: str) -> float:
    """About how wide a text is at 12 px; Chinese characters are square."""
    return sum(12.0 if unicodedata.east_asian_width(c) in "WF" else 7.2 for c in text)


class Plane:
    """The domains that hold all points and lines with room for their labels."""

    def __init__(self, points: Sequence[Point], references: Sequence[Line]):
        self.points = points
        self.references = references
        self.x_domain = [min(p.x for p in points) / 1.7, max(p.x for p in points) * 1.7]
        values = [v for p in points for v in (p.low, p.high)] + [r.y for r in references]
        room = 0.13 * (max(values) - min(values)) or 0.1
        self.y_domain = [max(min(values) - room, 0), max(values) + room]

    def x_ticks(self) -> list[float]:
        """1, 2, 5, 10, 20, ... within the domain; finer ones where those are few."""
        low, high = self.x_domain
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            ticks = [step * 10.0**decade for decade in decades for step in steps]
            ticks = [tick for tick in ticks if low <= tick <= high]
            if len(ticks) > 2:
                break
        return ticks

    def labels(self) -> list[dict[str, Any]]:
        """A place for each label, in data units: `text`, `x`, `y`, `align`."""
        taken = [
            _Box(self._x(p.x) - 5, self._y(p.high), self._x(p.x) + 5, self._y(p.low)) for p in self.points
        ]
        taken += [_Box(0, self._y(r.y) - 1, WIDTH, self._y(r.y) + 1) for r in self.references]
        wanted = [list(self._beside_point(p)) for p in sorted(self.points, key=lambda p: p.x)]
        wanted += [list(self._beside_line(r)) for r in sorted(self.references, key=lambda r: -r.y)]
        placed = []
        for places in wanted:
            best = min(places, key=lambda place: _cost(place.box(), taken))
            taken.append(best.box())
            placed.append(best)
        return [
            {"text": p.text, "x": self._x_value(p.x), "y": self._y_value(p.y), "align": p.align}
            for p in placed
        ]

    def _beside_point(self, point: Point) -> Iterator[_Label]:
        text, x = _shorten(point.text), self._x(point.x)
        for align, away in (("left", 9), ("right", -9)):
            yield _Label(text, x + away, self._y(point.mean), align)
        for line in (0.5, 1.5, 2.5):
            for y in (self._y(point.high) - line * _LINE - 2, self._y(point.low) + line * _LINE + 2):
                for align in ("center", "left", "right"):
                    yield _Label(text, x, y, align)

    def _beside_line(self, reference: Line) -> Iterator[_Label]:
        text, y = _shorten(reference.text), self._y(reference.y)
        for align, x in (("left", 4.0), ("right", WIDTH - 4.0)):
            for below in (-1, 1):
                yield _Label(text, x, y + below * (_LINE / 2 + 2), align)

    def _x(self, value: float) -> float:
        low, high = self.x_domain
        return WIDTH * math.log(value / low) / math.log(high / low)

    def _y(self, value: float) -> float:
        low, high = self.y_domain
        return HEIGHT * (high - value) / (high - low)

    def _x_value(self, pixel: float) -> float:
        low, high = self.x_domain
        return low * (high / low) ** (pixel / WIDTH)

    def _y_value(self, pixel: float) -> float:
        low, high = self.y_domain
        return high - pixel / HEIGHT * (high - low)


def _cost(box: _Box, taken: Sequence[_Box]) -> float:
    return box.outside() + sum(box.overlap(other) for other in taken)


def _shorten(text: str) -> str:
    """Cut the middle: names differ at their ends, by quantization or by mode."""
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[: half - 1]}…{text[-half:]}"
