"""Word-by-word byte-level BPE: the ids of `tokenizers`, several times as fast.

A byte-level tokenizer splits text into words with a regular expression and encodes each word separately. Words repeat,
so most of the work is a look-up from words to the bytes of their ids.

Only tokenizers with a known expression are encoded this way. Two libraries may still class a character differently
(letter, number, space), with different Unicode versions. So every new character is tried on the tokenizer itself, and a
text with a character on which they differ is left to the tokenizer.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_CL100K = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN = {
    _GPT2,
    _CL100K,  # also Llama 3
    _CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),  # Qwen 2
}
_LONGEST_KEPT = 40  # characters; longer words hardly come again
_MOST_KEPT = 1 << 19  # words, about 100 MB; then the cache is cleared, which also suits a change of domain
_LONG_TEXT = 1 << 22  # characters; beyond, words are not all held at the same time


class WordEncoder:
    """Encoder with a tokenizer's ids; made with `of`."""

    def __init__(self, tokenizer: Any, pattern: str, dtype: Any, avoid: Sequence[str]) -> None:
        import regex

        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype)
        self._words = regex.compile(pattern)
        # Faster, and the same on ASCII text.
        ascii_pattern = pattern.replace(r"\p{L}", "a-zA-Z").replace(r"\p{N}", "0-9")
        self._ascii_words = re.compile(re.sub(r"(?<![\[\w\\-])(a-zA-Z|0-9)(?=[+{|])", r"[\1]", ascii_pattern), re.ASCII)
        self._avoid = re.compile("|".join(map(re.escape, avoid))) if avoid else None
        self._ids: dict[str, bytes] = {}
        self._same: set[str] = set()
        self._other: set[str] = set()
        self._try(set(map(chr, range(128))))

    @classmethod
    def of(cls, tokenizer: Any, dtype: Any) -> WordEncoder | None:
        """An encoder for a `tokenizers.Tokenizer` that encodes special tokens as text; None for an unknown kind."""
        config = json.loads(tokenizer.to_str())
        model, normalizer = config["model"], config["normalizer"] or {}
        pattern = _pattern_of(config["pre_tokenizer"] or {})
        plain = model["type"] == "BPE" and not any(
            model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        )
        if pattern not in _KNOWN or not plain or normalizer.get("type") not in (None, "NFC"):
            return None
        # Added tokens that stand for text are split off before words.
        avoid = [token["content"] for token in config["added_tokens"] if not token["special"]]
        return cls(tokenizer, pattern, dtype, avoid)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of every text, as bytes of the dtype."""
        found: list[bytes | None] = [self._encode(text) for text in texts]
        left = [number for number, ids in enumerate(found) if ids is None]
        if left:
            encodings = self._tokenizer.encode_batch_fast([texts[n] for n in left], add_special_tokens=False)
            for number, encoding in zip(left, encodings, strict=True):
                found[number] = np.array(encoding.ids, self._dtype).tobytes()
        return [ids for ids in found if ids is not None]

    def _encode(self, text: str) -> bytes | None:
        """The ids as bytes; None if only the tokenizer itself can tell."""
        is_ascii = text.isascii()
        if self._avoid is not None and self._avoid.search(text):
            return None
        if not is_ascii:
            if self._tokenizer.normalizer is not None:
                text = self._tokenizer.normalizer.normalize_str(text)
                if self._avoid is not None and self._avoid.search(text):
                    return None
            characters = set(text)
            if not characters <= self._same:
                self._try(characters - self._same)
        if self._other and not self._other.isdisjoint(text):
            return None
        words = self._ascii_words if is_ascii else self._words
        if len(text) <= _LONG_TEXT:
            return self._look_up(words.findall(text))
        matches = (match[0] for match in words.finditer(text))
        return b"".join(self._look_up(part) for part in iter(lambda: list(itertools.islice(matches, 1 << 16)), []))

    def _look_up(self, words: list[str]) -> bytes:
        known = self._ids
        try:
            return b"".join([known[word] for word in words])
        except KeyError:
            pass
        if len(known) > _MOST_KEPT:
            known.clear()
        long: dict[str, bytes] = {}
        missing = list({word for word in words if word not in known})
        # A word stays one word when split alone, so the tokenizer can encode many words as a batch.
        encodings = self._tokenizer.encode_batch_fast(missing, add_special_tokens=False)
        for word, encoding in zip(missing, encodings, strict=True):
            (known if len(word) <= _LONGEST_KEPT else long)[word] = np.array(encoding.ids, self._dtype).tobytes()
        return b"".join([known[word] if word in known else long[word] for word in words])

    def _try(self, characters: set[str]) -> None:
        """Tests whether both libraries class characters alike, beside a letter, a number, a mark and a space."""
        for character in characters - self._other:
            probe = f"a{character}1{character}!{character} {character}{character}\n{character}'{character}"
            cuts = [offsets for _, offsets in self._tokenizer.pre_tokenizer.pre_tokenize_str(probe)]
            words = [self._words] if ord(character) > 127 else [self._words, self._ascii_words]
            same = all(cuts == [match.span() for match in pattern.finditer(probe)] for pattern in words)
            (self._same if same else self._other).add(character)


def _pattern_of(pre_tokenizer: dict[str, Any]) -> str | None:
    """The expression that splits words; None if it cannot be read."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not steps:
        return None
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return _GPT2 if last.get("use_regex", True) else None
    split = steps[0]
    isolated = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    return split["pattern"].get("Regex") if isolated and len(steps) == 2 and not last.get("use_regex", True) else None
