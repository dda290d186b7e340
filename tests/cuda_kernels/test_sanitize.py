"""What ``sanitize.py`` makes of what compute-sanitizer says, with that tool played."""

import os
import stat
import sys

import pytest
import sanitize

PLAYED = """#!{python}
import os, sys

tool = sys.argv[sys.argv.index("--tool") + 1]
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
said, status = {{{answers}}}.get(tool, ("44 cases agree", 0))
print(said)
sys.exit(status)
"""


@pytest.fixture
def played(tmp_path, monkeypatch):
    if os.name == "nt":
        pytest.skip("the played tool is a script with a shebang")

    def play(answers):
        tool = tmp_path / "compute-sanitizer"
        text = PLAYED.format(python=sys.executable, log=str(tmp_path / "log"), answers=answers)
        tool.write_text(text)
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
        return tmp_path / "log"

    return play


def test_all_tools_run_on_this_file(played, capsys):
    log = played("")
    assert sanitize.main([]) == 0
    assert capsys.readouterr().out == "memcheck: clean\nracecheck: clean\nsynccheck: clean\n"
    lines = log.read_text().splitlines()
    assert [line.split()[1] for line in lines] == list(sanitize.TOOLS)
    assert all(line.endswith(f"{sanitize.__file__} inside") for line in lines)
    assert all("--report-api-errors no" in line for line in lines)


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ('"racecheck": ("44 cases agree\\\\nhazard", 9)', "racecheck: found something\n44 cases"),
        ('"racecheck": ("no GPU", 0)', "racecheck: did not run to its end (status 0)\nno GPU"),
        ('"racecheck": ("no GPU", 1)', "racecheck: did not run to its end (status 1)\nno GPU"),
    ],
)
def test_what_is_found_is_shown_and_the_others_still_run(played, capsys, answers, sentence):
    played(answers.replace("\\\\n", "\\n"))
    assert sanitize.main([]) == 1
    out = capsys.readouterr().out
    assert sentence in out
    assert "synccheck: clean" in out


def test_wrong_use_is_one_sentence(monkeypatch, capsys, tmp_path):
    assert sanitize.main(["initcheck"]) == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.main([]) == 2
    assert "compute-sanitizer is not on PATH" in capsys.readouterr().err
