"""The overlap of two adapters as a picture: one panel of coloured cells for all modules, and one for each kind of them."""

from collections.abc import Mapping
from html import escape

from torch import Tensor

CELL, GAP, LABELS, TITLE = 14, 44, 30, 34
MOST_CELLS = 24  # a side
COLUMNS = 3
LIGHT, DARK = (247, 251, 255), (8, 48, 107)


def svg(panels: Mapping[str, Tensor], *, title: str, rows: str, columns: str) -> str:
    """An SVG file: each panel's cell (i, j) is the darker, the nearer its value is to 1; hovering shows it."""
    shown = {name: thinned(panel) for name, panel in panels.items()}
    width = max(len(indices[1]) for _, indices in shown.values()) * CELL + LABELS + GAP
    height = max(len(indices[0]) for _, indices in shown.values()) * CELL + LABELS + GAP
    parts = [
        _panel(name, panel, indices, x=GAP + (n % COLUMNS) * width, y=2 * TITLE + (n // COLUMNS) * height)
        for n, (name, (panel, indices)) in enumerate(shown.items())
    ]
    across = min(COLUMNS, len(shown)) * width + GAP
    down = 2 * TITLE + -(-len(shown) // COLUMNS) * height + GAP
    key = _key(GAP, down - GAP / 2)
    axes = f"rows: the first i directions of {rows} · columns: the first j directions of {columns}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(across, 560)} {down}" width="{max(across, 560)}" '
        f'height="{down}" font-family="sans-serif" font-size="10">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{GAP}" y="24" font-size="15">{escape(title)}</text>\n'
        f'<text x="{GAP}" y="42" fill="#555">{escape(axes)}</text>\n{"".join(parts)}{key}</svg>\n'
    )


def thinned(panel: Tensor, most: int = MOST_CELLS) -> tuple[Tensor, tuple[list[int], list[int]]]:
    """At most so many rows and columns, evenly taken, the last among them; and which they are, from 1."""
    chosen = tuple(_evenly(size, most) for size in panel.shape)
    return panel[[i - 1 for i in chosen[0]]][:, [j - 1 for j in chosen[1]]], chosen


def _evenly(size: int, most: int) -> list[int]:
    if size <= most:
        return list(range(1, size + 1))
    return sorted({round(1 + n * (size - 1) / (most - 1)) for n in range(most)})


def _panel(name: str, panel: Tensor, indices: tuple[list[int], list[int]], *, x: float, y: float) -> str:
    cells = [
        f'<rect x="{x + LABELS + n * CELL}" y="{y + LABELS + m * CELL}" width="{CELL}" height="{CELL}" '
        f'fill="{_colour(value)}"><title>φ(i={indices[0][m]}, j={indices[1][n]}) = {value:.3f}</title></rect>\n'
        for m, row in enumerate(panel.tolist())
        for n, value in enumerate(row)
    ]
    every = [-(-len(side) // 9) for side in indices]
    down = [
        f'<text x="{x + LABELS - 4}" y="{y + LABELS + (m + 0.75) * CELL}" text-anchor="end">{i}</text>\n'
        for m, i in enumerate(indices[0])
        if m % every[0] == 0
    ]
    across = [
        f'<text x="{x + LABELS + (n + 0.5) * CELL}" y="{y + LABELS - 4}" text-anchor="middle">{j}</text>\n'
        for n, j in enumerate(indices[1])
        if n % every[1] == 0
    ]
    heading = f'<text x="{x + LABELS}" y="{y + 10}" font-size="12" font-weight="bold">{escape(name)}</text>\n'
    return heading + "".join(cells + down + across)


def _key(x: float, y: float) -> str:
    steps = "".join(
        f'<rect x="{x + 26 + n * 12}" y="{y - 9}" width="12" height="12" fill="{_colour(n / 10)}"/>' for n in range(11)
    )
    return f'<text x="{x}" y="{y}">φ = 0</text>{steps}<text x="{x + 30 + 11 * 12}" y="{y}">1</text>\n'


def _colour(value: float) -> str:
    share = min(1.0, max(0.0, value))
    return "#" + "".join(
        f"{round(light + share * (dark - light)):02x}" for light, dark in zip(LIGHT, DARK, strict=True)
    )
