"""The app as a stranger starts it: in a terminal, with an empty home, from some other directory."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="pseudo-terminals are POSIX")

SECONDS = 10


@dataclass
class Started:
    process: subprocess.Popen
    terminal: int
    port: int
    seconds: float
    """Until the health endpoint answered."""

    def screen(self) -> str:
        """Everything that has been printed since the last call."""
        os.set_blocking(self.terminal, False)
        text = b""
        try:
            while chunk := os.read(self.terminal, 65536):
                text += chunk
        except OSError:  # nothing more for now, or the other end is closed
            pass
        return text.decode()


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("localhost", port, timeout=1)
    try:
        connection.request("GET", "/_stcore/health")
        return connection.getresponse().read() == b"ok"
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture
def started(tmp_path: Path, root: Path) -> Iterator[Started]:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    # A display, because Streamlit asks nothing without one, and a browser that does nothing.
    browser = tmp_path / "bin" / "xdg-open"
    browser.parent.mkdir()
    browser.write_text("#!/bin/sh\n")
    browser.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        "HOME": str(home),
        "PATH": f"{browser.parent}{os.pathsep}{os.defpath}",
        "DISPLAY": ":0",
        "PYTHONPATH": str(root),
        "TERM": "xterm",
    }
    ours, theirs = pty.openpty()
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "app", f"--port={port}"],
        cwd=home,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        while not (healthy := _healthy(port)) and time.monotonic() - begin < SECONDS:
            if process.poll() is not None:
                break
            time.sleep(0.1)
        app = Started(process, ours, port, time.monotonic() - begin)
        if not healthy:
            pytest.fail(f"the app did not serve within {SECONDS} s; it printed:\n{app.screen()}")
        yield app
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_serves_at_once_and_asks_nothing(started: Started) -> None:
    time.sleep(0.5)  # what Streamlit prints once it serves
    screen = started.screen()
    assert started.seconds < SECONDS
    assert f"http://localhost:{started.port}" in screen
    assert "?" not in screen
    for word in ("mail", "usage statistics", "telemetry", "Traceback", "0.0.0.0"):
        assert word not in screen


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_listens_on_loopback_only(started: Started) -> None:
    listening = "0A"
    addresses = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not Path(table).exists():
            continue
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, port = local.split(":")
            if state == listening and int(port, 16) == started.port:
                addresses.append(address)
    loopback = {"0100007F", "00000000000000000000000001000000"}
    assert addresses, "nothing listens on the port that answered"
    assert set(addresses) <= loopback


def test_ctrl_c_ends_with_one_line(started: Started) -> None:
    time.sleep(0.5)
    started.screen()
    os.killpg(started.process.pid, signal.SIGINT)
    assert started.process.wait(timeout=SECONDS) == 130
    assert len(started.screen().strip().splitlines()) == 1


def test_home_stays_empty(started: Started, tmp_path: Path) -> None:
    time.sleep(0.5)
    assert not list((tmp_path / "home").iterdir())
