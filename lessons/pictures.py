"""Pictures that only lessons need; tile maps are drawn by ``sim.draw``, as in the app."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sim.draw import PALETTE

if TYPE_CHECKING:
    from PIL.Image import Image

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
