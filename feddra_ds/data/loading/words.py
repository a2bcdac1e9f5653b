"""Which word of its text each word piece belongs to, from the piece's id alone.

B texts, T word pieces.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEGINNINGS = ("Ġ", "▁")  # how byte-level and sentencepiece vocabularies mark a piece that begins a word


class Words:
    """Callable: (input_ids, attention_mask), both (B, T) → (B, T) int64, the number of each piece's word in its text.

    Words count from 0; −1 is for padding and special tokens ([CLS], [SEP], …).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        inside, end = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
        if inside:  # WordPiece: what is not inside a word begins one
            begins = [not piece.startswith(inside) for piece in pieces]
        else:
            begins = [piece.startswith(_BEGINNINGS) for piece in pieces]
        self.begins = torch.tensor(begins)
        self.ends = torch.tensor([bool(end) and piece.endswith(end) for piece in pieces])
        self.special = torch.zeros(len(pieces), dtype=torch.bool)
        self.special[torch.tensor(tokenizer.all_special_ids)] = True
        if tokenizer.unk_token_id is not None:
            self.special[tokenizer.unk_token_id] = False  # an unknown word is a word

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        begins, ends, special = (x.to(input_ids.device)[input_ids] for x in (self.begins, self.ends, self.special))
        counts = ~special & (attention_mask > 0)
        before = torch.zeros_like(counts)
        before[:, 1:] = counts[:, :-1] & ~ends[:, :-1]
        new = counts & (begins | ~before)
        return torch.where(counts, new.long().cumsum(1) - 1, -1)
