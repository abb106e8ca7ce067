"""Charts as inline SVG, drawn with classes, so that the page's style gives light and dark.

Every function returns a string; numbers are in the units that its axis names.
"""

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

FONT = 6.2  # pixels that a character of the labels takes, roughly


@dataclasses.dataclass(frozen=True)
class Series:
    """Points ``(x, y)`` of one colour; ``label`` is the legend's, ``tips`` what each one tells."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]
    tips: Sequence[str] = ()


class Scale:
    """From values to pixels, logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float):
        if high <= low * 1.0001:
            low, high = low / 2, high * 2
        self.low, self.high = low, high
        self._log, self._start, self._end = math.log(low), start, end
        self._factor = (end - start) / (math.log(high) - self._log)

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        return self._start + (math.log(value) - self._log) * self._factor

    def ticks(self, most: int) -> list[float]:
        """Round values in range, as many as there is room for."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for digits in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [d * 10.0**e for e in range(first, last + 1) for d in digits]
            found = [v for v in found if self.low * 0.999 <= v <= self.high * 1.001]
            if 2 <= len(found) <= most:
                return found
        step = math.ceil(len(found) / most) or 1
        return found[::step] or [self.low, self.high]


def number(value: float, space: str = "") -> str:
    """Short: 0.05, 3, 12k, 5M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{space}{unit}"
    return f"{value:.3g}"


def escape(text: str) -> str:
    return html.escape(str(text), quote=True)


def legend(series: Sequence[tuple[str, str]]) -> str:
    """Labels and styles as a line of HTML."""
    items = "".join(
        f'<span class="key"><i class="swatch {style}"></i>{escape(label)}</span>'
        for label, style in series
    )
    return f'<div class="legend">{items}</div>'


def _svg(width: float, height: float, body: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{1.35 * width:.0f}px" '
        f'role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}"'
    return f"<text {at}>{escape(text)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _dot(x: float, y: float, style: str, tip: str, radius: float = 3.6) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="dot {style}">'
        f"<title>{escape(tip)}</title></circle>"
    )


def rows(
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    title: str,
    unit: Callable[[float], str] = lambda v: f"{v:.3g}×",
    base: float | None = 1.0,
    told: str = "",
    width: float = 460,
) -> str:
    """One line for each label with a dot of each series; a line at ``base``.

    Args:
      series: whose x are values and y the label's index.
      told: what the numbers at the right, the last series', are of.
    """
    values = [x for s in series for x, _ in s.points]
    if not values:
        return ""
    left = min(190, 16 + FONT * max(map(len, labels)))
    low, high = min(values), max(values)
    if base is not None:
        low, high = min(low, base * 0.8), max(high, base * 1.25)
    scale = Scale(low / 1.08, high * 1.08, left, width - 48)
    step, top = 15, 22
    height = top + step * len(labels) + 8
    body = []
    for tick in scale.ticks(7):
        x = scale(tick)
        body += [_line(x, top - 4, x, height - 6, "grid"), _text(x, 12, f"{tick:g}", "middle")]
    if base is not None:
        body.append(_line(scale(base), top - 4, scale(base), height - 6, "base"))
    for i, label in enumerate(labels):
        y = top + step * i + step / 2
        body.append(_text(left - 8, y + 3.5, label, "end", "label"))
    body.append(_text(width - 2, 12, told, "end"))
    spans: dict[int, list[float]] = {}
    for s in series:
        for x, i in s.points:
            spans.setdefault(int(i), []).append(x)
    for i, xs in spans.items():
        y = top + step * i + step / 2
        body.append(_line(scale(min(xs)), y, scale(max(xs)), y, "span"))
    for s in series:
        for (x, i), tip in zip(s.points, s.tips or [""] * len(s.points), strict=True):
            body.append(_dot(scale(x), top + step * i + step / 2, s.style, tip))
    for i in spans:
        y = top + step * i + step / 2
        body.append(_text(width - 2, y + 3.5, unit(series_value(series, i)), "end", "value"))
    return _svg(width, height, body, title)


