"""The vocabulary split over 1, 2 and 4 gloo ranks against the whole logits, on both paths, and rows split over ranks.

Guaranteed and tested: all ranks of a group have the same losses to the last bit; one of them has the sums; counts are
equal for any number of ranks, losses and gradients equal to rounding; sums of rows split over ranks are equal to the
last bit.
"""

import os
import subprocess
import sys

import pytest
import tensor_parallel_ranks as ranks
import torch
import triton_interpreter
from commands import ROOT, SUPPORT
from loss_oracle import GRADIENT_TOLERANCE
from tolerance import assert_alike, rounding

from megamix_kernels import domain_cross_entropy, linear_domain_cross_entropy

PATHS = ["torch"] if triton_interpreter.why_not() else ["torch", "triton"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": str(len(PATHS) - 1),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "tensor_parallel_ranks.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(ranks.WORLD)]


@pytest.mark.parametrize("mode", ["A", "B"])
@pytest.mark.parametrize("name", ranks.OPTIONS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("path", PATHS)
def test_the_vocabulary_over_ranks(results, path, size, name, mode):
    logits_NV, labels_N, domain_N = ranks.case()
    leaf_NV = logits_NV.requires_grad_()
    want = domain_cross_entropy(leaf_NV, labels_N, domain_N, 3, return_token_loss=True, **ranks.OPTIONS[name])
    (want.loss * 0.5).backward()
    for rank in range(ranks.WORLD):
        loss, token_loss_N, buffer, grad_NV = results[rank][path, size, name, mode]
        torch.testing.assert_close(loss, want.loss.detach(), rtol=rounding(), atol=0)
        torch.testing.assert_close(token_loss_N, want.token_loss_N, rtol=2 * rounding(), atol=rounding())
        assert_alike(grad_NV, leaf_NV.grad, 2 * GRADIENT_TOLERANCE[torch.float32])
        first = results[rank - rank % size][path, size, name, mode]
        assert torch.equal(loss, first[0])
        assert torch.equal(token_loss_N, first[1])
        if rank % size:
            assert not buffer.any()
        else:
            assert torch.equal(buffer[:, [1, 3]], want.stats.buffer[:, [1, 3]])
            torch.testing.assert_close(buffer / 2**24, want.stats.buffer / 2**24, rtol=2e-6, atol=2e-6)
            assert buffer[:, 1].sum() == ranks.N - 1


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("path", PATHS)
def test_hidden_states_over_ranks(results, path, size):
    generator = torch.Generator().manual_seed(1)
    hidden_NH = torch.randn(ranks.N, 8, generator=generator).requires_grad_()
    weight_VH = torch.randn(ranks.V, 8, generator=generator).requires_grad_()
    out = linear_domain_cross_entropy(hidden_NH, weight_VH, *ranks.case()[1:], 3, vocab_size=ranks.VOCAB_SIZE)
    out.loss.backward()
    for result in results:
        loss, grad_hidden, grad_weight = result["hidden", path, size]
        torch.testing.assert_close(loss, out.loss.detach(), rtol=rounding(), atol=0)
        assert_alike(grad_hidden, hidden_NH.grad, rounding(terms=ranks.VOCAB_SIZE))
        assert_alike(grad_weight, weight_VH.grad, rounding(terms=ranks.N))


@pytest.mark.parametrize("path", PATHS)
def test_rows_over_ranks_change_no_bit_of_the_sums(results, path):
    for result in results:
        split, whole = result["rows", path]
        assert torch.equal(split, whole)
        assert whole[:, [1, 3]].sum(dim=0).tolist() == [22, 1]
        assert whole[:, 2].sum() > 0


def test_one_rank_is_the_same_as_no_group_to_the_last_bit_on_the_torch_path(results):
    logits_NV, labels_N, domain_N = ranks.case()
    want = domain_cross_entropy(logits_NV, labels_N, domain_N, 3, return_token_loss=True)
    loss, token_loss_N, buffer, _ = results[0]["torch", 1, "plain", "B"]
    assert torch.equal(loss, want.loss)
    assert torch.equal(token_loss_N, want.token_loss_N)
    assert torch.equal(buffer, want.stats.buffer)
