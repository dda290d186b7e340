"""The app served, and opened in Chromium, for the tests that need a browser."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

FLAGS = [
    "--no-sandbox",  # tests run as root on bare machines
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TILE_MAP = ".tile-map .headline strong"
DONE = '[data-testid="stApp"][data-test-script-state="notRunning"]'


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--server.headless=true", "--server.address=127.0.0.1", f"--server.port={port}"]
    environment = {k: v for k, v in os.environ.items() if k != "SKIP_SOFTMAX_TRACE"}
    process = subprocess.Popen(
        [sys.executable, "-m", "streamlit", "run", root / "app/streamlit_app.py", *options],
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(150):
            assert process.poll() is None, "the server ended by itself"
            try:
                with urllib.request.urlopen(f"{url}/_stcore/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def browser(chromium: str):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


class Waiting:
    """Whether a page waits for a run of the script, told by what page and server send each other.

    A page asks for a run; the server says that one begins, and that it has ended or was given up
    for another one.  The time that this takes is the machine's, so no test waits for a time.
    """

    def __init__(self, page) -> None:
        self.page, self.asked, self.begun = page, True, False
        page.on("websocket", self._listen)

    def _listen(self, socket) -> None:
        socket.on("framesent", self._sent)
        socket.on("framereceived", self._received)

    def _sent(self, frame) -> None:
        self.page.sent.append(frame)
        if isinstance(frame, bytes) and BackMsg.FromString(frame).HasField("rerun_script"):
            self.asked, self.begun = True, False

    def _received(self, frame) -> None:
        message = ForwardMsg.FromString(frame)
        if message.HasField("new_session"):
            self.begun = self.asked
        elif message.HasField("script_finished") and self.begun:
            self.begun = False
            self.asked = message.script_finished == ForwardMsg.FINISHED_EARLY_FOR_RERUN

    def timers(self, milliseconds: int) -> None:
        """Wait until the page's own timers that were due within this time have fired."""
        self.page.evaluate("(ms) => new Promise((done) => setTimeout(done, ms))", milliseconds)

    def drawn(self) -> None:
        """Wait until the browser has drawn what its own events changed."""
        self.page.evaluate(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def settle(self) -> None:
        """Wait until what was done has been sent, its run has ended, and the answer is drawn."""
        waited = True
        while waited:
            self.timers(300)  # the map's slider waits a quarter of a second before it sends
            waited = self.asked
            end = time.monotonic() + 60
            while self.asked:
                assert time.monotonic() < end, "a run of the script has not ended within a minute"
                self.page.wait_for_timeout(20)
            self.page.wait_for_selector(DONE)
        self.drawn()


@pytest.fixture
def open_page(browser, server):
    """Open the app; afterwards no script error and no request to another machine was seen.

    A page has :meth:`Waiting.settle`, ``drawn`` and ``timers``, and ``sent``, what it sent.
    """
    contexts, faults = [], []

    def open_(query: str = "", *, width=1400, height=1000, ready=TILE_MAP, **context):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **context))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((server, "data:", "blob:", server.replace("http", "ws")))
                else faults.append(request.url)
            ),
        )
        page.sent = []
        waiting = Waiting(page)
        page.settle, page.drawn, page.timers = waiting.settle, waiting.drawn, waiting.timers
        page.goto(f"{server}/{query}")
        page.wait_for_selector(ready)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not faults
