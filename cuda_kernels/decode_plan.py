"""A decode call made ready: splits, workspace and report; what changes comes with each launch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cuda_kernels import arrays, gpu
from cuda_kernels.blocks.decode_mma import (
    BLOCKS,
    RESERVED,
    ROWS,
    THREADS,
    WHOLE,
    inverse,
    shared_bytes,
)
from cuda_kernels.forms import Forms
from cuda_kernels.kernel import Kernel
from cuda_kernels.plan import abi_of
from sim.geometry import COMPUTED, MASKED, ORDERS, SKIPPED

if TYPE_CHECKING:
    from sim.decode import DecodeBytes

MAX_SPLITS = 128
FEWEST_TILES = 4  # of a split that is worth its merge
H200 = 132, 233_472  # multiprocessors, and bytes of shared memory of each
_NAMES = ("q", "k", "v", "out", "page_table", "seq_lens", "threshold")


@dataclass(frozen=True)
class DecodeSettings:
    """What a decode call asks for, checked.

    Parameters
    ----------
    batch, query_tokens, heads, kv_heads, head_dim : int
    capacity : int
        Keys of a request that the cache, or its page table, has room for.
    page : int or None
        Keys of a page; None where each request's keys lie one after the other.
    keys : int
        Keys of a tile.
    layout, order, split_layout : str
    splits : int
    stages : int
        Tiles of K, and of V, that a block has under way.
    seeded, by_length, gap, skips : bool
        ``by_length``: λ is what is given, divided by the keys of the request.
    scale : float
    """

    batch: int
    query_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    page: int | None
    layout: str
    keys: int
    order: str
    split_layout: str
    splits: int
    stages: int
    seeded: bool
    by_length: bool
    gap: bool
    skips: bool
    scale: float

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def tokens(self) -> int:
        """Query tokens of a vote group: as many whole ones as there is room for."""
        return ROWS // self.group

    @property
    def query_tiles(self) -> int:
        """Vote groups of one KV head."""
        return ceil(self.query_tokens / self.tokens)

    @property
    def groups(self) -> int:
        """Vote groups of all requests and KV heads."""
        return self.batch * self.kv_heads * self.query_tiles

    @property
    def key_tiles(self) -> int:
        """Tiles of the cache of one request."""
        return ceil(self.capacity / self.keys)

    @property
    def partial(self) -> int:
        """Numbers that a split leaves for the merge: acc, and m, l, u of each row."""
        return ROWS * self.head_dim + 4 * ROWS

    @property
    def workspace_size(self) -> int:
        """Float32 of workspace: partial results, and a counter for each vote group."""
        return self.groups * (self.splits * self.partial + 1) if self.splits > 1 else 0


def choose_splits(groups: int, tiles: int, slots: int) -> int:
    """Say how many blocks share the cache of one vote group.

    Parameters
    ----------
    groups : int
        Vote groups: blocks that there are with one split.
    tiles : int
        Key tiles of the longest request.
    slots : int
        Blocks that the GPU runs at a time.

    Returns
    -------
    int
        As many as fill the slots: slots // groups.  A split has at least ``FEWEST_TILES`` tiles.

    Notes
    -----
    Measured on an H200, which has 264 slots, with 8, 64 and 256 vote groups
    (``cuda_kernels/results/log.md``).  With more groups than slots there is one split; that has not
    been measured.

    Examples
    --------
    >>> choose_splits(8, 1024, 264), choose_splits(64, 256, 264), choose_splits(256, 256, 264)
    (33, 4, 1)
    """
    return max(min(slots // groups, tiles // FEWEST_TILES, MAX_SPLITS), 1)


def blocks_at_a_time(
    head_dim: int, keys: int, stages: int, multiprocessors: int, shared: int
) -> int:
    """Blocks that a GPU runs at a time, of so many multiprocessors with that much shared memory."""
    each = shared_bytes(head_dim, keys, stages) + RESERVED
    return multiprocessors * min(max(shared // each, 1), BLOCKS)


@dataclass(frozen=True, repr=False, eq=False)
class DecodeReport:
    """What a decode call skipped and what that can have cost.

    Arrays are of the caller's library and stay on its device; ``sparsity`` and ``bytes`` are
    fetched to the host when they are asked for.  A vote group is the query heads of one KV head
    for up to ``16 // heads`` query tokens: a *query tile*.

    Parameters
    ----------
    state : array, shape [B, Hkv, query_tiles, key_tiles], uint8
        0 not visited, 1 computed, 2 skipped.
    gap : array, shape [B, Hkv, query_tiles, key_tiles], float32, or None
        Natural-log units; +inf for the first tile of a plain split, −inf where not visited.
    lse : array, shape [B, Hq, Lq], float32
        Natural log, over kept keys only.
    dropped_mass_bound : array, shape [B, Hq, Lq], float32
        Certified: the true softmax probability that fell into skipped tiles is at most this.
    seq_lens : array, shape [B], int32
        Keys of each request, as the call was given them.
    given : array, shape [B, Hkv], float32
        λ, or the factor, likewise.
    settings : DecodeSettings
    backend : str
    """

    state: Any
    gap: Any
    lse: Any
    dropped_mass_bound: Any
    seq_lens: Any
    given: Any
    settings: DecodeSettings
    backend: str

    def __repr__(self) -> str:
        visited, skipped = (np.count_nonzero(x) for x in self._visited_and_skipped)
        return (
            f"<DecodeReport: {skipped / max(visited, 1):.1%} of tiles skipped, by {self.backend}>"
        )

    @property
    def _visited_and_skipped(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        state = arrays.to_numpy(self.state)
        return state != MASKED, state == SKIPPED

    @property
    def sparsity(self) -> NDArray[np.float64]:
        """Skipped ÷ visited tiles, [B, Hkv]; first tiles count as visited."""
        visited, skipped = (x.sum(axis=(2, 3)) for x in self._visited_and_skipped)
        return skipped / np.maximum(visited, 1)

    @property
    def threshold(self) -> NDArray[np.float64]:
        """λ that was applied, [B, Hkv]; 0 where a request was computed densely."""
        lam = arrays.to_numpy(self.given).astype(np.float64)
        if self.settings.by_length:
            lam /= np.maximum(arrays.to_numpy(self.seq_lens), 1)[:, None]
        return np.where((lam >= 0) & (lam <= 1), lam, 0.0)

    @property
    def bytes(self) -> DecodeBytes:
        """Bytes that the call moved: K, V of kept tiles, page table, partial results.

        What seeded splits read of tile 0 and of the newest one for their maxima comes from the L2
        cache as a rule, and is not counted.
        """
        from sim.decode import DecodeBytes

        asked = self.settings
        lengths = arrays.to_numpy(self.seq_lens).astype(np.int64)
        last = np.minimum(np.arange(1, asked.query_tiles + 1) * asked.tokens, asked.query_tokens)
        ends = np.maximum(lengths[:, None] - asked.query_tokens + last, 0)  # [B, query tiles]
        start = np.arange(asked.key_tiles) * asked.keys
        seen = np.clip(ends[..., None] - start, 0, asked.keys)  # [B, query tiles, key tiles]
        row = 2 * asked.head_dim
        computed = arrays.to_numpy(self.state) == COMPUTED
        entries = 0 if asked.page is None else int((-(-ends // asked.page)).sum())
        rows = np.diff(last, prepend=0) * asked.group  # of each query tile; 8 are written together
        written = int((-(-rows // 8) * 8 * asked.head_dim + 4 * ROWS).sum()) * asked.splits
        return DecodeBytes(
            k=row * asked.kv_heads * int(seen.sum()),
            v=row * int((computed * seen[:, None]).sum()),
            dense_v=row * asked.kv_heads * int(seen.sum()),
            page_table=4 * asked.kv_heads * entries,
            partials=2 * 4 * asked.batch * asked.kv_heads * written if asked.splits > 1 else 0,
        )


class DecodePlan:
    """One decode call, for arrays of given shapes, strides, dtype and device.

    Made by :func:`cuda_kernels.skip_softmax_decode_plan`.  Calling it checks that the arrays are
    like those it was made for, and launches; it allocates nothing but an ``out`` that is not given,
    and reads lengths, page table and threshold where they lie, so that it can be captured in a CUDA
    graph and replayed as they change.

    Attributes
    ----------
    settings : DecodeSettings
    report : DecodeReport
        Of the last call; the next one overwrites its arrays.
    """

    def __init__(
        self, tensors: dict[str, Any], settings: DecodeSettings, workspace: Any = None
    ) -> None:
        from cuda_kernels.launch import Launcher, load

        q = tensors["q"]
        kernel, shared = _kernel(q, settings)
        self.settings = settings
        self.report = make_report(tensors, settings, "decode mma")
        if workspace is None:
            workspace = arrays.full(q, (max(settings.workspace_size, 1),), 0)
        self._own = {name: tensors[name] for name in _NAMES[4:]}
        self._forms = Forms({name: tensors[name] for name in _NAMES})
        self._stream = arrays.stream_of(q)
        self._results = _results(self.report, q)
        self._workspace = workspace
        partials, counters = _parts_of_workspace(settings)
        start = arrays.layout(workspace)[1]
        at_counters = start + 4 * settings.groups * settings.splits * settings.partial
        if settings.splits == 1:
            at_counters = start
        self._workspace_at = [start, at_counters]
        self._results_at = [arrays.layout(x)[1] for x in self._results]
        self._launcher = Launcher(
            load(kernel, None, shared, gpu.current()),
            _grid(settings),
            THREADS,
            shared,
            *(abi_of(tensors[name]) for name in _NAMES),
            (partials, _strides(partials), 4),
            (counters, _strides(counters), 4),
            *(abi_of(x) for x in self._results),
            *_scalars(settings, ctypes.c_float, ctypes.c_uint8, ctypes.c_int32, ctypes.c_uint64),
        )

    def __call__(
        self, q: Any, k: Any, v: Any, *, seq_lens: Any = None, page_table: Any = None,
        threshold: Any = None, out: Any = None,
    ) -> Any:  # fmt: skip
        """Launch on the current stream of the arrays' library.

        Parameters
        ----------
        q, k, v : array
            Like those that the plan was made for.
        seq_lens, page_table, threshold : array, optional
            Likewise, on the GPU; ``threshold`` is λ or the factor, whichever the plan was made
            with.  Default: the plan's own.
        out : array, shape [B, Lq, Hq, D], optional

        Returns
        -------
        out : array

        Raises
        ------
        ValueError
            If an array has another shape, other strides, another dtype or device.
        """
        given = self._given(q, k, v, out, seq_lens, page_table, threshold)
        self._launch(given, self._results_at)
        if seq_lens is not None or threshold is not None:
            self.report = replace(self.report, seq_lens=given["seq_lens"], given=given["threshold"])
        return given["out"]

    def fresh(
        self, q: Any, k: Any, v: Any, *, seq_lens: Any = None, page_table: Any = None,
        threshold: Any = None, out: Any = None,
    ) -> tuple[Any, DecodeReport]:  # fmt: skip
        """Launch, and return the output and a report of its own."""
        given = self._given(q, k, v, out, seq_lens, page_table, threshold)
        report = make_report(given, self.settings, self.report.backend)
        self._launch(given, [arrays.layout(x)[1] for x in _results(report, q)])
        return given["out"], report

    def _given(
        self, q: Any, k: Any, v: Any, out: Any, seq_lens: Any, page_table: Any, threshold: Any
    ) -> dict[str, Any]:
        """Put a call's arrays in place of the plan's."""
        if self.settings.layout == "HND":
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if out is None:
            out = arrays.empty_like(q, q.shape)
        given = {"q": q, "k": k, "v": v, "out": out, **self._own}
        changed = {"page_table": page_table, "seq_lens": seq_lens, "threshold": threshold}
        return given | {name: x for name, x in changed.items() if x is not None}

    def _launch(self, given: dict[str, Any], results: list[int]) -> None:
        at = self._forms.addresses(*given.values())
        self._launcher(self._stream(), *at, *self._workspace_at, *results)


def emulated(
    tensors: dict[str, Any], settings: DecodeSettings, workspace: Any = None
) -> DecodeReport:
    """Run the kernel's own source on the CPU."""
    from cuda_kernels.emulator import emulate

    q = tensors["q"]
    kernel, shared = _kernel(q, settings)
    report = make_report(tensors, settings, "decode mma, emulated")
    partials, counters = _parts_of_workspace(settings)
    size = int(np.prod(partials))
    if workspace is None or settings.splits == 1:
        workspace = arrays.full(q, (size + int(np.prod(counters)),), 0)
    numbers = arrays.bare(workspace)
    emulate(
        kernel.make(),
        _grid(settings),
        THREADS,
        *(arrays.bare(arrays.as_bits(tensors[name])) for name in _NAMES[:4]),
        *(arrays.bare(tensors[name]) for name in _NAMES[4:]),
        numbers[:size].reshape(partials),
        numbers[size:].view(np.int32)[: counters[0]],
        *(arrays.bare(x) for x in _results(report, q)),
        *_scalars(settings, np.float32, bool, int, int),
        shared_bytes=shared,
    )
    return report


