"""What every test may need: markers for things a machine may lack, and switches that insist.

A test marked ``browser`` is skipped, with the reason, on a machine without Chromium; with
``--require-browser`` it fails there, and so does one that skips itself.
"""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


def find_chromium() -> str | None:
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _why_no_browser() -> str | None:
    playwright = importlib.util.find_spec("playwright")
    if playwright is None or playwright.origin is None:
        return "Playwright is not installed (extra: test)"
    driver = Path(playwright.origin).parent / "driver" / ("node.exe" if os.name == "nt" else "node")
    started = subprocess.run([driver, "--version"], capture_output=True, text=True, check=False)
    if started.returncode:  # on a bare Debian it lacks libatomic1
        return f"Playwright's driver does not start: {started.stderr.strip()}"
    if find_chromium() is None:
        return (
            "no Chromium: set CHROMIUM, or put chromium, chromium-browser or google-chrome on PATH"
        )
    return None


def _why_no_assembler() -> str | None:
    from cuda_kernels.launch import why_not_assemble

    return why_not_assemble()


REQUIREMENTS: dict[str, Callable[[], str | None]] = {
    "browser": _why_no_browser,
    "assembler": _why_no_assembler,
}
"""Marker → why its tests cannot run here, or None where they can."""


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker in REQUIREMENTS:
        parser.addoption(
            f"--require-{marker}",
            action="store_true",
            help=f"a test marked {marker} that would be skipped fails instead",
        )
    parser.addoption(
        "--random-shapes",
        type=int,
        default=60,
        metavar="N",
        help="how many random shapes the kernels are given on a GPU",
    )


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):  # a file in one process, and browsers in one
        for item in items:
            browses = item.get_closest_marker("browser") is not None
            item.add_marker(pytest.mark.xdist_group("browser" if browses else str(item.path)))
    for marker, why_not in REQUIREMENTS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := why_not()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> pytest.TestReport:
    report: pytest.TestReport = yield
    insisted = [
        f"--require-{marker}"
        for marker in REQUIREMENTS
        if item.get_closest_marker(marker) and item.config.getoption(f"--require-{marker}")
    ]
    if report.skipped and not hasattr(report, "wasxfail") and insisted:
        report.outcome = "failed"
        report.longrepr = f"skipped in spite of {insisted[0]}: {report.longrepr[2]}"
    return report


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of Chromium, for tests marked ``browser``."""
    path = find_chromium()
    assert path, "a test that asks for Chromium must be marked browser"
    return path


@pytest.fixture(scope="session")
def root() -> Path:
    """Directory of the repository."""
    return Path(__file__).resolve().parents[1]
