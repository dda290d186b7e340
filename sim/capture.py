"""Capture Q, K and V of a Hugging Face model into a trace, as its attention received them.

transformers lets anyone register an attention function.  The one registered here calls the
model's own, hands on its result unchanged, and keeps what went in: after rotary embedding,
before the KV heads are repeated.  Every captured layer is checked: attention computed from the
kept arrays must equal what the model computed.

``python -m sim.capture --help`` is the command; it needs the ``capture`` extra (torch,
transformers, accelerate, gguf), which nothing else here does.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.geometry import ORDERS
from sim.reference import attention
from sim.skip_softmax import Scan, scan
from sim.traces import Trace, read_trace, write_trace

TOLERANCE = 1e-3
"""Largest accepted difference between the model's attention output and ours from its Q, K, V."""

THRESHOLDS = (0.001, 0.01, 0.05)

_FUNCTION = "skip_softmax_capture"


class Text(NamedTuple):
    """A text, and for the card its title and licence."""

    content: str
    title: str
    license: str


@dataclass(frozen=True)
class Layer:
    """What one attention layer received, float32, and how well it explains what came out.

    Attributes
    ----------
    q : array [Hq, L, D], float32
    k : array [Hkv, L, D], float32
    v : array [Hkv, L, Dv], float32
    softmax_scale : float
    max_difference : float
        Largest difference between the model's attention output and float64 attention from
        these arrays.
    """

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    softmax_scale: float
    max_difference: float


def reference_text() -> Text:
    """Return the chapter "Compound statements" of the Python Language Reference.

    It comes with every CPython, for ``help()``; the wording depends on the Python version,
    which the title names.

    Examples
    --------
    >>> reference_text().content.split()[:2]
    ['Compound', 'statements']
    """
    from pydoc_data.topics import topics  # 700 kB of text that nothing else needs

    version = ".".join(map(str, sys.version_info[:3]))
    return Text(
        topics["compound"].lstrip("\n"),
        f"The Python Language Reference {version}, chapter Compound statements "
        "(pydoc_data.topics, topic 'compound')",
        "PSF-2.0",
    )


def token_pieces(text: str, spans: Iterable[tuple[int, int]]) -> list[str]:
    """Cut a text into the pieces that its tokens stand for.

    Tokens of a byte-level vocabulary may end inside a character; then the first of them gets
    the character and the others an empty string, so that the pieces join to the text again.

    Parameters
    ----------
    text : str
        What was tokenized.
    spans : iterable of (int, int)
        Begin and end of each token in ``text``, as a tokenizer's offset mapping gives them.

    Returns
    -------
    list of str
        One piece per token.

    Examples
    --------
    >>> token_pieces("a 🤖!", [(0, 1), (1, 3), (2, 3), (2, 3), (3, 4)])
    ['a', ' 🤖', '', '', '!']
    """
    pieces, done = [], 0
    for _, end in spans:
        pieces.append(text[done:end])
        done = max(done, end)
    return pieces


