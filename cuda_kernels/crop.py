"""A few tiles of a head through the real kernel, in Numba's CUDA simulator, on any machine.

The simulator must be chosen before Numba is imported, so the kernel runs in a child process:
``python -m cuda_kernels.crop IN.npz OUT.npz``.  One at a time: it keeps a core busy for seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.geometry import Grid, TileMap

MAX_TILES = 8
_busy = threading.Lock()


class CropError(RuntimeError):
    """The child process could not run the kernel; the message is one sentence."""


class Crop(NamedTuple):
    """One vote group against a few of its key tiles, cut out of a head.

    ``q`` [1, rows, D], ``k`` and ``v`` [1, keys, D]; ``key_tiles`` are the tiles' numbers in the
    whole head, in ascending order; the group's last tile is always among them, so that the
    bottom-right aligned mask stays what it was.
    """

    q: NDArray
    k: NDArray
    v: NDArray
    key_tiles: list[int]
    grid: Grid


class CropRun(NamedTuple):
    """What the kernel returned for a crop: tile map and gaps, [1, 1, tiles]."""

    tiles: TileMap
    gap: NDArray[np.float32]
    dropped_mass_bound: NDArray[np.float32]


def cut(
    q: NDArray,
    k: NDArray,
    v: NDArray,
    grid: Grid,
    group: int,
    key_tile: int,
    limit: int = MAX_TILES,
) -> Crop:
    """Cut one vote group and up to ``limit`` of its key tiles out of a head.

    The group's last tile, tile 0 and the tile asked for are among them, then its neighbours.

    Parameters
    ----------
    q, k, v : ndarray, shape [Lq, D], [Lk, D], [Lk, Dv]
        One head and its KV head.
    grid : Grid
        Causal, without a window.
    group, key_tile : int
        The tile in the middle of the crop.
    limit : int

    Returns
    -------
    Crop

    Raises
    ------
    ValueError
        If the mask is another or the group does not visit that tile.

    Examples
    --------
    >>> x = np.zeros((512, 4), np.float32)
    >>> cut(x, x, x, Grid((64, 64), 512, 512, True), 7, 3, limit=4).key_tiles
    [0, 2, 3, 7]
    """
    if not grid.causal or grid.window is not None:
        raise ValueError("a crop is cut from a causal head without a window")
    n = int(grid.visited()[group]) if 0 <= group < grid.groups else 0
    if not 0 <= key_tile < n:
        raise ValueError(f"vote group {group} does not visit key tile {key_tile}")
    by_nearness = sorted(range(n), key=lambda j: (abs(j - key_tile), j))
    chosen = sorted(list(dict.fromkeys([n - 1, 0, *by_nearness]))[: max(limit, 2)])
    rows = grid.group_rows(group)
    end = int(grid.visible()[rows.stop - 1])  # keys that the group's last row sees
    keys = np.concatenate(
        [np.arange(grid.tile_keys(j).start, min(grid.tile_keys(j).stop, end)) for j in chosen]
    )
    small = Grid(grid.tile, rows.stop - rows.start, keys.size, True)
    return Crop(q[None, rows], k[None, keys], v[None, keys], chosen, small)


def run(
    crop: Crop, *, threshold: float, order: str, softmax_scale: float, timeout: float = 180
) -> CropRun:
    """Run the teaching kernel on a crop, in a child process.

    Parameters
    ----------
    crop : Crop
    threshold : float
        λ.
    order : str
    softmax_scale : float
    timeout : float
        Seconds.

    Returns
    -------
    CropRun

    Raises
    ------
    CropError
        If another crop is running, the child fails, or it takes too long.
    """
    if not _busy.acquire(blocking=False):
        raise CropError("another crop is running; wait until it is done")
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, result = Path(folder, "in.npz"), Path(folder, "out.npz")
            arrays = {"q": crop.q, "k": crop.k, "v": crop.v}
            np.savez(
                source,
                **{name: x.astype(np.float32) for name, x in arrays.items()},
                settings=np.array([*crop.grid.tile, threshold, softmax_scale]),
                order=np.array(order),
            )
            _child([str(source), str(result)], timeout)
            with np.load(result) as out:
                tiles = TileMap(out["state"], crop.grid, order, np.full(1, threshold))
                return CropRun(tiles, out["gap"], out["bound"])
    finally:
        _busy.release()


def _child(arguments: list[str], timeout: float) -> None:
    command = [sys.executable, "-m", "cuda_kernels.crop", *arguments]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    root = str(Path(__file__).resolve().parent.parent)
    try:
        child = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise CropError(f"the kernel took longer than {timeout:g} s and was stopped") from None
    if child.returncode:
        last = (child.stderr.strip() or "no message").splitlines()[-1]
        raise CropError(f"the kernel could not run: {last}")


def _main(source: str, result: str) -> None:
    from cuda_kernels.attention import skip_softmax_attention

    sys.setswitchinterval(1e-4)  # the simulator's barriers poll
    with np.load(source) as given:
        rows, keys, threshold, scale = given["settings"].tolist()
        q, k, v = (np.ascontiguousarray(np.moveaxis(given[x], 0, 1))[None] for x in "qkv")
        _, report = skip_softmax_attention(
            q,
            k,
            v,
            threshold=threshold,
            order=str(given["order"]),
            tile=(int(rows), int(keys)),
            softmax_scale=scale,
            backend="simt",
            return_report=True,
        )
    np.savez(result, state=report.state[0], gap=report.gap[0], bound=report.dropped_mass_bound[0])


if __name__ == "__main__":
    _main(*sys.argv[1:])
