"""Decode against memory's own speed, in one run on one GPU: ``skip-softmax bench decode``.

Decode is bound by HBM, so the rate that counts is bytes per second: K, V of kept tiles, page table
and partial results, over the time of a call; beside it stands a kernel that only reads the same
cache.  Caches are rotated, so that none is in L2 when its turn comes.  How rounds are timed is what
:mod:`cuda_kernels.benchmark` says.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuda_kernels.benchmark import TINY, Gpu, _bar, interleaved, ratio, working
from cuda_kernels.machine import RESULTS, Record, check_gpu, describe

PAGE, KEYS, HEAD_DIM = 64, 64, 128
SPARSITIES = (0.5, 0.75, 0.9)
ROTATED = 1 << 30  # bytes of all caches at least: many times any L2


class Shape(NamedTuple):
    """Requests, query heads, KV heads and keys of each request."""

    batch: int
    heads: int
    kv_heads: int
    keys: int

    @property
    def bytes(self) -> int:
        """Bytes of K and V."""
        return 2 * 2 * HEAD_DIM * self.batch * self.kv_heads * self.keys


SHAPES = (Shape(64, 64, 4, 16_384), Shape(8, 64, 8, 16_384), Shape(1, 64, 8, 65_536))


def bench_decode(
    *, quick: bool = False, progress: bool = True, results: Path = RESULTS
) -> dict[str, Any]:
    """Time decode kernels and write every row to ``cuda_kernels/results/``.

    Interrupted, it keeps and returns what it has measured.

    Parameters
    ----------
    quick : bool
        Caches with heads before keys only (HND), 10 rounds.  Otherwise NHD too, 30 rounds.
    progress : bool
        Show a progress bar on stderr.
    results : path
        Folder of the JSON.

    Returns
    -------
    dict
        ``machine``, ``rounds``, ``rows``, ``notes``, ``interrupted``, and ``path`` of the JSON
        written.

    Raises
    ------
    RuntimeError
        If there is no GPU that runs the decode kernel, or no PyTorch.
    """
    check_gpu()
    gpu = Gpu()
    rounds = 10 if quick else 30
    layouts = ("HND",) if quick else ("HND", "NHD")
    record = Record("decode-quick" if quick else "decode", describe(), results)
    record.fields |= {"rounds": rounds}
    with record:
        for shape, layout in _bar([(s, layout) for s in SHAPES for layout in layouts], progress):
            record.add(*_measure(gpu, shape, layout, rounds))
            gpu.torch.cuda.empty_cache()
    return record.result()


def decode_table(record: dict[str, Any]) -> str:
    """Lay a record out in aligned columns."""
    head = f"{'kernel':18}{'batch':>6}{'heads':>8}{'keys':>8}{'cache':>7}{'splits':>8}"
    lines = [f"{head}{'sparsity':>10}{'ms':>9}{'TB/s':>7}  ratio (quartiles)"]
    for row in record["rows"]:
        low, middle, high = row["ratio"]
        heads = f"{row['heads']}/{row['kv_heads']}"
        lines.append(
            f"{row['kernel']:18}{row['batch']:6}{heads:>8}{row['keys']:8}{row['layout']:>7}"
            f"{row['splits'] or '':>8}{row['sparsity']:10.3f}{row['ms']:9.4f}{row['tb_per_s']:7.2f}"
            f"  {middle:.3f} ({low:.3f}–{high:.3f}) × {row['against']}"
        )
    lines += record["notes"]
    lines.append(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    return "\n".join(lines)


def faint_tiles(shape: Shape, sparsity: float, seed: int = 0) -> NDArray[np.bool_]:
    """Choose the tiles to be skipped, at random for each request and KV head.

    Parameters
    ----------
    shape : Shape
    sparsity : float
        Their share of all tiles, to the nearest tile.  Neither the first tile nor the newest is
        among them.
    seed : int

    Returns
    -------
    ndarray, shape [B, Hkv, key tiles], bool

    Examples
    --------
    >>> faint_tiles(Shape(2, 8, 4, 1024), 0.75).sum(axis=2).tolist()
    [[12, 12, 12, 12], [12, 12, 12, 12]]
    """
    tiles = shape.keys // KEYS
    order = np.random.default_rng(seed).random((shape.batch, shape.kv_heads, tiles))
    order[..., [0, -1]] = np.inf
    return order.argsort(axis=2).argsort(axis=2) < round(sparsity * tiles)


def _measure(
    gpu: Gpu, shape: Shape, layout: str, rounds: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """All candidates on one shape and layout; and what is not as prescribed."""
    from cuda_kernels.decode import skip_softmax_decode_plan

    torch, notes = gpu.torch, []
    about = f"{shape.batch} × {shape.keys} keys, {layout}"
    queries, table, lens = _inputs(torch, shape)
    out = torch.empty_like(queries)
    common = {**shape._asdict(), "head_dim": HEAD_DIM, "dtype": "bfloat16", "layout": layout}
    common["page"] = PAGE
    rows: list[dict[str, Any]] = []
    for sparsity in (0.0, *SPARSITIES):
        faint = faint_tiles(shape, sparsity)
        count = max(2, -(-ROTATED // shape.bytes))
        caches = [_cache(torch, shape, layout, faint, table) for _ in range(count)]
        turn = cycle(caches)  # of all candidates, so that none finds what the last one has read
        asked = {"dense": 0.0, "skip": 0.01} if sparsity else {"dense": 0.0, "none skipped": TINY}
        plans = {
            name: skip_softmax_decode_plan(
                queries, *caches[0], threshold=lam, seq_lens=lens, page_table=table,
                layout=layout, keys=KEYS,
            )
            for name, lam in asked.items()
        }  # fmt: skip
        candidates: dict[str, Callable[[], Any]] = {
            name: partial(_call, plan, queries, turn, out) for name, plan in plans.items()
        }
        if not sparsity:
            read = _reader(torch, shape)
            candidates["read-only"] = lambda read=read, turn=turn: read(next(turn))
            peers = _flashinfer(torch, shape, layout, queries, table, lens, turn)
            works, refusals = working(peers, torch.cuda.synchronize)
            candidates |= works
            notes += [f"{about}: {refusal}" for refusal in refusals]
        times = interleaved(gpu, candidates, rounds)
        for name in times:
            if name == "dense" and sparsity:
                continue  # it is there to be compared with
            against = "dense" if name in ("none skipped", "skip") else "read-only"
            moved, reached, splits = shape.bytes, 0.0, None
            if name in plans:
                report = plans[name].report
                moved, splits = report.bytes.total, report.settings.splits
                reached = float(report.sparsity.mean())
                if abs(reached - sparsity) > 0.01:
                    notes.append(f"{about}: {name} skipped {reached:.3f}, not {sparsity:g}")
            named = {**common, "workload": f"columns {sparsity:g}" if sparsity else "random"}
            rows.append(_row(name, times, against, moved, reached, splits, named))
    return rows, notes


def _call(plan: Any, queries: Any, turn: Iterator[tuple[Any, Any]], out: Any) -> Any:
    return plan(queries, *next(turn), out=out)


def _inputs(torch: Any, shape: Shape) -> tuple[Any, Any, Any]:
    """Queries, a page table in random order, and lengths."""
    pages = shape.keys // PAGE
    queries = torch.randn(shape.batch, 1, shape.heads, HEAD_DIM, device="cuda")
    queries[..., 0] = 8.0
    table = torch.randperm(shape.batch * pages, device="cuda").to(torch.int32)
    lens = torch.full((shape.batch,), shape.keys, dtype=torch.int32, device="cuda")
    return queries.to(torch.bfloat16), table.view(shape.batch, pages), lens


def _cache(
    torch: Any, shape: Shape, layout: str, faint: NDArray[np.bool_], table: Any
) -> tuple[Any, Any]:
    """K and V of N(0, 1) in pages; keys of faint tiles score 22 less than the others."""
    heads_first = (shape.batch * shape.keys // PAGE, shape.kv_heads, PAGE, HEAD_DIM)
    k, v = (
        torch.randn(heads_first, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )  # a tile is a page
    low = torch.from_numpy(np.moveaxis(faint, 1, 2).reshape(-1, shape.kv_heads)).cuda()
    shift = -22.0 * HEAD_DIM**0.5 / 8
    k[..., 0] = 0.0
    k[table.view(-1).long(), :, :, 0] = torch.where(low, shift, 0.0)[..., None].to(k.dtype)
    if layout == "NHD":
        k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    return k, v


def _reader(torch: Any, shape: Shape) -> Callable[[tuple[Any, Any]], None]:
    """Make a function that reads K and V and does nothing else."""
    from cuda_kernels.bandwidth import SIGNATURE, THREADS, make_kernel
    from cuda_kernels.gpu import current
    from cuda_kernels.launch import Launcher, load

    device = current()
    blocks = device.multiprocessors * 8
    each = ((shape.bytes // 4,), (2,), 2)  # K, or V, as numbers of 16 bits: whole chunks
    folded = torch.empty(blocks * THREADS, dtype=torch.int32, device="cuda")
    compiled = load(make_kernel(), SIGNATURE, 0, device)
    room = ((folded.numel(),), (4,), 4)
    launcher = Launcher(compiled, (blocks, 1, 1), THREADS, 0, each, each, room)

    def read(cache: tuple[Any, Any]) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        launcher(stream, *(x.data_ptr() for x in (*cache, folded)))

    return read


def _flashinfer(
    torch: Any, shape: Shape, layout: str, queries: Any, table: Any, lens: Any,
    turn: Iterator[tuple[Any, Any]],
) -> dict[str, Callable[[], Any]]:  # fmt: skip
    """FlashInfer's decode kernels, if it is installed."""
    try:
        import flashinfer
    except ImportError:
        return {}
    q = queries[:, 0]
    room, zeros = (torch.zeros(256 << 20, dtype=torch.uint8, device="cuda") for _ in range(2))
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, layout, use_tensor_cores=True)

    @cache
    def planned() -> None:
        starts = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * table.shape[1]
        last = torch.full((shape.batch,), PAGE, dtype=torch.int32, device="cuda")
        wrapper.plan(
            starts, table.view(-1), last, shape.heads, shape.kv_heads, HEAD_DIM, PAGE,
            q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip

    def fa2() -> Any:
        planned()
        return wrapper.run(q, next(turn))

    def xqa() -> Any:
        return flashinfer.decode.xqa_batch_decode_with_kv_cache(
            q, next(turn), zeros, table, lens, shape.keys, bmm1_scale=HEAD_DIM**-0.5,
            bmm2_scale=1.0, kv_layout=layout,
        )  # fmt: skip

    return {"flashinfer fa2": fa2, "flashinfer xqa": xqa}


def _row(
    name: str, times: dict[str, list[float]], against: str, moved: int, sparsity: float,
    splits: int | None, common: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """One line of the record; ``ratio`` is how many times faster it is than ``against``."""
    ms = statistics.median(times[name])
    return {
        "kernel": name,
        **common,
        "splits": splits,
        "sparsity": sparsity,
        "bytes": moved,
        "ms": ms,
        "tb_per_s": moved / ms / 1e9,
        "ratio": ratio(times[name], times[against]),  # lower quartile, median, upper quartile
        "against": against,
    }
