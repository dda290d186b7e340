"""What every lesson uses: real data, gaps to fill, predictions, pictures, links into the app."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from sim.traces import bundled, read_trace

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT = Path(__file__).parent.parent
OUTPUT = Path(__file__).parent / "output"
APP = "http://localhost:8501"

LAYER_12 = "smollm2-135m-layer12-kv0"
LAYER_23 = "smollm2-135m-layer23-kv0"


class Stop(Exception):
    """Ends a lesson with one message and exit status 1: no traceback, in a notebook neither."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def _say_only_the_message(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if isinstance(error, Stop):
        sys.stdout.flush()
        print(f"\n{error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _say_only_the_message
for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):
        _stream.reconfigure(errors="replace")  # consoles without λ


def in_notebook() -> bool:
    """Whether this runs in Jupyter or IPython."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def todo(what: str) -> NoReturn:
    """Stand where a gap is to be filled, and say so when it is reached.

    Raises
    ------
    Stop
    """
    caller = inspect.stack()[1]
    place = "the cell above" if in_notebook() else f"{_shown(caller.filename)}:{caller.lineno}"
    raise Stop(f"To do in {place}\n  {what}")


def reveal(predicted: float | None, answer: float, what: str) -> None:
    """Compare a prediction with what the run has found."""
    if predicted is None:
        print(f"Predict first ({what}): fill in `prediction` above, and run again to compare.")
    else:
        print(f"You predicted {predicted:g}; it is {answer:.4g} {what}.")


class Head(NamedTuple):
    """One attention head of a real model.

    ``q``, ``k``, ``v`` [length, 64] float32; ``scale`` is what q·k is multiplied with; ``words``
    are the tokens of the text, one for each row.
    """

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    scale: float
    words: list[str]


def real_head(name: str, head: int, length: int | None = None) -> Head:
    """Read one head of SmolLM2-135M: q, k and v as its attention received them.

    Parameters
    ----------
    name : str
        ``LAYER_12`` or ``LAYER_23``.
    head : int
        0, 1 or 2.
    length : int, optional
        The first so many of 4096 tokens.
    """
    trace = read_trace(bundled()[name])
    q, k, v = (x[:length].astype(np.float32) for x in (trace.q[head], trace.k[0], trace.v[0]))
    return Head(q, k, v, trace.softmax_scale, trace.tokens[:length])


def to_gpu(array: NDArray[Any]) -> Any:
    """Copy an array to the GPU, by CuPy if it is installed, else by PyTorch."""
    if find_spec("cupy") is not None:
        import cupy

        return cupy.asarray(array)
    import torch

    return torch.from_numpy(array).cuda()


def show(image: Image, name: str) -> None:
    """Save a picture as ``lessons/output/<name>.png``; a notebook shows it too."""
    OUTPUT.mkdir(exist_ok=True)
    path = OUTPUT / f"{name}.png"
    image.save(path)
    print(f"Picture: {_shown(path)}")
    if in_notebook():
        from IPython.display import display

        display(image)


def app_link(page: str = "", **parameters: str | float) -> None:
    """Print a link that opens the app with these settings; ``skip-softmax app`` starts it.

    Parameters
    ----------
    page : str
        As in the URL; by default the first, the tile map.
    **parameters : str or number
    """
    print(f"In the app (skip-softmax app): {APP}/{page}?{urlencode(parameters)}")


_PROGRAM = """\
import math
import sys

import numpy as np
from numba import cuda


{sources}


with np.load(sys.argv[1]) as arguments:
    results = {name}(**{{name: x if x.ndim else x.item() for name, x in arguments.items()}})
np.savez(sys.argv[1], **results)
"""


def run_in_cuda_simulator(
    function: Callable[..., dict[str, NDArray[Any]]], *parts: Callable[..., Any], **arguments: Any
) -> dict[str, NDArray[Any]]:
    """Call a function in a process of its own, in which ``cuda`` is Numba's CUDA simulator.

    Numba decides when it is first imported whether CUDA is simulated.  The program that runs is
    made of the functions' own source, and stays in ``lessons/output`` to be read.

    Parameters
    ----------
    function : function
        Takes the arguments and returns a dict of arrays.  It may use ``math``, ``np``, ``cuda``,
        and the parts.
    *parts : function
        What else the program needs.
    **arguments : array or number

    Returns
    -------
    dict
        What the function returned.

    Raises
    ------
    Stop
        If the program fails.
    """
    OUTPUT.mkdir(exist_ok=True)
    program, data = (OUTPUT / (function.__name__ + ending) for ending in (".py", ".npz"))
    sources = "\n\n".join(inspect.getsource(one) for one in (*parts, function)).rstrip()
    program.write_text(_PROGRAM.format(sources=sources, name=function.__name__), encoding="utf-8")
    np.savez(data, **arguments)
    environment = child_environment() | {"NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, str(program), str(data)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    if done.returncode:
        said = done.stderr.strip()
        raise Stop(f"❌ {_shown(program)} failed in Numba's CUDA simulator:\n{said}")
    with np.load(data) as results:
        return dict(results)


def child_environment() -> dict[str, str]:
    """Environment in which a child process finds this clone and prints UTF-8.

    One thread for NumPy's products: those of a tile are so small that more only wait.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    one_thread = {"OPENBLAS_NUM_THREADS": "1"}
    return one_thread | os.environ | {"PYTHONPATH": path, "PYTHONUTF8": "1"}


def _shown(path: str | Path) -> str:
    """Give a path as seen from the root of the clone."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