def series_value(series: Sequence[Series], row: int) -> float:
    """The value that a row tells in digits: the last series' that has one."""
    for s in reversed(series):
        for x, i in s.points:
            if i == row:
                return x
    raise KeyError(row)


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: float = 320,
    height: float = 210,
) -> str:
    """Lines with dots over two logarithmic axes."""
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    left, right, top, bottom = 46, 12, 26, 38
    xs, ys = ([p[i] for p in points] for i in (0, 1))
    across = Scale(min(xs), max(xs), left + 6, width - right - 6)
    up = Scale(min(ys) / 1.3, max(ys) * 1.3, height - bottom, top)
    body = [_text(left, 14, title, style="title")]
    for tick in up.ticks(6):
        body += [
            _line(left, up(tick), width - right, up(tick), "grid"),
            _text(left - 6, up(tick) + 3.5, number(tick), "end"),
        ]
    ticks = sorted(set(xs))
    if len(ticks) > 6:
        ticks = ticks[:: math.ceil(len(ticks) / 5)]
    for tick in ticks:
        body.append(_text(across(tick), height - bottom + 14, f"{tick:g}", "middle"))
    body.append(_text((left + width - right) / 2, height - 6, x_label, "middle"))
    body.append(
        f'<text transform="translate(10 {(top + height - bottom) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    for s in series:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in s.points)
        body.append(f'<polyline points="{path}" class="curve {s.style}"/>')
        for (x, y), tip in zip(s.points, s.tips or [""] * len(s.points), strict=True):
            body.append(_dot(across(x), up(y), s.style, tip, 3))
    return _svg(width, height, body, title)


def roofline(
    series: Sequence[Series], bytes_: float, operations: dict[str, float], *, width: float = 460
) -> str:
    """Operations a second over operations a byte, under the two ceilings.

    Args:
      bytes_: a second, of a large copy.
      operations: a second, of a large matmul of each dtype.
    """
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    height, left, right, top, bottom = 320, 52, 12, 14, 40
    xs, ys = ([p[i] for p in points] for i in (0, 1))
    turn = max(operations.values()) / bytes_
    across = Scale(min(*xs, turn) / 1.6, max(*xs, turn) * 3, left, width - right)
    up = Scale(min(ys) / 1.6, max(*operations.values(), *ys) * 1.6, height - bottom, top)
    body = []
    for tick in up.ticks(7):
        body += [
            _line(left, up(tick), width - right, up(tick), "grid"),
            _text(left - 6, up(tick) + 3.5, number(tick), "end"),
        ]
    for tick in across.ticks(9):
        body += [
            _line(across(tick), top, across(tick), height - bottom, "grid"),
            _text(across(tick), height - bottom + 15, number(tick), "middle"),
        ]
    body.append(_text((left + width) / 2, height - 6, "operations per byte", "middle"))
    body.append(
        f'<text transform="translate(11 {height / 2:.0f}) rotate(-90)" text-anchor="middle">'
        "operations per second</text>"
    )
    for most in operations.values():
        corner = most / bytes_
        start = max(across.low, up.low / bytes_)
        body += [
            _line(across(start), up(start * bytes_), across(corner), up(most), "ceiling"),
            _line(across(corner), up(most), width - right, up(most), "ceiling"),
        ]
    for s in series:
        for (x, y), tip in zip(s.points, s.tips or [""] * len(s.points), strict=True):
            body.append(_dot(across(x), up(y), s.style, tip, 3.4))
    highest = max(operations.values())
    for dtype, most in operations.items():  # over the dots
        y = up(most) + (-6 if most == highest else 14)
        body.append(_text(width - right - 4, y, f"{number(most)} {dtype}", "end", "value"))
    return _svg(width, height, body, "Roofline")
