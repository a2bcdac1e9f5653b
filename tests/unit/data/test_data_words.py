"""Word pieces find their words: for WordPiece, byte-level and end-of-word vocabularies, without special tokens."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from feddra_ds.data.loading.tokens import load_tokenizer
from feddra_ds.data.loading.words import Words

SPECIAL = {"<s>": 0, "</s>": 1, "<pad>": 2}


def test_wordpiece() -> None:
    tokenizer = load_tokenizer(None)
    texts = ["Zqxjk effusion, zqx.", "no", ""]
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    found = Words(tokenizer)(rows["input_ids"], rows["attention_mask"])
    for number in range(len(texts)):
        words = rows.word_ids(number)  # what the tokenizer itself says
        assert found[number].tolist() == [-1 if word is None else word for word in words]
    assert (found[0] == 0).sum() > 1
    assert (found[2] == -1).all()


@pytest.mark.parametrize(
    ("vocabulary", "options"),
    [
        (["no", "Ġeff", "usion", "Ġseen"], {}),
        (["no</w>", "eff", "usion</w>", "seen</w>"], {"end_of_word_suffix": "</w>"}),
        (["▁no", "▁eff", "usion", "▁seen"], {}),
    ],
    ids=["byte-level", "end of word", "sentencepiece"],
)
def test_other_vocabularies(vocabulary: list[str], options: dict[str, str]) -> None:
    ids = {**SPECIAL, **{piece: 3 + number for number, piece in enumerate(vocabulary)}}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], **options))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    rows = torch.tensor([[0, 3, 4, 5, 6, 1, 2], [0, 4, 5, 1, 2, 2, 2]])
    found = Words(tokenizer)(rows, (rows != 2).long())
    assert found.tolist() == [[-1, 0, 1, 1, 2, -1, -1], [-1, 0, 0, -1, -1, -1, -1]]
