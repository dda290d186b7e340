"""Checks of the lessons: many cases, and of those that fail the first, with one hint.

A check prints and returns whether all cases pass.  In a program it ends the run at the first
failure instead (``strict``), so that the exit status says whether a lesson is solved.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import sim
from lessons.helpers import Stop, in_notebook
from sim.decode import attend_decode, decode_bytes, scan_decode
from sim.reference import attention

Array = NDArray[Any]


class Wanted(NamedTuple):
    """One value that must be returned: max |Δ| ≤ budget; and what to say if it is not so."""

    name: str
    value: Array
    budget: float
    hint: str


class Case(NamedTuple):
    """One call, and what it must return, in the order in which it is looked at."""

    label: str
    arguments: tuple[Any, ...]
    wanted: list[Wanted]


def check_attention(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 0: ``attention(q, k, v, scale) -> output, weights``, causal."""

    def cases() -> Iterator[Case]:
        alone = "one word sees only itself: its weight is 1"
        order = "in order: scores times `scale`; −inf above the diagonal; exp; row ÷ its sum"
        for seed, (n, d, dv) in enumerate([(1, 4, 4), (2, 4, 3), (5, 8, 8), (34, 64, 64)]):
            q, k, v = _random(seed, (n, d), (n, d), (n, dv))
            scale = d**-0.5
            scores = np.where(np.tri(n, dtype=bool), q @ k.T * scale, -np.inf)
            weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            yield Case(
                f"{n} words, head size {d}, seed {seed}",
                (q, k, v, scale),
                [
                    Wanted("output", weights @ v, 1e-9, alone if n == 1 else order),
                    Wanted("weights", weights, 1e-9, alone if n == 1 else order),
                ],
            )

    return _judge(fn, cases(), strict)


