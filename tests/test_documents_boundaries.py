"""Document boundaries: from the index files into labels and positions, counted for the whole batch on every rank."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from megamix.data.blend import Blend
from megamix.data.loader import IGNORED_LABEL, Batch, Loader, WindowReader
from megamix.data.sampler import Sampler, Slice
from megamix.data.stream import DomainTokens

SEQ = 16
VOCAB = 100
EOD = 0


def write(prefix: Path, documents: list[list[list[int]]]) -> Path:
    """A .bin / .idx pair of documents that are cut into sequences, as Megatron's sentence splitting writes them."""
    lengths = [len(sequence) for document in documents for sequence in document]
    ends = np.cumsum([0, *lengths])
    bounds = np.cumsum([0, *[len(document) for document in documents]])
    tokens = [token for document in documents for sequence in document for token in sequence]
    Path(f"{prefix}.bin").write_bytes(np.array(tokens, "<u2").tobytes())
    Path(f"{prefix}.idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(bounds))
        + np.array(lengths, "<i4").tobytes()
        + (2 * ends[:-1]).astype("<i8").tobytes()
        + bounds.astype("<i8").tobytes()
    )
    return prefix


def random_documents(rng: np.random.Generator, number: int, *, eod: bool) -> list[list[list[int]]]:
    """Documents of 1 to 30 tokens in one to three sequences; with ``eod``, EOD is the last token and no other.

    Without, ids say nothing about where documents end (EOD comes anywhere), and some documents are empty.
    """
    documents = []
    for _ in range(number):
        tokens = rng.integers(1 if eod else 0, VOCAB, rng.integers(0, 30)).tolist() + ([EOD] if eod else [])
        cuts = sorted(rng.integers(0, len(tokens) + 1, rng.integers(0, 3)).tolist())
        documents.append([tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)])
    return documents


def flags(documents: list[list[list[int]]]) -> list[bool]:
    """Whether each token is the first of its document, document by document."""
    lengths = [sum(map(len, document)) for document in documents]
    return [index == 0 for length in lengths for index in range(length)]


def test_starts_are_those_of_the_index(tmp_path: Path) -> None:
    """Of four files (one empty, one of a single token) and of ranges of their documents, at three window lengths: the
    shortest never holds a whole document, the longest spans all files. Ids, cuts and empty documents do not matter."""
    rng = np.random.default_rng(3)
    files = [random_documents(rng, number, eod=False) for number in (60, 0, 40)]
    files.insert(2, [[[], []], [[7]], []])
    prefixes = [write(tmp_path / str(number), documents) for number, documents in enumerate(files)]
    for ranges in ([(0, len(file)) for file in files], [(3, 50), (0, 0), (0, 1), (5, 40)]):
        domain = DomainTokens("web", prefixes, ranges=ranges)
        wanted = [flag for file, (first, end) in zip(files, ranges, strict=True) for flag in flags(file[first:end])]
        assert len(wanted) == domain.num_tokens
        for seq_length in (4, 64, domain.num_tokens - 1):
            index_n = rng.permutation(domain.num_windows(seq_length))
            row_m, token_m = domain.document_starts(index_n, seq_length)
            seen = np.zeros((index_n.size, seq_length + 1), int)
            np.add.at(seen, (row_m, token_m), 1)
            for row, index in enumerate(index_n.tolist()):
                assert seen[row].tolist() == wanted[index * seq_length : (index + 1) * seq_length + 1]
    assert [part.size for part in domain.document_starts(np.empty(0, np.int64), 4)] == [0, 0]


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[DomainTokens]:
    """Three domains, the last of two files, in which EOD is the last token of every document and nowhere else."""
    folder, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(5)
    found = []
    for name, files in (("web", [90]), ("code", [40]), ("mail", [10, 25])):
        prefixes = [
            write(folder / f"{name}{number}", random_documents(rng, documents, eod=True))
            for number, documents in enumerate(files)
        ]
        found.append(DomainTokens(name, prefixes))
    return found


def batches(domains: list[DomainTokens], steps: int, data_size: int, mask: bool, reset: bool) -> list[list[Batch]]:
    """The batches of every data-parallel rank."""
    result = []
    for rank in range(data_size):
        blend = Blend([domain.num_windows(SEQ) for domain in domains], [0.5, 0.2, 0.3], seed=1)
        reader = WindowReader(domains, SEQ, VOCAB, eod_mask_loss=mask, reset_position_ids=reset)
        loader = Loader(Sampler(blend, Slice(12, 2, rank, data_size)), reader, pin_memory=False)
        for _ in range(steps):
            loader.request()
        found = [loader.get()[0] for _ in range(steps)]
        result.append([batch for batch in found if batch is not None])
        loader.close()
    return result


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_labels_and_positions(domains: list[DomainTokens], mask: bool, reset: bool) -> None:
    """Against a walk over every row's token ids; the normaliser is on each rank the count of what all ranks count."""
    masked = 0
    for per_rank in zip(*batches(domains, 6, 2, mask, reset), strict=True):
        counted = 0
        for batch in per_rank:
            assert batch.samples is not None
            assert (batch.positions is None) == (not reset)
            for at in np.ndindex(batch.samples.domain.shape):
                domain, sample = domains[int(batch.samples.domain[at])], int(batch.samples.sample[at])
                window = domain.read(sample * SEQ, SEQ + 1).tolist()
                positions, labels, position = [], [], 0
                for token, label in itertools.pairwise(window):
                    positions.append(position)
                    labels.append(IGNORED_LABEL if mask and token == EOD else label)
                    position = 0 if token == EOD else position + 1
                assert batch.tokens[at].tolist() == window[:-1]
                assert batch.labels[at].tolist() == labels
                if batch.positions is not None:
                    assert batch.positions.dtype == torch.int64
                    assert batch.positions[at].tolist() == positions
                counted += sum(label != IGNORED_LABEL for label in labels)
        assert [batch.num_tokens for batch in per_rank] == [counted, counted]
        masked += 12 * SEQ - counted
    assert (masked > 0) == mask


def test_masks_and_positions_are_megatrons(domains: list[DomainTokens]) -> None:
    gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    for batch in batches(domains, 4, 1, True, True)[0]:
        assert batch.positions is not None
        rows = [tensor.flatten(0, 1) for tensor in (batch.tokens, batch.labels, batch.positions)]
        for tokens, labels, positions in zip(*rows, strict=True):
            _, loss_mask, position_ids = gpt_dataset._get_ltor_masks_and_position_ids(
                tokens, EOD, True, False, True, False
            )
            torch.testing.assert_close((labels != IGNORED_LABEL).float(), loss_mask)
            torch.testing.assert_close(positions, position_ids)


def test_a_batch_moves_with_its_positions(domains: list[DomainTokens]) -> None:
    moved = batches(domains, 1, 1, True, True)[0][0].to(torch.device("meta"))
    assert moved.positions is not None
    tensors = (moved.tokens, moved.labels, moved.domains, moved.positions)
    assert {str(tensor.device) for tensor in tensors} == {"meta"}
    assert moved.samples is not None