def record(model: Any, input_ids: Any, layers: Iterable[int]) -> tuple[dict[int, Layer], float]:
    """Run a model once and keep what the attention of some layers receives.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model in float32 that looks its attention up by name.
    input_ids : torch.Tensor, shape [1, L]
    layers : iterable of int
        Which layers.

    Returns
    -------
    layers : dict
        Layer number → :class:`Layer`.
    next_token_loss : float
        Mean next-token loss on this text, nats.

    Raises
    ------
    ValueError
        If the model has no such layer, its attention cannot be exchanged, or attention
        computed from the kept arrays differs from the model's by more than ``TOLERANCE``
        (a sliding window, a soft cap, sink logits).
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    own_name = model.config._attn_implementation
    if own_name not in AttentionInterface() or own_name not in AttentionMaskInterface():
        raise ValueError(
            f"the model's attention {own_name!r} is not in transformers' attention interface; "
            "load it with attn_implementation='sdpa'"
        )
    wanted = set(layers)
    count = model.config.get_text_config().num_hidden_layers
    if not wanted <= set(range(count)):
        raise ValueError(f"layers must be between 0 and {count - 1}, got {sorted(wanted)}")
    own_attention = AttentionInterface()[own_name]
    kept: dict[int, Layer] = {}

    def keeping(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any
    ) -> Any:
        result = own_attention(module, query, key, value, mask, scaling=scaling, **rest)
        if module.layer_idx in wanted:
            q, k, v = (x[0].float().numpy(force=True).copy() for x in (query, key, value))
            output = result[0][0].float().numpy(force=True).swapaxes(0, 1)  # [Hq, L, Dv]
            difference = max_difference(q, k, v, scaling, output)
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"layer {module.layer_idx} does more than softmax(scale q k) v with a causal "
                    f"mask: its output differs by {difference:.2g}, at most {TOLERANCE} is accepted"
                )
            kept[module.layer_idx] = Layer(q, k, v, float(scaling), difference)
        return result

    AttentionInterface.register(_FUNCTION, keeping)
    AttentionMaskInterface.register(_FUNCTION, AttentionMaskInterface()[own_name])
    model.set_attn_implementation(_FUNCTION)
    try:
        with torch.no_grad():
            loss = model(input_ids, labels=input_ids, use_cache=False).loss.item()
    finally:
        model.set_attn_implementation(own_name)
    if set(kept) != wanted:
        raise ValueError(
            f"layers {sorted(wanted - set(kept))} did not call the attention interface"
        )
    return kept, loss


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
    q : array [Hq, L, D]
    k : array [Hkv, L, D]
    v : array [Hkv, L, Dv]
    softmax_scale : float
    output : array [Hq, L, Dv]

    Returns
    -------
    float

    Examples
    --------
    >>> x = np.ones((1, 5, 4), np.float32)
    >>> max_difference(x, x, x, 0.5, 1.25 * x)
    0.25
    """
    worst, length = 0.0, q.shape[1]
    for start in range(0, length, 512):  # rows of one block, so that its scores fit in memory
        stop = min(start + 512, length)
        ours = attention(
            q[:, start:stop], k[:, :stop], v[:, :stop], softmax_scale=softmax_scale
        ).output
        worst = max(worst, float(np.abs(ours - output[:, start:stop]).max()))
    return worst


def capture(
    model: str | Path,
    out: str | Path,
    *,
    layer: int,
    kv_head: int | None = None,
    length: int = 4096,
    text: Text | None = None,
    model_name: str | None = None,
    model_license: str | None = None,
    log: Callable[[str], object] = print,
) -> Trace:
    """Run a model over a text and write one layer's Q, K, V as a float16 trace.

    Parameters
    ----------
    model : path
        Folder of a Hugging Face model, or a .gguf file.
    out : path
        The trace to write.
    layer : int
    kv_head : int, optional
        This KV head with its query heads only; default all.
    length : int
        Tokens, from the beginning of the text.
    text : Text, optional
        Default :func:`reference_text`.
    model_name, model_license : str, optional
        For the card; by default the name of the file or folder, and "not stated".
    log : callable
        Is given the checks' results, a line each.

    Returns
    -------
    Trace
        As read back from the file.

    Raises
    ------
    ValueError
        If an argument does not fit the model or the text, or a check fails.
    ModuleNotFoundError
        If the ``capture`` extra is not installed.
    """
    default_text = text is None
    text = reference_text() if text is None else text
    out = Path(out)
    network, ids, tokens = _prepare(model, text, length)
    layers, loss = record(network, ids, [layer])
    one = layers[layer]
    groups, share = len(one.k), len(one.q) // len(one.k)
    if kv_head is not None and not 0 <= kv_head < groups:
        raise ValueError(f"kv_head must be between 0 and {groups - 1}, got {kv_head}")
    kv_heads = range(groups) if kv_head is None else range(kv_head, kv_head + 1)
    heads = range(kv_heads.start * share, kv_heads.stop * share)
    q = one.q[heads.start : heads.stop]
    k, v = (x[kv_heads.start : kv_heads.stop] for x in (one.k, one.v))
    log(f"next-token loss on this text: {loss:.3f} nats")
    log(f"largest difference from the model's own attention output: {one.max_difference:.2g}")
    log(_float16_report(q, k, one.softmax_scale))

    options = {
        "--model": Path(model).name,
        "--layer": layer,
        "--kv-head": kv_head,
        "--length": length,
        "--text": None if default_text else text.title,
        "--text-license": None if default_text else text.license,
        "--model-name": model_name,
        "--model-license": model_license,
        "--out": out.name,
    }
    given = [str(x) for option in options.items() if option[1] is not None for x in option]
    card = {
        "model": Path(model).name if model_name is None else model_name,
        "license": "not stated" if model_license is None else model_license,
        "text": text.title,
        "text_license": text.license,
        "layer": str(layer),
        "heads": json.dumps([str(head) for head in heads]),
        "kv_heads": json.dumps([str(head) for head in kv_heads]),
        "command": shlex.join(["python", "-m", "sim.capture", *given]),
        "date": datetime.date.today().isoformat(),
        "versions": _versions(),
        "next_token_loss": f"{loss:.4f}",
        "max_difference": f"{one.max_difference:.2g}",
    }
    half = (x.astype(np.float16) for x in (q, k, v))
    write_trace(out, *half, tokens=tokens, softmax_scale=one.softmax_scale, card=card)
    log(f"wrote {out}: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} in float16")
    return read_trace(out)


