"""Texts that come with every CPython: what models are calibrated on, and measured on.

``pydoc_data.topics`` holds chapters of Python's own documentation, for ``help()``.  Seven of
them are long enough for 4096 tokens and share no paragraph; three are for calibration, the other
four are held out, so that nothing is measured on what a threshold was fitted to.
"""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from typing import NamedTuple

CALIBRATION = ("compound", "types", "string-methods")
HELD_OUT = ("specialnames", "formatstrings", "typesseq", "debugger")

PIECE = 18_500
"""Characters of the shortest piece: 4096 tokens of SmolLM2 are 15 700 to 17 800 of them."""

_LANGUAGE, _LIBRARY = "The Python Language Reference", "The Python Library Reference"
_CHAPTERS = {
    "compound": (_LANGUAGE, "Compound statements"),
    "types": (_LANGUAGE, "The standard type hierarchy"),
    "string-methods": (_LIBRARY, "String Methods"),
    "specialnames": (_LANGUAGE, "Special method names"),
    "formatstrings": (_LIBRARY, "Format String Syntax"),
    "typesseq": (_LIBRARY, "Sequence Types"),
    "debugger": (_LIBRARY, "The Python Debugger"),
}


class Text(NamedTuple):
    """A text, and for the card its title and licence."""

    content: str
    title: str
    license: str


def chapter(topic: str) -> Text:
    """Return one chapter, whole.

    Parameters
    ----------
    topic : str
        One of ``CALIBRATION`` or ``HELD_OUT``.

    Returns
    -------
    Text
        The wording depends on the Python version, which the title names.

    Raises
    ------
    ValueError
        If there is no such chapter.

    Examples
    --------
    >>> chapter("compound").content.split()[:2]
    ['Compound', 'statements']
    """
    if topic not in _CHAPTERS:
        raise ValueError(f"topic must be one of {', '.join(_CHAPTERS)}, got {topic!r}")
    from pydoc_data.topics import topics  # 700 kB of text that nothing else needs

    book, name = _CHAPTERS[topic]
    version = ".".join(map(str, sys.version_info[:3]))
    return Text(
        topics[topic].lstrip("\n"),
        f"{book} {version}, chapter {name} (pydoc_data.topics, topic {topic!r})",
        "PSF-2.0",
    )


def chapters() -> list[Text]:
    """Return all seven chapters, whole, those for calibration first.

    Examples
    --------
    >>> min(len(text.content) for text in chapters()) > 20_000
    True
    """
    return [chapter(topic) for topic in (*CALIBRATION, *HELD_OUT)]


def split() -> tuple[list[Text], list[Text]]:
    """Return texts to calibrate on and texts to measure on.

    Long chapters are cut into pieces, at paragraphs, each of at least ``PIECE`` characters; no
    chapter is on both sides.

    Returns
    -------
    calibration, held_out : list of Text
        At least five and six, in a fixed order.

    Examples
    --------
    >>> calibration, held_out = split()
    >>> {text.title for text in calibration} & {text.title for text in held_out}
    set()
    """
    calibration, held_out = (
        [piece for topic in topics for piece in pieces(chapter(topic))]
        for topics in (CALIBRATION, HELD_OUT)
    )
    return calibration, held_out


def pieces(text: Text, characters: int = PIECE) -> list[Text]:
    r"""Cut a text into as many even pieces of at least so many characters as there are.

    Parameters
    ----------
    text : Text
    characters : int

    Returns
    -------
    list of Text
        They join to the text, and begin at paragraphs where that leaves them long enough.

    Examples
    --------
    >>> [piece.content for piece in pieces(Text("One two.\n\nThree.", "Tale", "CC0-1.0"), 6)]
    ['One two.\n\n', 'Three.']
    """
    content = text.content
    count = max(len(content) // characters, 1)
    if count == 1:
        return [text]
    breaks = [match.end() for match in re.finditer(r"\n\n+", content)]
    cuts = [0]
    for i in range(1, count):
        even = i * len(content) // count
        earliest, latest = cuts[-1] + characters, len(content) - (count - i) * characters
        fitting = [cut for cut in breaks if earliest <= cut <= latest]
        distances = [abs(cut - even) for cut in fitting]
        cuts.append(fitting[distances.index(min(distances))] if fitting else max(even, earliest))
    cuts.append(len(content))
    return [
        text._replace(content=content[start:stop], title=f"{text.title}, part {i} of {count}")
        for i, (start, stop) in enumerate(pairwise(cuts), 1)
    ]
