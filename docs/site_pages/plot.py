"""Line charts as SVG whose colours are those of the page, in light and in dark."""

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 40
Points = Sequence[tuple[float, float]]


def chart(lines: Mapping[str, Points], *, x: str, y: str, log: bool = False) -> str:
    """Return a chart of a few named lines; with `log` the height is the logarithm."""
    shown = {name: [(a, b) for a, b in points if _drawable(b, log)] for name, points in lines.items()}
    every = [point for points in shown.values() for point in points]
    if not every:
        raise ValueError(f"nothing of {', '.join(lines)} can be drawn")
    width = max(a for a, _ in every) or 1.0
    heights = [math.log10(b) if log else b for _, b in every]
    low, high = min(heights), max(heights)
    if not log:
        low = min(low, 0.0)
    # a line that never moves is drawn in the middle
    low, high = (low - 0.5, high + 0.5) if high - low < 1e-12 else (low, high)

    def place(a: float, b: float) -> str:
        up = ((math.log10(b) if log else b) - low) / (high - low)
        return f"{LEFT + a / width * (WIDTH - LEFT - RIGHT):.1f},{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" font-size="12">']
    for value in _ticks(low, high, log):
        shown_value = 10.0**value if log else value
        _, _, height = place(0, shown_value).partition(",")
        out.append(f'<path class="grid" d="M{LEFT},{height} H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{float(height) + 4:.1f}" text-anchor="end">{shown_value:.4g}</text>')
    for value in _ticks(0.0, width, False):
        across, _, _ = place(value, 10.0**low if log else low).partition(",")
        out.append(f'<path class="tick" d="M{across},{HEIGHT - BOTTOM} v4"/>')
        out.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:.6g}</text>')
    out.append(f'<path class="axis" d="M{LEFT},{TOP} V{HEIGHT - BOTTOM} H{WIDTH - RIGHT}"/>')
    out.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{html.escape(x)}</text>')
    out.append(f'<text x="4" y="14">{html.escape(y)}</text>')
    across = LEFT + 8 + 7 * len(y)
    for number, (name, points) in enumerate(shown.items()):
        out.append(f'<path class="line s{number}" d="M{" L".join(place(a, b) for a, b in points)}"/>')
        out.append(f'<text class="s{number}" x="{across}" y="14">{html.escape(name)}</text>')
        across += 7.2 * len(name) + 18
    return f'<div class="picture">{"".join(out)}</svg></div>'


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Return round values between two others, of a logarithm whole powers of ten if there are several."""
    reach = high - low
    step = 10.0 ** math.floor(math.log10(reach / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if reach / (step * factor) <= 5)
    if log and reach >= 1.5:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]
