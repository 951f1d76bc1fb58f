"""Encoding by the word gives the ids that `tokenizers` gives, for every kind of tokenizer that it takes on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prepared import stdlib_texts
from tokenizers import Tokenizer

from megamix.data.tokens import word_encoder
from megamix.data.tokens.tokenizer import train_tokenizer
from megamix.data.tokens.word_encoder import WordEncoder

KINDS = ["gpt2", "llama3", "qwen2", "nfc", "added"]
LLAMA3, QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
)


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return json.loads(train_tokenizer([*stdlib_texts("email", 20), "Grüße aus Köln, 你好 " * 500], 800))


def make(trained: dict[str, Any], kind: str) -> Tokenizer:
    config = json.loads(json.dumps(trained))
    pattern = {"llama3": LLAMA3, "qwen2": QWEN2}.get(kind)
    if pattern:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        config["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
    if kind == "nfc":
        config["normalizer"] = {"type": "NFC"}
    if kind == "added":
        token = {"id": 800, "content": "    ", "special": False, "normalized": True}
        config["added_tokens"].append({**token, "single_word": False, "lstrip": False, "rstrip": False})
    tokenizer = Tokenizer.from_str(json.dumps(config))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module")
def encoders(trained: dict[str, Any]) -> dict[str, tuple[Tokenizer, WordEncoder]]:
    found: dict[str, tuple[Tokenizer, WordEncoder]] = {}
    for kind in KINDS:
        tokenizer = make(trained, kind)
        encoder = WordEncoder.of(tokenizer, "<u2")
        assert encoder is not None
        found[kind] = (tokenizer, encoder)
    return found


def same(tokenizer: Tokenizer, encoder: WordEncoder, texts: list[str]) -> None:
    wanted = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert [np.frombuffer(ids, "<u2").tolist() for ids in encoder.encode(texts)] == wanted


SPACES = ["  ", "    ", "\t", "\n", "\r\n", "\x0b", "\x1c", "\x1f", "\x85", "\xa0", "\u2028", "\u3000", "\u200b"]
MARKS = ["'s", "'LL", "'\u017f", "_", "<|endoftext|>", "1234567", "\x00", "word", " ", "\U0001f600"]
LETTERS = ["a\u0301", "é", "ß", "²", "\u2167", "\u0663", "१", "你好", "\u0345", "\u212a"]
NEW = ["\U00010d40", "\ua7dc"]  # of Unicode 16
ODD = st.sampled_from([*SPACES, *MARKS, *LETTERS, *NEW])


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(texts=st.lists(st.lists(ODD | st.text(max_size=5), max_size=12).map("".join), max_size=4))
@example(texts=["'stuff !'s  x\n  \n y ", "don't 'tis 'S\u017f"])
def test_any_text(encoders: dict[str, tuple[Tokenizer, WordEncoder]], kind: str, texts: list[str]) -> None:
    same(*encoders[kind], texts)


@pytest.mark.parametrize("kind", KINDS)
def test_real_text(encoders: dict[str, tuple[Tokenizer, WordEncoder]], kind: str) -> None:
    same(*encoders[kind], [*stdlib_texts("asyncio", 10), *stdlib_texts("encodings", 20)])


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_characters_the_libraries_class_differently(
    encoders: dict[str, tuple[Tokenizer, WordEncoder]], kind: str
) -> None:
    codes = [code for code in range(0, 0x30000, 37) if not 0xD800 <= code < 0xE000]
    for first in range(0, len(codes), 300):
        same(*encoders[kind], ["".join(f"a{chr(code)} 1{chr(code)}" for code in codes[first : first + 300])])


def test_wrong_class_is_found(trained: dict[str, Any]) -> None:
    """Were the expression's idea of a letter another one, the tokenizer would be asked instead."""
    tokenizer = make(trained, "gpt2")
    encoder = WordEncoder.of(tokenizer, "<u2")
    assert encoder is not None
    narrow = encoder._words.pattern.replace(r"[^\s\p{L}", r"[^\sA-Za-z").replace(r"\p{L}", "[A-Za-z]")
    encoder._words = regex.compile(narrow)
    same(tokenizer, encoder, ["Grüße aus Köln", "plain words", "Καλημέρα κόσμε, 你好"])
    assert "ü" in encoder._other
    assert "b" in encoder._same
    encoder._same |= encoder._other
    encoder._other.clear()
    with pytest.raises(AssertionError):  # this comparison would see the difference
        same(tokenizer, encoder, ["Grüße aus Köln"])


def test_long_texts_and_a_full_dictionary(
    encoders: dict[str, tuple[Tokenizer, WordEncoder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_encoder, "_LONG_TEXT", 1000)
    monkeypatch.setattr(word_encoder, "_MOST_KEPT", 50)
    tokenizer, encoder = encoders["gpt2"]
    same(tokenizer, encoder, [*stdlib_texts("asyncio", 6), "x" * 5000, "short"])
    assert len(encoder._ids) < 3000


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model": {"dropout": 0.5}},
    ],
)
def test_others_are_left_to_the_tokenizer(trained: dict[str, Any], change: dict[str, Any]) -> None:
    config = {**trained, **{key: value for key, value in change.items() if key != "model"}}
    config["model"] = {**trained["model"], **change.get("model", {})}
    assert WordEncoder.of(Tokenizer.from_str(json.dumps(config)), "<u2") is None
