"""The stepper: one query group's visit to its key tiles, played in the browser."""

from __future__ import annotations

import streamlit as st

from app.components.files import read

_HTML = """
<div class="stepper">
  <div class="bar" role="group" aria-label="Steps">
    <button type="button" class="play">Play</button>
    <button type="button" class="tile-back" aria-label="Tile back">&laquo; tile</button>
    <button type="button" class="back" aria-label="Step back">&lsaquo; step</button>
    <button type="button" class="forth" aria-label="Step on">step &rsaquo;</button>
    <button type="button" class="tile-forth" aria-label="Tile on">tile &raquo;</button>
    <label>speed
      <select class="speed">
        <option value="0.5">½ ×</option>
        <option value="1" selected>1 ×</option>
        <option value="3">3 ×</option>
        <option value="10">10 ×</option>
      </select>
    </label>
  </div>
  <input type="range" class="scrub" min="0" step="1" value="0" aria-label="Position in the visit" />
  <p class="status" aria-live="polite"></p>
  <div class="stage" tabindex="0" role="application" aria-describedby="stepper-help">
    <p class="caption strip-caption"></p>
    <canvas class="strip" aria-hidden="true"></canvas>
    <div class="columns">
      <div>
        <p class="caption rows-caption"></p>
        <canvas class="rows" aria-hidden="true"></canvas>
      </div>
      <div>
        <p class="caption row-caption"></p>
        <table><tbody class="numbers"></tbody></table>
      </div>
    </div>
  </div>
  <div class="columns">
    <div>
      <p class="caption">The rule</p>
      <pre class="listing pseudo" tabindex="0" role="region" aria-label="The rule"></pre>
    </div>
    <div>
      <p class="caption">The same in the teaching kernel, cuda_kernels/prefill_simt.py</p>
      <pre class="listing kernel" tabindex="0" role="region" aria-label="The kernel"></pre>
    </div>
  </div>
  <p class="help" id="stepper-help">
    With the picture in focus: left and right arrow keys step, Page Up and Page Down go by tile,
    Home and End to the ends, up and down choose the row, space plays and pauses.
  </p>
</div>
"""

_mount = st.components.v2.component(
    "skip_softmax_stepper",
    html=_HTML,
    css=read("stepper.css"),
    js=read("dom.js", "tiles.js", "paint.js", "stepper.js"),
)


def stepper(data: dict, *, key: str) -> None:
    """Show the stepper; nothing comes back from it.

    Parameters
    ----------
    data : dict
        From :func:`app.visit.stepper_data`.
    key : str
    """
    _mount(key=key, data=data)
