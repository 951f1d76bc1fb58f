"""Worker processes that turn blocks of text into tokens, in order."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megamix.core.errors import RankFailed
from megamix.data.blend.permute import GOLDEN, mix64
from megamix.data.tokens.tokenizer import LoadedTokenizer
from megamix.prepare.blocks import Block
from megamix.prepare.done_notes import PrepareSettings


@dataclass(frozen=True)
class EncodeJob:
    """Options of the worker processes for one domain."""

    path: str
    """The tokenizer.json."""
    sha256: str
    """Hash of the tokenizer: another one under the same path is loaded anew."""
    eod_id: int
    """Token appended to every document."""
    dtype: str
    """Token type."""
    text_key: str
    """Key of the text in a JSON line."""
    domain: str
    seed: int
    validation_fraction: float
    """Share of the documents to hold out; see `HeldOut`."""
    keep_empty: bool
    """Keep documents without text, as Megatron does."""
    skip_bad: bool
    """Pass over what is no document."""

    @classmethod
    def of(cls, settings: PrepareSettings, tokenizer: Path, domain: str, text_key: str) -> EncodeJob:
        """The options of ``settings`` for one domain, with the tokenizer.json of the output."""
        return cls(
            path=str(tokenizer),
            sha256=settings.tokenizer_sha256,
            eod_id=settings.eod_id,
            dtype=settings.dtype,
            text_key=text_key,
            domain=domain,
            seed=settings.seed,
            validation_fraction=settings.validation_fraction,
            keep_empty=settings.keep_empty,
            skip_bad=settings.skip_bad,
        )


class Nearest(NamedTuple):
    """The document of a split that would move to the other split first."""

    hash: int
    """See `HeldOut`."""
    document: int
    """Number in the split."""


@dataclass(frozen=True)
class SplitTokens:
    """Tokens of a block that belong to one split."""

    tokens: np.ndarray
    """Concatenated documents, each with its end-of-document token, [sum(lengths)]."""
    lengths: np.ndarray
    """Tokens of each document, int32 [documents]; 0 for an empty one that is kept."""
    nearest: Nearest | None
    """The training document with tokens that has the lowest hash, or the held-out document with the highest."""


@dataclass(frozen=True)
class Skipped:
    """A line of skipped.jsonl: what is no document, and why.

    Attributes:
        place: the byte of the decompressed file, or the row, counted from 1.
    """

    path: str
    place: int
    is_row: bool
    reason: str
    message: str

    def line(self) -> bytes:
        at = {"file": self.path, "row" if self.is_row else "byte": self.place}
        return json.dumps({**at, "reason": self.reason, "message": self.message}, ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True)
class Encoded:
    """The tokens of one block."""

    train: SplitTokens
    validation: SplitTokens
    empty: int
    """Documents without text that are left out."""
    skipped: tuple[Skipped, ...]
    """What is no document."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    file_bytes: int
    """See `Block`, as ``position``."""
    position: tuple[int, int]


_LIVENESS_SECONDS = 2.0  # between checks for dead workers while a result is awaited


class Encoders:
    """Worker processes that turn blocks into tokens, in order. With one worker, this process encodes."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None
        if num_workers > 1:
            # Not fork: this process may hold threads and an accelerator.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self._pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, job: EncodeJob, blocks: Iterable[Block]) -> Iterator[Encoded]:
        """Yields the tokens of every block, in order. Only a few blocks are read ahead.

        Raises:
            InputError: A damaged block.
            RankFailed: A worker died.
        """
        if self._pool is None:
            yield from (encode_block(job, block) for block in blocks)
            return
        pending: deque[Future[Encoded]] = deque()
        try:
            for block in blocks:
                pending.append(self._pool.submit(encode_block, job, block))
                if len(pending) > 2 * self._num_workers:
                    yield self._result(pending.popleft())
            while pending:
                yield self._result(pending.popleft())
        except BrokenProcessPool as error:
            raise RankFailed(
                f"one of the {self._num_workers} tokenising processes died: killed, or out of memory. Call"
                " prepare again to go on from the last safe point, with fewer workers if memory is short."
            ) from error

    def _result(self, future: Future[Encoded]) -> Encoded:
        while True:
            try:
                return future.result(timeout=_LIVENESS_SECONDS)
            except TimeoutError:
                self._break_if_a_worker_died()

    def _break_if_a_worker_died(self) -> None:
        """Breaks the pool if a worker was killed while sending a result: the pool would wait for the rest of the result
        for ever, since this process holds the pipe open."""
        assert self._pool is not None
        processes = list((self._pool._processes or {}).values())
        if any(process.exitcode is not None for process in processes):
            for process in processes:
                process.kill()
            queue: Any = self._pool._result_queue  # pyright: ignore[reportAttributeAccessIssue]
            queue._writer.close()


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one of as many processes as there are cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends the worker with its parent; it would wait for the next task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


@functools.lru_cache(maxsize=1)
def _encoder_of(path: str, sha256: str, eod_id: int, dtype: str) -> DocumentEncoder:
    return DocumentEncoder(LoadedTokenizer(path, eod_id), dtype)


class DocumentEncoder:
    """Encodes documents, an end-of-document token after each."""

    def __init__(self, tokenizer: LoadedTokenizer, dtype: str) -> None:
        self._tokenizer, self._dtype = tokenizer, np.dtype(dtype)
        self._words = tokenizer.word_encoder(dtype)
        self._eod = np.array([tokenizer.eod_id], self._dtype).tobytes()

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The concatenated tokens of all texts, and the number of each, int64 [texts]; 0 for an empty text."""
        if self._words is not None:
            parts = self._words.encode(texts)
        else:
            parts = [np.array(ids, self._dtype).tobytes() for ids in self._tokenizer.encode_batch(texts)]
        sizes = np.fromiter(map(len, parts), np.int64, len(parts)) // self._dtype.itemsize
        tokens = np.frombuffer(b"".join(part + self._eod for part in parts if part), self._dtype)
        return tokens, sizes + (sizes > 0)