def survey(
    model: str | Path, *, length: int = 4096, text: Text | None = None
) -> Iterator[dict[str, float]]:
    """Measure every head of a model: what is skipped, and where its attention lies.

    Parameters
    ----------
    model : path
        Folder of a Hugging Face model, or a .gguf file.
    length : int
        Tokens, from the beginning of the text.
    text : Text, optional
        Default :func:`reference_text`.

    Yields
    ------
    dict
        One head: ``layer``, ``kv_head``, ``head``; the share of tiles skipped, 64 x 128, as
        ``<order>@<λ>``; and over the rows that see at least three key tiles the mean softmax
        mass in the ``first`` tile, in the ``local`` two, and ``elsewhere``.

    Raises
    ------
    ValueError, ModuleNotFoundError
        As :func:`capture`.
    """
    text = reference_text() if text is None else text
    network, ids, _ = _prepare(model, text, length)
    layers, _ = record(network, ids, range(network.config.get_text_config().num_hidden_layers))
    for number, layer in layers.items():
        yield from _survey_layer(number, layer)


def _survey_layer(number: int, layer: Layer) -> Iterator[dict[str, float]]:
    scans = {
        ORDERS[0]: scan(
            layer.q, layer.k, order=ORDERS[0], softmax_scale=layer.softmax_scale, mass=True
        )
    }
    scans |= {order: scans[ORDERS[0]].replay(order=order) for order in ORDERS[1:]}
    sparsity = {
        f"{order}@{threshold}": one.decide(threshold).sparsity
        for order, one in scans.items()
        for threshold in THRESHOLDS
    }
    for head, places in enumerate(_places(scans[ORDERS[0]])):
        yield {
            "layer": number,
            "kv_head": head * len(layer.k) // len(layer.q),
            "head": head,
            **{name: float(values[head]) for name, values in sparsity.items()},
            **places,
        }


def _places(one: Scan) -> list[dict[str, float]]:
    """Mean softmax mass of each head in the first key tile, the last two seen, and between."""
    assert one.mass is not None
    keys = one.grid.keys
    rows = np.arange(2 * keys, one.grid.lq)
    own = rows // keys
    places = []
    for mass in one.mass:
        first = mass[rows, 0].mean(dtype=float)
        local = (mass[rows, own] + mass[rows, own - 1]).mean(dtype=float)
        places.append({"first": first, "local": local, "elsewhere": 1 - first - local})
    return places


