"""Draws docs/images/graph.svg from the registry: `make graph`. Edges that a longer path implies are left out.

Layers by longest path; a long edge passes through one waypoint per layer; waypoints and stages are ordered by the mean
position of their neighbours, a few sweeps down and up (Sugiyama's method, without its refinements).
"""

import html
import itertools
from dataclasses import dataclass
from pathlib import Path

from pipeline.stages.registry import BY_NAME, STAGES

OUT = Path(__file__).parent / "images" / "graph.svg"
BOX_WIDTH, BOX_HEIGHT, ROW_HEIGHT, GAP, WAYPOINT_WIDTH, MARGIN = 196, 30, 58, 22, 14, 24
NUM_SWEEPS = 24
COLORS = {
    "parent": "#e8e2d4",
    "data": "#d9e8d2",
    "puzzle": "#d5e3f0",
    "reasoning": "#ecdcec",
    "target": "#f5e0c8",
    "training": "#f3d0c8",
    "results": "#e3e3e3",
}
LEGEND = (
    "parent: the checkpoint that comes in",
    "data: sources and mixtures",
    "puzzle: the block library",
    "reasoning: the switch's data",
    "target: search, assembly, fusion",
    "training: KD, CPT, SFT, RL",
    "results: measured, exported, told",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Rows of names (waypoints are tuples of source, target, row), links between neighbouring rows, centres."""

    rows: list[list[object]]
    links: list[tuple[object, object]]
    x: dict[object, float]


def reduced_edges() -> list[tuple[str, str]]:
    """Return the edges of the graph that no longer path implies."""
    above: dict[str, set[str]] = {}
    for stage in STAGES:
        above[stage.name] = set(stage.upstream).union(*(above[name] for name in stage.upstream))
    return [
        (name, stage.name)
        for stage in STAGES
        for name in stage.upstream
        if not any(name in above[other] for other in stage.upstream)
    ]


def lay_out(edges: list[tuple[str, str]]) -> Layout:
    """Place every stage and waypoint."""
    row_of: dict[str, int] = {}
    for stage in STAGES:
        row_of[stage.name] = max((row_of[name] + 1 for name in stage.upstream), default=0)
    # A stage that only one later stage reads moves down to it, which shortens its edges.
    for stage in reversed(STAGES):
        readers = [row_of[target] for source, target in edges if source == stage.name]
        if readers and stage.upstream:
            row_of[stage.name] = min(readers) - 1
    rows: list[list[object]] = [[] for _ in range(max(row_of.values()) + 1)]
    for name, row in row_of.items():
        rows[row].append(name)
    links: list[tuple[object, object]] = []
    for source, target in edges:
        path: list[object] = [source]
        for row in range(row_of[source] + 1, row_of[target]):
            path.append((source, target, row))
            rows[row].append(path[-1])
        links += list(zip(path, [*path[1:], target], strict=True))
    x: dict[object, float] = {}
    for row in rows:
        _spread(row, x)
    for sweep in range(NUM_SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            for item in row:
                near = [a for a, b in links if b == item] if down else [b for a, b in links if a == item]
                if near:
                    x[item] = sum(x[other] for other in near) / len(near)
            row.sort(key=lambda item: x[item])
            _separate(row, x)
    return Layout(rows=rows, links=links, x=x)


def _width(item: object) -> int:
    return BOX_WIDTH if isinstance(item, str) else WAYPOINT_WIDTH


def _spread(row: list[object], x: dict[object, float]) -> None:
    position = 0.0
    for item in row:
        x[item] = position + _width(item) / 2
        position += _width(item) + GAP


def _separate(row: list[object], x: dict[object, float]) -> None:
    """Push neighbours apart until none overlap, moving both sides alike."""
    for _ in range(60):
        moved = False
        for left, right in itertools.pairwise(row):
            missing = (_width(left) + _width(right)) / 2 + GAP - (x[right] - x[left])
            if missing > 0.5:
                x[left] -= missing / 2
                x[right] += missing / 2
                moved = True
        if not moved:
            return


def draw(layout: Layout) -> str:
    """Return the picture as SVG text."""
    row_of = {item: row for row, items in enumerate(layout.rows) for item in items}
    left = min(layout.x[item] - _width(item) / 2 for item in row_of) - MARGIN
    width = max(layout.x[item] + _width(item) / 2 for item in row_of) + MARGIN - left
    legend_rows = (len(LEGEND) + 2) // 3
    height = MARGIN * 2 + ROW_HEIGHT * len(layout.rows) + 22 * (legend_rows + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12.5">',
        "<title>The asset graph: every stage and what it reads</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
    ]

    def place(item: object) -> tuple[float, float]:
        return layout.x[item] - left, MARGIN + row_of[item] * ROW_HEIGHT + BOX_HEIGHT / 2

    for source, target in layout.links:
        (x0, y0), (x1, y1) = place(source), place(target)
        y0 += BOX_HEIGHT / 2 if isinstance(source, str) else 0
        y1 -= BOX_HEIGHT / 2 if isinstance(target, str) else 0
        middle = (y0 + y1) / 2
        path = f"M{x0:.1f} {y0:.1f} C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
        parts.append(f'<path d="{path}" fill="none" stroke="#8a8a8a" stroke-width="1.3"/>')
    for stage in STAGES:
        x, y = place(stage.name)
        border = 'stroke="#444" stroke-width="2"' if stage.per_target else 'stroke="#9a9a9a"'
        parts.append(
            f'<g><title>{html.escape(BY_NAME[stage.name].description)}</title><rect x="{x - BOX_WIDTH / 2:.1f}" '
            f'y="{y - BOX_HEIGHT / 2:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
            f'fill="{COLORS[stage.group]}" {border}/><text x="{x:.1f}" y="{y + 4.5:.1f}" text-anchor="middle" '
            f'fill="#222">{stage.name}</text></g>'
        )
    top = MARGIN * 1.5 + ROW_HEIGHT * len(layout.rows)
    for index, text in enumerate(LEGEND):
        x, y = MARGIN + index % 3 * (width - 2 * MARGIN) / 3, top + index // 3 * 22
        parts.append(
            f'<rect x="{x:.1f}" y="{y - 11:.1f}" width="14" height="14" rx="3" fill="{COLORS[text.split(":")[0]]}" '
            f'stroke="#9a9a9a"/><text x="{x + 20:.1f}" y="{y:.1f}" fill="#222" font-size="11.5">{text}</text>'
        )
    note = "heavy border: one per target; light border: shared by all targets"
    parts.append(f'<text x="{MARGIN}" y="{top + legend_rows * 22:.1f}" fill="#222" font-size="11.5">{note}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(draw(lay_out(reduced_edges())), encoding="utf-8")
