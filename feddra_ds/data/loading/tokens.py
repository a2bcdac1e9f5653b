"""Tokenizers: any fast one of transformers, or the vocabulary that ships here.

The shipped vocabulary (assets/vocab.txt) is WordPiece, lower case, accents folded. Every printable ASCII character and
the letters of the common European alphabets are in it both as a whole piece and as a `##` piece, so that a word it
does not know falls back to shorter pieces and in the end to characters, and never collapses into one [UNK].
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from feddra_ds.common.text import first_line
from feddra_ds.common.trust import OF_TOKENIZER, refuse_code, safely

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD_MULTIPLE = 8


def load_tokenizer(path_or_id: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hugging Face id; None gives the shipped one (lower case, [CLS] … [SEP]).

    Raises ValueError where there is none, where it is not a fast tokenizer, and where it has no padding token.
    """
    if path_or_id is None:
        return _shipped()
    from transformers import AutoTokenizer

    refuse_code(path_or_id, "model.text.tokenizer", OF_TOKENIZER)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, **safely(path_or_id))
    except Exception as error:  # transformers and the hub raise many types for "not there"
        raise ValueError(
            f"model.text.tokenizer: cannot load a tokenizer from {path_or_id}: {first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"model.text.tokenizer: {path_or_id} has no fast (tokenizer.json) form; save it as one first")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"model.text.tokenizer: {path_or_id} has no padding token; set its pad_token")
    return tokenizer


def vocabulary() -> dict[str, int]:
    """The shipped vocabulary, piece → id, in file order."""
    lines = resources.files("feddra_ds").joinpath("assets/vocab.txt").read_text(encoding="utf-8").split("\n")
    return {piece: number for number, piece in enumerate(line for line in lines if line)}


def _shipped() -> PreTrainedTokenizerBase:
    from transformers import BertTokenizer

    return BertTokenizer(vocab=vocabulary(), do_lower_case=True, strip_accents=True, model_max_length=512)


@functools.lru_cache(maxsize=2)  # a text of up to a megabyte, which all clients of a run share
def freeze(tokenizer: PreTrainedTokenizerBase, text_length: int) -> tuple[str, int]:
    """(tokenizer.json with truncation at `text_length`, padding id): all that a worker needs, without transformers."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    side = getattr(tokenizer, "truncation_side", "right")
    backend.enable_truncation(max_length=text_length, direction=side)
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    return backend.to_str(), pad


def pad_batch(rows: list[list[int]], pad_id: int, text_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask, both (b, T) int64; T is the longest row rounded up to 8, at most `text_length`."""
    longest = max(len(row) for row in rows)
    width = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max(text_length, longest))
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask
