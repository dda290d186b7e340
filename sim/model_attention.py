"""A model whose attention skips tiles as a kernel does: same grid, order, vote, same decisions.

transformers lets anyone register an attention function.  This one forms the scores once, for one
KV group and one strip of query rows at a time so that memory stays bounded, takes the maximum of
every tile, decides as :meth:`sim.Scan.decide` does, and attends over the keys of kept tiles.
A call with one query token is decode, any other prefill; each has its own target
(:mod:`sim.targets`).  λ > 1, a scale factor larger than the context, is computed densely.

Needs the ``capture`` extra (torch, transformers); importing this module does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.decode import DecodeGrid
from sim.geometry import Grid
from sim.targets import PHASES, Target, target
from sim.threshold import ln_threshold, resolve

TOLERANCE = 1e-3
"""Largest accepted relative difference between the model's own attention and this one at λ = 0."""

STRIP_ROWS = 256

_FUNCTION = "skip_softmax_evaluate"


@dataclass(frozen=True)
class Setting:
    """Which kernel decides, and on which threshold, in prefill and in decode.

    Parameters
    ----------
    kernel : {"ours", "nvidia", "nvidia-256", "model-optimizer"}
        As in :mod:`sim.targets`.
    threshold : mapping, optional
        Phase → λ, at most 1.
    threshold_scale_factor : mapping, optional
        Phase → factor; λ = factor / KV length, and where that exceeds 1 the call is dense.
        Give one of the two.

    Raises
    ------
    ValueError
        If the kernel is unknown, not exactly one of the two is given, a phase is missing, or a
        value is negative, not finite, or a threshold above 1.

    Examples
    --------
    >>> Setting.both("ours", threshold_scale_factor=600).threshold_at("decode", 60_000)
    0.01
    """

    kernel: str
    threshold: Mapping[str, float] | None = None
    threshold_scale_factor: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.threshold_scale_factor is None):
            raise ValueError("give threshold or threshold_scale_factor, one of them")
        given = self.threshold if self.threshold is not None else self.threshold_scale_factor
        if given is None or set(given) != set(PHASES):
            raise ValueError(f"give a value for {' and '.join(PHASES)}, got {given!r}")
        for phase in PHASES:
            target(self.kernel, phase)
            self.threshold_at(phase, 1)

    @classmethod
    def both(
        cls,
        kernel: str,
        *,
        threshold: float | None = None,
        threshold_scale_factor: float | None = None,
    ) -> Setting:
        """Give the setting with the same value in both phases."""

        def twice(value: float | None) -> dict[str, float] | None:
            return None if value is None else dict.fromkeys(PHASES, value)

        return cls(kernel, twice(threshold), twice(threshold_scale_factor))

    def threshold_at(self, phase: str, kv_length: int) -> float:
        """Give the λ of a call with so many keys; 0 where it is computed densely."""
        threshold, factor = (
            None if values is None else values[phase]
            for values in (self.threshold, self.threshold_scale_factor)
        )
        return float(resolve(threshold, factor, kv_length))


@dataclass
class Tally:
    """What was skipped, and what it changed, per layer.

    Attributes
    ----------
    visited, skipped : dict
        Phase → tiles, [layers] int64.
    difference, norm : dict
        Phase → sums of squares, [layers] float64, of (output − dense output) and of the dense
        output, both from the same Q, K and V; zeros unless asked for.
    """

    layers: int
    visited: dict[str, NDArray[np.int64]] = field(init=False)
    skipped: dict[str, NDArray[np.int64]] = field(init=False)
    difference: dict[str, NDArray[np.float64]] = field(init=False)
    norm: dict[str, NDArray[np.float64]] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("visited", "skipped"):
            setattr(self, name, {phase: np.zeros(self.layers, np.int64) for phase in PHASES})
        for name in ("difference", "norm"):
            setattr(self, name, {phase: np.zeros(self.layers) for phase in PHASES})

    def sparsity(self, phase: str) -> NDArray[np.float64]:
        """Skipped ÷ visited tiles of each layer, [layers]; first tiles count as visited."""
        return self.skipped[phase] / np.maximum(self.visited[phase], 1)

    def output_error(self, phase: str) -> NDArray[np.float64]:
        """‖output − dense‖ ÷ ‖dense‖ of each layer's attention, over all rows, [layers]."""
        return np.sqrt(self.difference[phase] / np.maximum(self.norm[phase], 1e-30))


