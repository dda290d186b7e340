"""Expanders that are bound to the URL, and whose content is made only while they are open."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st


def section(label: str, key: str, icon: str, show: Callable[[], None]) -> None:
    """Offer a section; closed, it costs nothing at first paint, neither here nor in the browser.

    Parameters
    ----------
    label : str
    key : str
        Of the widget, and of the parameter in the URL.
    icon : str
        Such as ``:material/help:``.
    show : callable
        Writes the content; called only while the section is open.
    """
    expander = st.expander(label, key=key, icon=icon, on_change="rerun", bind="query-params")
    if expander.open:
        with expander:
            show()
