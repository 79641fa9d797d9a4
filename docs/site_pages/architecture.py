"""The graph of the modules, as Mermaid writes it, drawn as SVG: layer by layer, each arrow downward.

A browser draws Mermaid with a large script from elsewhere; this needs none, and follows the colours of the page.
"""

import html
import itertools
import re
from dataclasses import dataclass, field

BLOCK = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NODE = re.compile(r"^\s*(\w+)\[(.+)\]$")
ARROW = re.compile(r"^\s*(\w+) --> (\w+)$")
DOWN, GAP, HIGH, LETTER = 62, 26, 28, 7.6


@dataclass
class Graph:
    """Nodes with their labels, those that belong to a subgraph, and arrows."""

    labels: dict[str, str] = field(default_factory=dict)
    inside: dict[str, str] = field(default_factory=dict)
    arrows: list[tuple[str, str]] = field(default_factory=list)


def with_drawings(markdown: str) -> str:
    """Return a page with its Mermaid diagrams drawn."""
    return BLOCK.sub(lambda match: drawing(match[1]), markdown)


def read(text: str) -> Graph:
    """Return the graph of a Mermaid flowchart."""
    graph, inside = Graph(), ""
    for line in text.splitlines():
        if line.strip().startswith("subgraph "):
            inside = line.split()[1]
        elif line.strip() == "end":
            inside = ""
        elif node := NODE.match(line):
            graph.labels[node[1]] = node[2]
            if inside:
                graph.inside[node[1]] = inside
        elif arrow := ARROW.match(line):
            graph.arrows.append((arrow[1], arrow[2]))
    return graph


def layers(graph: Graph) -> dict[str, int]:
    """Return the layer of each node: below all nodes that have an arrow to it. Raises ValueError for a cycle."""
    found = dict.fromkeys(graph.labels, 0)
    for _ in range(len(found) + 1):
        changed = False
        for begin, end in graph.arrows:
            if found[end] <= found[begin]:
                found[end], changed = found[begin] + 1, True
        if not changed:
            return found
    raise ValueError("the modules import one another in a circle")


def drawing(text: str) -> str:
    """Return a flowchart as SVG."""
    graph = read(text)
    layer = layers(graph)
    paths, rows = _rows(graph, layer)
    width = {
        name: len(graph.labels[name]) * LETTER + 22 if name in graph.labels else 8.0 for row in rows for name in row
    }
    across, total = _places(rows, width)
    height = len(rows) * DOWN
    out = [
        f'<svg viewBox="0 0 {total:.0f} {height}" width="{total:.0f}" height="{height}" role="img" font-size="13">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0,0 L8,4 L0,8 z"/></marker></defs>',
    ]
    for path in paths:
        points = [(across[name], level * DOWN + 10.0) for level, name in enumerate(path, layer[path[0]])]
        out.append(f'<path class="arrow" marker-end="url(#head)" d="{_curve(points)}"/>')
    for name, label in graph.labels.items():
        x, y = across[name], layer[name] * DOWN + 10
        kind = "box engine-box" if name in graph.inside else "box"
        out.append(
            f'<rect class="{kind}" x="{x - width[name] / 2:.1f}" y="{y}" width="{width[name]:.1f}" height="{HIGH}" '
            'rx="5"/>'
        )
        out.append(f'<text x="{x:.1f}" y="{y + 19}" text-anchor="middle">{html.escape(label)}</text>')
    names = ", ".join(sorted(set(graph.inside.values())))
    legend = f"<p>Boxes with a coloured edge are the modules of the {html.escape(names)}.</p>" if names else ""
    return f'<div class="picture">{"".join(out)}</svg>{legend}</div>'


def _rows(graph: Graph, layer: dict[str, int]) -> tuple[list[list[str]], list[list[str]]]:
    """Return each arrow as a path through the layers, and the layers, ordered so that few arrows cross."""
    rows: list[list[str]] = [[] for _ in range(max(layer.values()) + 1)]
    for name, level in layer.items():
        rows[level].append(name)
    paths = []
    for begin, end in graph.arrows:
        between = [f"{begin}>{end}>{level}" for level in range(layer[begin] + 1, layer[end])]
        for level, name in enumerate(between, layer[begin] + 1):
            rows[level].append(name)
        paths.append([begin, *between, end])
    near: dict[str, set[str]] = {name: set() for row in rows for name in row}
    for path in paths:
        for a, b in itertools.pairwise(path):
            near[a].add(b)
            near[b].add(a)
    for turn in range(12):
        order = rows if turn % 2 == 0 else rows[::-1]
        for before, row in itertools.pairwise(order):
            place = {name: number / max(1, len(before) - 1) for number, name in enumerate(before)}
            own = {name: number / max(1, len(row) - 1) for number, name in enumerate(row)}
            row.sort(key=lambda name: _mean([place[n] for n in near[name] if n in place], own[name]))
    return paths, rows


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _places(rows: list[list[str]], width: dict[str, float]) -> tuple[dict[str, float], float]:
    """Return the middle of each node, its row centred, and the width of the widest row."""
    lengths = [sum(width[name] + GAP for name in row) for row in rows]
    total = max(lengths)
    across = {}
    for row, length in zip(rows, lengths, strict=True):
        x = (total - length) / 2
        for name in row:
            across[name] = x + (width[name] + GAP) / 2
            x += width[name] + GAP
    return across, total


def _curve(points: list[tuple[float, float]]) -> str:
    """Return a smooth way from the lower edge of the first node to the upper edge of the last."""
    (x, y), *others = points
    y += HIGH
    pieces = [f"M{x:.1f},{y:.1f}"]
    for number, (to_x, to_y) in enumerate(others):
        low = to_y if number == len(others) - 1 else to_y + HIGH / 2
        middle = (y + low) / 2
        pieces.append(f"C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{low:.1f}")
        x, y = to_x, low
    return " ".join(pieces)
