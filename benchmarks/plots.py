"""Two kinds of plots as SVG, which a repository shows and a test can read: bars, and points with a fitted line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, ROW, LEFT, RIGHT = 760, 26, 210, 130
COLOURS = ("#2f6f9f", "#b8663a", "#4f8f4f", "#8a5a9f")
STYLE = "font-family: sans-serif; font-size: 13px"


def bars(title: str, values: Mapping[str, float], unit: str, apart: Mapping[str, float] | None = None) -> str:
    """A bar for each name, from 0 on, the best first. `apart` is the share of a value by which measurements differ,
    drawn as a line over its end."""
    known = {name: value for name, value in values.items() if math.isfinite(value) and value >= 0}
    if not known:
        raise ValueError(f"nothing to draw of {title!r}")
    most = max(known.values()) or 1.0
    body = [_text(8, 20, title, weight="bold")]
    for row, (name, value) in enumerate(sorted(known.items(), key=lambda item: item[1])):
        y = 36 + row * ROW
        length = (WIDTH - LEFT - RIGHT) * value / most
        colour = COLOURS[0] if name.startswith(("ours", "flux-engine")) else COLOURS[1]
        body.append(_text(LEFT - 8, y + 14, name, anchor="end"))
        body.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{ROW - 8}" fill="{colour}"/>')
        if half := length * (apart or {}).get(name, 0.0) / 2:
            end = LEFT + length
            body.append(_line(end - half, y + 9, end + half, y + 9))
        body.append(_text(LEFT + length + 8, y + 14, f"{value:.4g} {unit}"))
    return _svg(body, 44 + len(known) * ROW)


def growth(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> str:
    """Points (x, y) on logarithmic axes, joined."""
    points = [point for curve in curves.values() for point in curve]
    if not points or min(min(point) for point in points) <= 0:
        raise ValueError(f"nothing to draw of {title!r} on logarithmic axes")
    height, left, top, bottom = 340, 80, 40, 300
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = (math.log(number) for number in point)
        across_share = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        up_share = (y - min(ys)) / ((max(ys) - min(ys)) or 1)
        return left + across_share * (WIDTH - left - RIGHT), bottom - up_share * (bottom - top - 10)

    body = [_text(8, 20, title, weight="bold"), _line(left - 10, bottom + 8, WIDTH - RIGHT + 10, bottom + 8)]
    body += [_line(left - 10, top, left - 10, bottom + 8)]
    body += [_text(WIDTH - RIGHT + 16, bottom + 12, across), _text(left - 10, top - 6, up)]
    for x in sorted({x for x, _ in points}):
        body.append(_text(place((x, points[0][1]))[0], bottom + 26, f"{x:g}", anchor="middle"))
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        placed = [place(point) for point in sorted(curve)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        body.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (_, value) in zip(placed, sorted(curve), strict=True):
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            body.append(_text(x, y - 9, f"{value:.3g}", anchor="middle"))
        body.append(_text(placed[-1][0] + 10, placed[-1][1] + 5, name))
    return _svg(body, height)


def _svg(body: Sequence[str], height: int) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" style="{STYLE}">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="white"/>', *body, "</svg>", ""])


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#333"/>'
