"""Load a Hugging Face causal language model and cut a text into its tokens.

Needs the ``capture`` extra (torch, transformers, accelerate, gguf); importing this module does
not.  A model is a name on the Hugging Face hub, a folder, or a .gguf file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim.texts import Text

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_NOT_HASHED = ("_name_or_path", "transformers_version")


class Model(NamedTuple):
    """A model ready to run on the CPU in float32, and its tokenizer."""

    network: Any
    tokenizer: Any
    name: str


class Tokens(NamedTuple):
    """Token ids of a text, and the piece of it that each stands for."""

    ids: list[int]
    pieces: list[str]


def check_name(model: str | Path) -> str:
    """Give the name a model goes by: that of its file or folder, or its name on the hub.

    Parameters
    ----------
    model : str or path
        A folder, a .gguf file, or a name on the Hugging Face hub.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If it is none of these.

    Examples
    --------
    >>> check_name("HuggingFaceTB/SmolLM2-135M-Instruct")
    'HuggingFaceTB/SmolLM2-135M-Instruct'
    """
    path = Path(model)
    if model and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        return path.resolve().name
    if path.exists() or path.suffix == ".gguf" or not _HUB_NAME.fullmatch(str(model)):
        raise ValueError(
            "model must be a folder, a .gguf file or a name on the Hugging Face hub, "
            f"got {str(model)!r}"
        )
    return str(model)


def load(model: str | Path) -> Model:
    """Load a model in float32 on the CPU, with its tokenizer.

    Parameters
    ----------
    model : str or path
        As in :func:`check_name`.  A name on the hub is downloaded, unless it has been before.

    Returns
    -------
    Model

    Raises
    ------
    ValueError
        If there is no such model, or it is no causal language model that transformers knows.
    RuntimeError
        If the ``capture`` extra is not installed.
    """
    name = check_name(model)
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"running a model needs {error.name}: python -m pip install -e '.[capture]'"
        ) from None
    path = Path(model)
    where: dict[str, Any] = {"pretrained_model_name_or_path": model}
    if path.is_dir():
        where["local_files_only"] = True
    elif path.is_file():
        where = {
            "pretrained_model_name_or_path": path.parent,
            "gguf_file": path.name,
            "local_files_only": True,
        }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        network = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    except Exception as error:  # a damaged file may make them raise anything
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"the model {name!r} could not be loaded: {said}") from None
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {name!r} does not say where its tokens lie in the text")
    return Model(network, tokenizer, name)


def config_hash(network: Any) -> str:
    """Give the SHA-256 of a model's configuration: the same wherever it was loaded from.

    Parameters
    ----------
    network : transformers.PreTrainedModel

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    fields = {k: v for k, v in network.config.to_dict().items() if k not in _NOT_HASHED}
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenize(tokenizer: Any, text: Text, length: int) -> Tokens:
    """Cut the beginning of a text into exactly so many tokens.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
    text : Text
    length : int

    Returns
    -------
    Tokens
        The pieces join to the text as far as it went; a special token's piece is its name.

    Raises
    ------
    ValueError
        If the text is too short.
    """
    encoded = tokenizer(
        text.content,
        truncation=True,
        max_length=length,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ids = encoded["input_ids"]
    if len(ids) < length:
        raise ValueError(
            f"the text {text.title!r} has only {len(ids)} of this model's tokens, not {length}"
        )
    pieces = token_pieces(text.content, encoded["offset_mapping"])
    for i in np.flatnonzero(encoded["special_tokens_mask"]):
        pieces[i] = tokenizer.convert_ids_to_tokens(ids[i])
    return Tokens(ids, pieces)


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