class Attended(NamedTuple):
    """Output, a torch tensor [Hq, Lq, Dv], which tiles were skipped, and how many were visited.

    ``skipped`` is a bool tensor: prefill [Hq, groups, key_tiles], decode [votes, key_tiles].
    """

    output: Any
    skipped: Any
    visited: int


@contextmanager
def exchanged(model: Any, attend: Callable[..., Any]) -> Iterator[None]:
    """Let ``attend`` take the place of a model's attention.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    attend : callable
        Called as transformers calls attention functions, with the model's own in front.

    Raises
    ------
    ValueError
        If the model does not look its attention up in transformers' attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    own_name = model.config._attn_implementation
    if own_name not in AttentionInterface() or own_name not in AttentionMaskInterface():
        raise ValueError(
            f"the model's attention {own_name!r} is not in transformers' attention interface; "
            "load it with attn_implementation='sdpa'"
        )
    own = AttentionInterface()[own_name]

    def function(*args: Any, **kwargs: Any) -> Any:
        return attend(own, *args, **kwargs)

    AttentionInterface.register(_FUNCTION, function)
    AttentionMaskInterface.register(_FUNCTION, AttentionMaskInterface()[own_name])
    model.set_attn_implementation(_FUNCTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own_name)


@contextmanager
def skipping(model: Any, setting: Setting, *, compare: bool = False) -> Iterator[Tally]:
    """Let a model's attention skip tiles, and count them.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model on CPU that looks its attention up by name.
    setting : Setting
    compare : bool
        Also compute each call densely, from the same Q, K and V, for ``Tally.output_error``.

    Yields
    ------
    Tally
        Filled while the model runs.

    Raises
    ------
    ValueError
        If the attention cannot be exchanged, or when the model runs: a batch, padding, a window,
        a soft cap or sink logits.
    """
    tally = Tally(model.config.get_text_config().num_hidden_layers)

    def attend(
        own: Callable[..., Any],
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scaling: float | None = None,
        **rest: Any,
    ) -> Any:
        _check_call(module, query, key, mask, rest)
        q, k, v = (x[0].float() for x in (query, key, value))
        phase = "decode" if q.shape[1] == 1 else "prefill"
        one, lam = target(setting.kernel, phase), setting.threshold_at(phase, k.shape[1])
        scale = q.shape[2] ** -0.5 if scaling is None else float(scaling)
        attended = (attend_prefill if phase == "prefill" else attend_decode)(
            q, k, v, one, lam, scale
        )
        layer, output = module.layer_idx, attended.output.transpose(0, 1)[None]  # [1, Lq, Hq, Dv]
        tally.visited[phase][layer] += attended.visited
        tally.skipped[phase][layer] += int(attended.skipped.sum())
        if compare:
            dense = own(module, query, key, value, mask, scaling=scaling, **rest)[0].float()
            tally.difference[phase][layer] += float((output - dense).square().sum())
            tally.norm[phase][layer] += float(dense.square().sum())
        return output.to(value.dtype), None

    with exchanged(model, attend):
        yield tally


def check_model(model: Any, ids: Any) -> None:
    """Raise ValueError unless this attention at λ = 0 is the model's own.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    ids : torch.Tensor, shape [1, L]
        A few tokens to try it on.
    """
    import torch

    setting = Setting.both("ours", threshold=0.0)
    with skipping(model, setting, compare=True) as tally, torch.no_grad():
        model(ids, use_cache=False)
    silent = np.flatnonzero(tally.visited["prefill"] == 0)
    if silent.size:
        raise ValueError(f"layers {silent.tolist()} did not call the attention interface")
    error = tally.output_error("prefill")
    if not error.max() <= TOLERANCE:
        layer = int(error.argmax())
        raise ValueError(
            f"layer {layer} does more than softmax(scale q k) v with a causal mask: its output "
            f"differs by {error[layer]:.2g} of its norm, at most {TOLERANCE} is accepted"
        )


def attend_prefill(q: Any, k: Any, v: Any, one: Target, lam: float, scale: float) -> Attended:
    """Causal attention of many query rows, tiles skipped as ``one`` decides.

    Parameters
    ----------
    q : torch.Tensor, shape [Hq, Lq, D], float32
    k : torch.Tensor, shape [Hkv, Lk, D], float32
    v : torch.Tensor, shape [Hkv, Lk, Dv], float32
    one : Target
    lam : float
        λ ≤ 1.
    scale : float
        Softmax scale.

    Returns
    -------
    Attended
    """
    import torch

    pad = torch.nn.functional.pad

    heads, lq, head_dim = q.shape
    share = heads // len(k)
    grid = Grid(one.tile, lq, k.shape[1], causal=True)
    keys, beyond = grid.keys, grid.key_tiles * grid.keys - grid.lk
    visible, last = (torch.tensor(x) for x in (grid.visible(), _last_tiles(grid)))
    ln_lam = float(ln_threshold(lam))
    output = q.new_empty(heads, lq, v.shape[2])
    skipped = torch.zeros(heads, grid.groups, grid.key_tiles, dtype=torch.bool)
    strip = STRIP_ROWS // grid.rows * grid.rows
    for group in range(len(k)):
        of_group = slice(group * share, (group + 1) * share)
        all_keys, values = (pad(x[group], (0, 0, 0, beyond)) for x in (k, v))
        for start in range(0, lq, strip):
            rows = slice(start, min(start + strip, lq))
            n = -(-int(visible[rows.stop - 1]) // keys)  # key tiles that the strip sees
            queries = (q[of_group, rows] * scale).reshape(-1, head_dim)
            scores = (queries @ all_keys[: n * keys].T).view(share, -1, n * keys)
            clear = int(visible[start])  # keys that all rows see
            unseen = torch.arange(clear, n * keys) >= visible[rows, None]
            scores[..., clear:].masked_fill_(unseen, -torch.inf)
            tiles = scores.view(share, -1, n, keys)
            gap = _gap(tiles.amax(-1), last[rows], one.order, grid.rows)  # [share, groups, n]
            if one.vote == "group":
                gap = gap.amax(0, keepdim=True).expand_as(gap)
            skip = gap < ln_lam
            first = start // grid.rows
            skipped[of_group, first : first + skip.shape[1], :n] = skip
            of_rows = skip.repeat_interleave(grid.rows, 1)[:, : tiles.shape[1]]
            tiles.masked_fill_(of_rows[..., None], -torch.inf)
            torch.softmax(scores, -1, out=scores)
            output[of_group, rows] = (scores.view(-1, n * keys) @ values[: n * keys]).view(
                share, -1, v.shape[2]
            )
    visited = torch.tensor(grid.visited_tiles())
    return Attended(output, skipped & visited, heads * int(visited.sum()))


def attend_decode(q: Any, k: Any, v: Any, one: Target, lam: float, scale: float) -> Attended:
    """Attention of one new token, tiles skipped as ``one`` decides.

    Parameters
    ----------
    q : torch.Tensor, shape [Hq, 1, D], float32
    k : torch.Tensor, shape [Hkv, L, D], float32
        The cache, the token's own key included.
    v : torch.Tensor, shape [Hkv, L, Dv], float32
    one : Target
    lam : float
        λ ≤ 1.
    scale : float
        Softmax scale.

    Returns
    -------
    Attended
    """
    import torch

    pad = torch.nn.functional.pad

    heads, (groups, length, _), keys = len(q), k.shape, one.tile[1]
    n = -(-length // keys)
    queries = (q * scale).view(groups, heads // groups, -1)
    scores = queries @ k.transpose(1, 2)  # [groups, share, L]
    tiles = pad(scores, (0, n * keys - length), value=-torch.inf).view(groups, -1, n, keys)
    tile_max = tiles.amax(-1)  # [groups, share, n]
    before = torch.full_like(tile_max, -torch.inf)
    seed = torch.maximum(tile_max[..., 0], tile_max[..., n - 1])[..., None]
    for lane in _lanes(one, n):
        visit = torch.tensor(lane)
        m = tile_max[..., visit[:-1]].cummax(-1).values
        if one.seeded:
            before[..., visit[:1]] = seed
            m = torch.maximum(m, seed)
        before[..., visit[1:]] = m
    gap = tile_max - before  # +inf for the first tile of a plain split: before is −inf
    gap = gap.amax(1, keepdim=True) if one.vote == "group" else gap
    skip = gap < float(ln_threshold(lam))  # [groups, 1 or share, n]
    tiles = tiles.masked_fill(skip[..., None], -torch.inf)
    p = torch.softmax(tiles.flatten(2)[..., :length], -1)
    return Attended((p @ v).view(heads, 1, -1), skip.flatten(0, 1), gap.numel())


@cache
def _lanes(one: Target, n: int) -> list[list[int]]:
    """Tiles of each split that has any, in the order in which it visits them."""
    grid = DecodeGrid(
        np.array([n]), n, 1, 1, 1, one.order, splits=one.splits, split_layout=one.split_layout
    )
    return [lane.tolist() for lane in grid.lanes(n) if lane.size]


def _last_tiles(grid: Grid) -> NDArray[np.int64]:
    """Last key tile that each row's vote group visits, [Lq]."""
    return (grid.visited() - 1).repeat(grid.rows)[: grid.lq]


