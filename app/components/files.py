"""The browser's side of the components: the files beside this one, as text.

They are handed to Streamlit as one inline module each, because the project builds nothing with a
JavaScript bundler.
"""

from pathlib import Path

_HERE = Path(__file__).parent


def read(*names: str) -> str:
    """Join files of this folder."""
    return "\n".join((_HERE / name).read_text(encoding="utf-8") for name in names)
