"""What concerns the whole head: the ledger of its work, and files to take away."""

from __future__ import annotations

import streamlit as st

from app.inspector import Subject, sizes_of
from app.sections import section
from sim.traces import Trace


def tell(subject: Subject, trace: Trace, head: int) -> None:
    """Offer ledger and downloads.

    Parameters
    ----------
    subject : Subject
    trace : Trace
        Where the head comes from.
    head : int
    """
    tiles = subject.what_if.decide(subject.threshold)

    def ledger() -> None:
        from app import work

        work.tell_head(subject.scan, tiles, subject.threshold, sizes_of(subject.arrays))

    def files() -> None:
        from app import downloads

        downloads.show(tiles, subject.arrays, trace, head)

    st.subheader("The whole head", anchor=False)
    label = "Ledger: operations, exponentials and bytes, against NVIDIA’s kernel"
    section(label, "ledger", ":material/receipt_long:", ledger)
    section("Download the map or the trace", "files", ":material/download:", files)
