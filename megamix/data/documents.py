"""Documents that the labels of samples belong to: windows cut documents, and a document may reach over several windows.

Legend: K domains, D documents, n samples, S tokens in a sample, m stretches of one document in one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamix.data.tokens.stream import DomainTokens

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LabelDocuments:
    """Documents of the labels of n samples.

    Attributes:
        domain: int64 [D], of every document.
        row, place, document: int64 [m], by row and place: from label ``place`` of sample ``row`` on, the labels are of
            this document.
    """

    seq_length: int
    domain: Ints
    row: Ints
    place: Ints
    document: Ints

    @property
    def number(self) -> int:
        """D."""
        return self.domain.size

    def of(self, rows: Ints) -> Ints:
        """int64 [rows, S]: the document of every label of these samples."""
        first_n = np.searchsorted(self.row, rows)
        end_n = np.searchsorted(self.row, rows, side="right")
        ends_m = np.append(self.place[1:], 0)
        ends_m[ends_m == 0] = self.seq_length  # every sample begins with a stretch at place 0
        count_n = end_n - first_n
        index = np.arange(count_n.sum()) + np.repeat(end_n - np.cumsum(count_n), count_n)
        return np.repeat(self.document[index], (ends_m - self.place)[index]).reshape(rows.size, self.seq_length)


def label_documents(streams: Sequence[DomainTokens], domain_n: Ints, sample_n: Ints, seq_length: int) -> LabelDocuments:
    """The documents of the labels of samples, from the index files.

    A label belongs to the document that its token is of, so a document's first token, predicted from the end of another
    document, is its own.

    Args:
        domain_n, sample_n: int64 [n], the samples.
    """
    rows, places, starts = [], [], []
    for domain in np.unique(domain_n):
        row_n, stream = np.flatnonzero(domain_n == domain), streams[domain]
        first_n = sample_n[row_n] * seq_length + 1
        begun_n = np.array([offset - stream.document_at(offset)[2] for offset in first_n.tolist()], np.int64)
        row_m, token_m = stream.document_starts(sample_n[row_n], seq_length)
        later = token_m > 1  # the first label is token 1 of the window
        rows += [row_n, row_n[row_m[later]]]
        places += [np.zeros(row_n.size, np.int64), token_m[later] - 1]
        starts += [begun_n, sample_n[row_n][row_m[later]] * seq_length + token_m[later]]
    row_m, place_m, start_m = (np.concatenate(parts) for parts in (rows, places, starts))
    order_m = np.lexsort((place_m, row_m))
    row_m, place_m, start_m = row_m[order_m], place_m[order_m], start_m[order_m]
    found, document_m = np.unique(np.stack([domain_n[row_m], start_m]), axis=1, return_inverse=True)
    return LabelDocuments(seq_length, found[0], row_m, place_m, document_m.reshape(-1))