def _prepare(model: str | Path, text: Text, length: int) -> tuple[Any, Any, list[str]]:
    """Load model and tokenizer; return the model, ids [1, length] and the tokens' text."""
    path = Path(model)
    if not path.is_dir() and not (path.is_file() and path.suffix == ".gguf"):
        raise ValueError(f"model must be a folder or a .gguf file, got {str(model)!r}")
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"capturing needs {error.name}: python -m pip install -e '.[capture]'"
        ) from None
    where = {"pretrained_model_name_or_path": path, "local_files_only": True}
    if path.is_file():
        where |= {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    network = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    limit = network.config.get_text_config().max_position_embeddings
    if not 1 < length <= limit:
        raise ValueError(f"length must be between 2 and the model's {limit}, got {length}")
    encoded = tokenizer(
        text.content,
        truncation=True,
        max_length=length,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ids = encoded["input_ids"]
    if len(ids) < length:
        raise ValueError(f"the text has only {len(ids)} of this model's tokens, not {length}")
    pieces = token_pieces(text.content, encoded["offset_mapping"])
    for i in np.flatnonzero(encoded["special_tokens_mask"]):
        pieces[i] = tokenizer.convert_ids_to_tokens(ids[i])
    return network, torch.tensor([ids]), pieces


def _float16_report(q: NDArray[np.float32], k: NDArray[np.float32], softmax_scale: float) -> str:
    """Say what rounding q and k to float16 does to the gap map."""
    full = scan(q, k, softmax_scale=softmax_scale)
    half = scan(q.astype(np.float16), k.astype(np.float16), softmax_scale=softmax_scale)
    finite = np.isfinite(full.gap)
    moved = np.abs(full.gap[finite] - half.gap[finite])
    changed = (full.decide(0.01).state != half.decide(0.01).state).sum()
    visited = int(full.grid.visited().sum()) * len(q)
    return (
        f"float16 moves a gap by {moved.max():.2g} at most, {moved.mean():.2g} on average, "
        f"and changes {changed} of {visited} tiles at threshold 0.01"
    )


def _versions() -> str:
    packages = ("torch", "transformers", "tokenizers", "gguf", "numpy")
    python = ".".join(map(str, sys.version_info[:3]))
    found = []
    for name in packages:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([f"Python {python}", *found])


def _print_survey(rows: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    """Print a line per KV group as its heads come, then the means; return all rows."""
    print("Share of visited tiles skipped at 0.01, tile 64 x 128, for the heads of each group;")
    print("and where their attention lies: first key tile / last two tiles seen / elsewhere")
    print(f"{'layer':>5} {'kv':>3}  {'ascending':<20} {'ends_first':<20} first/local/elsewhere")
    done: list[dict[str, float]] = []
    group: list[dict[str, float]] = []

    def print_group() -> None:
        ascending, ends_first = (
            " ".join(f"{row[f'{order}@0.01']:6.1%}" for row in group)
            for order in ("ascending", "ends_first")
        )
        places = "  ".join(
            "/".join(f"{row[name]:3.0%}" for name in ("first", "local", "elsewhere"))
            for row in group
        )
        layer, kv_head = (int(group[0][name]) for name in ("layer", "kv_head"))
        print(f"{layer:>5} {kv_head:>3}  {ascending:<20} {ends_first:<20} {places}", flush=True)

    for row in rows:
        if group and (row["layer"], row["kv_head"]) != (group[0]["layer"], group[0]["kv_head"]):
            print_group()
            group.clear()
        group.append(row)
        done.append(row)
    print_group()
    print(f"\nMean over {len(done)} heads")
    print(f"{'threshold':>10} " + " ".join(f"{order:>11}" for order in ORDERS))
    for threshold in THRESHOLDS:
        means = (np.mean([row[f"{order}@{threshold}"] for row in done]) for order in ORDERS)
        print(f"{threshold:>10} " + " ".join(f"{mean:>11.1%}" for mean in means))
    return done


def _write_csv(path: str, rows: Sequence[dict[str, float]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(rows[0])
        for row in rows:
            table.writerow([f"{x:.4f}" if isinstance(x, float) else x for x in row.values()])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m sim.capture``; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sim.capture",
        description="Write one layer's Q, K and V of a Hugging Face model as a trace.",
    )
    parser.add_argument("--model", required=True, help="folder of the model, or a .gguf file")
    parser.add_argument("--survey", action="store_true", help="measure all heads instead")
    parser.add_argument("--layer", type=int, help="layer to capture, counted from 0")
    parser.add_argument("--kv-head", type=int, help="this KV head's group only (default: all)")
    parser.add_argument("--length", type=int, default=4096, help="tokens (default: 4096)")
    parser.add_argument("--out", help="trace to write; with --survey: table to write as CSV")
    parser.add_argument("--text", help="UTF-8 text file (default: the Python reference)")
    parser.add_argument("--text-license", default="not stated", help="of --text, for the card")
    parser.add_argument("--model-name", help="for the card (default: name of the file)")
    parser.add_argument("--model-license", help="for the card (default: not stated)")
    args = parser.parse_args(arguments)
    if not args.survey and (args.layer is None or args.out is None):
        parser.error("--layer and --out are needed, or --survey")
    try:
        text = None
        if args.text is not None:
            content = Path(args.text).read_text(encoding="utf-8")
            text = Text(content, Path(args.text).name, args.text_license)
        if args.survey:
            rows = _print_survey(survey(args.model, length=args.length, text=text))
            if args.out is not None:
                _write_csv(args.out, rows)
        else:
            capture(
                args.model,
                args.out,
                layer=args.layer,
                kv_head=args.kv_head,
                length=args.length,
                text=text,
                model_name=args.model_name,
                model_license=args.model_license,
            )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
