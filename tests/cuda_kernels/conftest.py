"""Make the shared case list and the agreement contract importable; number random shapes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that asks for a ``shape_seed`` as many as ``--random-shapes`` says."""
    if "shape_seed" in metafunc.fixturenames:
        metafunc.parametrize("shape_seed", range(metafunc.config.getoption("--random-shapes")))
