"""Capture what a Hugging Face model's attention does over some texts, into a folder.

A *run* is one text at one length: the model reads it (prefill), then decodes some tokens greedily
with its cache.  What each attention layer receives is scanned as the model runs
(:mod:`sim.gap_scans`) and only gap maps are kept; or, if asked for, counts of them, or Q, K and V
as traces.  Every finished file takes its name at once, so an interrupted capture goes on where it
stopped.  ``capture.json`` says what the folder holds.

``skip-softmax capture`` is the command; it needs the ``capture`` extra.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from sim.attention_hook import Layer, Shape, probe, run
from sim.calibration import TRIALS
from sim.gap_maps import GapMaps, Sample, tiles_of_row
from sim.gap_scans import Packed, decode_gaps, head_dim_field, prefill_gaps, stacked
from sim.model import Model, Tokens, check_name, config_hash, load, tokenize
from sim.targets import PHASES, targets_of
from sim.texts import Text, split
from sim.traces import MAX_LENGTH, write_trace

KEEP = ("maps", "counts", "qkv")
FORMAT = 1
RECORD = "capture.json"


@dataclass(frozen=True)
class _Plan:
    """What a capture keeps, checked."""

    texts: tuple[Text, ...]
    layers: tuple[int, ...] | None
    kv_heads: tuple[int, ...] | None
    lengths: tuple[int, ...]
    phases: tuple[str, ...]
    decode_tokens: int
    keep: str

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("texts must be at least one, got none")
        if self.keep not in KEEP:
            raise ValueError(f"keep must be one of {', '.join(KEEP)}, got {self.keep!r}")
        if not self.phases or not set(self.phases) <= set(PHASES):
            raise ValueError(f"phases must be of {', '.join(PHASES)}, got {list(self.phases)}")
        if not self.lengths or not all(2 <= length <= MAX_LENGTH for length in self.lengths):
            raise ValueError(
                f"lengths must be between 2 and {MAX_LENGTH}, got {list(self.lengths)}"
            )
        if not 1 <= self.decode_tokens <= 1024:
            raise ValueError(f"decode_tokens must be between 1 and 1024, got {self.decode_tokens}")
        for name in ("layers", "kv_heads", "lengths", "phases"):
            values = getattr(self, name)
            if values is not None and len(set(values)) < len(values):
                raise ValueError(f"{name} must differ, got {list(values)}")

    @property
    def steps(self) -> int:
        return self.decode_tokens if "decode" in self.phases else 0

    def settings(self, model: str) -> dict[str, Any]:
        """What must be the same for a capture to go on, ready for JSON."""
        return {
            "model": model,
            "keep": self.keep,
            "layers": None if self.layers is None else list(self.layers),
            "kv_heads": None if self.kv_heads is None else list(self.kv_heads),
            "lengths": list(self.lengths),
            "phases": list(self.phases),
            "decode_tokens": self.steps,
            "texts": [
                {
                    "title": text.title,
                    "license": text.license,
                    "sha256": hashlib.sha256(text.content.encode()).hexdigest(),
                }
                for text in self.texts
            ],
        }

    def sample(self, number: int, length: int, phase: str) -> Sample:
        text = self.texts[number]
        steps = range(length + 1, length + 1 + self.steps) if phase == "decode" else ()
        name = f"text{number}-{length}-{phase}"
        return Sample(name, text.title, text.license, length, phase, tuple(steps))

    def runs(self) -> dict[tuple[int, int], list[Sample]]:
        """(number of the text, length) → samples of that run."""
        return {
            (number, length): [self.sample(number, length, phase) for phase in self.phases]
            for number in range(len(self.texts))
            for length in self.lengths
        }


def capture(
    model: str | Path,
    out: str | Path,
    *,
    texts: Sequence[Text] | None = None,
    layers: Sequence[int] | None = None,
    kv_heads: Sequence[int] | None = None,
    lengths: Sequence[int] = (1024, 2048, 4096),
    phases: Sequence[str] = PHASES,
    decode_tokens: int = 16,
    keep: str = "maps",
    model_name: str | None = None,
    model_license: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Run a model over texts and keep what its attention does.

    Parameters
    ----------
    model : str or path
        A folder, a .gguf file, or a name on the Hugging Face hub.
    out : path
        A folder: new, empty, or of this very capture, which then goes on where it stopped.
    texts : sequence of Text, optional
        Default the calibration texts of :func:`sim.texts.split`.
    layers : sequence of int, optional
        Default all.
    kv_heads : sequence of int, optional
        These KV heads with their query heads; default all.
    lengths : sequence of int
        Tokens, from the beginning of each text.
    phases : sequence of {"prefill", "decode"}
    decode_tokens : int
        Tokens to decode, greedily, after each text.
    keep : {"maps", "counts", "qkv"}
        Gap maps; counts of them, exact at Model Optimizer's trial thresholds and a hundredth of
        the size; or float16 traces, one a layer.
    model_name, model_license : str, optional
        For the card; by default the name of the file or folder, and "not stated".
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    dict
        What ``capture.json`` holds, and ``captured``, the number of runs done now.

    Raises
    ------
    ValueError
        If an argument does not fit the model, a text is too short, the folder holds something
        else or the disk is too full; all before anything is captured.  Or if a layer's attention
        is more than softmax(scale q k) v with a causal mask.
    RuntimeError
        If the ``capture`` extra is not installed.
    OSError
        If a file cannot be written.
    """
    plan = _Plan(
        tuple(split()[0] if texts is None else texts),
        None if layers is None else tuple(layers),
        None if kv_heads is None else tuple(kv_heads),
        tuple(lengths),
        tuple(phases),
        decode_tokens,
        keep,
    )
    folder = Path(out)
    file_name = check_name(model)
    settings = plan.settings(file_name if model_name is None else model_name)
    earlier = _earlier(folder, settings)
    if earlier is not None and all((folder / name).is_file() for name in earlier["files"]):
        return {**earlier, "captured": 0}
    loaded = load(model)
    shapes = _check_model(loaded, plan)
    tokens = {
        (number, length): tokenize(loaded.tokenizer, plan.texts[number], length)
        for number, length in plan.runs()
    }
    files = {
        sample: _files(plan, shapes, sample)
        for samples in plan.runs().values()
        for sample in samples
    }
    record = {
        "format": FORMAT,
        **settings,
        "model_config": config_hash(loaded.network),
        "model_license": "not stated" if model_license is None else model_license,
        "command": _command(file_name, folder, plan, texts is None, model_name, model_license),
        "date": datetime.date.today().isoformat(),
        "versions": _versions(),
        "files": [name for names in files.values() for name in names],
        "checks": {},
    }
    if earlier is not None:
        if earlier["model_config"] != record["model_config"]:
            raise ValueError(
                f"{folder} holds a capture of another model of this name: give another folder"
            )
        record = earlier
    missing = {
        sample: names
        for sample, names in files.items()
        if not all((folder / name).is_file() for name in names)
    }
    _check_space(folder, sum(_bytes(plan, shapes, sample) for sample in missing))
    folder.mkdir(parents=True, exist_ok=True)
    _write_record(folder, record)
    runs = {
        pair: [sample for sample in samples if sample in missing]
        for pair, samples in plan.runs().items()
        if not missing.keys().isdisjoint(samples)
    }
    with _bar(progress, len(missing) * len(shapes)) as bar:
        for (number, length), samples in runs.items():
            bar.set_description(f"text {number}, {length} tokens")
            one = _Run(folder, plan, record, loaded, shapes, tokens[number, length], samples)
            record["checks"][f"text{number}-{length}"] = one.capture(bar.update)
            _write_record(folder, record)
    return {**record, "captured": len(runs)}


