"""What ``skip-softmax lesson`` does: list the lessons, open one, check one, build the notebooks.

Files are edited in place.  A lesson is solved when its program runs to the end, and its check is
what ends it otherwise; results are remembered by content in ``lessons/output/progress.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lessons.catalogue import LESSONS, NOTEBOOKS, Lesson, lessons
from lessons.helpers import OUTPUT, ROOT, child_environment

PROGRESS = OUTPUT / "progress.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``skip-softmax lesson`` with these arguments.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows ``lesson``; default ``sys.argv[1:]``.  Nothing is ``list``.

    Returns
    -------
    int
        0; 1 if the lesson that was checked is not solved; 2 after an error that one sentence on
        stderr names.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"skip-softmax lesson: {error}", file=sys.stderr)
        return 2


def find(number: int) -> Lesson:
    """Give the lesson of this number.

    Raises
    ------
    ValueError
        If there is none.
    """
    numbers = {lesson.number: lesson for lesson in lessons()}
    if number not in numbers:
        raise ValueError(f"lesson must be one of {', '.join(map(str, numbers))}, got {number}")
    return numbers[number]


def solved(lesson: Lesson) -> bool:
    """Whether a lesson is solved; runs it unless its content is known or it has a gap left."""
    if "helpers.todo(" in lesson.path.read_text(encoding="utf-8"):
        return False
    known = _remembered().get(_content(lesson))
    return check(lesson, quiet=True)[0] if known is None else known


def check(lesson: Lesson, *, quiet: bool = False) -> tuple[bool, str]:
    """Run a lesson as a program.

    Parameters
    ----------
    lesson : Lesson
    quiet : bool
        Return what it prints instead of letting it through.

    Returns
    -------
    solved : bool
    output : str
    """
    done = subprocess.run(
        [sys.executable, str(lesson.path)],
        env=child_environment(),
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        encoding="utf-8",
    )
    solved = done.returncode == 0
    OUTPUT.mkdir(exist_ok=True)
    remembered = _remembered() | {_content(lesson): solved}
    PROGRESS.write_text(json.dumps(remembered), encoding="utf-8")
    return solved, done.stdout or ""


def build(path: Path) -> Path:
    """Build the notebook of a percent script beside it, without outputs.

    A notebook that is newer than its script is left alone: somebody has worked in it.  It names
    its script, so that Jupyter with jupytext saves both.

    Returns
    -------
    Path
        The notebook.

    Raises
    ------
    ValueError
        If jupytext is not installed.
    """
    if importlib.util.find_spec("jupytext") is None:
        raise ValueError("notebooks need jupytext: pip install -e '.[notebooks]'")
    import jupytext

    notebook = path.with_suffix(".ipynb")
    if not notebook.exists() or notebook.stat().st_mtime < path.stat().st_mtime:
        content = jupytext.read(path, fmt="py:percent")
        content.metadata["kernelspec"] = {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        }
        content.metadata["jupytext"] = {
            "formats": "ipynb,py:percent",
            "notebook_metadata_filter": "-all",  # saving the notebook adds nothing to the script
            "cell_metadata_filter": "-all",
        }
        jupytext.write(content, notebook, fmt="ipynb")
    return notebook


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skip-softmax lesson",
        description="From one real sentence to a CUDA kernel, one question at a time.",
    )
    parser.set_defaults(run=_list, json=False)
    commands = parser.add_subparsers(metavar="COMMAND")
    listed = commands.add_parser("list", help="all lessons, and which are solved (the default)")
    opened = commands.add_parser("open", help="where a lesson is, and how to open it")
    checked = commands.add_parser("check", help="run your file and say whether it is solved")
    built = commands.add_parser("build", help="build a notebook of every lesson (needs jupytext)")
    for command in (opened, checked):
        command.add_argument("number", type=int, metavar="N", help="0, 1, …")
    for command, run in ((listed, _list), (opened, _open), (checked, _check), (built, _build)):
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
    return parser


def _list(options: argparse.Namespace) -> int:
    found = [(lesson, solved(lesson)) for lesson in lessons()]
    if options.json:
        print(json.dumps([_as_dict(lesson) | {"solved": done} for lesson, done in found], indent=2))
        return 0
    for lesson, done in found:
        mark = "✓ solved" if done else "· to do "
        print(f"{mark}  {lesson.number:2}  {lesson.title} ({lesson.minutes} min)")
        print(f"              {lesson.question}")
    left = [lesson.number for lesson, done in found if not done]
    print(f"\nNext: skip-softmax lesson open {left[0]}" if left else "\nAll solved.")
    return 0


def _open(options: argparse.Namespace) -> int:
    lesson = find(options.number)
    notebook = None
    if importlib.util.find_spec("jupytext") is not None:
        notebook = build(lesson.path)
    if options.json:
        print(json.dumps(_as_dict(lesson) | {"notebook": notebook and _shown(notebook)}, indent=2))
        return 0
    print(f"Lesson {lesson.number}: {lesson.title}")
    print(f"  before    {lesson.before.rstrip('.')}; it takes about {lesson.minutes} minutes")
    print(f"  edit      {_shown(lesson.path)}  (look for FILL ME IN)")
    if notebook is None:
        print("  notebook  pip install -e '.[notebooks]' first; VS Code runs the cells as it is")
    elif importlib.util.find_spec("jupyterlab") is None:
        print(f"  notebook  {_shown(notebook)}  (open it with any Jupyter that has jupytext)")
    else:
        print(f"  notebook  jupyter lab {_shown(notebook)}  (saving it saves the .py as well)")
    print(f"  then      skip-softmax lesson check {lesson.number}")
    return 0


def _check(options: argparse.Namespace) -> int:
    lesson = find(options.number)
    done, output = check(lesson, quiet=options.json)
    if options.json:
        print(json.dumps(_as_dict(lesson) | {"solved": done, "output": output}, indent=2))
    elif done:
        print(f"\n✓ Lesson {lesson.number} is solved. Compare: {_shown(lesson.solution)}")
    return 0 if done else 1


def _build(options: argparse.Namespace) -> int:
    paths = [*(lesson.path for lesson in lessons()), *NOTEBOOKS]
    notebooks = [_shown(build(path)) for path in paths]
    print(json.dumps(notebooks, indent=2) if options.json else "\n".join(notebooks))
    return 0


def _as_dict(lesson: Lesson) -> dict[str, Any]:
    return vars(lesson) | {"path": _shown(lesson.path)}


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _content(lesson: Lesson) -> str:
    """Hash of everything that decides whether a lesson is solved."""
    parts = [lesson.path, LESSONS / "checks.py", LESSONS / "helpers.py"]
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


def _remembered() -> dict[str, bool]:
    try:
        return json.loads(PROGRESS.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    sys.exit(main())
