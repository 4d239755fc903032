"""Charts as inline SVG, coloured by the page's own style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tokenry.report.numbers import readable, short

__all__ = ["bars", "lines", "scatter", "stacked"]

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 82, 24, 16, 52
COLOURS = 10
CHARACTER = 6.6  # pixels of a label, about


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels, linearly or by logarithm, with ticks at round values."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, log: bool, zero: bool = False) -> _Axis:
        log = log and min(values) > 0
        low, high = min(values), max(values)
        if log:
            span = math.log10(high / low) or 1.0
            return cls(low / 10 ** (0.08 * span), high * 10 ** (0.08 * span), start, end, True)
        if zero and low >= 0:
            return cls(0.0, high * 1.08 or 1.0, start, end, False)
        pad = 0.1 * (high - low) or abs(high) * 0.1 or 1.0
        return cls(low - pad if low - pad > 0 or low < 0 else 0.0, high + pad, start, end, False)

    def __call__(self, value: float) -> float:
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if math.log10(self.high / self.low) < 3 else (1,)
            round_values = [m * 10.0**d for d in decades for m in steps if self.low <= m * 10.0**d <= self.high]
            if len(round_values) > 1:
                return round_values  # a narrower range is ticked as a linear axis is
        raw = (self.high - self.low) / 5
        magnitude = 10 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _frame(x: _Axis, y: _Axis, x_title: str, y_title: str, body: str, label: str, height: int = HEIGHT) -> str:
    grid = []
    for tick in y.ticks():
        at = y(tick)
        grid.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        grid.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x.ticks():
        at = x(tick)
        grid.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        grid.append(
            f'<text class="tick" x="{at:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{short(tick)}</text>'
        )
    titles = (
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 10}" text-anchor="middle">{escape(x_title)}</text>'
        f'<text class="axis" x="14" y="{(TOP + height - BOTTOM) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(TOP + height - BOTTOM) / 2})">{escape(y_title)}</text>'
    )
    return _svg("".join(grid) + titles + body, label, height)


def _svg(body: str, label: str, height: int) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'


def scatter(
    points: Mapping[str, tuple[float, float]],
    x_title: str,
    y_title: str,
    *,
    baseline: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """One labelled point per method. The baseline is drawn hollow."""
    x = _Axis.over([p[0] for p in points.values()], LEFT, WIDTH - RIGHT, log_x)
    y = _Axis.over([p[1] for p in points.values()], HEIGHT - BOTTOM, TOP, log_y)
    body = []
    taken: list[tuple[float, float, float]] = []
    for i, (name, (a, b)) in enumerate(sorted(points.items(), key=lambda item: item[1][1])):
        px, py = x(a), y(b)
        width = CHARACTER * len(name)
        left = px + 10 + width > WIDTH - RIGHT
        start = px - 10 - width if left else px + 10
        label_y = py + 4
        for shift in sorted(range(-98, 99, 14), key=abs):
            if all(abs(label_y + shift - ty) > 12 or start > tx + tw or start + width < tx for tx, ty, tw in taken):
                label_y += shift
                break
        taken.append((start, label_y, width))
        style = "point hollow" if name == baseline else f"point c{i % COLOURS}"
        body.append(
            f'<circle class="{style}" cx="{px:.1f}" cy="{py:.1f}" r="6"><title>{escape(name)}: {readable(a)}, {readable(b)}</title></circle>'
            f'<text class="mark" x="{start:.1f}" y="{label_y:.1f}">{escape(name)}</text>'
        )
    return _frame(x, y, x_title, y_title, "".join(body), f"{y_title} against {x_title}")


def bars(
    values: Mapping[str, float], title: str, *, baseline: str = "", spread: Mapping[str, float] | None = None
) -> str:
    """One horizontal bar per method, with its value and spread."""
    left, row = max(190, 16 + CHARACTER * max(map(len, values), default=0)), 26
    height = TOP + row * len(values) + 34
    ends = [value + sign * (spread or {}).get(name, 0.0) for name, value in values.items() for sign in (-1, 1)]
    low, high = min(0.0, *ends), max(0.0, *ends) or 1.0
    x = _Axis(low, high * 1.12, left, WIDTH - 60, False)
    body = []
    for i, (name, value) in enumerate(values.items()):
        top = TOP + i * row
        begin, end = sorted((x(0), x(value)))
        style = "bar base" if name == baseline else "bar"
        body.append(
            f'<text class="mark" x="{left - 8}" y="{top + 16}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="{style}" x="{begin:.1f}" y="{top + 3}" width="{max(end - begin, 1):.1f}" height="{row - 8}" rx="2"/>'
        )
        around = (spread or {}).get(name)
        if around:
            a, b = x(value - around), x(value + around)
            body.append(
                f'<line class="whisker" x1="{a:.1f}" x2="{b:.1f}" y1="{top + row / 2 - 1}" y2="{top + row / 2 - 1}"/>'
            )
            end = max(end, b)
        body.append(f'<text class="value" x="{end + 6:.1f}" y="{top + 16}">{readable(value)}</text>')
    body.append(
        f'<text class="axis" x="{(left + WIDTH - 60) / 2}" y="{height - 10}" text-anchor="middle">{escape(title)}</text>'
    )
    return _svg("".join(body), title, height)


def stacked(groups: Mapping[str, Mapping[str, float]], title: str) -> str:
    """One horizontal bar per group, cut into named shares that are written as percentages of the group's sum."""
    parts = list(dict.fromkeys(part for shares in groups.values() for part in shares))
    left, row = 150, 34
    height = TOP + row * len(groups) + 10
    body = []
    for i, (name, shares) in enumerate(groups.items()):
        top, at, total = TOP + i * row, float(left), sum(shares.values()) or 1.0
        body.append(f'<text class="mark" x="{left - 8}" y="{top + 20}" text-anchor="end">{escape(name)}</text>')
        for part, share in shares.items():
            width = share / total * (WIDTH - RIGHT - left)
            body.append(
                f'<rect class="fill c{parts.index(part) % COLOURS}" x="{at:.1f}" y="{top + 3}" width="{max(width, 0):.1f}" height="{row - 8}">'
                f"<title>{escape(name)}: {escape(part)} {share / total:.1%}</title></rect>"
            )
            if width > 34:
                body.append(
                    f'<text class="inside" x="{at + width / 2:.1f}" y="{top + 20}" text-anchor="middle">{share / total:.0%}</text>'
                )
            at += width
    return _svg("".join(body), title, height) + _legend([(part, "") for part in parts])


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_title: str,
    y_title: str,
    *,
    remarks: Mapping[str, str] | None = None,
    log_x: bool = True,
    log_y: bool = True,
    baseline: str = "",
) -> str:
    """One line per method, with a legend that carries a remark for each (for example its growth exponent)."""
    series = {name: sorted(points) for name, points in series.items() if points}
    every = [p for points in series.values() for p in points]
    if not every:
        return ""
    x = _Axis.over([p[0] for p in every], LEFT, WIDTH - RIGHT, log_x)
    y = _Axis.over([p[1] for p in every], HEIGHT - BOTTOM, TOP, log_y, zero=not log_y)
    body = []
    for i, (name, points) in enumerate(series.items()):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        dashed = " dashed" if name == baseline else _again(i)
        body.append(f'<polyline class="line s{i % COLOURS}{dashed}" points="{path}"/>')
        body += [
            f'<circle class="dot c{i % COLOURS} s{i % COLOURS}{_again(i)}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5"><title>{escape(name)}: {readable(a)}, {readable(b)}</title></circle>'
            for a, b in points
        ]
    chart = _frame(x, y, x_title, y_title, "".join(body), f"{y_title} against {x_title}")
    return chart + _legend([(name, (remarks or {}).get(name, "")) for name in series])


def _again(i: int) -> str:
    """Style of a series whose colour is taken already: dotted, with hollow points."""
    return " again" if i >= COLOURS else ""


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><span class="key k{i % COLOURS}{_again(i)}"></span>{escape(name)}{f" <em>{escape(remark)}</em>" if remark else ""}</li>'
        for i, (name, remark) in enumerate(entries)
    )
    return f'<ul class="legend">{items}</ul>'
