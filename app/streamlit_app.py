"""Router of the app: page configuration and the list of pages."""

from pathlib import Path

import streamlit as st

PAGES = Path(__file__).parent / "app_pages"

# Drawn here: a named icon would be fetched from the network.
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
<path fill="#0072b2" d="M0 0h5v5H0zM5.5 5.5h5v5h-5zM11 11h5v5h-5zM0 11h5v5H0z"/>
<path fill="#e69f00" d="M0 5.5h5v5H0zM5.5 11h5v5h-5z"/>
</svg>
"""

st.set_page_config(page_title="Skip Softmax Lab", page_icon=ICON, layout="wide")

st.navigation(
    [
        st.Page(PAGES / "tile_map.py", title="Tile map", default=True),
        st.Page(PAGES / "decode.py", title="Decode"),
        st.Page(PAGES / "rules.py", title="Rules"),
        st.Page(PAGES / "calibrate.py", title="Calibrate"),
    ],
    position="top",
).run()
