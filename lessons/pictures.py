"""Pictures that only lessons need; tile maps are drawn by ``sim.draw``, as in the app."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.draw import PALETTE

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.Image import Image

    from cuda_kernels.emulator import Event

INK = "#222222"


def weights_by_word(weights: NDArray, words: Sequence[str], cell: int = 18) -> Image:
    """Draw attention weights [n, n]: a row for each word that looks, a column for each looked at.

    Darker is more; the square root of a weight is drawn, so that small ones show.
    """
    from PIL import Image, ImageDraw, ImageFont

    n, margin = len(words), 130
    font = ImageFont.load_default(12)
    picture = Image.new("RGB", (margin + n * cell, margin + n * cell), "white")
    draw = ImageDraw.Draw(picture)
    names = [word.strip().replace("\n", "") or repr(word)[1:-1] for word in words]
    for i, name in enumerate(names):
        draw.text((margin - 6, margin + (i + 0.5) * cell), name, INK, font, anchor="rm")
    strip = Image.new("RGB", (margin, n * cell), "white")
    for j, name in enumerate(names):
        ImageDraw.Draw(strip).text((6, (j + 0.5) * cell), name, INK, font, anchor="lm")
    picture.paste(strip.rotate(90, expand=True), (margin, 0))
    for i, j in np.ndindex(n, n):
        corner = (margin + j * cell, margin + i * cell)
        colour = PALETTE["masked"] if j > i else _blue(float(weights[i, j]) ** 0.5)
        draw.rectangle((*corner, corner[0] + cell - 2, corner[1] + cell - 2), colour)
    return picture


def _blue(share: float) -> tuple[int, ...]:
    """White at 0, the palette's blue at 1."""
    full = [int(PALETTE["computed"][i : i + 2], 16) for i in (1, 3, 5)]
    return tuple(round(255 + min(max(share, 0), 1) * (c - 255)) for c in full)


def categories(values: NDArray, colours: Sequence[str], cell: int = 3) -> Image:
    """Draw small integers [rows, columns] in these colours."""
    from PIL import Image, ImageColor

    table = np.array([ImageColor.getrgb(colour) for colour in colours], np.uint8)
    return Image.fromarray(table[values].repeat(cell, axis=0).repeat(cell, axis=1))


def numbers(
    values: NDArray, colours: Sequence[tuple[float, float, float]], cell: int = 24
) -> Image:
    """Draw small integers [rows, columns] as numbers, on their colours (parts 0 … 1)."""
    from PIL import Image, ImageDraw, ImageFont

    rows, columns = values.shape
    font = ImageFont.load_default(11)
    picture = Image.new("RGB", (columns * cell, rows * cell), "white")
    draw = ImageDraw.Draw(picture)
    for (i, j), value in np.ndenumerate(values):
        x, y = j * cell, i * cell
        fill = tuple(round(255 * part) for part in colours[value])
        draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill)
        draw.text((x + cell / 2 - 1, y + cell / 2 - 1), str(value), INK, font, anchor="mm")
    return picture


