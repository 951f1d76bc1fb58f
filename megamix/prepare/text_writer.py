"""Tokens of texts that another program reads: datatrove, Spark, Ray, or a loop of one's own.

Each task of that program writes one shard; `merge` then makes a data set of all, as of the shards of `prepare`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamix.core.errors import InputError, check_known, given_twice
from megamix.core.files import replace_file
from megamix.core.processes import allow_more_files
from megamix.data.domain_names import check_domain_name
from megamix.data.tokens.indexed import pick_dtype
from megamix.data.tokens.manifest import FILE_NAME, TOKENIZER_FILE
from megamix.data.tokens.tokenizer import LoadedTokenizer, given_tokenizer
from megamix.prepare.blocks import TEXT_KEY, Block
from megamix.prepare.columns import MAX_ROWS
from megamix.prepare.done_notes import PrepareSettings, ShardNote, write_note
from megamix.prepare.encoders import EncodeJob, encode_block
from megamix.prepare.merge import shard_note_path
from megamix.prepare.output_folder import sole_writer, writing_to
from megamix.prepare.parts import Part, PartWriter
from megamix.prepare.pieces import BLOCK_BYTES, Piece
from megamix.prepare.shards import Shard, Share

_NO_MARKS = 1 << 62
_HELD_BYTES = 256 << 20  # of texts of all domains


@dataclass(frozen=True)
class TextWriter:
    """Writer of shards. Small to pickle; every task makes or gets the same one.

    As a step of datatrove it is the last callable of a pipeline: the task of rank r writes shard r + 1.

    Attributes:
        out: Output folder, which all tasks share.
        domains: Names of all domains, also of those of which a task has no text. With one, all texts are its own;
            otherwise a document of datatrove has its domain in ``metadata["domain"]``.
        tokenizer: A tokenizer.json or ``hf:NAME``.
        eod: Its end-of-document token, where it has an unusual name.
        validation_fraction, seed, keep_empty: As of `prepare`.
    """

    out: str | Path
    domains: Sequence[str]
    tokenizer: str
    eod: str | None = None
    validation_fraction: float = 0.02
    seed: int = 1234
    keep_empty: bool = False

    def write(self, documents: Iterable[tuple[str, str]], shard: str) -> int:
        """Writes a shard, new or in place of one that a task which failed has left.

        Which documents are held out depends on the seed, the shard and their order.

        Args:
            documents: Domain and text of each, in any order. Memory: 256 MiB of texts.
            shard: ``i/n``, i from 1; n is the number of tasks.

        Returns:
            The number of documents with text.

        Raises:
            InputError: A bad option, an unknown domain, half of a character in a text, or another task that is writing
                the same shard.
        """
        job, out = Shard.parse(shard), Path(self.out)
        if job.count < 2:
            raise InputError(f"shard '{shard}': expected at least two, for `megamix merge`. Divide the texts into 2.")
        if not 0 <= self.validation_fraction <= 0.5:
            raise InputError(f"validation fraction {self.validation_fraction}: expected 0 to 0.5, for example 0.02.")
        for name in self.domains:
            check_domain_name(name, "domains")
        if doubled := given_twice(self.domains):
            raise InputError(f"two domains are called '{doubled[0]}'. Name each once.")
        with writing_to(out):
            out.mkdir(parents=True, exist_ok=True)
            with sole_writer(out, job):
                shard_note_path(out, job).unlink(missing_ok=True)
                loaded = self._tokenizer(out, job)
                settings = self._settings(loaded)
                shard_writer = _Shard(out, job, settings, loaded.vocab_size, sorted(self.domains))
                number = shard_writer.write(documents)
                write_note(ShardNote(settings=settings, domains=tuple(sorted(self.domains))), shard_note_path(out, job))
        return number

    def __call__(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """A task of datatrove: writes its documents and passes nothing on."""
        self.write(((self._domain_of(each), each.text) for each in data or ()), f"{rank + 1}/{world_size}")
        return iter(())

    def _domain_of(self, document: Any) -> str:
        return self.domains[0] if len(self.domains) == 1 else str(document.metadata.get("domain"))

    def _tokenizer(self, out: Path, job: Shard) -> LoadedTokenizer:
        data, loaded = given_tokenizer(self.tokenizer, self.eod)
        path = out / TOKENIZER_FILE
        if not path.is_file():
            copy = out / f"tokenizer{job.suffix}.json"  # tasks that begin together write the same
            replace_file(copy, data)
            copy.replace(path)
        kept = LoadedTokenizer(path, loaded.eod_id)
        kept.expect(loaded.sha256)
        (out / FILE_NAME).unlink(missing_ok=True)
        return kept

    def _settings(self, loaded: LoadedTokenizer) -> PrepareSettings:
        return PrepareSettings(
            seed=self.seed,
            validation_fraction=self.validation_fraction,
            text_key=TEXT_KEY,
            tokenizer_sha256=loaded.sha256,
            eod_id=loaded.eod_id,
            dtype=pick_dtype(loaded.vocab_size).name,
            block_bytes=BLOCK_BYTES,
            keep_empty=self.keep_empty,
        )


class _Shard:
    """One task's parts of all domains."""

    def __init__(self, out: Path, job: Shard, settings: PrepareSettings, vocab_size: int, names: Sequence[str]) -> None:
        self._out, self._job, self._settings, self._vocab_size, self._names = out, job, settings, vocab_size, names
        self._held: dict[str, list[str]] = {name: [] for name in names}
        self._sizes = dict.fromkeys(names, 0)
        self._places = dict.fromkeys(names, 0)

    def write(self, documents: Iterable[tuple[str, str]]) -> int:
        allow_more_files()  # four for each domain
        parts = {name: Part(self._out, name, self._job) for name in self._names}
        writers: dict[str, PartWriter] = {}
        try:
            for name, part in parts.items():
                part.folder.mkdir(exist_ok=True)
                part.discard()
                part.journal_path.unlink(missing_ok=True)
                shares = [Share(Piece(f"the texts of '{name}'", 0, 0))]
                writers[name] = PartWriter(part, self._settings, (), shares, self._vocab_size, _NO_MARKS)
            for name, text in documents:
                if name not in writers:
                    check_known([name], self._names, "a text is of the domain")
                self._held[name].append(text)
                self._sizes[name] += len(text)
                if self._sizes[name] >= BLOCK_BYTES or len(self._held[name]) == MAX_ROWS:
                    self._encode(name, writers[name])
                elif sum(self._sizes.values()) > _HELD_BYTES:
                    largest = max(self._sizes, key=lambda each: self._sizes[each])
                    self._encode(largest, writers[largest])
            for name, writer in writers.items():
                self._encode(name, writer)
            notes = [writer.close() for writer in writers.values()]
        except BaseException as error:
            for writer in writers.values():
                writer.__exit__(type(error), error, None)
            raise
        return sum(note.train.documents + note.validation.documents for note in notes)

    def _encode(self, name: str, writer: PartWriter) -> None:
        if not self._held[name]:
            return
        texts = [text.encode("utf-8", "surrogatepass") for text in self._held[name]]  # refused by the block
        first = self._places[name]
        job = EncodeJob.of(self._settings, self._out / TOKENIZER_FILE, name, self._settings.text_key)
        writer.add(
            encode_block(
                job,
                Block(
                    path=f"the texts of '{name}'",
                    file=self._job.number - 1,
                    position=(0, writer.mark.block),
                    start=first,
                    stop=first + len(texts),
                    file_bytes=0,
                    kind="rows",
                    data=b"".join(texts),
                    row_bytes=np.array(list(map(len, texts)), np.int64),
                ),
            )
        )
        self._places[name] += len(texts)
        self._held[name], self._sizes[name] = [], 0
