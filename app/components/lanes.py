"""The lanes: a cache shared among splits, each tile's state and vote, with a λ slider."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from app.components.files import read

_HTML = """
<div class="tile-map lanes">
  <p class="headline"></p>
  <div class="threshold">
    <div class="threshold-label">
      <label for="lanes-threshold">Threshold λ</label>
      <output for="lanes-threshold"></output>
    </div>
    <input id="lanes-threshold" type="range" min="0" step="1" />
    <div class="scale" aria-hidden="true"></div>
  </div>
  <p class="title splits-title"></p>
  <div class="plot">
    <div class="axis corner"></div>
    <div class="axis top" aria-hidden="true"></div>
    <div class="axis left splits" aria-hidden="true"></div>
    <div class="map" tabindex="0" role="application" aria-describedby="lanes-help">
      <canvas></canvas>
      <canvas class="overlay"></canvas>
    </div>
  </div>
  <ul class="legend"></ul>
  <p class="title">Votes of the heads that share the cache: one veto keeps a tile for all</p>
  <div class="plot">
    <div class="axis left heads-axis" aria-hidden="true"></div>
    <div class="votes-map"><canvas aria-hidden="true"></canvas></div>
  </div>
  <ul class="counts"></ul>
  <p class="reading" aria-live="polite"></p>
  <p class="passage"></p>
  <p class="help" id="lanes-help">
    Left and right arrow keys move along the cache, up and down to the tile that the same split
    visits before or after, Home and End to the ends, Enter selects.
  </p>
</div>
"""

_mount = st.components.v2.component(
    "skip_softmax_lanes",
    html=_HTML,
    css=read("tile_map.css", "lanes.css"),
    js=read("dom.js", "tiles.js", "paint.js", "slider.js", "lanes.js"),
)


def lanes(
    data: dict, *, key: str, on_threshold: Callable[[], None], on_tile: Callable[[], None]
) -> None:
    """Show lanes, votes and slider.

    Parameters
    ----------
    data : dict
        From :func:`app.decode_view.lanes_data`.
    key : str
        In the callbacks ``st.session_state[key]`` holds what was done: ``threshold`` (float) or
        ``tile`` (int).
    on_threshold, on_tile : callable
        Called when the slider has come to rest, and when a tile is chosen.
    """
    _mount(key=key, data=data, on_threshold_change=on_threshold, on_tile_change=on_tile)
