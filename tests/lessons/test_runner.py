"""``skip-softmax lesson``: list, open, check, build."""

import importlib.util
import json
import os
from dataclasses import replace

import pytest

from lessons import runner
from lessons.catalogue import lessons

needs_jupytext = pytest.mark.skipif(
    importlib.util.find_spec("jupytext") is None, reason="jupytext is not installed"
)


@pytest.fixture
def progress(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    monkeypatch.setattr(runner, "PROGRESS", path)
    return path


@pytest.fixture
def no_notebooks(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        runner.importlib.util, "find_spec", lambda name: None if "jupy" in name else find(name)
    )


def test_list(progress, capsys):
    assert runner.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.count("· to do") == len(lessons())
    assert "✓" not in shown
    assert shown.endswith("Next: skip-softmax lesson open 0\n")
    assert runner.main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["solved"] for one in listed] == [False] * len(lessons())
    assert listed[0]["path"] == "lessons/00_attention.py"


def test_solved_lessons_are_listed_and_not_run_again(progress, monkeypatch, capsys):
    first, *others = lessons()
    mine = [replace(first, path=first.solution), *others]
    monkeypatch.setattr(runner, "lessons", lambda: mine)
    assert runner.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("✓ solved   0  ")
    assert shown.count("· to do") == len(others)
    assert shown.endswith("Next: skip-softmax lesson open 1\n")
    assert len(json.loads(progress.read_text())) == 1
    monkeypatch.setattr(runner.subprocess, "run", None)
    assert runner.solved(mine[0])
    progress.write_text("not JSON")
    with pytest.raises(TypeError):
        runner.solved(mine[0])


def test_a_wrong_filling_is_not_solved(progress, tmp_path):
    lesson = lessons()[1]
    source = lesson.solution.read_text(encoding="utf-8")
    path = tmp_path / "mine.py"
    path.write_text(source.replace("np.exp(scores - m)", "np.exp(scores)"), encoding="utf-8")
    mine = replace(lesson, path=path)
    done, output = runner.check(mine, quiet=True)
    assert not done
    assert "❌ softmax: case 2 of 6" in output
    assert not runner.solved(mine)


def test_check_of_an_unsolved_lesson(progress, capfd):
    assert runner.main(["check", "0"]) == 1
    out, err = capfd.readouterr()
    assert "The text: Compound statements" in out
    assert err.startswith("\nTo do in lessons/00_attention.py:")
    assert runner.main(["check", "0", "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["solved"] is False
    assert "To do in" in found["output"]


def test_check_of_a_solution(progress, monkeypatch, capfd):
    lesson = lessons()[2]
    monkeypatch.setattr(runner, "find", lambda number: replace(lesson, path=lesson.solution))
    assert runner.main(["check", "2"]) == 0
    assert "✓ Lesson 2 is solved" in capfd.readouterr().out


@pytest.mark.parametrize("command", ["open", "check"])
def test_no_such_lesson(command, capsys):
    assert runner.main([command, "99"]) == 2
    numbers = ", ".join(str(one.number) for one in lessons())
    said = f"skip-softmax lesson: lesson must be one of {numbers}, got 99\n"
    assert capsys.readouterr().err == said


def test_open_without_jupytext(no_notebooks, capsys):
    assert runner.main(["open", "3"]) == 0
    shown = capsys.readouterr().out
    assert "lessons/03_tiles.py  (look for FILL ME IN)" in shown
    assert "pip install -e '.[notebooks]'" in shown
    assert runner.main(["open", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notebook"] is None


def test_build_without_jupytext(no_notebooks, capsys):
    assert runner.main(["build"]) == 2
    assert "notebooks need jupytext" in capsys.readouterr().err


@needs_jupytext
def test_open_builds_the_notebook(monkeypatch, capsys):
    lesson = lessons()[3]
    built = []

    def build(path):
        built.append(path)
        return path.with_suffix(".ipynb")

    monkeypatch.setattr(runner, "build", build)
    assert runner.main(["open", "3"]) == 0
    assert built == [lesson.path]
    assert "lessons/03_tiles.ipynb" in capsys.readouterr().out
    assert runner.main(["build", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(lessons()) + len(runner.NOTEBOOKS)


@needs_jupytext
@pytest.mark.parametrize(
    "path",
    [*(one.path for one in lessons()), *runner.NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebook_round_trip(path, tmp_path):
    """Script → notebook without outputs → the same script, byte for byte."""
    import jupytext

    source = path.read_text(encoding="utf-8")
    script = tmp_path / path.name
    script.write_text(source, encoding="utf-8")
    notebook = runner.build(script)
    content = json.loads(notebook.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    jupytext.write(jupytext.read(notebook), script, fmt="py:percent")
    assert script.read_text(encoding="utf-8") == source


@needs_jupytext
def test_a_notebook_that_was_worked_in_is_left_alone(tmp_path):
    script = tmp_path / "lesson.py"
    script.write_text("# %%\nx = 1\n", encoding="utf-8")
    notebook = runner.build(script)
    notebook.write_text("mine", encoding="utf-8")
    now = script.stat().st_mtime
    os.utime(notebook, (now + 10, now + 10))
    runner.build(script)
    assert notebook.read_text(encoding="utf-8") == "mine"
    os.utime(notebook, (now - 10, now - 10))
    runner.build(script)
    assert notebook.read_text(encoding="utf-8") != "mine"