@dataclass
class _Run:
    """One text at one length: the samples of it that are still to be captured."""

    folder: Path
    plan: _Plan
    record: Mapping[str, Any]
    model: Model
    shapes: Mapping[int, Shape]
    tokens: Tokens
    samples: Sequence[Sample]

    def capture(self, advance: Callable[[], object]) -> dict[str, float]:
        """Run the model, write the samples' files, and return what was checked."""
        by_phase = {sample.phase: sample for sample in self.samples}
        kept: dict[str, dict[int, dict[str, Packed]]] = {phase: {} for phase in by_phase}
        generated: list[int] = []
        worst = 0.0

        def take(phase: str, number: int, layer: Layer) -> None:
            nonlocal worst
            worst = max(worst, layer.max_difference)
            sample = by_phase[phase]
            if self.plan.keep == "qkv":
                self.write_trace(sample, number, layer, generated)
            else:
                kept[phase][number] = self.scan(sample, layer)
                if len(kept[phase]) == len(self.shapes):
                    self.write_maps(sample, kept.pop(phase))
            advance()

        loss = run(
            self.model.network,
            self.tokens.ids,
            list(self.shapes),
            take,
            phases=list(by_phase),
            kv_heads=self.plan.kv_heads,
            decode_tokens=self.plan.steps if "decode" in by_phase else 0,
            generated=generated,
        )
        return {"next_token_loss": round(loss, 4), "max_difference": float(f"{worst:.2g}")}

    def scan(self, sample: Sample, layer: Layer) -> dict[str, Packed]:
        targets, scale = targets_of(sample.phase), layer.softmax_scale
        if sample.phase == "decode":
            return decode_gaps(layer.q, layer.k, sample.steps, targets, softmax_scale=scale)
        scanned = prefill_gaps(
            layer.q, layer.k, targets, softmax_scale=scale, lengths=[sample.length]
        )
        return {name: packed for (_, name), packed in scanned.items()}

    def write_maps(self, sample: Sample, kept: dict[int, dict[str, Packed]]) -> None:
        layers = tuple(self.shapes)
        kv_heads, heads = _heads(self.plan, self.shapes)
        maps = GapMaps(
            samples=(sample,),
            layers=layers,
            heads=tuple(map(str, heads)),
            kv_heads=tuple(map(str, kv_heads)),
            targets=targets_of(sample.phase),
            thresholds=None,
            card=self.card(),
            arrays={
                (sample.name, name): stacked([kept[layer][name] for layer in layers])
                for name in kept[layers[0]]
            },
        )
        if self.plan.keep == "counts":
            maps = maps.counted()
        maps.write(self.folder / _files(self.plan, self.shapes, sample)[0])

    def write_trace(
        self, sample: Sample, number: int, layer: Layer, generated: Sequence[int]
    ) -> None:
        path = self.folder / _trace_name(sample, number)
        if path.exists():
            return
        kv_heads, heads = _heads(self.plan, self.shapes)
        new = [self.model.tokenizer.decode([token]) for token in generated]
        card = {
            **self.card(),
            "text": sample.text,
            "text_license": sample.license,
            "phase": sample.phase,
            "layer": str(number),
            "heads": json.dumps(list(map(str, heads))),
            "kv_heads": json.dumps(list(map(str, kv_heads))),
            "max_difference": f"{layer.max_difference:.2g}",
        }
        with np.errstate(over="ignore"):  # write_trace refuses what float16 cannot hold
            half = [x.astype(np.float16) for x in (layer.q, layer.k, layer.v)]
        write_trace(
            path,
            *half,
            tokens=self.tokens.pieces + (new if sample.phase == "decode" else []),
            softmax_scale=layer.softmax_scale,
            card=card,
        )

    def card(self) -> dict[str, str]:
        named = ("model", "model_config", "command", "date", "versions")
        return {
            **{name: self.record[name] for name in named},
            "license": self.record["model_license"],
            **head_dim_field(shape.head_dim for shape in self.shapes.values()),
        }


