"""The token stream of a domain: several token files, one after the other, read in windows."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megamix.data.indexed import IndexedTokens
from megamix.errors import InputError


class DomainTokens:
    """Several ``.bin`` / ``.idx`` pairs as the one token stream of a domain.

    Args:
        name: The domain; every error message names it.
        prefixes: Paths without suffix, in stream order.
        expected_tokens: What the manifest says the stream holds; None leaves it unchecked.
        verify: See `IndexedTokens`.

    Raises:
        InputError: A file is damaged (see `IndexedTokens`), or the number of tokens is not the expected one.
    """

    def __init__(
        self, name: str, prefixes: Sequence[str | Path], expected_tokens: int | None = None, *, verify: bool = True
    ) -> None:
        self.name = name
        if not prefixes:
            raise InputError(f"domain '{name}': no token files given. Name at least one prefix.")
        try:
            self.files = [IndexedTokens(prefix, verify=verify) for prefix in prefixes]
        except InputError as error:
            raise InputError(f"domain '{name}': {error}") from error
        self.dtype = np.result_type(*(file.dtype for file in self.files))
        self._ends = np.cumsum([file.num_tokens for file in self.files]).tolist()
        self.num_tokens: int = self._ends[-1]
        self.num_documents = sum(file.num_documents for file in self.files)
        if expected_tokens is not None and self.num_tokens != expected_tokens:
            raise InputError(
                f"domain '{name}': {', '.join(str(file.prefix) for file in self.files)} hold {self.num_tokens} tokens,"
                f" but the manifest says {expected_tokens}. Run `megamix prepare` again, or use the manifest of these"
                " files."
            )

    def read(self, start: int, length: int) -> np.ndarray:
        """A copy of tokens [start, start + length), ``dtype`` [length]; may cross file borders.

        Raises:
            InputError: The range leaves the stream.
        """
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise InputError(
                f"domain '{self.name}': tokens {start} to {start + length} asked for; it holds 0 to {self.num_tokens}."
            )
        tokens = np.empty(length, self.dtype)
        number = bisect.bisect_right(self._ends, start)
        filled = 0
        while filled < length:
            file = self.files[number]
            offset = start + filled - (self._ends[number] - file.num_tokens)
            piece = file.tokens[offset : offset + length - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            number += 1
        return tokens

    def num_windows(self, seq_length: int) -> int:
        """How many samples of ``seq_length`` tokens, plus the label of the last one, fit; 0 where not even one does."""
        return max(0, (self.num_tokens - 1) // seq_length)

    def window(self, index: int, seq_length: int) -> np.ndarray:
        """Sample ``index``: tokens [index * S, index * S + S + 1), ``dtype`` [S + 1]; neighbours share one token.

        Raises:
            InputError: The domain has no such window.
        """
        if not 0 <= index < self.num_windows(seq_length):
            raise InputError(
                f"domain '{self.name}': window {index} of {seq_length} tokens asked for, but it has"
                f" {self.num_windows(seq_length)} windows ({self.num_tokens} tokens). Use a shorter sequence length, or"
                " more text."
            )
        return self.read(index * seq_length, seq_length + 1)

    def document_at(self, token_offset: int) -> tuple[int, int, int]:
        """Where a token of the stream comes from: (prefix index, document index in that file, offset in it)."""
        if not 0 <= token_offset < self.num_tokens:
            raise InputError(
                f"domain '{self.name}': token {token_offset} asked for, but it holds 0 to {self.num_tokens}."
            )
        number = bisect.bisect_right(self._ends, token_offset)
        file = self.files[number]
        return number, *file.document_at(token_offset - (self._ends[number] - file.num_tokens))
