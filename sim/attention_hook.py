"""Run a model and hand on the Q, K and V that its attention layers receive.

transformers lets anyone register an attention function.  The one here calls the model's own,
hands on its result unchanged, and looks at what went in: after rotary embedding, before the KV
heads are repeated.  What is handed on is checked: attention computed from it, for
``CHECKED_ROWS`` query rows spread over the text, must equal what the model computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.model_attention import exchanged
from sim.reference import attention

TOLERANCE = 1e-3
"""Largest accepted difference between the model's attention output and ours from its Q, K, V."""

CHECKED_ROWS = 64
"""Query rows of each layer that the check computes: four runs, the last at the end."""

LOSS_TOKENS = 512
"""Last tokens of a text whose next-token loss is measured."""


@dataclass(frozen=True)
class Layer:
    """What one attention layer received, float32, and how well it explains what came out.

    Attributes
    ----------
    q : array [Hq, Lq, D], float32
        Lq is the text's length in prefill, the number of steps in decode.
    k : array [Hkv, Lk, D], float32
    v : array [Hkv, Lk, Dv], float32
        In decode as the cache is after the last step.
    softmax_scale : float
    max_difference : float
        Largest difference between the model's attention output and float64 attention from
        these arrays; in decode of the last step.
    """

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    softmax_scale: float
    max_difference: float


@dataclass(frozen=True)
class Shape:
    """Heads and head sizes of an attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


Take = Callable[[str, int, Layer], object]
"""Is given the phase, the layer's number and what it received."""


