"""What pytest needs wherever a test is, doctests beside the code among them."""

import importlib
from pathlib import Path


def pytest_collect_file(file_path: Path) -> None:
    """Import a file's package, before pytest imports the file for its doctests.

    Pytest imports the package itself, and then the file once more even if the package has just
    done so: the module that others find by name would not be the one whose functions they have.
    """
    package = file_path.parent.relative_to(Path(__file__).parent)
    if (file_path.parent / "__init__.py").exists():
        importlib.import_module(".".join(package.parts))
