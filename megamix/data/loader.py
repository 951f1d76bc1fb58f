"""Tokens, labels and domain ids of a step, read in the background while the step before it trains.

Legend: M micro-batches, B samples in one, S tokens in a sample.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megamix.data.sampler import Sampler, StepSamples
from megamix.data.stream import DomainTokens
from megamix.errors import InputError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step.

    Attributes:
        tokens, labels: int64 [M, B, S]; a label is the token that follows, or ``IGNORED_LABEL``.
        domains: int32 [M, B, S], the domain of every label.
        num_tokens: labels that count in the step's loss over the whole world; known here, before any forward pass.
        samples: where the rows came from; None for validation data.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    domains: torch.Tensor
    num_tokens: int
    samples: StepSamples | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; from pinned memory without waiting for the copy."""
        tokens, labels, domains = (t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.domains))
        return Batch(tokens, labels, domains, self.num_tokens, self.samples)


class WindowReader:
    """Reads samples of several domains into one array and checks every token id against the vocabulary."""

    def __init__(self, domains: Sequence[DomainTokens], seq_length: int, vocab_size: int) -> None:
        self._domains = domains
        self._seq_length = seq_length
        self._vocab_size = vocab_size

    def read(self, domain_n: NDArray[np.int64], sample_n: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n, S + 1]: the tokens of each sample and the one that follows it.

        Raises:
            InputError: a token id outside the vocabulary, with its domain and sample.
        """
        window_nt = np.empty((domain_n.size, self._seq_length + 1), np.int64)
        for row, (domain, sample) in enumerate(zip(domain_n.tolist(), sample_n.tolist(), strict=True)):
            window_nt[row] = self._domains[domain].window(sample, self._seq_length)
        if window_nt.size and (window_nt.max() >= self._vocab_size or window_nt.min() < 0):
            self._refuse(window_nt, domain_n, sample_n)
        return window_nt

    def _refuse(self, window_nt: NDArray[np.int64], domain_n: NDArray[np.int64], sample_n: NDArray[np.int64]) -> None:
        row, column = np.argwhere((window_nt >= self._vocab_size) | (window_nt < 0))[0]
        raise InputError(
            f"domain '{self._domains[int(domain_n[row])].name}', sample {sample_n[row]}: token id {window_nt[row, column]} is outside the model's "
            f"vocabulary of {self._vocab_size}. The data was prepared with another tokenizer, or the model's vocab_size is too small."
        )


class Loader:
    """Prefetches steps of training data.

    The train loop calls `request` for each step in turn, some steps ahead, and `get` when it wants the oldest one.

    Args:
        reader: None on a rank that needs no tokens; steps are dealt there all the same, so that every rank's sampler
            stays in step.
    """

    def __init__(self, sampler: Sampler, reader: WindowReader | None, seq_length: int, pin_memory: bool) -> None:
        self._sampler = sampler
        self._reader = reader
        self._seq_length = seq_length
        self._pin_memory = pin_memory
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._waiting: deque[Future[Batch | None]] = deque()

    def request(self, settle: Callable[[], None] | None = None) -> None:
        """Starts reading the next step; first, in the background, ``settle`` waits until its weights are known."""
        self._waiting.append(self._executor.submit(self._load, settle))

    def get(self) -> tuple[Batch | None, float]:
        """The oldest requested step (None without a reader), and the seconds this call waited for it."""
        started = time.perf_counter()
        batch = self._waiting.popleft().result()
        return batch, time.perf_counter() - started

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _load(self, settle: Callable[[], None] | None) -> Batch | None:
        if settle is not None:
            settle()
        samples = self._sampler.deal()
        if self._reader is None:
            return None
        window_nt = self._reader.read(samples.domain.ravel(), samples.sample.ravel())
        shape = (*samples.domain.shape, self._seq_length)
        tokens, labels, domains = batch_arrays(window_nt, samples.domain.ravel(), shape)
        if self._pin_memory:
            tokens, labels, domains = tokens.pin_memory(), labels.pin_memory(), domains.pin_memory()
        return Batch(tokens, labels, domains, self._sampler.share.global_batch * self._seq_length, samples)


def batch_arrays(
    window_nt: NDArray[np.int64], domain_n: NDArray[np.int64], shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels (int64) and per-token domain ids (int32), each of ``shape`` [M, B, S], from windows [n, S + 1]."""
    tokens = torch.from_numpy(np.ascontiguousarray(window_nt[:, :-1])).view(shape)
    labels = torch.from_numpy(np.ascontiguousarray(window_nt[:, 1:])).view(shape)
    domains = torch.from_numpy(np.repeat(domain_n.astype(np.int32), shape[-1])).view(shape)
    return tokens, labels, domains
