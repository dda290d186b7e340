"""The tile map: canvas maps with a λ slider that answers in the browser."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from app.components.files import read

_HTML = """
<div class="tile-map">
  <div class="headlines"></div>
  <div class="threshold">
    <div class="threshold-label">
      <label for="threshold">Threshold λ</label>
      <output for="threshold"></output>
    </div>
    <input id="threshold" type="range" min="0" step="1" />
    <div class="scale" aria-hidden="true"></div>
  </div>
  <div class="heads" role="group" aria-label="Heads"></div>
  <div class="panels"></div>
  <p class="reading" aria-live="polite"></p>
  <p class="help" id="help">
    Arrow keys move over the tiles, Home and End go to the group’s first and last tile, Page Up and
    Page Down move eight groups, Enter selects, Escape hides the details.
  </p>
  <div class="tooltip" aria-hidden="true" hidden></div>
</div>
"""

_mount = st.components.v2.component(
    "skip_softmax_tile_map",
    html=_HTML,
    css=read("tile_map.css"),
    js=read("dom.js", "tiles.js", "paint.js", "slider.js", "tile_map.js"),
)


def tile_map(
    data: dict,
    *,
    key: str,
    on_threshold: Callable[[], None],
    on_head: Callable[[], None],
    on_cell: Callable[[], None],
) -> None:
    """Show maps and slider.

    Parameters
    ----------
    data : dict
        From :func:`app.views.component_data`.
    key : str
        In the callbacks ``st.session_state[key]`` holds what was done: ``threshold`` (float),
        ``head`` (int) or ``cell`` ({"i": int, "j": int}).
    on_threshold, on_head, on_cell : callable
        Called when the slider is released, a thumbnail or a tile is chosen.
    """
    _mount(
        key=key,
        data=data,
        on_threshold_change=on_threshold,
        on_head_change=on_head,
        on_cell_change=on_cell,
    )
