"""The loss in what trainers put around it: activation checkpointing, autocast, inference mode, torch.compile.

Shapes: N tokens, H hidden, V vocabulary, K domains.
"""

import subprocess
import sys

import pytest
import torch
from loss_oracle import make_case, oracle
from loss_surroundings import FORMS, check_checkpointing

from megamix_kernels import DomainSums, domain_cross_entropy, linear_domain_cross_entropy


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_recomputation_adds_nothing_to_the_sums(form, reentrant):
    check_checkpointing(form, "torch", "cpu", reentrant)


def factors():
    generator = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH = torch.randn(9, 8, generator=generator), torch.randn(30, 8, generator=generator)
    return hidden_NH, weight_VH, torch.arange(9), torch.arange(9) % 2


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
)
def test_autocast_multiplies_hidden_states_and_weight_in_its_dtype(hidden_dtype, weight_dtype, scale):
    hidden_NH, weight_VH, labels_N, domain_N = factors()
    hidden_NH = hidden_NH.to(hidden_dtype).requires_grad_()
    weight_VH = weight_VH.to(weight_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_domain_cross_entropy(hidden_NH, weight_VH, labels_N, domain_N, 2, gradient_scale=scale)
    out.loss.backward()
    logits_NV = (hidden_NH.detach().bfloat16() @ weight_VH.detach().bfloat16().T).double()
    loss, grad_NV, *_ = oracle(logits_NV, labels_N, domain_N, 2)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=0)
    wants = grad_NV @ weight_VH.detach().bfloat16().double(), grad_NV.T @ hidden_NH.detach().bfloat16().double()
    for factor, want in zip((hidden_NH, weight_VH), wants, strict=True):
        assert factor.grad.dtype == factor.dtype
        assert (factor.grad.double() - want).abs().max() <= 2**-6 * want.abs().max()


def test_autocast_spares_float64_and_only_autocast_casts():
    hidden_NH, weight_VH, labels_N, domain_N = factors()
    arguments = hidden_NH.double(), weight_VH.double(), labels_N, domain_N, 2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_domain_cross_entropy(*arguments).loss, linear_domain_cross_entropy(*arguments).loss)
        assert linear_domain_cross_entropy(*arguments).loss.dtype == torch.float64
    with pytest.raises(TypeError, match="weight_VH must be a tensor of bfloat16; got float32"):
        linear_domain_cross_entropy(hidden_NH.bfloat16(), weight_VH, labels_N, domain_N, 2)


@pytest.mark.parametrize("linear", [False, True])
def test_sums_made_in_inference_mode_can_be_added_to_afterwards(linear):
    hidden_NH, weight_VH, labels_N, domain_N = factors()
    call = linear_domain_cross_entropy if linear else domain_cross_entropy
    first = (hidden_NH, weight_VH) if linear else (hidden_NH @ weight_VH.T,)
    with torch.inference_mode():
        sums = call(*first, labels_N, domain_N, 2).stats
        made = DomainSums(2)
    for kept in (sums, made):
        before = kept.tokens
        call(*first, labels_N, domain_N, 2, sums=kept)
        assert (kept.tokens - before).tolist() == [5, 4]
        kept.zero_()


# In a process of its own: importing the compiler takes seconds, and tests should not depend on who did it first.
COMPILED = """
import torch
from torch._dynamo.testing import CompileCounter

from megamix_kernels import domain_cross_entropy, linear_domain_cross_entropy

labels_N = torch.tensor([3, 9, 0, 7])
weight_VH = torch.randn(10, 6)

def logits_first(hidden_NH):
    logits_NV = (hidden_NH * 2).tanh() @ weight_VH.T
    out = domain_cross_entropy(logits_NV, labels_N, labels_N % 2, 2, softcap=5.0, gradient_scale=0.5)
    return (out.loss * 0.5).exp().log()

def hidden_first(hidden_NH):
    out = linear_domain_cross_entropy((hidden_NH * 2).tanh(), weight_VH, labels_N, labels_N % 2, 2, z_loss=0.1)
    return (out.loss * 0.5).exp().log()

for model in (logits_first, hidden_first):
    counter = CompileCounter()
    hidden_NH = torch.randn(4, 6)
    assert torch.equal(torch.compile(model, backend=counter)(hidden_NH), model(hidden_NH))
    print(counter.frame_count, counter.op_count)
    torch._dynamo.reset()
"""


def test_torch_compile_leaves_the_loss_out_and_compiles_what_is_around_it():
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    # Two graphs, before and after the one break, of seven operations at most: none of the loss, which has dozens.
    for line in done.stdout.splitlines():
        graphs, operations = map(int, line.split())
        assert graphs == 2
        assert 5 <= operations <= 8
    assert len(done.stdout.splitlines()) == 2


def test_the_calls_do_not_import_the_compiler():
    code = (
        "import sys, torch\nfrom megamix_kernels import domain_cross_entropy\n"
        "labels_N = torch.arange(3)\ndomain_cross_entropy(torch.zeros(3, 4), labels_N, labels_N, 3)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def test_rows_of_weight_zero_add_nothing_whatever_their_loss():
    logits_NV, labels_N, _ = make_case(6, 20)
    domain_N = torch.tensor([0, 1, 0, 1, 0, 1])
    logits_NV[0, labels_N[0]] = -torch.inf  # an infinite loss
    logits_NV[2] = torch.nan
    weights = torch.tensor([0.0, 2.0])
    for scale in (None, 1.0):
        leaf_NV = logits_NV.clone().requires_grad_()
        out = domain_cross_entropy(leaf_NV, labels_N, domain_N, 2, loss_weights_K=weights, gradient_scale=scale)
        out.loss.backward()
        kept = domain_N == 1
        loss, grad_NV, *_ = oracle(
            logits_NV[kept], labels_N[kept], domain_N[kept], 2, loss_weights_K=weights, normaliser=6
        )
        torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=0)
        assert not leaf_NV.grad[~kept].any()
        torch.testing.assert_close(leaf_NV.grad[kept].double(), grad_NV, rtol=1e-5, atol=1e-7)
        assert out.stats.non_finite.tolist() == [2, 0]
        assert out.stats.tokens.tolist() == [1, 3]
