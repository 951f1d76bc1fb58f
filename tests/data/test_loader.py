"""Batches of tokens: the windows that the sampler named, labels one token on, errors that reach the training thread."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megamix.core.errors import InputError, MegamixError
from megamix.data.blend.blend import Blend
from megamix.data.loader import Loader, WindowReader
from megamix.data.reference_losses import ReferenceLosses
from megamix.data.sampler import Sampler, Slice
from megamix.data.tokens.stream import DomainTokens
from megamix.data.tokens.writer import IndexedWriter

SEQ = 8
VOCAB = 500
BATCH, MICRO = 12, 3


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[DomainTokens]:
    """Three domains of random tokens, the last in two files; a window may cross files and documents."""
    folder, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    found = []
    for name, files in (("web", [300]), ("code", [90]), ("mail", [41, 60])):
        prefixes = [folder / f"{name}{number}" for number in range(len(files))]
        for prefix, size in zip(prefixes, files, strict=True):
            with IndexedWriter(prefix, "uint16") as writer:
                for piece in np.array_split(rng.integers(0, VOCAB, size), 5):
                    writer.add_document(piece)
        found.append(DomainTokens(name, prefixes))
    return found


def make_sampler(domains: list[DomainTokens], rank: int = 0, data_size: int = 2) -> Sampler:
    sizes = [domain.num_windows(SEQ) for domain in domains]
    return Sampler(Blend(sizes, [0.5, 0.2, 0.3], seed=1), Slice(BATCH, MICRO, rank, data_size))


def make_loader(domains: list[DomainTokens], sampler: Sampler, vocab_size: int = VOCAB) -> Loader:
    return Loader(sampler, WindowReader(domains, SEQ, vocab_size), pin_memory=False)


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_are_the_windows_of_the_samples(domains: list[DomainTokens], rank: int) -> None:
    """Every row against a read of its own, in the order of an independent sampler, requested three steps ahead."""
    expected = make_sampler(domains, rank)
    loader = make_loader(domains, make_sampler(domains, rank))
    seen = set()
    for _ in range(3):
        loader.request()
    for step in range(12):
        loader.request()
        batch, waited = loader.get()
        samples = expected.deal()
        assert batch is not None
        assert batch.samples is not None
        assert batch.samples.step == step
        assert waited >= 0
        assert batch.domain_tokens.tolist() == [SEQ * int((samples.all_domain == k).sum()) for k in range(3)]
        assert (batch.num_tokens, batch.reference) == (BATCH * SEQ, None)
        shape = (BATCH // MICRO // 2, MICRO, SEQ)
        assert batch.tokens.shape == batch.labels.shape == batch.domains.shape == shape
        assert (batch.tokens.dtype, batch.labels.dtype, batch.domains.dtype) == (torch.int64, torch.int64, torch.int32)
        for at in np.ndindex(shape[:2]):
            domain, sample = int(samples.domain[at]), int(samples.sample[at])
            window = domains[domain].read(sample * SEQ, SEQ + 1).tolist()
            assert batch.tokens[at].tolist() == window[:-1]
            assert batch.labels[at].tolist() == window[1:]
            assert batch.domains[at].tolist() == [domain] * SEQ
            seen.add(domain)
    assert seen == {0, 1, 2}
    loader.close()


def test_a_rank_reads_its_rows_and_counts_all(domains: list[DomainTokens]) -> None:
    """Rows 3, 0, 3, 1 of five: in that order, contiguous, with the domain of each; the count is that of all five."""
    domain_n, sample_n = np.array([2, 0, 1, 2, 0]), np.array([5, 6, 7, 8, 9])
    mine = np.array([3, 0, 3, 1])
    batch = WindowReader(domains, SEQ, VOCAB).batch(domain_n, sample_n, mine, (2, 2))
    assert (batch.domain_tokens.tolist(), batch.positions) == ([2 * SEQ, SEQ, 2 * SEQ], None)
    assert batch.domains.flatten(0, 1).tolist() == [[domain] * SEQ for domain in (2, 2, 2, 0)]
    rows = [domains[domain].read(sample * SEQ, SEQ + 1).tolist() for domain, sample in ((2, 8), (2, 5), (2, 8), (0, 6))]
    assert batch.tokens.flatten(0, 1).tolist() == [row[:-1] for row in rows]
    assert batch.labels.flatten(0, 1).tolist() == [row[1:] for row in rows]
    assert all(tensor.is_contiguous() for tensor in (batch.tokens, batch.labels, batch.domains))


def test_rank_without_tokens_deals_all_the_same(domains: list[DomainTokens]) -> None:
    sampler = make_sampler(domains)
    loader = Loader(sampler, None, pin_memory=False)
    for _ in range(3):
        loader.request()
    assert [loader.get()[0] for _ in range(3)] == [None, None, None]
    assert sampler.deal().step == 3
    loader.close()


@pytest.mark.parametrize("bad", ["token", "label"])
def test_token_outside_the_vocabulary(tmp_path: Path, bad: str) -> None:
    """The first token of sample 0 is only an input, the last of the stream only a label: both are checked."""
    tokens = np.full(4 * SEQ + 1, 7)
    tokens[0 if bad == "token" else -1] = 64
    with IndexedWriter(tmp_path / "t", "uint16") as writer:
        writer.add_document(tokens)
    reader = WindowReader([DomainTokens("fine", [tmp_path / "t"]), DomainTokens("web", [tmp_path / "t"])], SEQ, 64)
    sample = 0 if bad == "token" else 3
    with pytest.raises(InputError, match=rf"domain 'web', sample {sample}: token id 64 is outside .* of 64\b"):
        reader.read(np.array([0, 1, 0]), np.array([1, sample, 2]))
    read = WindowReader([DomainTokens("web", [tmp_path / "t"])], SEQ, 65).read(np.array([0]), np.array([sample]))
    assert read.max() == 64


def test_negative_token(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "t", "int32") as writer:
        writer.add_document([1, 2, -5, *[3] * SEQ])
    with pytest.raises(InputError, match=r"domain 'web', sample 0: token id -5 is outside"):
        WindowReader([DomainTokens("web", [tmp_path / "t"])], SEQ, 64).read(np.array([0]), np.array([0]))


def test_error_in_the_background_surfaces_in_get(domains: list[DomainTokens]) -> None:
    """In the step it belongs to, with its type and message; the steps read before it still come."""
    loader = make_loader(domains, make_sampler(domains))
    loader.request()

    def fail() -> None:
        raise MegamixError("the loss is not finite")

    loader.request(fail)
    loader.request()
    assert loader.get()[0] is not None
    for _ in range(2):  # The step after it is not handed out in its place.
        with pytest.raises(MegamixError, match="the loss is not finite"):
            loader.get()
    loader.close()
    small = make_loader(domains, make_sampler(domains), vocab_size=5)
    small.request()
    with pytest.raises(InputError, match=r"domain '(web|code|mail)', sample \d+: token id \d+ is outside"):
        small.get()
    small.close()


def test_settle_runs_before_its_step_is_dealt(domains: list[DomainTokens]) -> None:
    """The step waits for ``settle``, whose weights it is dealt with; ``request`` itself does not wait."""
    sampler = make_sampler(domains)
    loader = make_loader(domains, sampler)
    release = threading.Event()

    def settle() -> None:
        assert release.wait(60)
        sampler.set_weights([0.0, 0.0, 1.0], step=1)  # raises if step 1 was dealt

    loader.request()
    loader.request(settle)
    loader.request()
    first = loader.get()[0]
    release.set()
    second, third = loader.get()[0], loader.get()[0]
    assert first is not None
    assert second is not None
    assert third is not None
    assert set(first.domains.unique().tolist()) > {2}
    assert second.domains.unique().tolist() == third.domains.unique().tolist() == [2]
    loader.close()


def test_close_does_not_wait_for_what_is_under_way(domains: list[DomainTokens]) -> None:
    """A step whose weights will never come does not hold up the end of a run; the steps after it are not dealt."""
    sampler = make_sampler(domains)
    loader = make_loader(domains, sampler)
    started, release = threading.Event(), threading.Event()

    def settle() -> None:
        started.set()
        release.wait(60)

    loader.request(settle)
    loader.request()
    assert started.wait(60)
    loader.close()
    assert not release.is_set()
    assert sampler.deal().step == 0
    release.set()


class NumberedLosses(ReferenceLosses):
    """Reference losses that need no files."""

    def __init__(self) -> None:
        pass

    def read_window(self, domain: int, sample: int, losses: NDArray[np.float32]) -> None:
        losses[:] = domain + sample / 8 + np.arange(SEQ) / 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_pinned_batches(domains: list[DomainTokens]) -> None:
    """Every tensor is pinned, holds what the others hold, and is copied without waiting for the GPU."""
    reader = WindowReader(domains, SEQ, VOCAB, eod_mask_loss=True, reset_position_ids=True, reference=NumberedLosses())
    rows = np.arange(6)
    plain = reader.batch(rows % 3, rows, rows, (3, 2))
    pinned = reader.batch(rows % 3, rows, rows, (3, 2), pin_memory=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = pinned.to(torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("tokens", "labels", "domains", "positions", "reference"):
        assert getattr(pinned, name).is_pinned()
        assert torch.equal(getattr(moved, name).cpu(), getattr(plain, name))
