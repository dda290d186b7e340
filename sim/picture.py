"""Lines, areas, dots and words on a sheet, written as SVG or as PNG.

Enough for a chart without a plotting library.  Positions are pixels from the top left corner.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

FORMATS = (".svg", ".png")
SCALE = 2
"""Pixels of a PNG per unit: screens are finer than charts are laid out."""

SIZE = 13
"""Of words, in pixels."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line through ``points``; ``dash`` is lengths drawn and left out, in turn."""

    points: Sequence[Point]
    colour: str
    width: float = 1
    dash: tuple[int, ...] = ()


@dataclass(frozen=True)
class Area:
    """A filled polygon."""

    points: Sequence[Point]
    colour: str


@dataclass(frozen=True)
class Dot:
    """A filled circle."""

    centre: Point
    radius: float
    colour: str


@dataclass(frozen=True)
class Words:
    """A line of text that starts, has its middle, or ends at a point on its baseline."""

    at: Point
    text: str
    anchor: str = "start"
    size: float = SIZE


Shape = Line | Area | Dot | Words


@dataclass
class Picture:
    r"""A white sheet with a title, which is not drawn, and shapes, the first at the bottom.

    Examples
    --------
    >>> sheet = Picture(40, 20, "a stroke", [Line([(0, 0), (40, 20)], "#0072B2", width=2)])
    >>> sheet.svg().count("<line "), sheet.png()[:4]
    (1, b'\x89PNG')
    """

    width: int
    height: int
    title: str
    shapes: list[Shape] = field(default_factory=list)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a file in the format of its suffix: see :func:`check_suffix`."""
        check_suffix(path)
        if Path(path).suffix == ".svg":
            Path(path).write_text(self.svg(), encoding="utf-8")
        else:
            Path(path).write_bytes(self.png())

    def svg(self) -> str:
        """Give an SVG document."""
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'role="img" font-family="sans-serif" font-size="{SIZE}">',
            f"<title>{escape(self.title)}</title>",
            f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>',
            *map(_svg, self.shapes),
        ]
        return "\n".join([*lines, "</svg>"]) + "\n"

    def png(self) -> bytes:
        """Give a PNG file, ``SCALE`` times as large; needs Pillow."""
        from PIL import Image, ImageDraw, ImageFont

        # Drawn twice as fine and halved, since Pillow does not smooth lines.
        fine = 2 * SCALE
        image = Image.new("RGB", (fine * self.width, fine * self.height), "white")
        draw = ImageDraw.Draw(image)
        for one in self.shapes:
            if isinstance(one, Words):
                anchor = {"start": "ls", "middle": "ms", "end": "rs"}[one.anchor]
                font = ImageFont.load_default(fine * one.size)
                at = fine * one.at[0], fine * one.at[1]
                draw.text(at, one.text, fill="black", font=font, anchor=anchor)
            elif isinstance(one, Dot):
                (x, y), r = one.centre, one.radius
                corners = [fine * value for value in (x - r, y - r, x + r, y + r)]
                draw.ellipse(corners, fill=one.colour)
            elif isinstance(one, Area):
                draw.polygon([(fine * x, fine * y) for x, y in one.points], fill=one.colour)
            else:
                for run in dashes(one.points, one.dash):
                    scaled = [(fine * x, fine * y) for x, y in run]
                    draw.line(scaled, one.colour, round(fine * one.width), joint="curve")
        file = io.BytesIO()
        image.resize((SCALE * self.width, SCALE * self.height), Image.Resampling.BOX).save(
            file, "PNG", optimize=True
        )
        return file.getvalue()


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a picture can be written to a file of this name."""
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"a picture's file must end in .svg or .png, got {os.fspath(path)!r}")


def dashes(points: Sequence[Point], dash: Sequence[int]) -> list[list[Point]]:
    """Cut a line into the runs that a dash pattern draws.

    Examples
    --------
    >>> dashes([(0, 0), (10, 0)], (4, 2))
    [[(0, 0), (4.0, 0.0)], [(6.0, 0.0), (10, 0)]]
    """
    if not dash:
        return [list(points)]
    runs: list[list[Point]] = [[points[0]]]
    place, left = 0, float(dash[0])  # in the pattern; of its present length
    for (x0, y0), (x1, y1) in pairwise(points):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        done = 0.0
        while length - done > left:
            done += left
            at = x0 + (x1 - x0) * done / length, y0 + (y1 - y0) * done / length
            if place % 2 == 0:
                runs[-1].append(at)
            else:
                runs.append([at])
            place += 1
            left = float(dash[place % len(dash)])
        left -= length - done
        if place % 2 == 0:
            runs[-1].append((x1, y1))
    return [run for run in runs if len(run) > 1]


def _svg(one: Shape) -> str:
    if isinstance(one, Words):
        (x, y), size = one.at, "" if one.size == SIZE else f' font-size="{one.size:g}"'
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{one.anchor}"{size}>'
            f"{escape(one.text)}</text>"
        )
    if isinstance(one, Dot):
        x, y = one.centre
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{one.radius:g}" fill="{one.colour}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in one.points)
    if isinstance(one, Area):
        return f'<polygon points="{path}" fill="{one.colour}"/>'
    dash = f' stroke-dasharray="{" ".join(map(str, one.dash))}"' if one.dash else ""
    stroke = f'stroke="{one.colour}" stroke-width="{one.width:g}"{dash}'
    if len(one.points) == 2:
        (x1, y1), (x2, y2) = one.points
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {stroke}/>'
    return f'<polyline points="{path}" fill="none" {stroke}/>'
