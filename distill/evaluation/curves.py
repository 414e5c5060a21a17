"""Line charts as SVG text: small, without scripts, fonts or files beside them. Knows numbers and labels, no stage."""

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 420, 230  # pixels
LEFT, RIGHT, TOP, BOTTOM = 62, 26, 30, 30  # of the plot's margins, for the labels
MAX_POINTS = 400  # more would be narrower than a pixel; each drawn point is the mean of its bin
NUM_TICKS = 5


def line_chart(title: str, steps: Sequence[float], values: Sequence[float], *, x_label: str = "step") -> str:
    """One curve with axes, grid and its last value.

    Args:
        title: stands above the plot and is read out by screen readers.
        steps: where on the x axis, ascending.
        values: one a step; those that are not finite are left out and counted in the title.
        x_label: what the x axis counts.

    Returns:
        An `<svg>` element. Its colours are CSS variables (`--ink`, `--faint`, `--line`) of the page around it.
    """
    points = [(x, y) for x, y in zip(steps, values) if math.isfinite(y)]
    lost = len(steps) - len(points)
    caption = html.escape(title + (f" ({lost} not finite)" if lost else ""))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{caption}">', f"<title>{caption}</title>"]
    parts.append(f'<text class="title" x="{LEFT}" y="16">{caption}</text>')
    if points:
        parts += _draw(_thin(points), last=points[-1][1], x_label=x_label)
    return "\n".join([*parts, "</svg>"])


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: means of bins of equal size."""
    size = math.ceil(len(points) / MAX_POINTS)
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]


def _draw(points: list[tuple[float, float]], *, last: float, x_label: str) -> list[str]:
    """Grid, ticks and the curve."""
    x_ticks = _ticks(points[0][0], points[-1][0])
    y_ticks = _ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))
    x_low, x_high = points[0][0], max(points[-1][0], points[0][0] + 1)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in (tick for tick in x_ticks if x_low <= tick <= x_high):
        x, _ = place(tick, y_low)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:,.6g}</text>'
        )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    x, y = place(*points[-1])
    parts.append(f'<polyline class="curve" points="{path}"/><circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="16" text-anchor="end">last {last:.4g}</text>')
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{html.escape(x_label)}</text>'
    )
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers a step of 1, 2 or 5 times a power of ten apart, from below `low` to above `high`."""
    span = high - low or abs(high) or 1.0
    rough = span / (NUM_TICKS - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    return [number * step for number in range(first, last + 1)]
