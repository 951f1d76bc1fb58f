"""Token stream of a domain: its token files concatenated, read in windows."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamix.core.errors import InputError
from megamix.data.tokens.indexed import IndexedTokens
from megamix.data.tokens.mapped_files import may_open, most_open


@dataclass(frozen=True)
class _Piece:
    """Documents [first, end) of a file: its tokens [start, start + num_tokens)."""

    file: IndexedTokens
    first: int
    end: int
    start: int
    num_tokens: int


class DomainTokens:
    """Several ``.bin`` / ``.idx`` pairs as the one token stream of a domain.

    Args:
        name: the domain; every error message names it.
        prefixes: paths without suffix, in stream order.
        expected_tokens: what the manifest says the stream holds; None leaves it unchecked.
        verify: see `IndexedTokens`.
        ranges: one per prefix: [first document, end document) of that file, or None for all of it. The stream, its
            counts and its windows are of these documents only.

    Raises:
        InputError: a file is damaged (see `IndexedTokens`), a range does not fit its file, or the number of tokens is
            not the expected one.
    """

    def __init__(
        self,
        name: str,
        prefixes: Sequence[str | Path],
        expected_tokens: int | None = None,
        *,
        verify: bool = True,
        ranges: Sequence[tuple[int, int] | None] | None = None,
    ) -> None:
        self.name = name
        if not prefixes:
            raise InputError(f"domain '{name}': no token files given. Name at least one prefix.")
        try:
            self.files = [IndexedTokens(prefix, verify=verify) for prefix in prefixes]
        except InputError as error:
            raise InputError(f"domain '{name}': {error}") from error
        self.dtype = np.result_type(*(file.dtype for file in self.files))
        if ranges is None:
            ranges = [None] * len(self.files)
        if len(ranges) != len(self.files):
            raise InputError(
                f"domain '{name}': {len(ranges)} document ranges for {len(self.files)} token files. Give one range per"
                " prefix; None stands for the whole file."
            )
        self._pieces = [self._piece(file, documents) for file, documents in zip(self.files, ranges, strict=True)]
        self._ends = np.cumsum([piece.num_tokens for piece in self._pieces]).tolist()
        self.num_tokens: int = self._ends[-1]
        self.num_documents = sum(piece.end - piece.first for piece in self._pieces)
        if expected_tokens is not None and self.num_tokens != expected_tokens:
            raise InputError(
                f"domain '{name}': {', '.join(str(file.prefix) for file in self.files)} hold {self.num_tokens} tokens,"
                f" but the manifest says {expected_tokens}. Run `megamix prepare` again, or use the manifest of these"
                " files."
            )

    def _piece(self, file: IndexedTokens, documents: tuple[int, int] | None) -> _Piece:
        if documents is None:  # the usual case, which needs no index
            return _Piece(file, 0, file.num_documents, 0, file.num_tokens)
        first, end = documents
        if not 0 <= first <= end <= file.num_documents:
            raise InputError(
                f"domain '{self.name}': documents {first} to {end} of {file.prefix} asked for, but it holds documents 0"
                f" to {file.num_documents}. Give 0 <= first <= end <= {file.num_documents}."
            )
        start, stop = file.starts_of(np.array([first, end])).tolist()
        return _Piece(file, first, end, start, stop - start)

    @property
    def num_files(self) -> int:
        """Files of the stream: two for each prefix."""
        return 2 * len(self.files)

    def read(self, start: int, length: int) -> np.ndarray:
        """A copy of tokens [start, start + length), ``dtype`` [length], across files.

        Raises:
            InputError: the range leaves the stream.
        """
        spans = self.spans(start, length)
        tokens = np.empty(length, self.dtype)
        for skip, file, begin, end in spans:
            tokens[skip : skip + end - begin] = file.tokens[begin:end]
        return tokens

    def document_starts(self, index_n: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """First tokens of documents in windows ``index_n`` (int64 [n]), from the index files.

        Returns:
            Two int64 arrays [m], ascending: the row in ``index_n``, and the place in its window, 0 to ``seq_length``.
        """
        starts, rows, counts = [np.empty(0, np.int64)], [], []
        # A search per window: a joint search is faster from about 20 windows in one file on, and 20 times slower where
        # every window is in another file.
        for row, index in enumerate(index_n.tolist()):
            for skip, file, begin, end in self._window_spans(index, seq_length):
                start_m = file.starts_between(begin, end)
                starts.append(start_m + (skip - begin))
                rows.append(row)
                counts.append(start_m.size)
        row_m, start_m = np.repeat(np.array(rows, np.int64), counts), np.concatenate(starts)
        # Empty documents begin where the next one does.
        new_m = np.ones(row_m.size, np.bool_)
        new_m[1:] = (row_m[1:] != row_m[:-1]) | (start_m[1:] != start_m[:-1])
        return row_m[new_m], start_m[new_m]

    def starts_within(self, start: int, length: int) -> np.ndarray:
        """First tokens of documents in tokens [start, start + length), int64 [m], ascending, counted from ``start``."""
        found = [
            file.starts_between(begin, end) + (skip - begin) for skip, file, begin, end in self.spans(start, length)
        ]
        return np.unique(np.concatenate([np.empty(0, np.int64), *found]))

    def num_windows(self, seq_length: int) -> int:
        """Number of samples of ``seq_length`` tokens plus the label of the last one."""
        return max(0, (self.num_tokens - 1) // seq_length)

    def window(self, index: int, seq_length: int) -> np.ndarray:
        """Sample ``index``: tokens [index * S, index * S + S + 1), ``dtype`` [S + 1]; neighbours share one token.

        Raises:
            InputError: the domain has no such window.
        """
        tokens = np.empty(seq_length + 1, self.dtype)
        self.read_window(index, tokens)
        return tokens

    def read_window(self, index: int, tokens: np.ndarray) -> None:
        """Fills ``tokens``, integers [S + 1], with `window` ``index``."""
        for skip, file, begin, end in self._window_spans(index, len(tokens) - 1):
            tokens[skip : skip + end - begin] = file.tokens[begin:end]

    def document_at(self, token_offset: int) -> tuple[int, int, int]:
        """Source of a token of the stream: (prefix index, document index in the file, offset in the document)."""
        if not 0 <= token_offset < self.num_tokens:
            raise InputError(
                f"domain '{self.name}': token {token_offset} asked for, but it holds 0 to {self.num_tokens}."
            )
        number = bisect.bisect_right(self._ends, token_offset)
        piece = self._pieces[number]
        return number, *piece.file.document_at(piece.start + token_offset - (self._ends[number] - piece.num_tokens))

    def _window_spans(self, index: int, seq_length: int) -> list[tuple[int, IndexedTokens, int, int]]:
        if not 0 <= index < self.num_windows(seq_length):
            raise InputError(
                f"domain '{self.name}': window {index} of {seq_length} tokens asked for, but it has"
                f" {self.num_windows(seq_length)} windows ({self.num_tokens} tokens). Use a shorter sequence length, or"
                " more text."
            )
        return self.spans(index * seq_length, seq_length + 1)

    def spans(self, start: int, length: int) -> list[tuple[int, IndexedTokens, int, int]]:
        """Tokens [start, start + length) by file: (tokens before this file's, file, its first token, its last + 1)."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise InputError(
                f"domain '{self.name}': tokens {start} to {start + length} asked for; it holds 0 to {self.num_tokens}."
            )
        spans = []
        number = bisect.bisect_right(self._ends, start)
        done = 0
        while done < length:
            piece = self._pieces[number]
            begin = piece.start + start + done - (self._ends[number] - piece.num_tokens)
            end = min(begin + length - done, piece.start + piece.num_tokens)
            if end > begin:
                spans.append((done, piece.file, begin, end))
            done += end - begin
            number += 1
        return spans


def files_line(domains: Sequence[DomainTokens]) -> str:
    """How many token files there are, and how many a process has open at a time."""
    number, most = sum(domain.num_files for domain in domains), most_open()
    return f"{number:,}, of which each rank has at most {min(number, most):,} open (it may open {may_open():,})"
