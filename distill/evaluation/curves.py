"""Line charts as SVG text: small, without scripts, fonts or files beside them. Knows numbers and labels, no stage."""

import html
import math
from collections.abc import Callable, Sequence

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
        An `<svg>` element. Its colors are CSS variables (`--ink`, `--faint`, `--line`) of the page around it.
    """
    points = [(x, y) for x, y in zip(steps, values) if math.isfinite(y)]
    lost = len(steps) - len(points)
    caption = html.escape(title + (f" ({lost} not finite)" if lost else ""))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{caption}">', f"<title>{caption}</title>"]
    parts.append(f'<text class="title" x="{LEFT}" y="16">{caption}</text>')
    if points:
        parts += _draw(_thin(points), last=points[-1][1], x_label=x_label)
    return "\n".join([*parts, "</svg>"])


def scatter_chart(title: str, points: Sequence[tuple[str, float, float]], *, x_label: str) -> str:
    """Named points, those that no other has less of both than (the Pareto front) joined by a line.

    Args:
        title: stands above the plot.
        points: name, x and y of each; both are costs.
        x_label: what the x axis counts.
    """
    caption = html.escape(title)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{caption}">', f"<title>{caption}</title>"]
    parts.append(f'<text class="title" x="{LEFT}" y="16">{caption}</text>')
    x_ticks, y_ticks = (_ticks(0.0, max(point[axis] for point in points)) for axis in (1, 2))
    place = _placer(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    parts += _grid(place, x_ticks, y_ticks, x_label)
    front = find_front([(x, y) for _, x, y in points])
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in front))
    parts.append(f'<polyline class="curve" points="{path}"/>')
    for name, *point in points:
        x, y = place(*point)
        side = "end" if x > WIDTH / 2 else "start"
        parts.append(f'<circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y - 6:.1f}" text-anchor="{side}">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])


def find_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is better than in both, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


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
    place = _placer(x_low, x_high, y_low, y_high)
    parts = _grid(place, [tick for tick in x_ticks if x_low <= tick <= x_high], y_ticks, x_label)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    x, y = place(*points[-1])
    parts.append(f'<polyline class="curve" points="{path}"/><circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="16" text-anchor="end">last {last:.4g}</text>')
    return parts


def _placer(x_low: float, x_high: float, y_low: float, y_high: float) -> Callable[[float, float], tuple[float, float]]:
    """Where on the picture a point lies."""

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    return place


def _grid(place: Callable, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> list[str]:
    """Lines and numbers of both axes."""
    parts = []
    for tick in y_ticks:
        _, y = place(0.0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:,.6g}</text>'
        )
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