def bars_under_line(bars: NDArray, line: NDArray, names: tuple[str, str]) -> Image:
    """Draw values as bars and others as a stair above them, on one scale."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, step = 40 + 20 * len(bars), 260, 20
    low, high = float(min(bars.min(), line.min())), float(max(bars.max(), line.max()))

    def y(value: float) -> float:
        return 40 + (height - 60) * (high - value) / max(high - low, 1e-9)

    font = ImageFont.load_default(12)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for i, (bar, level) in enumerate(zip(bars.tolist(), line.tolist(), strict=True)):
        x = 30 + i * step
        draw.rectangle((x + 3, y(bar), x + step - 3, height - 18), PALETTE["computed"])
        draw.line((x, y(level), x + step, y(level)), PALETTE["skipped"], 3)
    draw.text((30, 8), names[1], PALETTE["skipped"], font)
    draw.text((30 + width // 2, 8), names[0], PALETTE["computed"], font)
    for value in (high, low):
        draw.text((2, y(value) - 6), f"{value:+.0f}", INK, font)
    return picture


def chart(
    lines: Sequence[tuple[str, NDArray, NDArray]],
    titles: tuple[str, str],
    *,
    x_range: tuple[float, float],
    y_range: tuple[float, float] = (0, 100),
    log_x: bool = False,
    log_y: bool = False,
    dots: bool = False,
) -> Image:
    """Draw curves (name, x, y) on two axes, at most five; what lies outside is left out.

    Each has a colour and, at its points, a mark of its own.  ``dots``: all but the first are only
    points.
    """
    from PIL import Image, ImageDraw, ImageFont

    left, top, width, height = 64, 46 + 18 * ((len(lines) + 1) // 2), 560, 320
    font = ImageFont.load_default(12)
    picture = Image.new("RGB", (left + width + 24, top + height + 48), "white")
    draw = ImageDraw.Draw(picture)

    def places(values: ArrayLike, ends: tuple[float, float], log: bool, size: int) -> NDArray:
        scaled, both = np.asarray(values, float), np.array(ends, float)
        if log:
            with np.errstate(divide="ignore"):
                scaled, both = np.log(scaled), np.log(both)
        return (scaled - both[0]) / (both[1] - both[0]) * size

    for value in _ticks(x_range, log_x):
        at = left + float(places(value, x_range, log_x, width))
        draw.line((at, top, at, top + height), "#E3E3E3")
        draw.text((at, top + height + 6), f"{value:g}", INK, font, anchor="mt")
    for value in _ticks(y_range, log_y):
        at = top + height - float(places(value, y_range, log_y, height))
        draw.line((left, at, left + width, at), "#E3E3E3")
        draw.text((left - 6, at), f"{value:g}", INK, font, anchor="rm")
    draw.text((left + width / 2, top + height + 28), titles[0], INK, font, anchor="mt")
    draw.text((8, 8), titles[1], INK, font)
    for n, (name, xs, ys) in enumerate(lines):
        colour = _COLOURS[n]
        x = left + places(xs, x_range, log_x, width)
        y = top + height - places(ys, y_range, log_y, height)
        inside = (x >= left) & (x <= left + width) & (y >= top) & (y <= top + height)
        points = list(zip(x[inside].tolist(), y[inside].tolist(), strict=True))
        if n == 0 or not dots:
            draw.line(points, colour, 2)
        small = dots and n > 0
        if small or len(points) <= 40:
            for point in points:
                _mark(draw, point, n, colour, 1 if small else 4)
        key = (left + 12 + n % 2 * width // 2, 38 + 18 * (n // 2))
        _mark(draw, key, n, colour, 4)
        draw.text((key[0] + 14, key[1]), name, INK, font, anchor="lm")
    return picture


_COLOURS = (PALETTE["computed"], PALETTE["skipped"], "#009E73", "#CC79A7", "#000000")


def _mark(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], kind: int, colour: str, r: int
) -> None:
    """Draw the mark of the curve of this number: disc, square, triangle, ring, upright cross."""
    x, y = at
    box = (x - r, y - r, x + r, y + r)
    match kind:
        case 0:
            draw.ellipse(box, colour)
        case 1:
            draw.rectangle(box, colour)
        case 2:
            draw.polygon([(x - r, y + r), (x + r, y + r), (x, y - r)], colour)
        case 3:
            draw.ellipse(box, outline=colour, width=2)
        case _:
            draw.line((x - r, y, x + r, y), colour, 2)
            draw.line((x, y - r, x, y + r), colour, 2)


def _ticks(ends: tuple[float, float], log: bool) -> list[float]:
    """Powers of ten, or ten steps."""
    if not log:
        return np.linspace(*ends, 11).tolist()
    first, last = np.ceil(np.log10(ends[0])), np.floor(np.log10(ends[1]))
    return (10.0 ** np.arange(first, last + 1)).tolist()


_UNITS = {
    "TMA load": ("copy", "#009E73"),
    "wgmma_ss": ("Q·K", PALETTE["computed"]),
    "wgmma_rs": ("P·V", "#56B4E9"),
}
_THREADS = {
    "row_max": ("maxima", "#F0E442"),
    "exp2_rows": ("exponentials", "#CC79A7"),
    "pack_rows": ("exponentials", "#CC79A7"),
}
_WAIT = ("waits", "#D0D0D0")


def timeline(
    events: Sequence[Event],
    lanes: Mapping[str, int],
    skipped: Mapping[str, Collection[int]],
    width: int = 1200,
) -> Image:
    """Draw what the pipeline of an emulated kernel did when, by the model's cycles.

    A lane is a warp.  Above is what copies and products it has begun, beside each other where they
    overlap; below, what its own threads do.  Numbers in bars are tiles; what is copied before the
    first is Q.  Tiles that a lane has ``skipped`` are named behind their maxima.
    """
    from PIL import Image, ImageDraw, ImageFont

    left, top, step, cycles = 80, 66, 18, max(event.end for event in events)
    font, small = ImageFont.load_default(12), ImageFont.load_default(10)
    rows = [(name, warp, _rows_of(events, warp)) for name, warp in lanes.items()]
    height = top + sum(step * len(one) + 14 for _, _, one in rows) + 20
    picture = Image.new("RGB", (left + width + 24, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((8, 6), "The emulator's model of durations, in cycles: not a measurement", INK, font)
    for n, (name, colour) in enumerate(
        dict.fromkeys([*_UNITS.values(), *_THREADS.values(), _WAIT])
    ):
        draw.rectangle((left + 120 * n, 32, left + 120 * n + 12, 44), colour)
        draw.text((left + 120 * n + 18, 38), name, INK, font, anchor="lm")
    y = top
    for name, warp, bars in rows:
        draw.text((8, y), name, INK, font)
        for row in bars:
            for start, end, (_, colour), tile in row:
                box = (left + start / cycles * width, y, left + end / cycles * width - 1, y + 14)
                draw.rectangle((*box[:2], max(box[0], box[2]), box[3]), colour)
                if colour != _WAIT[1] and box[2] - box[0] > 8:
                    middle = ((box[0] + box[2]) / 2, y + 7)
                    ink = "white" if colour in ("#009E73", PALETTE["computed"]) else INK
                    draw.text(middle, str(tile) if tile >= 0 else "Q", ink, small, anchor="mm")
            y += step
        for event in events:
            if (event.warp, event.name) == (warp, "row_max") and event.tile in skipped.get(
                name, ()
            ):
                at = left + event.end / cycles * width
                draw.text((at, y - 2), f"skips {event.tile}", "#B25F00", small, anchor="ma")
        y += 14
    for value in range(0, int(cycles), 1000):
        at = left + value / cycles * width
        draw.line((at, top - 6, at, top - 2), INK)
        draw.line((at, y - 4, at, y), INK)
        draw.text((at, y + 2), str(value), INK, small, anchor="mt")
    return picture


def overlap(events: Sequence[Event], some: Collection[str], others: Collection[str]) -> float:
    """Share of the cycles in which some of these events were under way in which others were too."""
    busy = np.zeros((2, int(max(event.end for event in events))), bool)
    for event in events:
        for which, names in enumerate((some, others)):
            if event.name in names:
                busy[which, int(event.start) : int(event.end)] = True
    return float(busy[1, busy[0]].mean())


def _rows_of(events: Sequence[Event], warp: int) -> list[list[tuple]]:
    """Bars (start, end, kind, tile) of a warp: rows of what units do for it, then its own."""
    own: list[tuple] = []
    units: list[list[tuple]] = [[]]
    for event in sorted((one for one in events if one.warp == warp), key=lambda one: one.start):
        if event.name in _UNITS:
            row = next((one for one in units if not one or one[-1][1] <= event.start), None)
            if row is None:
                units.append(row := [])
            kind = _UNITS[event.name]
        else:
            row = own
            kind = _THREADS.get(event.name) or _WAIT
            if kind is _WAIT and not (" " in event.name or event.name == "wgmma_wait"):
                continue
        last = row[-1] if row else None
        if last and last[1:] == (event.start, kind, event.tile):  # the same goes on
            row[-1] = (last[0], event.end, kind, event.tile)
        elif event.end > event.start:
            row.append((event.start, event.end, kind, event.tile))
    return [*units, own]


def side_by_side(images: Sequence[Image], titles: Sequence[str]) -> Image:
    """Put pictures beside each other, each under its title."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(14)
    width = max(*(image.width for image in images), 180) + 12
    sheet = Image.new("RGB", (width * len(images), images[0].height + 26), "white")
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        ImageDraw.Draw(sheet).text((i * width, 4), title, INK, font)
        sheet.paste(image, (i * width, 26))
    return sheet
