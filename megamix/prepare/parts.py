"""Part: one job's token files of one domain, ``OUT/<domain>/{train,validation}.{bin,idx}``, and a note beside them.

With several jobs, ``-00002-of-00008`` follows in the names. A part with a note is finished.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamix.core.errors import InputError
from megamix.core.files import replace_file
from megamix.core.text import plural
from megamix.data.domain_names import file_name
from megamix.data.tokens.indexed import IndexedTokens, bin_path, idx_path
from megamix.data.tokens.manifest import FILE_NAME, SplitEntry
from megamix.data.tokens.writer import IndexedWriter
from megamix.prepare.done_notes import InputFile, PartNote, PrepareSettings, read_note, write_note
from megamix.prepare.encoders import Encoded, Nearest, Skipped, SplitTokens
from megamix.prepare.journal import Header, Journal, Kept, Mark
from megamix.prepare.shards import Shard, Share

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Part:
    """Paths of a part."""

    out: Path
    domain: str
    shard: Shard

    @property
    def folder(self) -> Path:
        """Folder of the domain."""
        return self.out / file_name(self.domain)

    def prefix(self, split: str) -> str:
        """Prefix of a split's token files, relative to the output folder."""
        return f"{self.folder.name}/{split}{self.shard.suffix}"

    @property
    def note_path(self) -> Path:
        """The `PartNote` of a finished part."""
        return self.folder / f"prepare{self.shard.suffix}.json"

    @property
    def journal_path(self) -> Path:
        """The `Journal` of an unfinished part."""
        return self.folder / f"prepare{self.shard.suffix}.journal"

    @property
    def skipped_path(self) -> Path:
        """What was no document and was passed over, a JSON object a line; not there if there is none."""
        return self.folder / f"skipped{self.shard.suffix}.jsonl"

    @property
    def counts_path(self) -> Path:
        """Occurrences of each token in the two splits, int64 [2, V] in numpy's format."""
        return self.folder / f"counts{self.shard.suffix}.npy"

    def read(self) -> PartNote | None:
        """The note of a finished part whose files still have the sizes noted; None otherwise."""
        note = read_note(PartNote, self.note_path)
        if note is None:
            return None
        try:
            self.load_counts()
            for split in (note.train, note.validation):
                files = IndexedTokens(self.out / split.prefixes[0], verify=False)
                if (files.num_tokens, files.num_documents) != (split.tokens, split.documents):
                    return None
        except (InputError, OSError, EOFError, ValueError):
            return None
        return note

    def load_counts(self) -> np.ndarray:
        """The counts that `save_counts` has written, int64 [2, V].

        Raises:
            OSError, EOFError, ValueError: they cannot be read, or are something else.
        """
        with self.counts_path.open("rb") as file:
            counts = np.load(io.BytesIO(file.read()), allow_pickle=False)
        if counts.dtype != np.int64 or counts.ndim != 2 or len(counts) != len(SPLITS):
            raise ValueError(f"{self.counts_path} holds no counts")
        return counts

    def discard(self, *, files: bool = True) -> None:
        """Removes the note, and with ``files`` the token files too; other jobs' parts stay."""
        (self.out / FILE_NAME).unlink(missing_ok=True)
        self.note_path.unlink(missing_ok=True)
        self.counts_path.unlink(missing_ok=True)
        prefixes = [self.out / self.prefix(split) for split in SPLITS] if files else []
        for path in (*map(idx_path, prefixes), *map(bin_path, prefixes)):
            path.unlink(missing_ok=True)

    def save_counts(self, counts: np.ndarray) -> None:
        """Writes the counts, whole or not at all."""
        data = io.BytesIO()
        np.save(data, counts)
        replace_file(self.counts_path, data.getvalue())