def _earlier(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Record of the same capture in this folder, if it has begun."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, but {folder} is a file")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = {name: record[name] for name in settings}
        assert isinstance(record["checks"], dict)
        assert isinstance(record["model_config"], str)
        assert all(isinstance(name, str) for name in record["files"])
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds other files: give a folder that is new, empty or of this capture"
        ) from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ValueError(f"{path} is damaged: give another folder") from None
    for name, wanted in settings.items():
        if found[name] != wanted:
            what = "" if name == "texts" else f", {found[name]} and not {wanted}"
            raise ValueError(
                f"{folder} holds a capture with other {name}{what}: give another folder, or the "
                "arguments it was begun with"
            )
    return record


def _check_model(loaded: Model, plan: _Plan) -> dict[int, Shape]:
    """Shapes of the layers to capture, if the model and the plan fit each other."""
    shapes = probe(loaded.network, plan.layers)
    if len({(shape.heads, shape.kv_heads) for shape in shapes.values()}) > 1:
        raise ValueError("the layers have different numbers of heads: choose layers that are alike")
    count = next(iter(shapes.values())).kv_heads
    if plan.kv_heads is not None and not set(plan.kv_heads) <= set(range(count)):
        raise ValueError(f"kv_heads must be between 0 and {count - 1}, got {list(plan.kv_heads)}")
    config = loaded.network.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", MAX_LENGTH)
    longest = max(plan.lengths)
    if longest + plan.steps > limit:
        decoded = f" and {plan.steps} tokens to decode" if plan.steps else ""
        raise ValueError(f"lengths{decoded} must fit in the model's {limit}, got {longest}")
    return shapes