def _gap(tile_max: Any, last: Any, order: str, rows: int) -> Any:
    """Gap of every tile from its row maxima: [heads, rows, tiles] → [heads, groups, tiles]."""
    import torch

    pad = torch.nn.functional.pad

    before = torch.full_like(tile_max, -torch.inf)
    if order == "ascending":
        before[..., 1:] = tile_max[..., :-1].cummax(-1).values
    else:
        before[..., :-1] = tile_max[..., 1:].flip(-1).cummax(-1).values.flip(-1)
    if order == "ends_first":  # the last tile, then tile 0, then back
        own = last.expand(len(tile_max), -1)[..., None]
        before = torch.maximum(before, tile_max[..., :1])
        before[..., :1] = tile_max.gather(-1, own)
        before.scatter_(-1, own, -torch.inf)
    row_gap = (tile_max - before).masked_fill_(tile_max == -torch.inf, -torch.inf)
    ragged = -row_gap.shape[1] % rows  # rows that are not there vote skip
    row_gap = pad(row_gap, (0, 0, 0, ragged), value=-torch.inf)
    return row_gap.unflatten(1, (-1, rows)).amax(2)


def _check_call(module: Any, query: Any, key: Any, mask: Any, rest: Mapping[str, Any]) -> None:
    """Raise ValueError unless a call is softmax(scale q k) v with a causal mask, of one text."""
    import torch

    layer = f"layer {module.layer_idx}"
    if len(query) != 1:
        raise ValueError(f"{layer}: one text at a time, got a batch of {len(query)}")
    lq, lk = query.shape[2], key.shape[2]
    if lq > lk or not getattr(module, "is_causal", True):
        raise ValueError(f"{layer}: its attention is not causal")
    for name in ("softcap", "s_aux"):
        if rest.get(name) is not None:
            raise ValueError(f"{layer}: its attention has {name}, which no skip kernel here has")
    if mask is not None:
        seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
        if not torch.equal(seen, torch.ones(lq, lk, dtype=torch.bool).tril(lk - lq)):
            raise ValueError(f"{layer}: its mask is more than causal: padding, or a window")
