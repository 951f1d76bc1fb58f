"""Samples of a run, at their global positions: domain, index, documents and text.

Legend: K domains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megamix.core.errors import InputError
from megamix.data.cut_samples import CutSamples
from megamix.data.tokens.indexed import bin_path
from megamix.data.tokens.manifest import Manifest
from megamix.data.tokens.stream import DomainTokens
from megamix.training.plan import domain_key
from megamix.training.records.recorded_run import RecordedRun


@dataclass(frozen=True)
class Sample:
    """A sample at a global position.

    Attributes:
        weight: sampling weight of its domain there.
        index: which of the domain's ``num_samples``, in ``epoch`` (counted from 0); one that is no window (see
            `CutSamples`) has a number from there on.
        pieces: its tokens, as stretches of the domain's training tokens: (first, end).
        bytes: the places of its tokens in .bin files.
        documents: the documents that each of the pieces is cut from.
    """

    position: int
    domain: str
    weight: float
    index: int
    num_samples: int
    epoch: int
    pieces: list[tuple[int, int]]
    bytes: list[str]
    documents: list[str]
    text: str


class SampleReader:
    """The samples of a step of a run, or of any other position under the same data set.

    Args:
        step: counted from 0; the data set is the one that the run had there.

    Raises:
        InputError: its data set cannot be opened.
    """

    def __init__(self, run: RecordedRun, step: int) -> None:
        self._run = run
        batches = run.config.batches
        self._seq_length = batches.length(step)
        self._first, self._batch = batches.position(step), batches.size(step)
        line = run.ledger.line_at(self._first)
        self._manifest = _data_at(run, line)
        self._names = line["domain_names"]
        self._keys = [domain_key(name) for name in self._names]
        self._streams = [self._manifest.open_domain(name, verify=False) for name in self._names]
        self._sizes = [stream.num_windows(self._seq_length) for stream in self._streams]

    @cached_property
    def _tokenizer(self) -> Any:
        return self._manifest.load_tokenizer()

    def positions_of(self, domain: str) -> list[int]:
        """The positions of the step that hold samples of ``domain``."""
        blend = self._run.ledger.blend_at(self._first, self._sizes, self._keys)
        domains, _ = blend.window(self._first, self._batch)
        return (self._first + np.flatnonzero(domains == self._names.index(domain))).tolist()

    def sample(self, position: int) -> Sample:
        """The sample at ``position``."""
        line = self._run.ledger.line_at(position)
        blend = self._run.ledger.blend_at(position, self._sizes, self._keys)
        (domain,), (index,) = (each.tolist() for each in blend.window(position, 1))
        stream, cut = self._streams[domain], CutSamples(self._streams, self._seq_length, blend.rests)
        pieces = [(first, first + number) for first, number in cut.pieces(domain, index)]
        tokens = np.empty(self._seq_length + 1, stream.dtype)
        cut.read(domain, index, tokens)
        epoch = int(blend.counts_at(position)[domain]) // self._sizes[domain]
        return Sample(
            position=position,
            domain=stream.name,
            weight=float(line["domain_weights"][domain]),
            index=index,
            num_samples=self._sizes[domain],
            epoch=blend.rests[domain].epoch if cut.is_cut(domain, index) else epoch,
            pieces=pieces,
            bytes=[place for start, stop in pieces for place in _bytes(stream, start, stop)],
            documents=[_documents(stream, start, stop) for start, stop in pieces],
            text=self._tokenizer.decode(tokens[:-1].tolist()),
        )


def _data_at(run: RecordedRun, line: dict[str, Any]) -> Manifest:
    """The data set of a line of the ledger: the run's, or the one before a resume changed it.

    Raises:
        InputError: it cannot be opened.
    """
    index = run.ledger.lines.index(line)
    later = (after["change"] for after in run.ledger.lines[index + 1 :] if after.get("change"))
    path = next((change["manifest"] for change in later if change["domains"]), None)
    if path is not None:
        return Manifest.load(path)
    if run.manifest is None:
        raise InputError(f"the data of {run.run_dir} cannot be opened: {run.missing_data}")
    return run.manifest


def _bytes(stream: DomainTokens, start: int, stop: int) -> Iterator[str]:
    """The places of tokens [start, stop) in the .bin files."""
    for _, file, first, last in stream.spans(start, stop - start):
        size = file.dtype.itemsize
        yield f"{first * size} to {last * size} of {bin_path(file.prefix)}"


def _documents(stream: DomainTokens, start: int, stop: int) -> str:
    """The documents of tokens [start, stop)."""
    first_file, first, offset = stream.document_at(start)
    last_file, last, _ = stream.document_at(stop - 1)
    begin = f"{first} of {stream.files[first_file].prefix} (from its token {offset} on)"
    if (first_file, first) == (last_file, last):
        return begin
    return f"{begin} to {last}" + (f" of {stream.files[last_file].prefix}" if last_file != first_file else "")
