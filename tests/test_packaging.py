"""What gets installed, what importing it loads, and what the Makefile does on odd machines."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SCRIPTS = ("streamlit_app.py", "app_pages")
"""Run by Streamlit, not imported."""

KERNELS = {"cuda_kernels.prefill_simt"}
"""Modules that are kernels: loaded when one is launched, and only then."""

HIDE = """
import importlib, sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"numba", "numba_cuda", "cuda"}:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hide())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def run_python(root: Path, code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter that finds this repository; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules(root: Path, *packages: str) -> list[str]:
    """Names of all modules of these packages, without the scripts that Streamlit runs."""
    files = [
        path.relative_to(root).with_suffix("")
        for package in packages
        for path in sorted((root / package).rglob("*.py"))
        if path.relative_to(root).parts[1] not in SCRIPTS
    ]
    return [".".join(file.parts).removesuffix(".__init__") for file in files]


def test_simulator_loads_nothing_heavy(root: Path) -> None:
    code = "import sim, sys; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(run_python(root, code).split())
    assert "numpy" in loaded
    heavy = {"numba", "numba_cuda", "cuda", "streamlit", "torch", "pandas", "altair", "PIL", "tqdm"}
    assert not loaded & heavy


def test_everything_imports_without_cuda(root: Path) -> None:
    names = [x for x in modules(root, "sim", "app", "cuda_kernels") if x not in KERNELS]
    assert {"sim.geometry", "app.cli", "app.components.tile_map", "cuda_kernels"} <= set(names)
    run_python(root, HIDE, *names)


def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def test_one_warning_of_numba_cuda_is_no_error() -> None:
    """It comes when numba-cuda is imported under NumPy 2.5; all others are errors."""
    generic = "The 'generic' unit for NumPy timedelta is deprecated"
    warnings.warn(f"{generic}, and will raise an error", DeprecationWarning, stacklevel=1)
    for other, kind in (("Another is deprecated", DeprecationWarning), (generic, UserWarning)):
        with pytest.raises(kind, match=other):
            warnings.warn(other, kind, stacklevel=1)


def requirements(root: Path) -> list[Requirement]:
    """Requirements of the base install and of every extra."""
    settings = project(root)
    extras = settings["optional-dependencies"].values()
    return [Requirement(text) for group in (settings["dependencies"], *extras) for text in group]


def constraints(root: Path) -> dict[str, list[Requirement]]:
    pins: dict[str, list[Requirement]] = {}
    for line in (root / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(pin.name, []).append(pin)
    return pins


def test_constraints_are_exact(root: Path) -> None:
    ranges = {
        name
        for name, pins in constraints(root).items()
        for pin in pins
        if not re.fullmatch(r"==[^*,]+", str(pin.specifier))
    }
    assert ranges == {"cuda-bindings", "cuda-toolkit"}  # the two that the gpu extras pin


def test_constraints_agree_with_the_project(root: Path) -> None:
    pins = constraints(root)
    for requirement in requirements(root):
        for pin in pins[requirement.name]:
            exact, allowed = pin.specifier, requirement.specifier
            if "<=" in str(exact):  # then the requirement itself is exact
                exact, allowed = allowed, exact
            (version,) = [one.version for one in exact if one.operator == "=="]
            assert allowed.contains(version), f"{requirement} against {pin}"


def test_constraints_name_no_package_server(root: Path) -> None:
    text = (root / "constraints.txt").read_text()
    assert "://" not in text
    assert "--" not in text


@pytest.mark.parametrize(
    ("platform", "machine", "has"),
    [
        ("linux", "x86_64", {"numba", "numba-cuda"}),
        ("win32", "AMD64", {"numba", "numba-cuda"}),
        ("darwin", "arm64", {"numba"}),
        ("darwin", "x86_64", set()),
    ],
)
def test_base_install_fits_the_platform(
    root: Path, platform: str, machine: str, has: set[str]
) -> None:
    environment = {"sys_platform": platform, "platform_machine": machine}
    base = [Requirement(text) for text in project(root)["dependencies"]]
    wanted = {one.name for one in base if not one.marker or one.marker.evaluate(environment)}
    assert wanted & {"numba", "numba-cuda"} == has
    assert {"numpy", "streamlit", "altair", "pillow", "safetensors", "tqdm"} <= wanted


@pytest.mark.parametrize(
    ("switch", "outcome"), [("", "1 skipped"), ("--require-browser", "1 error")]
)
def test_a_missing_browser_skips_or_fails(
    root: Path, tmp_path: Path, switch: str, outcome: str
) -> None:
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(root / name, tmp_path)
    test = "import pytest\n\n@pytest.mark.browser\ndef test_page(chromium):\n    pass\n"
    (tmp_path / "test_page.py").write_text(test)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_page.py", *switch.split()],
        cwd=tmp_path,
        env={**os.environ, "PATH": str(tmp_path), "CHROMIUM": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in done.stdout.splitlines()[-1]
    assert done.returncode == (1 if switch else 0)
    assert "no Chromium: set CHROMIUM" in done.stdout


def test_a_module_with_doctests_is_imported_once(root: Path, tmp_path: Path) -> None:
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(root / name, tmp_path)
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("from package.part import function\n")
    (tmp_path / "package/part.py").write_text('"""\n>>> 1\n1\n"""\n\ndef function():\n    pass\n')
    (tmp_path / "test_part.py").write_text(
        "import package, package.part\n\n"
        "def test_part():\n    assert package.function is package.part.function\n"
    )
    files = ("package/part.py", "test_part.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in done.stdout.splitlines()[-1]


class Machine:
    """A copy of the Makefile, and a PATH with nothing on it but what a test puts there."""

    def __init__(self, directory: Path, root: Path) -> None:
        self.directory = directory
        self.bin = directory / "bin"
        self.log = directory / "log"
        self.bin.mkdir()
        self.log.touch()
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(root / name, directory)
        for tool in ("sh", "rm", "mkdir", "touch", "cp", "echo", "test"):
            (self.bin / tool).symlink_to(shutil.which(tool))

    def command(self, name: str, script: str) -> Path:
        """Put a shell script on PATH, which notes down its arguments."""
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "{name}" "$@" >> "{self.log}"\n{script}\n')
        path.chmod(0o755)
        return path

    def python(self, name: str, venv: str) -> None:
        """Put a Python on PATH whose ``-m venv`` does this."""
        self.command(name, f'case "$1 $2" in "-m venv") {venv};; esac')

    def make(self, target: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [shutil.which("make"), target],
            cwd=self.directory,
            env={"PATH": str(self.bin)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def noted(self, pattern: str) -> int:
        """Count how often commands of this pattern ran."""
        return len(re.findall(pattern, self.log.read_text(), re.MULTILINE))


MAKE_VENV = "mkdir -p .venv/bin; cp bin/inside .venv/bin/python"
MAKE_VENV_WITH_PIP = f"{MAKE_VENV}; cp bin/inside .venv/bin/pip"


@pytest.fixture
def machine(tmp_path: Path, root: Path) -> Machine:
    if shutil.which("make") is None:
        pytest.skip("no make")
    made = Machine(tmp_path, root)
    made.command("inside", "")  # what the fake environments hold as their python
    return made


def sentences(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if "***" not in line]


def test_make_without_python3_venv(machine: Machine) -> None:
    machine.python("python3.11", "mkdir -p .venv/bin; exit 1")  # as Debian's does
    done = machine.make("test")
    assert done.returncode != 0
    assert not (machine.directory / ".venv").exists()
    (sentence,) = sentences(done)
    assert "python3-venv" in sentence
    assert "uv" in sentence


def test_make_without_python(machine: Machine) -> None:
    machine.command("python3.13", "exit 127")  # pyenv's, for a version that is not chosen
    machine.command("python3", "exit 1")  # out of range
    done = machine.make("app")
    assert done.returncode != 0
    (sentence,) = sentences(done)
    assert "3.11 to 3.14" in sentence
    assert not (machine.directory / ".venv").exists()


def test_make_takes_the_first_python_that_works(machine: Machine) -> None:
    machine.command("python3.14", "exit 127")
    machine.python("python3.13", "mkdir -p .venv/bin; exit 1")
    machine.python("python3.12", MAKE_VENV_WITH_PIP)
    machine.python("python3.11", MAKE_VENV_WITH_PIP)
    done = machine.make("app")
    assert done.returncode == 0, done.stderr
    assert machine.noted("^python3.12 -m venv") == 1
    assert machine.noted("^python3.11") == 0
    assert machine.noted("^inside -m pip install .*--constraint constraints.txt --editable .$") == 1
    assert machine.noted("^inside -m app app$") == 1


def test_make_installs_again_only_after_a_change(machine: Machine) -> None:
    machine.python("python3", MAKE_VENV_WITH_PIP)
    for _ in range(2):
        assert machine.make("app").returncode == 0
    assert machine.noted("pip install") == 1
    assert machine.noted("-m app app") == 2
    stamp = (machine.directory / ".venv" / ".installed-app").stat().st_mtime
    os.utime(machine.directory / "constraints.txt", (stamp + 10, stamp + 10))
    assert machine.make("app").returncode == 0
    assert machine.noted("pip install") == 2
    assert machine.noted("-m venv") == 1


def test_make_starts_anew_after_an_installation_that_failed(machine: Machine) -> None:
    machine.python("python3", MAKE_VENV_WITH_PIP)
    machine.command("inside", "exit 1")
    for attempts in (1, 2):
        assert machine.make("app").returncode != 0
        assert machine.noted("-m venv") == attempts
    machine.command("inside", "")
    assert machine.make("app").returncode == 0
    assert machine.noted("-m venv") == 3


def test_make_prefers_uv(machine: Machine) -> None:
    machine.python("python3", MAKE_VENV_WITH_PIP)
    machine.command("uv", f'case "$1" in venv) {MAKE_VENV};; esac')
    done = machine.make("test")
    assert done.returncode == 0, done.stderr
    assert machine.noted("^python3 ") == 0
    assert machine.noted("^uv venv .*>=3.11,<3.15 .venv$") == 1
    assert (
        machine.noted(r"^uv pip install .*--constraint constraints.txt --editable .\[test\]$") == 1
    )
    for check in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert machine.noted(f"^inside -m {check}") == 1
