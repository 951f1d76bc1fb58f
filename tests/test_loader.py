"""Batches of tokens: the windows that the sampler named, labels one token on, errors that reach the training thread."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from megamix.data.blend import Blend
from megamix.data.indexed import IndexedWriter
from megamix.data.loader import Loader, WindowReader, batch_arrays
from megamix.data.sampler import Sampler, Slice
from megamix.data.stream import DomainTokens
from megamix.errors import InputError, MegamixError

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
    return Loader(sampler, WindowReader(domains, SEQ, vocab_size), SEQ, pin_memory=False)


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
        assert batch.num_tokens == BATCH * SEQ
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


def test_batch_arrays_are_contiguous_and_per_token() -> None:
    window_nt = np.arange(4 * 6).reshape(4, 6)
    tokens, labels, ids = batch_arrays(window_nt, np.array([2, 0, 1, 2]), (2, 2, 5))
    assert tokens[1, 0].tolist() == [12, 13, 14, 15, 16]
    assert labels[1, 0].tolist() == [13, 14, 15, 16, 17]
    assert ids[:, :, 0].tolist() == [[2, 0], [1, 2]]
    assert all(tensor.is_contiguous() for tensor in (tokens, labels, ids))


def test_rank_without_tokens_deals_all_the_same(domains: list[DomainTokens]) -> None:
    sampler = make_sampler(domains)
    loader = Loader(sampler, None, SEQ, pin_memory=False)
    for _ in range(3):
        loader.request()
    assert [loader.get()[0] for _ in range(3)] == [None, None, None]
    assert sampler.next_step == 3
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
    assert loader.get()[0] is not None
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
    release, steps = threading.Event(), []

    def settle() -> None:
        assert release.wait(60)
        steps.append(sampler.next_step)
        sampler.set_weights([0.0, 0.0, 1.0], step=1)

    loader.request()
    loader.request(settle)
    loader.request()
    first = loader.get()[0]
    assert sampler.next_step == 1
    release.set()
    second, third = loader.get()[0], loader.get()[0]
    assert steps == [1]
    assert first is not None
    assert second is not None
    assert third is not None
    assert set(first.domains.unique().tolist()) > {2}
    assert second.domains.unique().tolist() == third.domains.unique().tolist() == [2]
    loader.close()
