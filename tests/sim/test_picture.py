"""Pictures: SVG and PNG show the same shapes in the same places."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from sim.picture import SCALE, Area, Dot, Line, Picture, Words, dashes

SPACE = "{http://www.w3.org/2000/svg}"
SHAPES = [
    Area([(10, 10), (50, 10), (50, 50), (10, 50)], "#00FF00"),
    Line([(60, 80), (100, 80)], "#0000FF", 4, (10, 10)),
    Line([(5, 60), (20, 60), (20, 90)], "#123456", 2),
    Dot((80, 30), 8, "#FF0000"),
    Words((60, 60), "<b>", "start", 20),
]


def test_both_formats_hold_every_shape_where_it_is():
    sheet = Picture(120, 100, "a <title>", SHAPES)
    root = ElementTree.fromstring(sheet.svg())
    assert root.find(f"{SPACE}title").text == "a <title>"
    assert [one.tag.removeprefix(SPACE) for one in root[2:]] == [
        "polygon", "line", "polyline", "circle", "text"
    ]  # fmt: skip
    assert root[2].get("points") == "10.0,10.0 50.0,10.0 50.0,50.0 10.0,50.0"
    assert (root[3].get("stroke-dasharray"), root[4].get("stroke-dasharray")) == ("10 10", None)
    assert root[6].text == "<b>"

    image = Image.open(io.BytesIO(sheet.png()))
    assert image.size == (120 * SCALE, 100 * SCALE)
    pixels = np.asarray(image)

    def at(x: float, y: float) -> tuple[int, ...]:
        return tuple(pixels[round(y * SCALE), round(x * SCALE)].tolist())

    assert at(30, 30) == (0, 255, 0)
    assert at(80, 30) == (255, 0, 0)
    assert at(65, 80) == at(85, 80) == (0, 0, 255)
    assert at(75, 80) == at(95, 80) == (255, 255, 255)  # left out
    assert at(20, 75) == (0x12, 0x34, 0x56)
    assert at(2, 2) == (255, 255, 255)
    assert (pixels[45 * SCALE : 60 * SCALE, 60 * SCALE : 95 * SCALE] < 100).any()  # words


def test_dashes_go_on_around_corners():
    runs = dashes([(0, 0), (3, 0), (3, 4)], (5, 1))
    assert runs == [[(0, 0), (3, 0), (3.0, 2.0)], [(3.0, 3.0), (3, 4)]]
    assert dashes([(0, 0), (1, 1)], ()) == [[(0, 0), (1, 1)]]


def test_the_suffix_is_the_format(tmp_path):
    sheet = Picture(4, 4, "")
    sheet.write(tmp_path / "a.svg")
    sheet.write(tmp_path / "a.png")
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match=r"must end in \.svg or \.png, got 'a\.pdf'"):
        sheet.write("a.pdf")
