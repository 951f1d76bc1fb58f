"""Domain sums: what is added, what is excluded, and that no order or split changes a bit.

Shapes: N tokens, K domains.
"""

import math

import pytest
import torch

from megamix_kernels import DomainSums, domain_cross_entropy
from megamix_kernels.sums import MAX_TOKEN_NATS, NUM_COLUMNS, UNITS_PER_NAT

N, V, K = 301, 57, 22


def make_step(seed=0):
    """One global batch with ignored rows, a NaN row, an infinite loss and a reference."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(N, V, generator=generator) * 4
    labels_N = torch.randint(0, V, (N,), generator=generator)
    labels_N[::7] = -100
    logits_NV[3] = math.nan
    logits_NV[5, labels_N[5]] = -math.inf
    domain_N = torch.randint(0, K, (N,), generator=generator)
    reference_N = torch.rand(N, generator=generator) * 8
    return logits_NV, labels_N, domain_N, reference_N


def sums_of(parts, sums=None):
    sums = DomainSums(K) if sums is None else sums
    for logits_NV, labels_N, domain_N, reference_N in parts:
        domain_cross_entropy(logits_NV, labels_N, domain_N, K, reference_loss_N=reference_N, sums=sums)
    return sums


def test_a_hand_computed_case():
    sums = DomainSums(3)
    sums.add(
        torch.tensor([0, 2, 2, 2, 0]),
        torch.tensor([1.5, 0.25, 2.0, math.nan, 9.0]),
        counted_N=torch.tensor([True, True, True, True, False]),
        reference_loss_N=torch.tensor([2.0, 0.125, 1.0, 0.0, 0.0]),
    )
    assert sums.nats.tolist() == [1.5, 0.0, 2.25]
    assert sums.tokens.tolist() == [1, 0, 2]
    assert sums.excess_nats.tolist() == [0.0, 0.0, 1.125]
    assert sums.non_finite.tolist() == [0, 0, 1]
    assert (sums.nats.dtype, sums.excess_nats.dtype) == (torch.float64, torch.float64)
    assert (sums.tokens.dtype, sums.non_finite.dtype) == (torch.int64, torch.int64)


def test_rounding_is_half_to_even():
    unit = 1 / UNITS_PER_NAT
    for dtype in (torch.float32, torch.float64):
        loss_N = torch.tensor([0.5, 1.5, 2.5, 2.75], dtype=dtype) * unit
        units = DomainSums(4).add(torch.arange(4), loss_N).buffer[:, 0]
        assert units.tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, MAX_TOKEN_NATS * 1.001])
def test_unusable_losses_are_counted_and_kept_out(bad):
    sums = DomainSums(2).add(torch.tensor([1, 1]), torch.tensor([bad, 3.0]))
    assert sums.nats.tolist() == [0.0, 3.0]
    assert sums.tokens.tolist() == [0, 1]
    assert sums.non_finite.tolist() == [0, 1]
    with_reference = DomainSums(2).add(
        torch.tensor([1, 1]), torch.tensor([4.0, 3.0]), reference_loss_N=torch.tensor([bad, 1.0])
    )
    assert with_reference.buffer[1].tolist() == [3 * UNITS_PER_NAT, 1, 2 * UNITS_PER_NAT, 1]


def test_the_largest_loss_is_summed_exactly():
    sums = DomainSums(1)
    for _ in range(3):
        sums.add(torch.zeros(1000, dtype=torch.int64), torch.full((1000,), float(MAX_TOKEN_NATS)))
    assert sums.nats.item() == 3000 * MAX_TOKEN_NATS


def test_ids_out_of_range_count_as_non_finite_of_the_nearest_domain():
    sums = DomainSums(3).add(torch.tensor([-5, 3, 2**40, 1]), torch.ones(4))
    assert sums.non_finite.tolist() == [1, 0, 2]
    assert sums.tokens.tolist() == [0, 1, 0]


def test_permutation_changes_no_bit():
    step = make_step()
    whole = sums_of([step]).buffer
    assert whole[:, 3].sum() == 2
    for seed in range(5):
        order_N = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(sums_of([tuple(part[order_N] for part in step)]).buffer, whole)


@pytest.mark.parametrize("size", [1, 2, 64, 300])
def test_micro_batches_change_no_bit(size):
    step = make_step()
    parts = list(zip(*(part.split(size) for part in step), strict=True))
    assert torch.equal(sums_of(parts).buffer, sums_of([step]).buffer)


def test_threads_and_single_rows_change_no_bit():
    # Wide enough for torch to share one row's reduction among threads, and blocks of two rows with one left over.
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(39, 50257, generator=generator) * 4
    labels_N = torch.randint(0, 50257, (39,), generator=generator)
    domain_N = labels_N % K
    step = (logits_NV, labels_N, domain_N, torch.zeros(39))
    before = torch.get_num_threads()
    buffers = []
    try:
        for num_threads, size in [(1, 39), (2, 39), (2, 1), (2, 3), (2, 7)]:
            torch.set_num_threads(num_threads)
            buffers.append(sums_of(list(zip(*(part.split(size) for part in step), strict=True))).buffer)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(buffer, buffers[0]) for buffer in buffers)


def test_accumulates_across_calls_and_zeroes_in_place():
    first, second = make_step(1), make_step(2)
    sums = sums_of([first])
    buffer = sums.buffer
    sums_of([second], sums)
    assert sums.buffer is buffer
    assert torch.equal(buffer, sums_of([first]).buffer + sums_of([second]).buffer)
    assert sums.zero_() is sums
    assert not buffer.any()


def test_from_buffer_shares_memory():
    buffer = torch.zeros(5, NUM_COLUMNS, dtype=torch.int64)
    sums = DomainSums.from_buffer(buffer)
    sums.add(torch.tensor([4]), torch.tensor([1.0]))
    assert buffer[4, 0] == UNITS_PER_NAT
    assert (sums.num_domains, sums.device) == (5, torch.device("cpu"))
    assert repr(sums) == "DomainSums(num_domains=5, device='cpu')"


@pytest.mark.parametrize(
    ("buffer", "error", "message"),
    [
        (torch.zeros(5, 4), TypeError, "int64 tensor, got torch.float32"),
        ([[0] * 4], TypeError, "got list"),
        (torch.zeros(5, 3, dtype=torch.int64), ValueError, r"\[num_domains, 4\], got shape \[5, 3\]"),
        (torch.zeros(4, 5, dtype=torch.int64).T, ValueError, r"contiguous .* strides \[1, 5\]"),
        (torch.zeros(0, 4, dtype=torch.int64), ValueError, "from 1 to 65536, got 0"),
    ],
)
def test_from_buffer_refuses(buffer, error, message):
    with pytest.raises(error, match=message):
        DomainSums.from_buffer(buffer)


@pytest.mark.parametrize(
    ("count", "error"), [(0, ValueError), (65537, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_number_of_domains_is_checked(count, error):
    with pytest.raises(error, match=f"num_domains must be .* got {count}"):
        DomainSums(count)