def encode_block(job: EncodeJob, block: Block) -> Encoded:
    """The tokens of a block.

    Raises:
        InputError: A document that is none, unless the job passes over these; or text that the tokenizer cannot cut.
    """
    documents = block.documents(job.text_key, skip_bad=job.skip_bad)
    keep = job.keep_empty
    held = [number for number, text in enumerate(documents.texts) if keep or (text and not text.isspace())]
    texts = [documents.texts[number] for number in held]
    tokens, lengths = _encoder_of(job.path, job.sha256, job.eod_id, job.dtype)(texts)
    kept = np.full(len(lengths), True) if keep else lengths > 0
    places, lengths = documents.places[held][kept], lengths[kept]
    is_row = block.row_bytes is not None
    held_out = HeldOut(job.domain, job.seed, job.validation_fraction)
    hashes = held_out.hashes(block.file, places)
    mask = held_out.take(hashes, first=block.file == 0 and block.start == 0)
    return Encoded(
        train=_split(tokens, lengths, hashes, ~mask, np.argmin),
        validation=_split(tokens, lengths, hashes, mask, np.argmax),
        empty=len(documents.texts) - len(lengths),
        skipped=tuple(
            Skipped(block.path, bad.place + is_row, is_row, bad.reason, bad.message) for bad in documents.bad
        ),
        text_bytes=sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts),
        file_bytes=block.file_bytes,
        position=block.position,
    )


def _split(tokens: np.ndarray, lengths: np.ndarray, hashes: np.ndarray, mask: np.ndarray, pick: Any) -> SplitTokens:
    nearest = None
    filled = np.flatnonzero(lengths[mask])
    if filled.size:
        number = int(filled[pick(hashes[mask][filled])])
        nearest = Nearest(int(hashes[mask][number]), number)
    chosen = tokens if mask.all() else tokens[np.repeat(mask, lengths)]
    return SplitTokens(chosen, lengths[mask].astype(np.int32), nearest)


class HeldOut:
    """Choice of the documents of one domain to hold out.

    Args:
        fraction: Share of the documents, 0 to 0.5. 0 holds out the first document of the first block, if it has one, so
            that no second pass over the domain is needed for a single document.
    """

    def __init__(self, name: str, seed: int, fraction: float) -> None:
        self._name, self._seed = name, seed
        self._limit = np.uint64(fraction * 2.0**64)

    def hashes(self, file: int, places: np.ndarray) -> np.ndarray:
        """A hash per document, uniform over uint64 [documents].

        Args:
            file: Number of the file in the domain.
            places: See `Documents`.
        """
        key = hashlib.blake2b(f"{self._seed}/{self._name}/{file}".encode(), digest_size=8).digest()
        # Outputs of SplitMix64, started at the key, of these numbers.
        return mix64((places.astype(np.uint64) + np.uint64(1)) * GOLDEN + np.uint64(int.from_bytes(key, "little")))

    def take(self, hashes: np.ndarray, *, first: bool) -> np.ndarray:
        """Whether each document is held out, bool [documents]; ``first`` marks the domain's first block."""
        mask = hashes < self._limit
        if first and not self._limit:
            mask[:1] = True
        return mask
