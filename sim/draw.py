"""A tile map as a picture, plain or with axes and a legend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.geometry import COMPUTED, MASKED, SKIPPED, TileMap

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

PALETTE = {"masked": "#EEEEEE", "computed": "#0072B2", "skipped": "#E69F00"}
"""Okabe and Ito's colours: told apart by every kind of colour vision, and in grey."""

INK, RULE = "#222222", "#999999"
STROKES_FROM = 6
"""Pixels of a cell from which skipped tiles carry strokes."""


def tile_map_image(tiles: TileMap, head: int = 0, cell: int = 8) -> Image:
    """Draw one head's tile map: vote groups down, key tiles across.

    Parameters
    ----------
    tiles : TileMap
    head : int
    cell : int
        Pixels per side of a tile's longer edge unit: a tile of 64 × 128 is ``cell`` high and
        2 · ``cell`` wide, so that the picture is square where queries and keys are as many.
        From 6 pixels up, skipped tiles also carry a diagonal stroke.

    Returns
    -------
    PIL.Image.Image

    Raises
    ------
    ValueError
        If there is no such head or the cell is smaller than a pixel.

    Examples
    --------
    >>> from sim import scan, workloads
    >>> work = workloads.columns(1024, heads=1, sparsity=0.3)
    >>> tile_map_image(scan(work.q, work.k).decide(0.01)).size
    (128, 128)
    """
    if not 0 <= head < tiles.state.shape[0]:
        raise ValueError(f"head must be between 0 and {tiles.state.shape[0] - 1}, got {head}")
    if cell < 1:
        raise ValueError(f"cell must be at least 1 pixel, got {cell}")
    rows, keys = tiles.grid.tile
    unit = min(rows, keys)
    height, width = max(cell * rows // unit, 1), max(cell * keys // unit, 1)
    return _cells(tiles.state[head], height, width, cell)


def labelled_tile_map(tiles: TileMap, head: int = 0, cell: int = 8) -> Image:
    """Draw one head's tile map with the names of its axes and colours.

    Parameters
    ----------
    tiles : TileMap
    head : int
    cell : int
        As of :func:`tile_map_image`, which draws the map itself.

    Returns
    -------
    PIL.Image.Image

    Raises
    ------
    ValueError
        If there is no such head or the cell is smaller than a pixel.

    Examples
    --------
    >>> from sim import scan, workloads
    >>> work = workloads.columns(1024, heads=1, sparsity=0.3)
    >>> picture = labelled_tile_map(scan(work.q, work.k).decide(0.01))
    >>> picture.width > 128 and picture.height > 128
    True
    """
    picture, grid = tile_map_image(tiles, head, cell), tiles.grid
    names = list(PALETTE)
    legend = {
        names[state]: _cells(np.full((1, 1), state), 12, 12, min(cell, STROKES_FROM))
        for state in (COMPUTED, SKIPPED, MASKED)
        if (tiles.state[head] == state).any()
    }
    across = f"{_counted(grid.key_tiles, 'key tile')} of {_counted(grid.keys, 'key')}"
    down = f"{_counted(grid.groups, 'vote group')} of {_counted(grid.rows, 'query row')}"
    return labelled(picture, legend, Axis(across, grid.key_tiles), Axis(down, grid.groups))


class Axis(NamedTuple):
    """The cells along a side of a picture: what they are, how many, and the number of the first."""

    name: str
    cells: int
    first: int = 0


def labelled(picture: Image, legend: Mapping[str, str | Image], across: Axis, down: Axis) -> Image:
    """Put a picture made of cells on a white sheet, with axes and a legend above and beside it.

    Parameters
    ----------
    picture : PIL.Image.Image
        Its cells are all of one size.
    legend : mapping
        Name → colour, or a picture of a cell.
    across, down : Axis

    Returns
    -------
    PIL.Image.Image
        Letters grow with a picture of more than 768 pixels, so that they can be read when it is
        shrunk to fit a page.
    """
    from PIL import Image, ImageDraw, ImageFont

    size = max(12, max(picture.size) // 64)  # of letters
    font, gap, line = ImageFont.load_default(size), size // 2, size * 3 // 2
    names = [f"across: {across.name}", f"down: {down.name}"]
    lines = (_widest(font, legend) + size + gap, _widest(font, names))
    numbers = [_widest(font, [str(axis.first + axis.cells - 1)]) for axis in (across, down)]
    left = 2 * gap + max(numbers[1], numbers[0] // 2)
    width = max(left + picture.width + gap + numbers[0] // 2, 2 * gap + max(lines))

    entries, x, y = [], gap, gap
    for name in legend:
        wide = size + gap + _widest(font, [name])
        if x > gap and x + wide > width - gap:
            x, y = gap, y + line
        entries.append((x, y, name))
        x += wide + 2 * gap
    below = y + line if legend else gap
    top = below + len(names) * line + size + 2 * gap

    sheet = Image.new("RGB", (width, top + picture.height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for x, y, name in entries:
        fill, corner = legend[name], (x + size, y + size)
        if not isinstance(fill, str):
            fill = fill.resize((size, size), Image.Resampling.NEAREST)
        sheet.paste(fill, (x, y, *corner))
        draw.rectangle((x, y, *corner), outline=RULE)
        draw.text((x + size + gap, y + size / 2), name, INK, font, anchor="lm")
    for n, name in enumerate(names):
        draw.text((gap, below + n * line + size / 2), name, INK, font, anchor="lm")
    for at, number in _ticks(across, picture.width, numbers[0] + size):
        draw.line((left + at, top - gap, left + at, top), RULE)
        draw.text((left + at, top - gap - size / 2), number, INK, font, anchor="mm")
    for at, number in _ticks(down, picture.height, line):
        draw.line((left - gap, top + at, left, top + at), RULE)
        draw.text((left - gap - 2, top + at), number, INK, font, anchor="rm")
    draw.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=RULE)
    sheet.paste(picture, (left, top))
    return sheet


def _cells(state: NDArray[np.uint8], height: int, width: int, cell: int) -> Image:
    """Draw states as cells of this size; skipped ones with strokes ``cell`` pixels apart."""
    from PIL import Image

    colours = np.array(
        [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in PALETTE.values()], np.uint8
    )
    state = state.repeat(height, axis=0).repeat(width, axis=1)
    pixels = colours[state]
    if cell >= STROKES_FROM:
        y, x = np.indices(state.shape)
        stroke = (state == SKIPPED) & ((x + y) % cell == cell // 2)
        pixels[stroke] = colours[SKIPPED] // 2
    return Image.fromarray(pixels)


def _ticks(axis: Axis, extent: int, room: int) -> list[tuple[float, str]]:
    """Middles and numbers of at most ten cells, round numbers that lie ``room`` pixels apart.

    Examples
    --------
    >>> _ticks(Axis("tokens", 30, first=1398), 300, 90)
    [(25.0, '1400'), (125.0, '1410'), (225.0, '1420')]
    """
    cell = extent / axis.cells
    least = max(room / cell, axis.cells / 10, 1)
    power = 10 ** math.floor(math.log10(least))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= least)
    numbers = range(-(-axis.first // step) * step, axis.first + axis.cells, step)
    return [((n - axis.first + 0.5) * cell, str(n)) for n in numbers or [axis.first]]


def _widest(font: FreeTypeFont | ImageFont, texts: Iterable[str]) -> int:
    """Pixels of the widest of these texts."""
    return math.ceil(max((font.getlength(text) for text in texts), default=0))


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