def check_softmax(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 1: ``softmax(scores) -> weights`` along the last axis, for any scores."""

    def cases() -> Iterator[Case]:
        (plain,) = _random(0, (3, 7))
        over = "exp overflows to inf and inf / inf is nan: subtract the row's maximum first"
        own = "each row needs its own maximum, not one for the whole array"
        masked = "−inf is a masked score: its weight is exp(−inf) = 0"
        empty = "a row whose every score is −inf: −inf − −inf is nan, use 0 as its maximum"
        hidden = np.where(np.tri(5, 6, dtype=bool), _random(1, (5, 6))[0], -np.inf)
        unlike = np.array([[900.0, 901, 902], [0, 1, 2], [-902, -901, -900]])
        for label, scores, hint in [
            ("ordinary scores, seed 0", plain, "weights are exp(score) over the sum of the row"),
            ("scores near +1000, seed 0", plain + 1000, over),
            ("scores near −1000, seed 0", plain - 1000, over),
            ("rows of very different size", unlike, own),
            ("a causal mask, seed 1", hidden, masked),
            ("a row that sees nothing", np.array([[-np.inf, -np.inf], [0, 0]]), empty),
        ]:
            yield Case(
                f"{label}, shape {scores.shape}",
                (scores,),
                [Wanted("weights", _softmax(scores), 1e-12, hint)],
            )

    return _judge(fn, cases(), strict)


def check_online_softmax(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 2: ``online_softmax(scores, values, chunk) -> output, m, l`` for one row."""

    def cases() -> Iterator[Case]:
        rescale = "when m grows, l and acc are too large by exp(old m − new m) = 1 / alpha"
        for seed, (n, chunk, slope) in enumerate(
            [(8, 8, 0), (9, 3, 0), (40, 7, -0.5), (40, 7, 0.5), (1, 4, 0), (300, 64, 20)]
        ):
            scores, values = _random(seed, (n,), (n, 5))
            scores += slope * np.arange(n)
            m = scores.max()
            l = np.exp(scores - m).sum()
            hint = "one chunk is the plain softmax: p = exp(s − m)" if chunk >= n else rescale
            yield Case(
                f"{n} scores in chunks of {chunk}, slope {slope}, seed {seed}",
                (scores, values, chunk),
                [
                    Wanted("output", _softmax(scores) @ values, 1e-10, hint),
                    Wanted("m", m, 0, "m is the largest of all scores so far"),
                    Wanted("l", l, 1e-10 * l, hint),
                ],
            )

    return _judge(fn, cases(), strict)


def check_tiled_attention(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 3: ``tiled_attention(q, k, v, scale, tile) -> output, state``, causal."""

    def cases() -> Iterator[Case]:
        mask = "row r sees keys 0 … r: in its tiles, mask the others"
        last = "the last row of a group decides how many tiles the group visits"
        tail = "the last group and the last tile may be smaller: stop at row n and key n"
        for seed, (n, tile, hint) in enumerate(
            [
                (8, (8, 8), mask),
                (32, (8, 8), mask),
                (32, (8, 16), mask),
                (32, (16, 8), mask),
                (37, (8, 16), tail),
                (50, (7, 3), tail),
            ]
        ):
            q, k, v = _random(seed, (n, 16), (n, 16), (n, 16))
            grid = sim.Grid(tile, n, n, True)
            yield Case(
                f"{n} words, tiles of {tile[0]} × {tile[1]}, seed {seed}",
                (q, k, v, 0.25, tile),
                [
                    Wanted("state", grid.visited_tiles(), 0, last),
                    Wanted("output", attention(q[None], k[None], v[None]).output[0], 1e-10, hint),
                ],
            )

    def in_order(*arguments: Any) -> Any:
        output, state = fn(*arguments)
        return state, output

    return _judge(fn, cases(), strict, call=in_order)


def check_skip(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 4: ``skip_attention(q, k, v, scale, tile, order, ln_lam) -> state, gap, output``."""

    def cases() -> Iterator[Case]:
        largest = (
            "a row's gap is tile_max − m, m from before this tile; the tile's is the largest; "
            "and a wrong skip (λ = 0 skips nothing) spoils every gap after it"
        )
        blind = "a row that sees nothing here (tile_max −inf) has gap −inf, never nan"
        rule = "skip exactly where the tile's gap lies below ln λ"
        kept = "on a skip nothing changes: neither m, nor l, nor acc"
        for seed, (n, tile, order, lam) in enumerate(
            [
                (64, (8, 16), "ascending", 0.0),
                (64, (8, 16), "ascending", 0.1),
                (64, (8, 16), "ends_first", 0.1),
                (64, (16, 8), "ends_first", 0.3),
                (53, (16, 8), "descending", 0.5),
                (90, (8, 16), "ascending", 0.9),
            ]
        ):
            q, k, v = _random(seed, (n, 16), (n, 16), (n, 16))
            q *= 4
            q, k, v = (x.astype(np.float32).astype(np.float64) for x in (q, k, v))
            one = sim.scan(q[None], k[None], tile=tile, order=order)
            tiles = one.decide(lam)
            output = attention(q[None], k[None], v[None], tiles=tiles).output[0]
            with np.errstate(divide="ignore"):
                ln_lam = np.log(lam)
            yield Case(
                f"{n} words, tiles of {tile[0]} × {tile[1]}, {order}, λ = {lam}, seed {seed}",
                (q, k, v, 0.25, tile, order, ln_lam),
                [
                    Wanted("gap", one.gap[0], 1e-4, largest if tile[0] < tile[1] else blind),
                    Wanted("state", tiles.state[0], 0, rule),
                    Wanted("output", output, 1e-9, kept),
                ],
            )

    def in_order(*arguments: Any) -> Any:
        output, state, gap = fn(*arguments)
        return gap, state, output

    return _judge(fn, cases(), strict, call=in_order)


def check_threads(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 5: ``launch(q, k, v, scale, threads) -> output``, one thread for each row, causal."""

    def cases() -> Iterator[Case]:
        first = "one block: row is threadIdx; and l is rescaled by alpha before p is added"
        blocks = "count the rows of the blocks before: row = blockIdx · blockDim + threadIdx"
        guard = "the last block has more threads than rows are left: those must do nothing"
        for seed, (n, threads, hint) in enumerate(
            [(4, 4, first), (12, 4, blocks), (13, 4, guard), (3, 8, guard), (21, 16, guard)]
        ):
            q, k, v = _random(seed, (n, 8), (n, 8), (n, 8))
            yield Case(
                f"{n} words, {threads} threads in a block, seed {seed}",
                (q, k, v, 8**-0.5, threads),
                [Wanted("output", attention(q[None], k[None], v[None]).output[0], 1e-10, hint)],
            )

    return _judge(fn, cases(), strict)


def check_fragments(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 6: ``multiply(a, b) -> places in A, places in B, d`` by one ``mma_m16n8k16``."""

    def cases() -> Iterator[Case]:
        in_a = "A: registers 1 and 3 are 8 rows below 0 and 2; registers 2 and 3 are 8 columns on"
        in_b = "B: the quad is the column; a register holds two neighbours of a column"
        load = "word [row, column // 2] of a, and word [column, row // 2] of b_columns"
        lane, i = np.indices((32, 8))
        quad, place = lane // 4, lane % 4
        a_row, a_column = quad + 8 * np.isin(i, (2, 3, 6, 7)), 2 * place + i % 2 + 8 * (i >= 4)
        b_row, b_column = (2 * place + i % 2 + 8 * (i >= 2))[:, :4], quad[:, :4]
        for seed in range(3):
            a, b = (x.astype(np.float16) for x in _random(seed, (16, 16), (16, 8)))
            product = a.astype(np.float64) @ b.astype(np.float64)
            yield Case(
                f"random matrices, seed {seed}",
                (a, b),
                [
                    Wanted("places in A", np.stack([a_row, a_column], 2), 0, in_a),
                    Wanted("places in B", np.stack([b_row, b_column], 2), 0, in_b),
                    Wanted("d", product, 1e-4, load),
                ],
            )

    return _judge(fn, cases(), strict)


def check_vote(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 7: ``decide(scores, ln_lam) -> skip, top_of_warp``, tiles of 16 keys, ≤ 64 rows."""

    def cases() -> Iterator[Case]:
        full = "who waits for whom? all must have written before one reads, and all must vote"
        tail = "rows that do not exist vote to skip, and come to every barrier and every exchange"
        top = "m of the rows of one warp: exchange with lanes 1, 2, 4, 8 and 16 away"
        for seed, (rows, tiles, lam) in enumerate(
            [(64, 2, 0.0), (64, 4, 0.3), (37, 4, 0.3), (5, 4, 0.5), (33, 3, 0.9)]
        ):
            scores = _random(seed, (rows, tiles, 16))[0].astype(np.float32)
            scores -= np.arange(tiles, dtype=np.float32)[None, :, None] % 3
            skip, m = np.zeros(tiles), np.full(64, -np.inf)
            with np.errstate(divide="ignore"):
                ln_lam = np.log(lam)
            for j in range(tiles):
                tile_max = scores[:, j].max(axis=1)
                skip[j] = (tile_max - m[:rows] < ln_lam).all()
                if not skip[j]:
                    m[:rows] = np.maximum(m[:rows], tile_max)
            yield Case(
                f"{rows} rows, {tiles} tiles, λ = {lam}, seed {seed}",
                (scores.reshape(rows, -1), ln_lam),
                [
                    Wanted("skip", skip, 0, full if rows == 64 else tail),
                    Wanted("top_of_warp", m.reshape(2, 32).max(axis=1), 0, top),
                ],
            )

    return _judge(fn, cases(), strict)


def check_cost(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 8: ``cost(gap, visited, vote_rows, mass, part, ln_lam) -> sparsity, delta, error``."""

    def cases() -> Iterator[Case]:
        hidden = "skipped: visited, and gap below ln λ; a tile that is not visited has gap −∞"
        share = "sparsity is skipped ÷ visited tiles, and not ÷ all tiles"
        rows = "the rows of a group skip alike: repeat a group's line `vote_rows` times, and crop"
        identity = "`lost` is δ·ȳ, and the sum of the other parts is (1 − δ)·ŷ"
        for seed, (n, tile, lam, hint) in enumerate(
            [
                (64, (8, 16), 1e-9, hidden),
                (64, (8, 16), 0.1, share),
                (64, (16, 8), 0.5, share),
                (53, (16, 8), 0.5, rows),
                (90, (8, 16), 0.9, rows),
            ]
        ):
            q, k, v = _uneven_head(seed, n, tile[1])
            one = sim.scan(q[None], k[None], tile=tile, order="ascending")
            scores = np.where(np.tri(n, dtype=bool), q @ k.T / 4, -np.inf)
            weights = _softmax(scores)
            starts = np.arange(0, n, tile[1])
            mass = np.add.reduceat(weights, starts, axis=1)
            parts = np.add.reduceat(weights[:, :, None] * v, starts, axis=1)
            tiles = one.decide(lam)
            kept = np.where(tiles.skipped[0].repeat(tile[0], axis=0)[:n], 0, 1)
            kept = np.where(kept.repeat(tile[1], axis=1)[:, :n], scores, -np.inf)
            after = _softmax(kept) @ v
            delta = 1 - np.where(kept > -np.inf, weights, 0).sum(axis=1)
            yield Case(
                f"{n} words, tiles of {tile[0]} × {tile[1]}, λ = {lam:g}, seed {seed}",
                (one.gap[0], one.grid.visited_tiles(), tile[0], mass, parts, np.log(lam)),
                [
                    Wanted("sparsity", tiles.sparsity[0], 1e-12, hint),
                    Wanted("delta", delta, 1e-9, rows),
                    Wanted("error", weights @ v - after, 1e-9, identity),
                ],
            )

    return _judge(fn, cases(), strict)


def check_calibrate(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 9: ``calibrate(sparsity, lengths, lams) -> a, b`` of points [texts, trials]."""

    def cases() -> Iterator[Case]:
        length = "a point's factor is λ times the length of its text, [texts, trials]"
        line = "x is sparsity, y is ln factor: b is the slope, and a is exp(intercept)"
        bends = "only points from 10 to 90 % sparsity count: beyond, the line bends"
        squares = "least squares on ln factor: y is ln factor, not factor; x is sparsity"
        lams = np.geomspace(1e-3, 0.99, 12)
        for seed, (lengths, a, b, noise, hint) in enumerate(
            [
                ([1000], 0.5, 10.0, 0.0, line),
                ([1000, 2000, 4000], 0.4, 12.0, 0.0, length),
                ([1000, 4000], 40.0, 5.0, 0.0, bends),
                ([1000, 2000, 4000], 0.4, 12.0, 0.02, squares),
                ([512, 512, 8192], 30.0, 6.0, 0.05, squares),
            ]
        ):
            factor = np.array(lengths)[:, None] * lams
            sparsity = np.log(factor / a) / b + noise * _random(seed, factor.shape)[0]
            sparsity = sparsity.clip(0, 0.97)
            kept = (sparsity >= 0.1) & (sparsity <= 0.9)
            x, y = sparsity[kept], np.log(factor[kept])
            slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
            level = np.exp(y.mean() - slope * x.mean())
            yield Case(
                f"texts of {', '.join(map(str, lengths))} tokens, noise {noise}, seed {seed}",
                (sparsity, np.array(lengths), lams),
                [Wanted("b", slope, 1e-6 * slope, hint), Wanted("a", level, 1e-6 * level, length)],
            )

    def slope_first(*arguments: Any) -> Any:
        a, b = fn(*arguments)
        return b, a

    return _judge(fn, cases(), strict, call=slope_first)


def check_certified(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 10: ``certified_attention(q, k, v, …, ln_lam, threads) -> output, bound``, causal."""

    def cases() -> Iterator[Case]:
        skip = "a skip adds n · exp(tile_max − m) to u, n keys that the row sees; then u ÷ (l + u)"
        alpha = "when a kept tile raises m, l and u are both multiplied by alpha"
        own = "each thread: the maximum, and the number, of its own columns that the row sees"
        for seed, (n, tile, order, lam, threads, hint) in enumerate(
            [
                (64, (8, 16), "ascending", 0.0, 1, "where nothing is skipped, the bound is 0"),
                (16, (8, 8), "ascending", 0.5, 1, skip),  # only the very last visit skips: no alpha
                (64, (16, 8), "descending", 0.5, 1, alpha),
                (64, (8, 16), "ends_first", 0.3, 4, own),
                (53, (16, 8), "descending", 0.5, 4, own),
                (90, (8, 16), "ascending", 0.9, 4, own),
            ]
        ):
            q, k, v = _uneven_head(seed, n, tile[1])
            tiles = sim.scan(q[None], k[None], tile=tile, order=order).decide(lam)
            output = attention(q[None], k[None], v[None], tiles=tiles).output[0]
            scores = np.where(np.tri(n, dtype=bool), q @ k.T / 4, -np.inf)
            left_out = tiles.skipped[0].repeat(tile[0], axis=0)[:n]
            left_out = left_out.repeat(tile[1], axis=1)[:, :n]
            m = scores.max(axis=1, keepdims=True)  # λ < 1: what is skipped never holds it
            l = np.where(left_out, 0, np.exp(scores - m)).sum(axis=1)
            u = np.zeros(n)
            for start in range(0, n, tile[1]):
                keys = np.arange(start, min(start + tile[1], n))
                for t in range(threads):
                    mine = keys[(keys - start) // 2 % threads == t]
                    if mine.size:
                        heaviest = np.exp(scores[:, mine].max(axis=1) - m[:, 0])
                        seen = (scores[:, mine] > -np.inf).sum(axis=1)
                        u += np.where(left_out[:, mine[0]], seen * heaviest, 0)
            with np.errstate(divide="ignore"):
                ln_lam = np.log(lam)
            yield Case(
                f"{n} words, tiles of {tile[0]} × {tile[1]}, {order}, λ = {lam}, {threads} "
                f"thread{'s' * (threads > 1)}, seed {seed}",
                (q, k, v, 0.25, tile, order, ln_lam, threads),
                [
                    Wanted("output", output, 1e-6, "u changes nothing else: the loop is given"),
                    Wanted("bound", u / (l + u), 1e-6, hint),
                ],
            )

    return _judge(fn, cases(), strict)


def check_decode(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 11: ``decode_step(q, k, v, …, splits, seeded) -> output, skipped, read``."""

    def cases() -> Iterator[Case]:
        vote = "tile_max − m of the head where it is largest must lie below ln λ: all must agree"
        merge = "bring all splits to the largest m: l and acc times exp(m − top); then acc ÷ l"
        seed = "seeded: the larger row maximum of the first tile and of the newest, for each head"
        bytes_ = "2 bytes a number: K of all tiles, V of those not skipped; the last may be short"
        for seed_, (n, keys, heads, lam, splits, seeded) in enumerate(
            [
                (64, 8, 1, 0.0, 1, True),
                (64, 8, 3, 0.5, 1, False),
                (53, 8, 3, 0.5, 3, False),
                (64, 8, 3, 0.5, 4, True),
                (90, 16, 2, 0.9, 6, True),
                (21, 8, 4, 0.7, 5, True),  # more splits than tiles
                (21, 8, 4, 0.7, 5, False),
            ]
        ):
            q, k, v = _uneven_head(seed_, n, keys)
            q = q[-heads:]
            arrays = q[None], k[None], v[None]
            tiles = scan_decode(
                q[None], k[None], [n], keys=keys, splits=splits, seeded=seeded, softmax_scale=0.25
            ).decide(lam)
            moved = decode_bytes(tiles, k.shape[1], v.shape[1])
            output = attend_decode(*arrays, tiles, softmax_scale=0.25).output[0]
            with np.errstate(divide="ignore"):
                ln_lam = np.log(lam)
            yield Case(
                f"{n} tokens, tiles of {keys}, {heads} heads, λ = {lam}, {splits} "
                f"{'seeded' if seeded else 'plain'} split{'s' * (splits > 1)}, seed {seed_}",
                (q, k, v, 0.25, keys, ln_lam, splits, seeded),
                [
                    Wanted("skipped", tiles.skipped[0, 0], 0, seed if seeded else vote),
                    Wanted("output", output, 1e-9, merge),
                    Wanted("read", np.array(moved.k + moved.v), 0, bytes_),
                ],
            )

    def in_order(*arguments: Any) -> Any:
        results = fn(*arguments)
        if not isinstance(results, tuple) or len(results) != 3:
            return results
        output, skipped, read = results
        return skipped, output, read

    return _judge(fn, cases(), strict, in_order)


def check_pipeline(fn: Callable[..., Any], strict: bool | None = None) -> bool:
    """Lesson 12: ``pipeline(q, k, v, scale, ln_lam) -> skip [2, tiles], output [128, 64]``."""

    def cases() -> Iterator[Case]:
        ring = (
            "copy_tiles: wait at empty for `parity ^ 1`, arrive at full with BYTES, copy; and K's "
            "stage is let go behind wgmma_wait, by one thread of each group"
        )
        leave = (
            "leave_out: one thread waits at full for `parity` and arrives at empty; or V's stage "
            "is filled again too early, or never, or before all have waited"
        )
        for seed, (tiles, first, second, hint) in enumerate(
            [(3, [], [], ring), (5, [1, 2, 4], [1, 3], leave)]
        ):
            q, k, v = _random(seed, (128, 64), (128 * tiles, 64), (128 * tiles, 64))
            q[:, :2], k[:, :2] = 0, 0
            skip = np.zeros((2, tiles))
            for group, skipped in enumerate((first, second)):
                q[64 * group : 64 * group + 64, group] = 8
                skip[group, skipped] = 1
                k[skip[group].repeat(128) > 0, group] = -16  # 16 below the others
            q, k, v = (x.astype(np.float16).astype(np.float64) for x in (q, k, v))
            hidden = skip.repeat(64, axis=0).repeat(128, axis=1) > 0
            output = _softmax(np.where(hidden, -np.inf, q @ k.T / 8)) @ v
            yield Case(
                f"{tiles} tiles, group 0 skips {first}, group 1 skips {second}, seed {seed}",
                (q, k, v, 1 / 8, np.log(0.1)),
                [Wanted("skip", skip, 0, hint), Wanted("output", output, 2e-3, hint)],
            )

    return _judge(fn, cases(), strict)


def _judge(
    fn: Callable[..., Any],
    cases: Iterable[Case],
    strict: bool | None,
    call: Callable[..., Any] | None = None,
) -> bool:
    """Run ``fn`` on all cases; print how many pass, or what is wrong with the first that does not.

    ``call`` puts the results of ``fn`` in the order in which they are looked at.
    """
    cases = list(cases)
    name = fn.__name__
    for number, case in enumerate(cases, 1):
        arguments = tuple(x.copy() if isinstance(x, np.ndarray) else x for x in case.arguments)
        fault = _fault(fn, call or fn, arguments, case.wanted)
        if fault:
            message = f"❌ {name}: case {number} of {len(cases)}: {case.label}\n   {fault}"
            if strict if strict is not None else not in_notebook():
                raise Stop(message)
            print(message)
            return False
    print(f"✅ {len(cases)}/{len(cases)} cases: {name}")
    return True


def _fault(
    fn: Callable[..., Any],
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    wanted: list[Wanted],
) -> str | None:
    """Say what is wrong with one call, and a hint; or None."""
    hint = f"\n   hint: {wanted[0].hint}"
    try:
        with np.errstate(all="ignore"):
            results = call(*arguments)
    except Stop:
        raise
    except Exception as error:  # the learner's, whatever it is
        return _raised(fn, error) + hint
    if not isinstance(results, tuple):
        results = (results,)
    if len(results) != len(wanted):
        return f"must return {', '.join(one.name for one in wanted)}{hint}"
    for result, one in zip(results, wanted, strict=True):
        if fault := _difference(one.name, result, np.asarray(one.value, float), one.budget):
            return f"{fault}\n   hint: {one.hint}"
    return None


def _raised(fn: Callable[..., Any], error: Exception) -> str:
    """Name an exception and the learner's line that it came from."""
    said = f"{type(error).__name__}: {error}"
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == fn.__code__.co_filename
    ]
    return f"raised {said}\n   in line {own[-1].lineno}: {own[-1].line}" if own else said


def _difference(name: str, result: Any, want: Array, budget: float) -> str | None:
    """Say where a result is wrong, or None."""
    if result is None:
        return f"{name} is None: is something missing after `return`?"
    try:
        got = np.asarray(result, float)
    except (TypeError, ValueError):
        return f"{name} must be an array of numbers, got {type(result).__name__}"
    if got.shape != want.shape:
        return f"{name} has shape {got.shape}, expected {want.shape}"
    with np.errstate(invalid="ignore"):
        off = np.where(got == want, 0, np.abs(got - want))
    off = np.where(np.isnan(off), np.inf, off)
    if (off <= budget).all():
        return None
    worst = tuple(int(x) for x in np.unravel_index(off.argmax(), off.shape))
    at = f" at {worst}" if worst else ""
    return (
        f"{name}: max |Δ| = {off.max():.3g}, budget {budget:.3g}, worst{at}: "
        f"got {got[worst]:.6g}, expected {want[worst]:.6g}"
    )


def _random(seed: int, *shapes: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def _uneven_head(seed: int, n: int, keys: int) -> list[Array]:
    """Draw q, k [n, 16] and v [n, 5] whose scores differ from tile to tile, so that some skip."""
    q, k, v, level = _random(seed, (n, 16), (n, 16), (n, 5), (n,))
    q[:, 0], k[:, 0] = 4, 3 * level[np.arange(n) // keys]
    return [q, k, v]


def _softmax(scores: Array) -> Array:
    """Softmax along the last axis in float64; a row of −inf gives zeros."""
    m = scores.max(axis=-1, keepdims=True)
    p = np.exp(scores - np.where(m == -np.inf, 0, m))
    return p / np.maximum(p.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