def make_report(tensors: dict[str, Any], settings: DecodeSettings, backend: str) -> DecodeReport:
    """Allocate what the kernel reports; it writes all of it."""
    q = tensors["q"]
    map_shape = (
        settings.batch, settings.kv_heads, settings.query_tiles, settings.key_tiles
    )  # fmt: skip
    rows = (settings.batch, settings.heads, settings.query_tokens)
    state = arrays.empty(q, map_shape, "uint8")
    gap = arrays.empty(q, map_shape, "float32") if settings.gap else None
    lse, bound = (arrays.empty(q, rows, "float32") for _ in range(2))
    given = tensors["seq_lens"], tensors["threshold"]
    return DecodeReport(state, gap, lse, bound, *given, settings, backend)


def _kernel(q: Any, settings: DecodeSettings) -> tuple[Kernel, int]:
    """Name the kernel for these arguments: dense where nothing can be skipped."""
    dtype = {"float16": 0, "bfloat16": 1}[arrays.dtype_name(q)]
    size, stages = (settings.head_dim, settings.keys), settings.stages
    arguments = (*size, dtype, settings.skips, settings.gap, stages)
    return Kernel("cuda_kernels.decode_mma", arguments), shared_bytes(*size, stages)


def _grid(settings: DecodeSettings) -> tuple[int, int, int]:
    return settings.splits, settings.kv_heads * settings.query_tiles, settings.batch


def _parts_of_workspace(settings: DecodeSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the partial results and the counters; with one split there is none of either."""
    if settings.splits == 1:
        return (1, 1, 1), (1,)
    return (settings.groups, settings.splits, settings.partial), (settings.groups,)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(4 * int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def _results(report: DecodeReport, q: Any) -> tuple[Any, ...]:
    gap = arrays.empty(q, (1, 1, 1, 1), "float32") if report.gap is None else report.gap
    return report.lse, report.dropped_mass_bound, report.state, gap


def _scalars(
    settings: DecodeSettings, real: Any, boolean: Any, integer: Any, long: Any
) -> tuple[Any, ...]:
    shift = WHOLE if settings.page is None else settings.page.bit_length() - 1
    seeds = 2 if settings.seeded and (settings.skips or settings.gap) else 0
    return (
        real(settings.scale), integer(shift), boolean(settings.by_length), integer(seeds),
        boolean(settings.split_layout == "contiguous"), integer(ORDERS.index(settings.order)),
        integer(settings.group),
        *(long(inverse(n)) for n in (settings.query_tiles, settings.splits, settings.group)),
    )  # fmt: skip