def _heads(plan: _Plan, shapes: Mapping[int, Shape]) -> tuple[list[int], list[int]]:
    """KV heads, and query heads, that are captured of each layer."""
    shape = next(iter(shapes.values()))
    share = shape.heads // shape.kv_heads
    kv_heads = list(range(shape.kv_heads) if plan.kv_heads is None else plan.kv_heads)
    return kv_heads, [head * share + i for head in kv_heads for i in range(share)]


def _files(plan: _Plan, shapes: Mapping[int, Shape], sample: Sample) -> list[str]:
    """Names of a sample's files: one of all layers, or a trace a layer."""
    if plan.keep == "qkv":
        return [_trace_name(sample, layer) for layer in shapes]
    return [f"{sample.name}.safetensors"]


def _trace_name(sample: Sample, layer: int) -> str:
    return f"{sample.name}-layer{layer}.safetensors"


def _bytes(plan: _Plan, shapes: Mapping[int, Shape], sample: Sample) -> int:
    """Bytes of a sample's arrays, about."""
    kv_heads, heads = (len(one) for one in _heads(plan, shapes))
    if plan.keep == "qkv":
        rows, keys = len(sample.steps) or sample.length, sample.length + len(sample.steps)
        query = sum(heads * rows * shape.head_dim for shape in shapes.values())
        cache = sum(kv_heads * keys * (s.head_dim + s.value_dim) for s in shapes.values())
        return 2 * (query + cache)
    rows_and_tiles = [
        (kv_heads if target.vote == "group" else heads, tiles_of_row(target, sample))
        for target in targets_of(sample.phase)
    ]
    if plan.keep == "counts":
        return len(shapes) * 4 * (len(TRIALS) + 1) * sum(rows for rows, _ in rows_and_tiles)
    return len(shapes) * 8 * sum(rows * tiles for rows, tiles in rows_and_tiles)


def _check_space(folder: Path, needed: int) -> None:
    """Raise ValueError unless the disk has room for so many bytes."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"the capture needs {needed / 1e9:.2g} GB, but {folder} has {free / 1e9:.2g} GB free"
        )


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    path = folder / RECORD
    unfinished = path.with_name(f".{RECORD}.{os.getpid()}.unfinished")
    try:
        text = json.dumps(record, indent=2, ensure_ascii=False)
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _bar(progress: bool, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="layer", disable=not progress, file=sys.stderr)


def _command(
    model: str,
    folder: Path,
    plan: _Plan,
    default_texts: bool,
    model_name: str | None,
    model_license: str | None,
) -> str:
    """Words that capture the same again, with names instead of paths."""
    options: dict[str, Sequence[object] | object | None] = {
        "--out": folder.name,
        "--texts": None if default_texts else [text.title for text in plan.texts],
        "--text-license": None if default_texts else plan.texts[0].license,
        "--layers": None if plan.layers is None else ",".join(map(str, plan.layers)),
        "--kv-heads": None if plan.kv_heads is None else ",".join(map(str, plan.kv_heads)),
        "--lengths": plan.lengths,
        "--phases": plan.phases,
        "--decode-tokens": plan.decode_tokens,
        "--keep": plan.keep,
        "--model-name": model_name,
        "--model-license": model_license,
    }
    words = ["skip-softmax", "capture", model]
    for option, value in options.items():
        if value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [option, *map(str, values)]
    return shlex.join(words)


def _versions() -> str:
    packages = ("torch", "transformers", "tokenizers", "gguf", "accelerate", "numpy")
    found = ["Python " + ".".join(map(str, sys.version_info[:3]))]
    for name in packages:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
