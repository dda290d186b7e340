"""The rule as text: the README's pseudo-code beside the teaching kernel's own lines, by phase.

Lines are found by what they say, so that an edit of the kernel either keeps the pairing or makes
it fail; the kernel is read as text and never imported.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

KERNEL = Path(__file__).resolve().parents[1] / "cuda_kernels" / "prefill_simt.py"

PSEUDO_CODE = """\
m = −∞, l = 0, acc = 0, u = 0                          # per row
for j in visit order:
    s        = scale · q kᵀ                            # always: K is always read
    tile_max = max of s over the tile's keys
    if every row: tile_max − m < ln λ:                 # the vote; m from before this tile
        u += keys · exp(tile_max − m)                  # bounds what is left out
        continue                                       # m, l, acc stay as they are
    m_new    = max(m, tile_max);  alpha = exp(m − m_new)
    p        = exp(s − m_new)                          # what a skip saves: this,
    l, u     = l·alpha + Σp, u·alpha
    acc      = acc·alpha + p v;  m = m_new             # and this
output = acc / l;  dropped mass ≤ u / (l + u)"""
"""Section "The rule" of the README, letter by letter."""

FIRST, LAST = "for step in range(n):", "bound[b, h, row] = "
"""What the first and the last kernel line that is shown say."""


class Phase(NamedTuple):
    """One moment of a visit: what happens, and the lines that say so.

    ``pseudo`` and ``kernel`` name a first and a last line each by how they begin.
    """

    name: str
    says: str
    pseudo: tuple[str, str]
    kernel: tuple[str, str]


PHASES = (
    Phase(
        "scores",
        "Load K, form the scores of this tile, and take each row’s largest.",
        ("s        =", "tile_max ="),
        ("# --- S = scale", "tile_max = max(tile_max, p[c])"),
    ),
    Phase(
        "vote",
        "Every row compares its largest score with its running maximum; one veto is enough.",
        ("if every row", "if every row"),
        ("# --- the vote", "state[b, h, i, j] ="),
    ),
    Phase(
        "skip",
        "All agree: only u grows, by what the tile can weigh at most. V is not touched.",
        ("u += keys", "continue"),
        ("if skip:", "continue"),
    ),
    Phase(
        "softmax",
        "Kept: move to the new maximum, rescale by alpha, take the exponentials.",
        ("m_new    =", "l, u     ="),
        ("# --- online softmax", "l += p[c]"),
    ),
    Phase(
        "values",
        "Load V and add p·v to the output.",
        ("acc      =", "acc      ="),
        ("# --- acc += P V", "acc[d] += p[c]"),
    ),
    Phase(
        "output",
        "The visit is over: divide by l, and state the bound.",
        ("output =", "output ="),
        ("if row < lq:", "bound[b, h, row] ="),
    ),
)


class Listing(NamedTuple):
    """Lines of a text, the number of the first, and the (first, last) line lit in each phase."""

    lines: list[str]
    first_number: int
    lit: dict[str, tuple[int, int]]


@cache
def pseudo_code() -> Listing:
    """List the pseudo-code; lit lines are counted from 0."""
    lines = PSEUDO_CODE.splitlines()
    return Listing(lines, 1, {phase.name: _span(lines, *phase.pseudo) for phase in PHASES})


@cache
def kernel() -> Listing:
    """List the kernel's loop over key tiles and what follows it; lit lines are counted from 0.

    Raises
    ------
    LookupError
        If a line is not found: the kernel was edited and PHASES was not.
    """
    source = KERNEL.read_text(encoding="utf-8").splitlines()
    start, stop = _span(source, FIRST, LAST)
    lines = source[start : stop + 1]
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    lines = [line[indent:] for line in lines]
    return Listing(lines, start + 1, {phase.name: _span(lines, *phase.kernel) for phase in PHASES})


def _span(lines: list[str], first: str, last: str) -> tuple[int, int]:
    """First line that begins with ``first``, and the next from there on that begins so."""
    start = _find(lines, first, 0)
    return start, _find(lines, last, start)


def _find(lines: list[str], beginning: str, start: int) -> int:
    for number in range(start, len(lines)):
        if lines[number].strip().startswith(beginning):
            return number
    raise LookupError(f"no line from {start} on begins with {beginning!r}")
