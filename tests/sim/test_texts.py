"""Texts: long enough, and nothing that is measured on was calibrated on."""

from __future__ import annotations

import pytest

from sim.texts import CALIBRATION, HELD_OUT, PIECE, Text, chapter, chapters, pieces, split


def windows(text: Text, size: int = 200) -> set[str]:
    return {text.content[i : i + size] for i in range(len(text.content) - size + 1)}


def test_the_two_sides_share_nothing():
    calibration, held_out = split()
    ours = set().union(*map(windows, calibration))
    for text in held_out:
        assert not ours & windows(text), text.title


def test_every_piece_is_long_enough_and_named_once():
    calibration, held_out = split()
    assert len(calibration) >= 5
    assert len(held_out) >= 6
    assert all(len(text.content) >= PIECE for text in calibration + held_out)
    titles = [text.title for text in calibration + held_out]
    assert len(set(titles)) == len(titles)
    assert split() == (calibration, held_out)


def test_pieces_are_the_chapters_again():
    for side, topics in zip(split(), (CALIBRATION, HELD_OUT), strict=True):
        whole = "".join(chapter(topic).content for topic in topics)
        assert "".join(text.content for text in side) == whole
    assert [text.license for text in chapters()] == ["PSF-2.0"] * 7
    assert chapters() == [chapter(topic) for topic in CALIBRATION + HELD_OUT]


@pytest.mark.parametrize("length", [1, 39, 40, 41, 400, 1234])
def test_pieces_are_never_short_whatever_the_paragraphs(length):
    long_paragraph = "a" * 57 + "\n\n" + "b" * 8 + "\n\n"
    text = Text((long_paragraph * 40)[:length], "t", "l")
    parts = pieces(text, 20)
    assert "".join(part.content for part in parts) == text.content
    assert len(parts) == max(length // 20, 1)
    assert all(len(part.content) >= min(20, length) for part in parts)


def test_pieces_begin_at_paragraphs():
    for text in split()[0]:
        if "part 2" in text.title:
            assert text.content[0] != "\n"
            assert chapter("compound").content.count("\n\n" + text.content[:300]) <= 1


def test_an_unknown_chapter_is_refused():
    with pytest.raises(ValueError, match=r"topic must be one of compound, .* got 'none'"):
        chapter("none")
