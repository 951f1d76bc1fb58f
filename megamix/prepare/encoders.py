"""Worker processes that turn blocks of text into tokens, in order."""

from __future__ import annotations

import functools
import hashlib
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
from typing import Any, NamedTuple

import numpy as np

from megamix.core.errors import RankFailed
from megamix.data.blend.permute import GOLDEN, mix64
from megamix.data.tokens.tokenizer import LoadedTokenizer
from megamix.prepare.blocks import Block


@dataclass(frozen=True)
class EncodeJob:
    """All that a worker process needs to know."""

    path: str
    """The tokenizer.json."""
    sha256: str
    """Its hash, so that another tokenizer under the same path is another job."""
    eod_id: int
    """Token appended to every document."""
    dtype: str
    """Type of a token."""
    text_key: str
    """Key of the text in a JSON line."""
    domain: str
    """The domain."""
    seed: int
    """See `HeldOut`."""
    validation_fraction: float
    """Share of the documents to hold out."""


class Nearest(NamedTuple):
    """The document that would change sides first."""

    hash: int
    """Its hash; see `HeldOut`."""
    document: int
    """Its number in its split."""


@dataclass(frozen=True)
class SplitTokens:
    """What a block gives to one split."""

    tokens: np.ndarray
    """All documents one after the other, each with its end-of-document token, [sum(lengths)]."""
    lengths: np.ndarray
    """Tokens of each document, int32 [documents]."""
    nearest: Nearest | None
    """Of the training documents that with the lowest hash, of those held out that with the highest."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of one block; empty documents are left out."""

    train: SplitTokens
    """What is trained on."""
    validation: SplitTokens
    """What is held out."""
    text_bytes: int
    """The documents as UTF-8."""
    file_bytes: int
    """See `Block`."""
    position: tuple[int, int]
    """See `Block`."""


_LIVENESS_SECONDS = 2.0
"""How long a result may take before the workers are looked at."""


class Encoders:
    """Worker processes that turn blocks into tokens, in order. With one worker, this process does it.

    Args:
        num_workers: How many.
    """

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
        """The tokens of every block, in the order of the blocks. Only a few blocks are read ahead.

        Raises:
            InputError: A damaged block.
            RankFailed: A worker died.
        """
        if self._pool is None:
            yield from (_encode(job, block) for block in blocks)
            return
        pending: deque[Future[Encoded]] = deque()
        try:
            for block in blocks:
                pending.append(self._pool.submit(_encode, job, block))
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
        """Makes the pool notice a worker that was killed while it was sending a result: the pool goes on reading the
        rest of that result, which nobody will write, from a pipe that its own process keeps open."""
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
    """A worker whose parent is killed would wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


@functools.lru_cache(maxsize=1)
def _encoder_of(path: str, sha256: str, eod_id: int, dtype: str) -> DocumentEncoder:
    return DocumentEncoder(LoadedTokenizer(path, eod_id), dtype)


class DocumentEncoder:
    """Encodes documents, an end-of-document token after each.

    Args:
        tokenizer: The tokenizer.
        dtype: Type of a token.
    """

    def __init__(self, tokenizer: LoadedTokenizer, dtype: str) -> None:
        self._tokenizer, self._dtype = tokenizer, np.dtype(dtype)
        self._words = tokenizer.word_encoder(dtype)
        self._eod = np.array([tokenizer.eod_id], self._dtype).tobytes()

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all texts one after the other, and how many each has, int64 [texts]; 0 for one without any."""
        if self._words is not None:
            parts = self._words.encode(texts)
        else:
            parts = [np.array(ids, self._dtype).tobytes() for ids in self._tokenizer.encode_batch(texts)]
        sizes = np.fromiter(map(len, parts), np.int64, len(parts)) // self._dtype.itemsize
        tokens = np.frombuffer(b"".join(part + self._eod for part in parts if part), self._dtype)
        return tokens, sizes + (sizes > 0)


def _encode(job: EncodeJob, block: Block) -> Encoded:
    documents = block.documents(job.text_key)
    held = [number for number, text in enumerate(documents.texts) if text and not text.isspace()]
    texts = [documents.texts[number] for number in held]
    tokens, lengths = _encoder_of(job.path, job.sha256, job.eod_id, job.dtype)(texts)
    places = documents.places[held][lengths > 0]
    lengths = lengths[lengths > 0]
    held_out = HeldOut(job.domain, job.seed, job.validation_fraction)
    hashes = held_out.hashes(block.file, places)
    mask = held_out.take(hashes, first=block.file == 0 and block.start == 0)
    return Encoded(
        train=_split(tokens, lengths, hashes, ~mask, np.argmin),
        validation=_split(tokens, lengths, hashes, mask, np.argmax),
        text_bytes=sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts),
        file_bytes=block.file_bytes,
        position=block.position,
    )


def _split(tokens: np.ndarray, lengths: np.ndarray, hashes: np.ndarray, mask: np.ndarray, pick: Any) -> SplitTokens:
    nearest = None
    if mask.any():
        number = int(pick(hashes[mask]))
        nearest = Nearest(int(hashes[mask][number]), number)
    chosen = tokens if mask.all() else tokens[np.repeat(mask, lengths)]
    return SplitTokens(chosen, lengths[mask].astype(np.int32), nearest)


class HeldOut:
    """The choice for one domain.

    Args:
        name: The domain.
        seed: Another seed chooses other documents.
        fraction: Share of the documents to hold out, 0 to 0.5. At 0 it is the first document of the first block, if
            that has one, so that the domain need not be gone through again for a single document.
    """

    def __init__(self, name: str, seed: int, fraction: float) -> None:
        self._name, self._seed = name, seed
        self._limit = np.uint64(fraction * 2.0**64)

    def hashes(self, file: int, places: np.ndarray) -> np.ndarray:
        """A number for each document, uniform over uint64 [documents].

        Args:
            file: Number of their file in the domain.
            places: Where they begin in it; see `Documents`.
        """
        key = hashlib.blake2b(f"{self._seed}/{self._name}/{file}".encode(), digest_size=8).digest()
        # Outputs of SplitMix64, started at the key, of these numbers.
        return mix64((places.astype(np.uint64) + np.uint64(1)) * GOLDEN + np.uint64(int.from_bytes(key, "little")))

    def take(self, hashes: np.ndarray, *, first: bool) -> np.ndarray:
        """Whether each document is held out, bool [documents]; ``first``: they are the domain's first block."""
        mask = hashes < self._limit
        if first and not self._limit:
            mask[:1] = True
        return mask
