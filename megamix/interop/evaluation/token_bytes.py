"""Bytes of text that each token stands for, by the decoder that tokenizer.json names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.files import read_json
from megamix.data.tokens.manifest import Manifest

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "\u2581"  # how SentencePiece writes a space


def token_bytes(manifest: Manifest) -> NDArray[np.int64] | None:
    """int64 [V]: bytes of every token, 0 for special ones and the end of a document; None where that is not known.

    Known are byte-level tokens (a character for each byte), and those of SentencePiece with bytes for rare characters.
    """
    path = manifest.folder / manifest.tokenizer.file
    contents = read_json(path, "the tokenizer", damaged="Put back the file that the tokens were made with.")
    kinds = set(_kinds(contents.get("decoder")))
    byte_level = "ByteLevel" in kinds
    if not byte_level and "ByteFallback" not in kinds:
        return None
    added = {entry["id"]: entry for entry in contents.get("added_tokens", [])}
    from tokenizers import Tokenizer

    sizes = np.zeros(manifest.tokenizer.vocab_size, np.int64)
    for token, index in Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).items():
        if index in added:
            sizes[index] = 0 if added[index]["special"] else len(token.encode())
        elif byte_level:
            sizes[index] = len(token)
        else:
            sizes[index] = 1 if _BYTE.fullmatch(token) else len(token.replace(_SPACE, " ").encode())
    sizes[manifest.tokenizer.eod_id] = 0
    return sizes


def _kinds(decoder: Any) -> Iterator[str]:
    """The kinds of a decoder, and of those that it is a sequence of."""
    if isinstance(decoder, dict):
        yield decoder.get("type", "")
        for part in decoder.get("decoders", []):
            yield from _kinds(part)
