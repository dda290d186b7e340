"""What skipping costs a model: perplexity, divergence, a needle, attention output, per setting.

A model reads a held-out text twice, with its own attention and with attention that skips tiles
as a kernel does (:mod:`sim.model_attention`); then it is given the text's next tokens one at a
time, which is decode.  The two predictions of every next token are compared.  The *needle* is a
number hidden in such a text that the model is asked to repeat.

One job is one text, length and setting; :func:`evaluate` does all of them in a sweep
(:mod:`sim.sweep`) and :mod:`sim.evaluation_report` draws them together.
Needs the ``capture`` extra; importing this module does not.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.evaluation_report import report_of
from sim.model import Model, check_name, config_hash, load, tokenize
from sim.model_attention import Setting, Tally, check_model, skipping
from sim.quality_plot import quality_plot
from sim.sweep import Job, processes, read_results, sweep
from sim.targets import PHASES
from sim.texts import Text, split

LENGTHS = (1024, 2048, 4096)
DECODE_TOKENS = 16
DEPTHS = (0.1, 0.5, 0.9)

_CITIES = ("Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Dakar", "Riga", "Perth")
_CHUNK = 128
"""Positions whose logits over the vocabulary are held at a time."""


@dataclass(frozen=True)
class Evaluator:
    """The work of one job; other processes and machines do it too.

    Parameters
    ----------
    model : str
        Folder, .gguf file or hub name, as the process that works finds it.
    texts : tuple of Text
    decode_tokens : int
        Tokens read one at a time after each text.
    threads : int
        Of torch, in each process.
    """

    model: str
    texts: tuple[Text, ...]
    decode_tokens: int = DECODE_TOKENS
    threads: int = 1

    def __call__(self, job: Job) -> dict[str, Any]:
        """Do one job: give its result, ready for JSON."""
        import torch

        torch.set_num_threads(self.threads)
        setting = Setting(job["kernel"], job["threshold"], job["threshold_scale_factor"])
        if job["kind"] == "needle":
            return self.needle(job["text"], job["length"], job["depth"], setting)
        return self.text(job["text"], job["length"], setting)

    def text(self, number: int, length: int, setting: Setting) -> dict[str, Any]:
        """Compare the predictions of a text's next tokens, in prefill and in decode."""
        model = _model(self.model)
        ids = tuple(
            tokenize(model.tokenizer, self.texts[number], length + self.decode_tokens + 1).ids
        )
        dense = _dense(self.model, ids[:-1], length, 0)
        hidden, tally = _run(model, ids[:-1], length, 0, setting, compare=True)
        one = predictions(model.network, dense, hidden, ids[1:])
        result: dict[str, Any] = {}
        for phase, where in zip(PHASES, (slice(0, length), slice(length, None)), strict=True):
            if self.decode_tokens == 0 and phase == "decode":
                continue
            result[phase] = {
                "threshold": setting.threshold_at(phase, length),
                "loss_dense": _round(one.loss_dense[where].mean()),
                "loss": _round(one.loss[where].mean()),
                "kl_mean": _round(one.kl[where].mean()),
                "kl_worst": _round(one.kl[where].max()),
                "same_token": _round(one.same_token[where].mean()),
                "sparsity": [_round(x) for x in tally.sparsity(phase)],
                "output_error": [_round(x) for x in tally.output_error(phase)],
            }
        return result

    def needle(self, number: int, length: int, depth: float, setting: Setting) -> dict[str, Any]:
        """Ask for a number hidden in a text: its probability, and whether it is found."""
        model = _model(self.model)
        prompt, answer = hide_needle(model.tokenizer, self.texts[number], length, depth, number)
        ids, first = tuple(prompt + answer)[:-1], length - 1
        dense = _dense(self.model, ids, length, first)
        hidden, tally = _run(model, ids, length, first, setting)
        one = predictions(model.network, dense, hidden, answer)
        return {
            "probability_dense": _round(np.exp(-one.loss_dense.sum())),
            "probability": _round(np.exp(-one.loss.sum())),
            "found_dense": bool(one.hit_dense.all()),
            "found": bool(one.hit.all()),
            "sparsity": _round(tally.sparsity("prefill").mean()),
        }


class Predictions(NamedTuple):
    """Two predictions of the same tokens, position by position; all arrays [n].

    ``loss_dense`` and ``loss`` in nats; ``kl`` is KL(dense ‖ skipping) in nats over the whole
    vocabulary; ``hit_dense`` and ``hit`` are whether the likeliest token is the right one, and
    ``same_token`` whether both find the same one likeliest.
    """

    loss_dense: NDArray[np.float64]
    loss: NDArray[np.float64]
    kl: NDArray[np.float64]
    hit_dense: NDArray[np.bool_]
    hit: NDArray[np.bool_]
    same_token: NDArray[np.bool_]