def probe(network: Any, layers: Sequence[int] | None = None) -> dict[int, Shape]:
    """Run two tokens to see which layers' attention can be looked at.

    Parameters
    ----------
    network : transformers.PreTrainedModel
    layers : sequence of int, optional
        Which layers; default all.

    Returns
    -------
    dict
        Layer → its shape, in ascending order.

    Raises
    ------
    ValueError
        If the model's attention cannot be exchanged, or a layer is not there or does not use
        the interface.
    """
    import torch

    count = network.config.get_text_config().num_hidden_layers
    wanted = sorted(set(range(count) if layers is None else layers))
    if not wanted or not set(wanted) <= set(range(count)):
        raise ValueError(f"layers must be between 0 and {count - 1}, got {wanted}")
    seen: dict[int, Shape] = {}

    def look(
        own: Any, module: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any
    ) -> Any:
        layer = getattr(module, "layer_idx", None)
        if layer is not None:
            seen[layer] = Shape(query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        return own(module, query, key, value, *rest, **more)

    with exchanged(network, look), torch.no_grad():
        network(torch.zeros((1, 2), dtype=torch.long), use_cache=False)
    if silent := sorted(set(wanted) - set(seen)):
        raise ValueError(
            f"layers {silent} do not call transformers' attention interface: choose other layers"
            if len(silent) < len(wanted)
            else "this model's attention does not call transformers' attention interface"
        )
    return {layer: seen[layer] for layer in wanted}


def run(
    network: Any,
    ids: Sequence[int],
    layers: Sequence[int],
    take: Take,
    *,
    phases: Sequence[str] = ("prefill",),
    kv_heads: Sequence[int] | None = None,
    decode_tokens: int = 0,
    generated: list[int] | None = None,
) -> float:
    """Run a model over a text, then greedily over new tokens, and hand on what layers receive.

    Parameters
    ----------
    network : transformers.PreTrainedModel
        A causal language model in float32.
    ids : sequence of int
        The text.
    layers : sequence of int
    take : callable
        Is given ``"prefill"`` or ``"decode"``, the layer's number and a :class:`Layer`: as the
        layer is computed in prefill, at the last step in decode.
    phases : sequence of str
        Which of the two to hand on.
    kv_heads : sequence of int, optional
        These KV heads with their query heads; default all.
    decode_tokens : int
        New tokens, one at a time with the model's cache.
    generated : list of int, optional
        The new tokens are appended to it as they go in.

    Returns
    -------
    float
        Mean next-token loss over the last ``LOSS_TOKENS`` tokens of the text, nats.

    Raises
    ------
    ValueError
        If the attention cannot be exchanged, a layer's cache does not keep every key, or
        attention computed from what a layer received differs from the model's by more than
        ``TOLERANCE`` (a sliding window, a soft cap, sink logits).
    """
    import torch

    hook = _Hook(len(ids), frozenset(layers), tuple(phases), kv_heads, decode_tokens, take)
    generated = [] if generated is None else generated
    tail = min(len(ids), LOSS_TOKENS + 1)
    options: dict[str, Any] = {"use_cache": decode_tokens > 0}
    if "logits_to_keep" in inspect.signature(network.forward).parameters:
        options["logits_to_keep"] = tail  # all logits of a long text would be gigabytes
    with exchanged(network, hook), torch.no_grad():
        out = network(torch.tensor([list(ids)]), **options)
        logits = out.logits[0, -tail:]
        targets = torch.tensor(list(ids[-tail:]))[1:]
        loss = torch.nn.functional.cross_entropy(logits[:-1], targets).item()
        for step in range(decode_tokens):
            hook.step = step
            generated.append(int(out.logits[0, -1].argmax()))
            out = network(
                torch.tensor([generated[-1:]]),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
    return loss


@dataclass
class _Hook:
    """The attention function that looks; ``step`` is None during prefill."""

    length: int
    layers: frozenset[int]
    phases: tuple[str, ...]
    kv_heads: Sequence[int] | None
    steps: int
    take: Take
    step: int | None = None
    queries: dict[int, list[NDArray[np.float32]]] = field(default_factory=dict)

    def __call__(
        self,
        own: Callable[..., Any],
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scaling: float | None = None,
        **rest: Any,
    ) -> Any:
        result = own(module, query, key, value, mask, scaling=scaling, **rest)
        layer = module.layer_idx
        phase = "prefill" if self.step is None else "decode"
        if layer not in self.layers or phase not in self.phases:
            return result
        expected = self.length + (0 if self.step is None else self.step + 1)
        if key.shape[2] != expected:
            raise ValueError(
                f"layer {layer} keeps {key.shape[2]} of {expected} keys, as with a sliding window: "
                "choose other layers"
            )
        share = query.shape[1] // key.shape[1]
        kv = list(range(key.shape[1]) if self.kv_heads is None else self.kv_heads)
        heads = [head * share + i for head in kv for i in range(share)]
        q = _array(query[0, heads])
        if self.step is not None:
            self.queries.setdefault(layer, []).append(q)
            if self.step < self.steps - 1:
                return result
            q = np.concatenate(self.queries.pop(layer), axis=1)
        k, v = _array(key[0, kv]), _array(value[0, kv])
        scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
        output = _array(result[0][0][:, heads]).swapaxes(0, 1)  # [Hq, Lq or 1, Dv]
        difference = max_difference(q[:, -output.shape[1] :], k, v, scale, output)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"layer {layer} does more than softmax(scale q k) v with a causal mask: its output "
                f"differs by {difference:.2g}, at most {TOLERANCE} is accepted: choose other layers"
            )
        self.take(phase, layer, Layer(q, k, v, scale, difference))
        return result


def max_difference(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    softmax_scale: float,
    output: NDArray[np.float32],
) -> float:
    """Return the largest difference between ``output`` and causal attention in float64.

    Parameters
    ----------
    q : array [Hq, Lq, D]
    k : array [Hkv, Lk, D]
        Query i sees keys ≤ i + Lk − Lq.
    v : array [Hkv, Lk, Dv]
    softmax_scale : float
    output : array [Hq, Lq, Dv]

    Returns
    -------
    float
        Over ``CHECKED_ROWS`` rows in four runs, the last at the end; over all if there are no
        more.

    Examples
    --------
    >>> x = np.ones((1, 5, 4), np.float32)
    >>> max_difference(x, x, x, 0.5, 1.25 * x)
    0.25
    """
    rows, keys = q.shape[1], k.shape[1]
    size = CHECKED_ROWS // 4
    stops = np.linspace(rows / 4, rows, 4).astype(int) if rows > CHECKED_ROWS else [rows]
    worst = np.float64(0)
    for stop in map(int, stops):
        start = stop - size if rows > CHECKED_ROWS else 0
        seen = keys - rows + stop
        ours = attention(
            q[:, start:stop], k[:, :seen], v[:, :seen], softmax_scale=softmax_scale
        ).output
        worst = np.maximum(worst, np.abs(ours - output[:, start:stop]).max())  # NaN stays NaN
    return float(worst)


def _array(tensor: Any) -> NDArray[np.float32]:
    # copied: the model may change its own in place
    return np.array(tensor.float().numpy(force=True))
