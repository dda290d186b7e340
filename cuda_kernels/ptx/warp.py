"""Exchange between the 32 lanes of a warp: shuffles and votes.  All lanes take part."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_kernels.ptx.instruction import instruction
from cuda_kernels.ptx.machine import running

_VOTE = (
    "{{ .reg .pred p, q; setp.ne.u32 p, $1, 0; "
    "vote.sync.{}.pred q, p, 0xffffffff; selp.u32 $0, 1, 0, q; }}"
)


def _exchange(x: Any, lane_mask: Any) -> Any:
    return x[np.arange(32) ^ lane_mask]


@instruction("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", scope="warp")
def shfl_bfly_f32(x: Any, lane_mask: Any) -> Any:
    """Return the float32 of lane ``lane ^ lane_mask``.

    PTX ISA: ``shfl.sync.bfly``.

    Examples
    --------
    >>> shfl_bfly_f32(np.arange(32), np.full(32, 2))[:4]
    array([2, 3, 0, 1])
    """
    return _exchange(x, lane_mask)


@instruction("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", scope="warp")
def shfl_bfly_u32(x: Any, lane_mask: Any) -> Any:
    """Return the uint32 of lane ``lane ^ lane_mask``.  PTX ISA: ``shfl.sync.bfly``."""
    return _exchange(x, lane_mask)


@instruction("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", scope="warp")
def shfl_idx_u32(x: Any, lane: Any) -> Any:
    """Return the uint32 of lane ``lane % 32``.  PTX ISA: ``shfl.sync.idx``."""
    return x[lane % 32]


@instruction(_VOTE.format("any"), "=r,r", scope="warp")
def vote_any(predicate: Any) -> Any:
    """Return 1 if any lane's predicate is not 0, else 0.  PTX ISA: ``vote.sync.any``.

    Examples
    --------
    >>> vote_any(np.arange(32))[0], vote_any(np.zeros(32))[0]
    (np.uint32(1), np.uint32(0))
    """
    return np.full(32, np.any(predicate), np.uint32)


@instruction(_VOTE.format("all"), "=r,r", scope="warp")
def vote_all(predicate: Any) -> Any:
    """Return 1 if every lane's predicate is not 0, else 0.  PTX ISA: ``vote.sync.all``."""
    return np.full(32, np.all(predicate), np.uint32)


@instruction(
    "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
    "=r,r",
    scope="warp",
)
def ballot(predicate: Any) -> Any:
    """Return a word whose bit t is lane t's predicate.  PTX ISA: ``vote.sync.ballot``.

    Examples
    --------
    >>> ballot(np.arange(32) < 3)[0]
    np.uint32(7)
    """
    lanes = np.flatnonzero(predicate).astype(np.uint32)
    return np.full(32, np.bitwise_or.reduce(np.uint32(1) << lanes), np.uint32)


@instruction("bar.warp.sync 0xffffffff;", memory=True)
def sync_warp() -> None:
    """Wait for every lane of the warp and see what they wrote.  PTX ISA: ``bar.warp.sync``."""
    running().sync_warp(0xFFFFFFFF)