class PartWriter:
    """Writer of a part, new or continued.

    As a context manager that an exception ends, it leaves what the journal has marked for the next call, and otherwise
    nothing.

    Args:
        inputs: All files of the domain.
        shares: What this job reads of them.
        vocab_size: Largest token id + 1.
        journal_bytes: Tokens between two marks, in bytes.

    Attributes:
        mark: The place to read from.
    """

    def __init__(
        self,
        part: Part,
        settings: PrepareSettings,
        inputs: tuple[InputFile, ...],
        shares: list[Share],
        vocab_size: int,
        journal_bytes: int,
    ) -> None:
        self._part, self._settings, self._inputs, self._shares = part, settings, inputs, shares
        self._journal_bytes = journal_bytes
        self.counts = np.zeros((2, vocab_size), np.int64)
        self._journal = Journal(part.journal_path, Header(settings=settings, shard=str(part.shard), inputs=inputs))
        try:
            self._splits = self._open()
        except FileNotFoundError:  # the journal came here without its files
            self.counts[:] = 0
            self._journal.mark = Mark()
            self._splits = self._open()
        self.mark = self._journal.mark
        self._journal.begin()
        self._unsafe_bytes = 0

    def _open(self) -> list[_SplitWriter]:
        mark = self._journal.mark
        self._part.discard(files=mark == Mark())
        cut_back(self._part.skipped_path, mark.skipped_bytes)
        kept = (mark.train, mark.validation)
        return [
            _SplitWriter(self._part.out, self._part.prefix(split), self._settings.dtype, counts, safe)
            for split, counts, safe in zip(SPLITS, self.counts, kept, strict=True)
        ]

    def add(self, encoded: Encoded) -> None:
        """Appends the documents of the next block."""
        train, validation = self._splits
        train.add(encoded.train, lowest=True)
        validation.add(encoded.validation, lowest=False)
        share, block = encoded.position
        done = self._with_skipped(encoded.skipped)
        self.mark = self._mark(
            share,
            block + 1,
            self._shares[share].piece.file + 1,
            file_bytes=done.file_bytes + encoded.file_bytes,
            empty=done.empty + encoded.empty,
        )
        self._unsafe_bytes += encoded.train.tokens.nbytes + encoded.validation.tokens.nbytes
        if self._unsafe_bytes >= self._journal_bytes:
            self._make_safe()

    def _mark(self, share: int, block: int, num_files: int, **done: int) -> Mark:
        train, validation = (split.kept() for split in self._splits)
        place = {"share": share, "block": block, "num_files": num_files}
        return self.mark.model_copy(update={**place, **done, "train": train, "validation": validation})

    def _with_skipped(self, skipped: Sequence[Skipped]) -> Mark:
        """Writes what is no document, and counts it in `mark`."""
        if skipped:
            counts = Counter(self.mark.skipped)
            counts.update(each.reason for each in skipped)
            with open(self._part.skipped_path, "ab") as file:
                file.writelines(each.line() for each in skipped)
                size = file.tell()
            self.mark = self.mark.model_copy(update={"skipped": dict(counts), "skipped_bytes": size})
        return self.mark

    def _make_safe(self) -> None:
        if self.mark.skipped_bytes:
            with open(self._part.skipped_path, "rb") as file:
                os.fsync(file.fileno())
        for split in self._splits:
            split.writer.sync()
        self._journal.add(self.mark)
        self._unsafe_bytes = 0

    def close(self) -> PartNote:
        """Puts the files and the note in place.

        Raises:
            InputError: The whole domain has fewer than two documents.
        """
        if self._part.shard.count == 1:
            num_documents = sum(split.writer.num_documents for split in self._splits)
            check_documents(self._part.domain, num_documents, self.mark.empty, self.mark.skipped)
        self.mark = self._mark(len(self._shares), 0, len(self._inputs))
        self._make_safe()
        train, validation = (split.close() for split in self._splits)
        self._part.save_counts(self.counts)
        note = PartNote(
            settings=self._settings,
            inputs=self._inputs,
            train=train,
            validation=validation,
            empty=self.mark.empty,
            skipped=self.mark.skipped,
            nearest_train=self.mark.train.nearest,
            nearest_validation=self.mark.validation.nearest,
        )
        write_note(note, self._part.note_path)
        self._journal.remove()
        return note

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        safe = self._journal.mark != Mark()
        for split in self._splits:
            if kind is not None and safe:
                split.writer.leave()
            else:
                split.writer.abort()  # of no effect after close
        if kind is not None and not safe:
            self._part.skipped_path.unlink(missing_ok=True)
            self._journal.remove()


def skipped_text(skipped: Mapping[str, int]) -> str:
    """``3 skipped (2 not JSON, 1 no text)``."""
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(skipped.items()))
    return f"{sum(skipped.values()):,} skipped ({reasons})"


class _SplitWriter:
    """Writer of one split of a part."""

    def __init__(self, out: Path, prefix: str, dtype: str, counts: np.ndarray, kept: Kept) -> None:
        self._prefix, self._counts, self._nearest = prefix, counts, kept.nearest
        self.writer = IndexedWriter(out / prefix, dtype, kept=(kept.tokens, kept.documents), seen=self._count)

    def _count(self, tokens: np.ndarray) -> None:
        self._counts += np.bincount(tokens, minlength=len(self._counts))

    def add(self, found: SplitTokens, *, lowest: bool) -> None:
        """Appends documents; ``lowest``: the nearest to the other split has the lowest hash, not the highest."""
        if found.nearest is not None:
            candidate = Nearest(found.nearest.hash, self.writer.num_documents + found.nearest.document)
            nearer = self._nearest is None or (candidate < self._nearest) == lowest
            self._nearest = (candidate.hash, candidate.document) if nearer else self._nearest
        self.writer.add_documents(found.tokens, found.lengths)
        self._count(found.tokens)

    def kept(self) -> Kept:
        """Amount written so far."""
        return Kept(tokens=self.writer.num_tokens, documents=self.writer.num_documents, nearest=self._nearest)

    def close(self) -> SplitEntry:
        """Puts the files in place."""
        return split_entry(self._prefix, self.writer)


def split_entry(prefix: str, writer: IndexedWriter) -> SplitEntry:
    """Puts a writer's files in place; ``prefix`` is relative to the output folder."""
    return SplitEntry.of(prefix, writer.close())


def cut_back(path: Path, size: int) -> None:
    """Takes off what follows the first ``size`` bytes; all of it: the file goes."""
    if not size:
        path.unlink(missing_ok=True)
    elif path.stat().st_size < size:  # raises FileNotFoundError
        raise FileNotFoundError(path)
    else:
        os.truncate(path, size)


def check_documents(name: str, num_documents: int, empty: int, skipped: Mapping[str, int]) -> None:
    """Refuses a domain that cannot have a document in each split."""
    if num_documents < 2:
        parts = [f"{plural(empty, 'document')} without text left out"] if empty else []
        parts += [skipped_text(skipped)] if skipped else []
        left_out = f" ({', '.join(parts)})" if parts else ""
        raise InputError(
            f"domain '{name}' has {num_documents} non-empty documents{left_out}, expected at least 2: one to train on,"
            " one to validate with. Split its text: one document a line of .jsonl, or more .txt files."
        )