def predictions(network: Any, dense: Any, hidden: Any, tokens: Sequence[int]) -> Predictions:
    """Compare what two runs of a model predict.

    Parameters
    ----------
    network : transformers.PreTrainedModel
    dense, hidden : torch.Tensor, shape [n, hidden size]
        Last hidden states of the two runs.
    tokens : sequence of int, n of them
        What should be predicted.

    Returns
    -------
    Predictions
    """
    import torch

    head, parts = network.get_output_embeddings(), []
    right = torch.tensor(list(tokens))[:, None]
    with torch.no_grad():
        for start in range(0, len(right), _CHUNK):
            rows = slice(start, start + _CHUNK)
            one, other = (torch.log_softmax(head(x[rows]), -1) for x in (dense, hidden))
            kl = (one.exp() * (one - other)).sum(-1)
            best, found = one.argmax(-1, keepdim=True), other.argmax(-1, keepdim=True)
            parts.append(
                (
                    -one.gather(1, right[rows])[:, 0].double().numpy(),
                    -other.gather(1, right[rows])[:, 0].double().numpy(),
                    kl.clamp(min=0).double().numpy(),  # rounding may take it below 0
                    (best == right[rows])[:, 0].numpy(),
                    (found == right[rows])[:, 0].numpy(),
                    (best == found)[:, 0].numpy(),
                )
            )
    return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def hide_needle(
    tokenizer: Any, text: Text, length: int, depth: float, seed: int
) -> tuple[list[int], list[int]]:
    """Hide a number in a text and ask for it.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
    text : Text
    length : int
        Tokens of the prompt, all in all.
    depth : float
        How far into the text, 0 … 1; moved back to the end of a line.
    seed : int
        Chooses the number, and whose it is.

    Returns
    -------
    prompt : list of int, ``length`` tokens
    answer : list of int

    Raises
    ------
    ValueError
        If the depth is out of range or the text or length too short.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depths must lie between 0 and 1, got {depth}")
    rng = np.random.default_rng([seed, length, round(100 * depth)])
    city, number = _CITIES[rng.integers(len(_CITIES))], rng.integers(10_000, 100_000)
    sentence = f"The secret number of {city} is"
    needle, question, answer = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (f"\n{sentence} {number}.\n", f"\n\n{sentence}", f" {number}")
    )
    room = length - len(needle) - len(question)
    if room < 2:
        raise ValueError(f"lengths must leave room for the needle, got {length}")
    filler = tokenize(tokenizer, text, room)
    place = max(round(depth * room), 1)
    while place > 1 and not filler.pieces[place - 1].endswith("\n"):
        place -= 1
    return filler.ids[:place] + needle + filler.ids[place:] + question, answer


def evaluate(
    model: str | Path,
    out: str | Path,
    settings: Sequence[Setting],
    *,
    lengths: Sequence[int] = LENGTHS,
    needle_lengths: Sequence[int] | None = None,
    texts: Sequence[Text] | None = None,
    decode_tokens: int = DECODE_TOKENS,
    depths: Sequence[float] = DEPTHS,
    workers: int | None = None,
    scheduler: str | None = None,
    model_name: str | None = None,
    command: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure what each setting skips and what that costs.

    Parameters
    ----------
    model : str or path
        As in :func:`sim.model.load`.
    out : path
        Folder: ``results.jsonl`` (a line a job; a later call goes on from it), and
        ``evaluation.json`` and ``quality.svg``, the report on all that ``results.jsonl`` holds:
        a call with other settings or lengths adds to it.
    settings : sequence of Setting
    lengths : sequence of int
        Tokens of each text.
    needle_lengths : sequence of int, optional
        Default ``lengths``; empty for no needle.
    texts : sequence of Text, optional
        Default the held-out texts of :func:`sim.texts.split`.
    decode_tokens : int
        Tokens of the text read one at a time after it, 0 … 1024.
    depths : sequence of float
        Where the needle is hidden, 0 … 1.
    workers : int, optional
        Processes; default one a core, as far as memory goes.
    scheduler : str, optional
        Address of a Dask scheduler; its workers must find the model under the same name.
    model_name, command : str, optional
        For the report; by default the name of the file or folder, and nothing.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    dict
        The report, ready for JSON: see :func:`sim.evaluation_report.report_of`.

    Raises
    ------
    ValueError
        If an argument is out of range, the model's attention cannot be exchanged or does more
        than softmax(scale q k) v with a causal mask, or a text is too short.
    RuntimeError
        If the ``capture`` extra is not installed, or workers end.
    OSError
        If the folder cannot be written.
    """
    texts = split()[1] if texts is None else list(texts)
    needle_lengths = lengths if needle_lengths is None else needle_lengths
    if not settings or len(set(map(repr, settings))) < len(settings):
        raise ValueError("settings must be at least one, and differ")
    if not texts or not lengths:
        raise ValueError("give at least one text and one length")
    if not 0 <= decode_tokens <= 1024:
        raise ValueError(f"decode_tokens must be between 0 and 1024, got {decode_tokens}")
    name = check_name(model)
    where = os.path.abspath(model) if Path(model).exists() else str(model)
    loaded = _model(where)
    _check_lengths(loaded, texts, [*lengths, *needle_lengths], decode_tokens)
    for length in needle_lengths:
        for depth in depths:
            hide_needle(loaded.tokenizer, texts[0], length, depth, 0)
    about = {
        "model": name,
        "weights": weights_hash(loaded.network),
        "config": config_hash(loaded.network),
        "texts": [hashlib.sha256(text.content.encode()).hexdigest() for text in texts],
        "decode_tokens": decode_tokens,
    }
    jobs = _jobs(len(texts), lengths, needle_lengths, depths, settings)
    if workers is None:
        workers = processes(_memory(loaded.network, max([*lengths, *needle_lengths])))
    threads = 1 if scheduler or workers > 1 else _own_threads()
    folder = Path(out)
    path = folder / "results.jsonl"
    sweep(
        jobs,
        Evaluator(where, tuple(texts), decode_tokens, threads),
        path,
        about=about,
        workers=workers,
        scheduler=scheduler,
        progress=progress,
    )
    card = {
        "model": name if model_name is None else model_name,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "command": command,
        "decode_tokens": decode_tokens,
        "texts": [{"title": text.title, "license": text.license} for text in texts],
    }
    report = report_of(read_results(path)[1], card)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    quality_plot(report).write(folder / "quality.svg")
    return report


