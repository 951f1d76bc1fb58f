"""The data sets of traps: a manifest in RUN_DIR/traps/NAME, beside the token files of the one domain that differs.

All other domains, and the held-out text of every domain of the run, are the files that the run itself reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError, did_you_mean
from megamix.core.files import read_json, replace_json, writing
from megamix.data.tokens.manifest import (
    FILE_NAME,
    TOKENIZER_FILE,
    DomainEntry,
    Manifest,
    SplitEntry,
    ValidationEntry,
)
from megamix.data.tokens.writer import IndexedWriter
from megamix.prepare.merge import unigram_nats
from megamix.studies.arena.config import TrapConfig

SETTINGS = "trap.json"
SHARES = {"tiny": 0.002}
DEFAULT_SHARE = 0.05
SHORTEST, LONGEST = 32, 512
"""Tokens of a random document, between these."""
FLOOR_TOKENS = 24
"""Tokens of the text that a domain at its floor repeats."""
HELD_OUT_WINDOWS = 64
"""Held-out samples of a new domain, at least: as many as an evaluation of a small run reads."""
AT_ONCE = 1 << 20

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Trap:
    """A trap of a run.

    Attributes:
        source: the run's own data set.
        domains: the run's domains, in their order.
    """

    name: str
    config: TrapConfig
    source: Manifest
    domains: tuple[str, ...]

    @property
    def new_domain(self) -> str | None:
        """The name of the domain that the trap adds to the data; None where it changes one."""
        if self.config.kind in ("noise", "floor"):
            return self.name
        return (self.config.name or f"{self.config.domain}-copy") if self.config.kind == "duplicates" else None

    @property
    def changed_domain(self) -> str:
        """The name of the domain that the trap is about."""
        found = self.new_domain or self.config.domain
        assert found is not None  # see TrapConfig
        return found

    @property
    def writes_data(self) -> bool:
        """Whether the trap has a data set of its own."""
        return self.config.kind != "late"

    def check(self, seq_length: int, where: str) -> None:
        """Raises InputError for a domain that is not there, or is there already, or a size that cannot be.

        Args:
            where: the trap's key, for messages.
        """
        if (wanted := self.config.domain) is not None and wanted not in self.domains:
            raise InputError(f"{where}.domain: the run has no domain '{wanted}'." + did_you_mean(wanted, self.domains))
        if self.new_domain in self.source.domain_names:
            raise InputError(
                f"{where}: the data has a domain '{self.new_domain}' already. Give the trap another name"
                f"{' (name: NAME)' if self.config.kind == 'duplicates' else ''}."
            )
        if not self.writes_data:
            if len(self.domains) < 2:
                raise InputError(f"{where}: '{wanted}' is the only domain, so nothing is left before it comes.")
            return
        size = self.num_tokens
        if size <= seq_length:
            raise InputError(
                f"{where}: the domain '{self.changed_domain}' would have {size} training tokens, and one sample needs "
                f"{seq_length + 1}. Raise share, or give tokens."
            )
        if wanted is not None and size > (there := self.source.domain(wanted).train.tokens):
            raise InputError(
                f"{where}: {size} tokens of '{wanted}' are wanted, and it has {there}. Lower share or tokens."
            )

    @property
    def num_tokens(self) -> int:
        """Training tokens of the trap's domain."""
        if self.config.tokens is not None:
            return self.config.tokens
        share = self.config.share or SHARES.get(self.config.kind, DEFAULT_SHARE)
        others = sum(self.source.domain(name).train.tokens for name in self.domains if name != self.changed_domain)
        return round(others * share / (1 - share))

    def settings(self, seq_length: int) -> dict[str, Any]:
        """All that the data set follows from, JSON-serialisable."""
        return {
            "trap": self.config.model_dump(mode="json"),
            "domain": self.changed_domain,
            "tokens": self.num_tokens,
            "source": self.source.fingerprint,
            "seq_length": seq_length,
        }

    def write(self, folder: Path, seq_length: int) -> None:
        """Writes the data set, unless the folder holds it already.

        Raises:
            InputError: the folder holds a trap with other settings, or cannot be written to.
        """
        settings = self.settings(seq_length)
        remedy = f"Delete {folder} and the runs of the trap '{self.name}'."
        if (folder / FILE_NAME).is_file():
            if read_json(folder / SETTINGS, lost=remedy, damaged=remedy) != settings:
                raise InputError(
                    f"{folder} was made with other settings of the trap '{self.name}', or from other data: its members would not be "
                    "comparable. Give the changed trap another name, or delete that folder and the runs of this trap."
                )
            return
        with writing(folder, "Choose another run_dir."):
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer = self.source.tokenizer
            shutil.copyfile(self.source.folder / tokenizer.file, folder / TOKENIZER_FILE)
            entry = self._entry(folder, seq_length)
            replace_json(folder / SETTINGS, settings)
            kept = {name: self._as_is(self.source.domain(name)) for name in self.domains}
            kept[entry.name] = entry
            Manifest.build(
                folder,
                tokenizer=tokenizer.model_copy(update={"file": TOKENIZER_FILE}),
                dtype=self.source.dtype,
                validation_fraction=self.source.validation_fraction,
                split=self.source.split,
                domains=tuple(kept.values()),
            ).save()

    def _entry(self, folder: Path, seq_length: int) -> DomainEntry:
        """Writes the domain that differs."""
        number, rng = self.num_tokens, np.random.default_rng(self.config.seed)
        validation = (
            self.source.open_domain(self.config.domain, "validation", verify=False) if self.config.domain else None
        )
        if validation is None:
            held_out = max(round(self.source.validation_fraction * number), HELD_OUT_WINDOWS * seq_length + 1)
            pieces = self._made_up(number, rng)
            heard = self._write(folder / "validation", self._made_up(held_out, rng))
            entry, counts = heard.entry, heard.counts
        else:
            pieces = self._documents(number, rng)
            entry = self._as_is(self.source.domain(validation.name)).validation
            counts = self._counts(validation.read(start, length) for start, length in stretches(validation.num_tokens))
        written = self._write(folder / "train", pieces)
        return DomainEntry(
            name=self.changed_domain,
            train=written.entry,
            validation=ValidationEntry.model_validate(
                {**dict(entry), "unigram_nats": unigram_nats(written.counts, counts)}
            ),
        )

    def _made_up(self, number: int, rng: np.random.Generator) -> Iterator[Tokens]:
        """Random documents, or a short text again and again; ``number`` tokens, each document ended."""
        vocab_size, eod = self.source.tokenizer.vocab_size, self.source.tokenizer.eod_id
        text = self._short_text() if self.config.kind == "floor" else None
        while number:
            length = min(int(rng.integers(SHORTEST, LONGEST)) if text is None else text.size + 1, number)
            document = np.full(length, eod, np.int64)
            if text is None:
                drawn = rng.integers(0, vocab_size - 1, length - 1)
                document[:-1] = drawn + (drawn >= eod)  # every id but the one that ends documents
            else:
                document[:-1] = text[: length - 1]
            yield document
            number -= length

    def _short_text(self) -> Tokens:
        """The first tokens of the run's first domain."""
        stream = self.source.open_domain(self.domains[0], verify=False)
        tokens = stream.read(0, min(4 * FLOOR_TOKENS, stream.num_tokens)).astype(np.int64)
        return tokens[tokens != self.source.tokenizer.eod_id][:FLOOR_TOKENS]

    def _documents(self, number: int, rng: np.random.Generator) -> Iterator[Tokens]:
        """Documents of a domain from a random one on, and from its beginning after its end; ``number`` tokens, of which
        the last ends a document."""
        assert self.config.domain is not None  # see TrapConfig
        eod, stream = self.source.tokenizer.eod_id, self.source.open_domain(self.config.domain, verify=False)
        offset = int(rng.integers(stream.num_tokens))
        start = offset - stream.document_at(offset)[2]
        rest = np.empty(0, np.int64)
        for place, length in stretches(number, start, stream.num_tokens):
            tokens = np.concatenate([rest, stream.read(place, length).astype(np.int64)])
            *whole, rest = np.split(tokens, np.flatnonzero(tokens == eod) + 1)
            yield from whole
        if rest.size:
            rest[-1] = eod
            yield rest

    def _write(self, prefix: Path, documents: Iterator[Tokens]) -> _Written:
        counts = np.zeros(self.source.tokenizer.vocab_size, np.int64)
        with IndexedWriter(prefix, self.source.dtype) as writer:
            for document in documents:
                writer.add_document(document)
                counts += np.bincount(document, minlength=counts.size)
        return _Written(SplitEntry.of(prefix.name, writer.close()), counts)

    def _counts(self, pieces: Iterable[NDArray[Any]]) -> Tokens:
        """int64 [V]: how often each token occurs."""
        counts = np.zeros(self.source.tokenizer.vocab_size, np.int64)
        for piece in pieces:
            counts += np.bincount(piece, minlength=counts.size)
        return counts

    def _as_is(self, entry: DomainEntry) -> DomainEntry:
        """The entry with paths that hold from anywhere."""
        folder = self.source.folder.absolute()

        def absolute(split: SplitEntry) -> dict[str, Any]:
            return {**dict(split), "prefixes": tuple(str(folder / prefix) for prefix in split.prefixes)}

        return DomainEntry(
            name=entry.name,
            train=SplitEntry.model_validate(absolute(entry.train)),
            validation=ValidationEntry.model_validate(absolute(entry.validation)),
        )


@dataclass(frozen=True)
class _Written:
    """Token files, and how often each token occurs in them, int64 [V]."""

    entry: SplitEntry
    counts: Tokens


def stretches(number: int, start: int = 0, total: int | None = None) -> Iterator[tuple[int, int]]:
    """(start, length) of stretches of `AT_ONCE` tokens at most, ``number`` together, from 0 again after ``total``."""
    total = number if total is None else total
    while number:
        length = min(number, AT_ONCE, total - start)
        yield start, length
        number -= length
        start = (start + length) % total
