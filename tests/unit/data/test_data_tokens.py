"""Tokenizers: the shipped vocabulary knows clinical words and every character; workers tokenize like transformers."""

from __future__ import annotations

import hashlib
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from feddra_ds.data.loading.tokens import freeze, load_tokenizer, pad_batch, vocabulary

NOTE = (
    "A 72-year-old man with bilateral pleural effusions and cardiomegaly. Right lower lobe consolidation, no pneumothorax; "
    "SpO2 94 %, CRP 42.2 mg/dl, temperature 38.5 °C. Ground-glass opacities ≥ 3 cm in the lingula."
)


def test_the_vocabulary_is_sound() -> None:
    words = vocabulary()
    assert 3000 <= len(words) <= 7000
    assert list(words)[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert sorted(words.values()) == list(range(len(words)))
    for char in (chr(c) for c in range(33, 127) if not chr(c).isupper()):
        assert char in words, char
        assert f"##{char}" in words, char


def test_the_vocabulary_is_what_its_page_says() -> None:
    """Where a rule gives the pieces, the file follows it; and it stays as it is, since models depend on the order."""
    pieces = list(vocabulary())
    characters = [piece for piece in pieces if len(piece) == 1]
    given = pieces[:5] + characters + [f"##{c}" for c in characters]
    given += [str(n) for n in (*range(10, 101), *range(110, 201, 10), 2019, 2020)]
    given += [f"##{n:02}" for n in range(100)]
    assert pieces[: len(given)] == given
    chosen = pieces[len(given) :]
    assert all(re.fullmatch("(##)?[a-z]+", piece) for piece in chosen)
    words, beginnings = chosen[: chosen.index("ab")], chosen[chosen.index("ab") : chosen.index("##es")]
    behind = chosen[chosen.index("##specific") :]
    assert all(piece.removeprefix("##") in words for piece in behind)
    page = resources.files("feddra_ds").joinpath("assets/VOCABULARY.md").read_text(encoding="utf-8")
    numbers = [len(words), len(beginnings), len(chosen) - len(words) - len(beginnings) - len(behind), len(behind)]
    assert [
        int(n.replace(",", "")) for n in re.findall(r"^\| ([\d,]+) \| .* \| (?:chosen|words of)", page, re.M)
    ] == numbers
    written = resources.files("feddra_ds").joinpath("assets/vocab.txt").read_bytes()
    assert hashlib.sha256(written).hexdigest() == "8b86d278938c4a23c41d2b08779f8c32477477c9daeb562fd14762a781f23ce3"


def test_its_page_makes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = resources.files("feddra_ds").joinpath("assets/VOCABULARY.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    Path("reports.txt").write_text("Kleiner Pleuraerguss links.\nKein Pleuraerguss, kein Infiltrat.\n" * 3)
    exec(code, {})
    tokenizer = load_tokenizer("my_tokenizer")
    assert tokenizer.tokenize("Kein Pleuraerguss.") == ["kein", "pleuraerguss", "."]
    assert tokenizer("Kein Infiltrat").input_ids[0] == tokenizer.cls_token_id


@pytest.mark.parametrize(
    "word", ["consolidation", "cardiomegaly", "effusion", "pneumothorax", "atelectasis", "bilateral"]
)
def test_clinical_words_are_one_piece(word: str) -> None:
    assert load_tokenizer(None).tokenize(word) == [word]


@pytest.mark.parametrize(
    "text",
    ["Pneumonoultramicroscopicsilicovolcanoconiosis", "zqxjk", "œdème", "naïve Übelkeit", "легкие", "α-1", "x²·µg±5°"],
)
def test_unknown_words_fall_back_to_pieces_not_to_unk(text: str) -> None:
    tokens = load_tokenizer(None).tokenize(text)
    assert "[UNK]" not in tokens
    assert len(tokens) > len(text.split())


def test_case_and_accents_are_folded() -> None:
    tokenizer = load_tokenizer(None)
    assert tokenizer.tokenize("Œdème PLEURAL") == tokenizer.tokenize("œdeme pleural")


def test_a_clinical_note_stays_short() -> None:
    assert len(load_tokenizer(None).tokenize(NOTE)) / len(NOTE.split()) < 1.75


def test_it_survives_saving(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(None)
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert again(NOTE).input_ids == tokenizer(NOTE).input_ids
        assert again.pad_token_id == tokenizer.pad_token_id == 0


@pytest.mark.parametrize("length", [8, 24, 40])
def test_workers_tokenize_like_transformers(length: int) -> None:
    tokenizer = load_tokenizer(None)
    frozen, pad = freeze(tokenizer, length)
    ids = Tokenizer.from_str(frozen).encode(NOTE).ids
    assert ids == tokenizer(NOTE, truncation=True, max_length=length).input_ids
    assert (len(ids) <= length, ids[0], ids[-1], pad) == (True, 2, 3, 0)
    assert len(tokenizer(NOTE).input_ids) > 50, "freezing must not change the tokenizer itself"


def test_padding_is_to_a_multiple_of_eight_within_the_length() -> None:
    ids, mask = pad_batch([[5, 6, 7], [1] * 9], pad_id=0, text_length=112)
    assert (ids.shape, ids.dtype, mask.dtype) == ((2, 16), np.int64, np.int64)
    assert ids[0].tolist() == [5, 6, 7] + [0] * 13
    assert mask.sum(axis=1).tolist() == [3, 9]
    assert pad_batch([[1] * 9], 0, text_length=12)[0].shape == (1, 12)


def test_what_cannot_be_used_is_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.text.tokenizer: cannot load a tokenizer from"):
        load_tokenizer(str(tmp_path / "nothing"))
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "<e>": 1}, unk_token="a")))
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no padding token"):
        load_tokenizer(str(tmp_path / "bare"))
    ended = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "<e>": 1}, unk_token="a")), eos_token="<e>"
    )
    ended.save_pretrained(tmp_path / "ended")
    assert load_tokenizer(str(tmp_path / "ended")).pad_token_id == 1
