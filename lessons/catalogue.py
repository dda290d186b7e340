"""Which lessons there are, read from their own first lines, and the table in ``README.md``.

``python -m lessons.catalogue`` writes that table anew.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

LESSONS = Path(__file__).parent
FIRST_KERNEL = LESSONS / "notebooks" / "first_kernel.py"
RUN_THE_KERNELS = LESSONS / "notebooks" / "run_the_kernels.py"
NOTEBOOKS = (FIRST_KERNEL, RUN_THE_KERNELS)

_HEADER = re.compile(
    r"# %% \[markdown\]\n"
    r"# # (?P<number>\d{1,2}) · (?P<title>.+)\n"
    r"#\n"
    r"# \*\*Question:\*\* (?P<question>.+(?:\n# .+)*)\n"
    r"#\n"
    r"# \*\*Before:\*\* (?P<before>.+)\n"
    r"# \*\*Time:\*\* (?P<minutes>\d+) minutes\. "
    r"\*\*Needs a GPU:\*\* (?P<gpu>yes|no)\.\n"
)

_INTRODUCTION = """\
# Lessons

From one real sentence to a CUDA kernel that skips what does not matter, one question at a time.
You need Python and NumPy; no CUDA, and no GPU.

Every lesson is one file with a gap for you to fill. Install once (`make app` in the root of the
clone, then `. .venv/bin/activate`; or `pip install -e .`) and begin:

```
skip-softmax lesson            # the list, and what you have solved
skip-softmax lesson open 0     # where the file is, and how to open it as a notebook
skip-softmax lesson check 0    # run your file: it says what is wrong, or that it is solved
```

Open the file in any editor, look for `FILL ME IN`, write the missing lines in place of
`helpers.todo(…)`, and check again. Every file is also a plain program
(`python lessons/00_attention.py`) and a notebook (with `pip install -e '.[notebooks]'`; VS Code
runs its cells as it is). Pictures are written to `lessons/output/`. To begin a lesson anew:
`git checkout lessons/00_attention.py`.

"""

_ENDING = """
After lesson 5, [notebooks/first_kernel.py](notebooks/first_kernel.py) calls the real kernel, on
your GPU if you have one. Then [notebooks/run_the_kernels.py](notebooks/run_the_kernels.py): back
ends, reports, plans, machine code, timing. Both are programs and notebooks, as lessons are:
`python lessons/notebooks/first_kernel.py`.

Letters and words mean the same in lessons, simulator, kernels and app: `m` running row maximum, `l`
running row sum, `acc` output gathered so far, `alpha` the factor that rescales `l` and `acc` when
`m` grows, `p` weights before they are divided by `l`, `u` a bound on the weight left out; *gap*:
how far a tile lies above the running maxima.
"""


@dataclass(frozen=True)
class Lesson:
    """One lesson, as its header describes it."""

    number: int
    title: str
    question: str
    before: str
    minutes: int
    needs_gpu: bool
    path: Path

    @property
    def solution(self) -> Path:
        """The same file with its gaps filled."""
        return self.path.parent / "solutions" / self.path.name


def lessons() -> list[Lesson]:
    """List the lessons in order.

    Raises
    ------
    ValueError
        If there are none, or if a file does not begin as a lesson must.

    Examples
    --------
    >>> [lesson.number for lesson in lessons()]
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    """
    found = [read_lesson(path) for path in sorted(LESSONS.glob("[0-9][0-9]_*.py"))]
    if not found:
        raise ValueError(f"there are no lessons in {LESSONS}")
    return found


def read_lesson(path: Path) -> Lesson:
    """Read the header of one lesson.

    Raises
    ------
    ValueError
        If the file does not begin with title, question, what to do before, time and GPU.
    """
    header = _HEADER.search(path.read_text(encoding="utf-8"))
    if header is None:
        raise ValueError(f"{path.name} must begin with a title, a question and what it needs")
    return Lesson(
        int(header["number"]),
        header["title"],
        header["question"].replace("\n# ", " "),
        header["before"],
        int(header["minutes"]),
        header["gpu"] == "yes",
        path,
    )


def readme() -> str:
    """Build the text of ``lessons/README.md``."""
    rows = [
        f"| {one.number} | [{one.title}]({one.path.name}) | {one.question} | {one.minutes} min "
        f"| {'yes' if one.needs_gpu else 'no'} | [solution](solutions/{one.path.name}) |\n"
        for one in lessons()
    ]
    table = "| | lesson | question | time | needs a GPU | |\n|---|---|---|---|---|---|\n"
    note = "<!-- Written by `python -m lessons.catalogue` from the lessons' own first lines. -->\n"
    return note + _INTRODUCTION + table + "".join(rows) + _ENDING


if __name__ == "__main__":
    (LESSONS / "README.md").write_text(readme(), encoding="utf-8")
