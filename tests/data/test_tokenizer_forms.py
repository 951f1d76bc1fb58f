"""Tokenizers in other forms than tokenizer.json: the same ids as their own programs give."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from megamix.core.errors import InputError
from megamix.data.tokens.tokenizer import TokenizerSpec, given_tokenizer, train_tokenizer

TEXTS = ["in the beginning was the word, and the word's end " * 9, "Grüße 你好 🙂", " def f(x):\n\treturn x  # 12345"]


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_vocabulary_and_merges(tmp_path: Path, names: tuple[str, str]) -> None:
    data = train_tokenizer(TEXTS, 300)
    model = json.loads(data)["model"]
    (tmp_path / names[0]).write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tmp_path / names[1]).write_text("\n".join(lines) + "\n")
    for given in (tmp_path, tmp_path / names[0]):
        _, loaded = given_tokenizer(str(given), None)
        assert loaded.encode_batch(TEXTS) == [Tokenizer.from_str(data.decode()).encode(text).ids for text in TEXTS]
        assert loaded.decode(loaded.encode_batch(TEXTS)[1]) == TEXTS[1]
        assert (loaded.eod_id, loaded.vocab_size) == (0, 300)
        assert loaded.eod_id not in loaded.encode_batch(["a<|endoftext|>b"])[0]
    (tmp_path / names[0]).write_text('{"a": 0}')
    with pytest.raises(InputError, match="lacks 255 of the 256 bytes"):
        given_tokenizer(str(tmp_path), None)
    (tmp_path / names[0]).write_text("[]")
    with pytest.raises(InputError, match="is no vocabulary"):
        given_tokenizer(str(tmp_path), None)


def test_a_folder_s_tokenizer_json_comes_first(tmp_path: Path) -> None:
    data = train_tokenizer(TEXTS, 300)
    (tmp_path / "tokenizer.json").write_bytes(data)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert TokenizerSpec.parse(str(tmp_path)).path == str(tmp_path / "tokenizer.json")
    assert given_tokenizer(str(tmp_path), None)[0] == data


SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "bytes": {"byte_fallback": True},
    "text as it is": {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "pieces of the user": {"user_defined_symbols": ["<b>", "<bb>", "12", "#"], "remove_extra_whitespaces": False},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, settings: str) -> None:
    """As SentencePiece cuts them, whatever the model's settings, and without transformers."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="make env installs it")
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "t.txt").write_text("\n".join([*TEXTS, string.printable[:95]] * 20))
    prefix = str(tmp_path / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "t.txt"), model_prefix=prefix, vocab_size=400,
        model_type=kind, minloglevel=2, hard_vocab_limit=False, **SETTINGS[settings],
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")
    _, loaded = given_tokenizer(str(tmp_path), None)
    texts = [
        *TEXTS,
        "the end</s> of <s> it",
        "  a   b\t<0x41> ",
        "",
        "\n\n",
        "in <bb>the <b>12 112",
        "\u2581the",
        "\u0416\u0416 \ufb01",
    ]
    assert loaded.encode_batch(texts) == [processor.encode(text) for text in texts]
    if settings == "text as it is":
        assert [loaded.decode(tokens) for tokens in loaded.encode_batch(TEXTS)] == TEXTS
    assert loaded.eod_id == processor.eos_id()
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(InputError, match="is no SentencePiece model"):
        given_tokenizer(str(tmp_path), None)


def test_without_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"needs the package sentencepiece, .*pip install 'megamix\[sentencepiece\]'"):
        given_tokenizer(str(tmp_path), None)