def weights_hash(network: Any) -> str:
    """Give the SHA-256 over the first 1024 values of each of a model's weights."""
    digest = hashlib.sha256()
    for name, weight in network.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().flatten()[:1024].numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that results rest on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("torch", "transformers", "tokenizers", "gguf", "numpy", "skip-softmax-lab"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _jobs(
    texts: int,
    lengths: Sequence[int],
    needle_lengths: Sequence[int],
    depths: Sequence[float],
    settings: Sequence[Setting],
) -> list[Job]:
    """All jobs, those of one text and length together: their dense run is kept."""
    places: list[tuple[str, int, int, float | None]] = [
        ("text", text, length, None) for length in lengths for text in range(texts)
    ]
    places += [
        ("needle", text, length, float(depth))
        for length in needle_lengths
        for depth in depths
        for text in range(texts)
    ]
    return [
        {"kind": kind, "text": text, "length": length, "depth": depth, **asdict(setting)}
        for kind, text, length, depth in places
        for setting in settings
    ]


def _check_lengths(
    model: Model, texts: Sequence[Text], lengths: Sequence[int], decode_tokens: int
) -> None:
    limit = model.network.config.get_text_config().max_position_embeddings
    for length in lengths:
        if not 2 <= length <= limit - decode_tokens - 1:
            raise ValueError(
                f"lengths must be between 2 and {limit - decode_tokens - 1}, the model's {limit} "
                f"less {decode_tokens + 1} tokens that follow, got {length}"
            )
    for text in texts:
        tokenize(model.tokenizer, text, max(lengths) + decode_tokens + 1)


@lru_cache(maxsize=1)
def _model(where: str) -> Model:
    """Load a model once a process, and check that this attention can stand in for its own."""
    import torch

    model = load(where)
    ids = torch.tensor([tokenize(model.tokenizer, split()[1][0], 200).ids])
    check_model(model.network, ids)
    with torch.no_grad():
        logits = model.network(ids, use_cache=False).logits
        body = model.network.base_model(ids, use_cache=False).last_hidden_state
        if not torch.allclose(model.network.get_output_embeddings()(body), logits, atol=1e-3):
            raise ValueError(
                f"{model.name} does more to its logits than its output embedding, so its "
                "predictions cannot be compared piece by piece"
            )
    return model


@lru_cache(maxsize=16)
def _dense(where: str, ids: tuple[int, ...], prefill: int, first: int) -> Any:
    """Last hidden states of the model's own attention; kept for the settings that follow."""
    return _hidden(_model(where).network, ids, prefill, first)


def _run(
    model: Model,
    ids: Sequence[int],
    prefill: int,
    first: int,
    setting: Setting,
    *,
    compare: bool = False,
) -> tuple[Any, Tally]:
    with skipping(model.network, setting, compare=compare) as tally:
        return _hidden(model.network, ids, prefill, first), tally


def _hidden(network: Any, ids: Sequence[int], prefill: int, first: int) -> Any:
    """Last hidden states from position ``first`` on: one prefill, then a token at a time."""
    import torch

    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        out = network.base_model(tokens[:, :prefill], use_cache=True)
        parts = [out.last_hidden_state[0, first:].clone()]
        for i in range(prefill, len(ids)):
            out = network.base_model(
                tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True
            )
            parts.append(out.last_hidden_state[0])
    return torch.cat(parts)


def _memory(network: Any, length: int) -> int:
    """Bytes that one process needs, about: weights, cache, scores of a strip, logits."""
    config = network.config.get_text_config()
    weights = 4 * sum(weight.numel() for weight in network.parameters())
    states = 4 * length * config.hidden_size * (2 * config.num_hidden_layers + 32)
    return int(1.5 * weights) + states + 16 * _CHUNK * config.vocab_size + (1 << 30)


def _own_threads() -> int:
    import torch

    return torch.get_num_threads()


def _round(value: Any) -> float:
    return float(f"{float(value):.6g}")
