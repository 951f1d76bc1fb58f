"""Batches of tokens, labels and domain ids, read in the background while the step before trains.

Legend: M micro-batches, B samples in one, S tokens in a sample, K domains.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.data.blend.rest import Rest
from megamix.data.cut_samples import CutSamples
from megamix.data.reference_losses import ReferenceLosses
from megamix.data.sampler import Sampler, StepSamples
from megamix.data.tokens.stream import DomainTokens

IGNORED_LABEL = -100
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step.

    Attributes:
        tokens, labels: int64 [M, B, S]; a label is the token that follows, or ``IGNORED_LABEL``.
        domains: int32 [M, B, S], the domain of every label.
        domain_tokens: int64 [K], labels of each domain that count in the step's loss over the whole world; known
            before any forward pass.
        positions: int64 [M, B, S], position of every token in its document; None if positions count in the sample.
        reference: float32 [M, B, S], a reference model's loss of every label in nats; None without a reference.
        samples: source of the rows; None for validation data.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    domains: torch.Tensor
    domain_tokens: Ints
    positions: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    samples: StepSamples | None = None

    @property
    def num_tokens(self) -> int:
        """Labels that count, over all domains."""
        return int(self.domain_tokens.sum())

    @property
    def targets(self) -> tuple[torch.Tensor, ...]:
        """Inputs of the loss besides logits, [M, B, S] each: labels, domains and, if present, reference."""
        known = (self.labels, self.domains)
        return known if self.reference is None else (*known, self.reference)

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; from pinned memory without waiting for the copy."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            tokens=move(self.tokens),
            labels=move(self.labels),
            domains=move(self.domains),
            positions=None if self.positions is None else move(self.positions),
            reference=None if self.reference is None else move(self.reference),
        )


class WindowReader:
    """Reads samples of several domains into batches and checks every token id against the vocabulary.

    Args:
        eod_mask_loss: a label that is a document's first token becomes ``IGNORED_LABEL``.
        reset_position_ids: batches have ``positions``, which restart at 0 with every document in a sample.
        reference: source of the batches' ``reference``.
        rests: of domains of which some samples are no windows, see `Blend`.
    """

    def __init__(
        self,
        domains: Sequence[DomainTokens],
        seq_length: int,
        vocab_size: int,
        *,
        eod_mask_loss: bool = False,
        reset_position_ids: bool = False,
        reference: ReferenceLosses | None = None,
        rests: Mapping[int, Rest] | None = None,
    ) -> None:
        self._domains = domains
        self._cut = CutSamples(domains, seq_length, rests or {})
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        self._eod_mask_loss = eod_mask_loss
        self._reset_position_ids = reset_position_ids
        self._reference = reference
        self._dtype = np.result_type(*(domain.dtype for domain in domains))

    def read(self, domain_n: Ints, sample_n: Ints) -> np.ndarray:
        """The tokens of each sample and the one that follows it, [n, S + 1] in the dtype of the files.

        Raises:
            InputError: a token id outside the vocabulary, with its domain and sample.
        """
        window_nt = np.empty((domain_n.size, self._seq_length + 1), self._dtype)
        # Faster than a gather of all rows of a domain at once from 4096 tokens on, and 20 % slower at 1024.
        for row_t, domain, sample in zip(window_nt, domain_n.tolist(), sample_n.tolist(), strict=True):
            if self._cut.is_cut(domain, sample):
                self._cut.read(domain, sample, row_t)
            else:
                self._domains[domain].read_window(sample, row_t)
        if window_nt.size and (window_nt.max() >= self._vocab_size or window_nt.min() < 0):
            self._refuse(window_nt, domain_n, sample_n)
        return window_nt

    def document_starts(self, domain_n: Ints, sample_n: Ints) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        """Where positions in documents begin: row in ``domain_n`` and place in the sample, 0 to S, int64 [m] each,
        ascending; and for each whether the label before it is a document's first token, bool [m]."""
        rows, tokens, firsts = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.bool_)]
        for domain in np.unique(domain_n).tolist():
            row_n = np.flatnonzero(domain_n == domain)
            is_cut_n = np.array([self._cut.is_cut(domain, sample) for sample in sample_n[row_n].tolist()], np.bool_)
            for row in row_n[is_cut_n].tolist():
                token_m, is_first_m = self._cut.starts(domain, int(sample_n[row]))
                rows.append(np.full(token_m.size, row))
                tokens.append(token_m)
                firsts.append(is_first_m)
            row_n = row_n[~is_cut_n]
            row_m, token_m = self._domains[domain].document_starts(sample_n[row_n], self._seq_length)
            rows.append(row_n[row_m])
            tokens.append(token_m)
            firsts.append(token_m > 0)  # token 0 of a window is no label
        row_m, token_m, is_first_m = np.concatenate(rows), np.concatenate(tokens), np.concatenate(firsts)
        order_m = np.argsort(row_m, kind="stable")
        return row_m[order_m], token_m[order_m], is_first_m[order_m]

    def batch(
        self, domain_n: Ints, sample_n: Ints, mine: Ints, shape: tuple[int, int], *, pin_memory: bool = False
    ) -> Batch:
        """One rank's part of the samples of all ranks.

        Args:
            domain_n, sample_n: int64 [n], the samples of all ranks, whose labels ``domain_tokens`` counts. The other
                ranks' tokens are not read: the index files say where documents begin.
            mine: int64 [M * B], places of this rank's samples, in order.
            shape: [M, B].
            pin_memory: pins the tensors. torch's cache reuses their memory for later batches, once copies are done, so
                nothing is allocated after the first steps.
        """
        window_nt = self.read(domain_n[mine], sample_n[mine])
        whole = (*shape, self._seq_length)

        def tensor(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            made = torch.empty(whole, dtype=dtype, pin_memory=pin_memory)
            made.view(-1, self._seq_length).numpy()[:] = values
            return made

        tokens, labels = tensor(window_nt[:, :-1], torch.int64), tensor(window_nt[:, 1:], torch.int64)
        if self._cut.rests:
            self._set_joints(labels.view(-1, self._seq_length).numpy(), domain_n[mine], sample_n[mine])
        domains = tensor(domain_n[mine][:, None], torch.int32)
        domain_tokens = np.bincount(domain_n, minlength=len(self._domains)) * self._seq_length
        positions = None
        if self._eod_mask_loss or self._reset_position_ids:
            row_m, token_m, is_first_m = self.document_starts(domain_n, sample_n)
            own_m, place_m = _rows_of(mine, row_m)
            own_token_m = token_m[place_m]
            if self._eod_mask_loss:
                masked_m = row_m[is_first_m]
                domain_tokens -= np.bincount(domain_n[masked_m], minlength=len(self._domains))
                is_label_m = is_first_m[place_m]
                label_ns = labels.view(-1, self._seq_length).numpy()
                label_ns[own_m[is_label_m], own_token_m[is_label_m] - 1] = IGNORED_LABEL
            if self._reset_position_ids:
                positions = tensor(np.array(1), torch.int64)
                count_positions(positions.view(-1, self._seq_length).numpy(), own_m, own_token_m)
        reference = None
        if self._reference is not None:
            reference = tensor(np.array(0.0), torch.float32)
            loss_ns = reference.view(-1, self._seq_length).numpy()
            for loss_s, row in zip(loss_ns, mine.tolist(), strict=True):
                self._reference.read_window(int(domain_n[row]), int(sample_n[row]), loss_s)
        return Batch(tokens, labels, domains, domain_tokens, positions, reference)

    def _set_joints(self, label_ns: np.ndarray, domain_n: Ints, sample_n: Ints) -> None:
        """Sets the labels that are not the sample's next token; see `CutSamples`."""
        for label_s, domain, sample in zip(label_ns, domain_n.tolist(), sample_n.tolist(), strict=True):
            if self._cut.is_cut(domain, sample):
                for place, label in self._cut.joints(domain, sample):
                    if not 0 <= label < self._vocab_size:
                        raise self._refusal(domain, sample, label)
                    label_s[place] = label

    def _refuse(self, window_nt: np.ndarray, domain_n: Ints, sample_n: Ints) -> None:
        row, column = np.argwhere((window_nt >= self._vocab_size) | (window_nt < 0))[0]
        raise self._refusal(int(domain_n[row]), int(sample_n[row]), int(window_nt[row, column]))

    def _refusal(self, domain: int, sample: int, token: int) -> InputError:
        return InputError(
            f"domain '{self._domains[domain].name}', sample {sample}: token id {token} is outside the model's vocabulary of "
            f"{self._vocab_size}. The data was prepared with another tokenizer, or the model's vocab_size is too small."
        )


def _rows_of(mine: Ints, row_m: Ints) -> tuple[Ints, Ints]:
    """The entries of ``row_m``, int64 [m] and ascending, whose row is in ``mine``: the index in ``mine``, and the place
    in ``row_m``; ``mine`` may hold rows in any order and more than once."""
    first_n, end_n = np.searchsorted(row_m, mine), np.searchsorted(row_m, mine, side="right")
    count_n = end_n - first_n
    place = np.arange(count_n.sum()) + np.repeat(end_n - np.cumsum(count_n), count_n)
    return np.repeat(np.arange(mine.size), count_n), place


def count_positions(position_ns: Ints, row_m: Ints, token_m: Ints) -> None:
    """Turns int64 [n, S] of ones into positions that begin at 0 with every row and, in it, with every document.

    Args:
        row_m, token_m: starts of documents, ascending; may hold token S, which is only a label.
    """
    num_rows, seq_length = position_ns.shape
    inside_m = token_m < seq_length
    flat = position_ns.reshape(-1)
    starts = np.union1d(row_m[inside_m] * seq_length + token_m[inside_m], np.arange(num_rows) * seq_length)
    # Positions are cumulative sums: a start subtracts what the tokens since the previous start have added.
    flat[starts] = 1 - np.diff(starts, prepend=-1)
    np.cumsum(flat, out=flat)


class Loader:
    """Prefetches steps of training data.

    The train loop calls `request` for each step in turn, some steps ahead, and `get` for the oldest one.

    Args:
        reader: None on a rank that needs no tokens; its sampler advances all the same.
    """

    def __init__(self, sampler: Sampler, reader: WindowReader | None, pin_memory: bool) -> None:
        self._sampler = sampler
        self._reader = reader
        self._pin_memory = pin_memory
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._waiting: deque[Future[Batch | None]] = deque()
        self._failure: Exception | None = None

    def request(self, settle: Callable[[], None] | None = None) -> None:
        """Starts reading the next step in the background, after ``settle`` has waited for its weights."""
        self._waiting.append(self._executor.submit(self._load, settle))

    def get(self) -> tuple[Batch | None, float]:
        """The oldest requested step (None without a reader), and the seconds this call waited for it.

        Raises:
            Exception: the failure of this step or of an earlier one: none is skipped.
        """
        started = time.perf_counter()
        batch = self._waiting.popleft().result()
        return batch, time.perf_counter() - started

    def close(self) -> None:
        """Abandons requests in progress, without waiting for them."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _load(self, settle: Callable[[], None] | None) -> Batch | None:
        if self._failure is not None:
            raise self._failure
        try:
            if settle is not None:
                settle()
            return self._read(self._sampler.deal())
        except Exception as error:
            self._failure = error
            raise

    def _read(self, samples: StepSamples) -> Batch | None:
        if self._reader is None:
            return None
        mine = np.arange(samples.all_domain.size)[self._sampler.share_of(samples.step).samples]
        shape = samples.domain.shape
        batch = self._reader.batch(
            samples.all_domain, samples.all_sample, mine, (shape[0], shape[1]), pin_memory=self._pin_memory
        )
        return replace(batch, samples=samples)
