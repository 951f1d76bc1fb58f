"""Mode A, the choice of implementation, and the loss from hidden states, on the torch path.

Shapes: N tokens, H hidden, V vocabulary, K domains.
"""

import math

import pytest
import torch
from loss_oracle import make_case, oracle
from torch.utils.checkpoint import checkpoint

from megamix_kernels import DomainSums, LossOptions, domain_cross_entropy, linear_domain_cross_entropy

OPTIONS = {
    "z_loss": 1e-2,
    "softcap": 5.0,
    "label_smoothing": 0.1,
    "vocab_size": 50,
    "loss_weights_K": torch.tensor([0.25, 1.0, 2.5]),
    "reference_loss_N": torch.linspace(0, 9, 37),
    "normaliser": 17.5,
}


def test_options_are_an_object_or_keywords_and_keywords_win():
    logits_NV, labels_N, domain_N = make_case()
    options = LossOptions(z_loss=0.5, softcap=5.0)
    hidden = (logits_NV, torch.eye(logits_NV.shape[1]))
    for loss, first in ((domain_cross_entropy, (logits_NV,)), (linear_domain_cross_entropy, hidden)):
        want = loss(*first, labels_N, domain_N, 3, z_loss=0.25, softcap=5.0).loss
        assert torch.equal(loss(*first, labels_N, domain_N, 3, options=options, z_loss=0.25).loss, want)
        assert not torch.equal(loss(*first, labels_N, domain_N, 3, options=options).loss, want)
    assert options == LossOptions(z_loss=0.5, softcap=5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_promised_gradient_is_the_same_gradient(dtype):
    logits_NV, labels_N, domain_N = make_case(dtype=dtype)
    labels_N = labels_N % 50
    labels_N[3] = -100
    results = []
    for scale in (None, 0.125, torch.tensor(0.125)):
        leaf_NV = logits_NV.clone().requires_grad_()
        out = domain_cross_entropy(leaf_NV, labels_N, domain_N, 3, gradient_scale=scale, **OPTIONS)
        (out.loss * 0.125).backward()
        results.append((out.loss, leaf_NV.grad, out.stats.buffer))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_a_broken_promise_and_a_second_backward_pass_raise():
    logits_NV, labels_N, domain_N = make_case()
    logits_NV.requires_grad_()
    out = domain_cross_entropy(logits_NV, labels_N, domain_N, 3, gradient_scale=0.5)
    with pytest.raises(RuntimeError, match=r"promised an incoming gradient of 0.5, but 1.0 came"):
        out.loss.backward(retain_graph=True)
    (out.loss * 0.5).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed on by an earlier backward pass"):
        (out.loss * 0.5).backward()


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (math.inf, ValueError, "gradient_scale must be finite, got inf"),
        (torch.ones(2), ValueError, r"gradient_scale must have one element, got shape \[2\]"),
        (torch.tensor(True), TypeError, "gradient_scale .* got bool"),
    ],
)
def test_promises_that_cannot_be(scale, error, message):
    with pytest.raises(error, match=message):
        domain_cross_entropy(*make_case(), 3, gradient_scale=scale)


@pytest.mark.parametrize(
    ("logits_NV", "message"),
    [
        (torch.zeros(4, 5), "logits_NV is on cpu, wanted cuda|triton is not installed"),
        (torch.zeros(4, 5).double(), "logits_NV is float64, wanted float32|triton is not installed"),
        (torch.zeros(5, 4).T, "columns 4 elements apart, wanted adjacent|triton is not installed"),
    ],
)
def test_triton_says_why_it_cannot_be_used(logits_NV, message):
    labels_N = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"'triton' cannot be used: .*({message}).*; use 'auto' or 'torch'"):
        domain_cross_entropy(logits_NV, labels_N, labels_N, 1, implementation="triton")
    assert domain_cross_entropy(logits_NV, labels_N, labels_N, 1).loss == pytest.approx(math.log(logits_NV.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("chunk_rows", [1, 16, None])
def test_the_loss_from_hidden_states(chunk_rows, scale, dtype):
    generator = torch.Generator().manual_seed(3)
    hidden_NH = torch.randn(37, 24, generator=generator, dtype=torch.float64).to(dtype)
    weight_VH = torch.randn(57, 24, generator=generator, dtype=torch.float64).to(dtype) / 2
    labels_N = torch.randint(0, 50, (37,), generator=generator)
    labels_N[::6] = -100
    domain_N = torch.randint(0, 3, (37,), generator=generator)
    mask_N = torch.arange(37) % 5 > 0
    hidden_leaf, weight_leaf = hidden_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    sums = DomainSums(3)
    out = linear_domain_cross_entropy(
        *(hidden_leaf, weight_leaf, labels_N, domain_N, 3),
        mask_N=mask_N,
        gradient_scale=scale,
        sums=sums,
        return_token_loss=True,
        chunk_rows=chunk_rows,
        **OPTIONS,
    )
    (out.loss * 0.25).backward()
    # Logits are rounded to the dtype, so those are what the definition starts from.
    logits_NV = (hidden_NH @ weight_VH.T).double()
    loss, grad_NV, token_loss_N, nats_K, tokens_K, excess_K = oracle(
        logits_NV, labels_N, domain_N, 3, mask_N=mask_N, **OPTIONS
    )
    near = 1e-12 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(out.loss.double(), loss, rtol=near, atol=near)
    torch.testing.assert_close(out.token_loss_N.double(), token_loss_N, rtol=near, atol=near)
    assert out.stats is sums
    assert torch.equal(sums.tokens, tokens_K)
    torch.testing.assert_close(sums.nats, nats_K, rtol=near, atol=2e-6)
    torch.testing.assert_close(sums.excess_nats, excess_K, rtol=near, atol=2e-6)
    step = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6, torch.float64: 1e-13}[dtype]
    wants = 0.25 * grad_NV @ weight_VH.double(), 0.25 * grad_NV.T @ hidden_NH.double()
    for leaf, want in zip((hidden_leaf, weight_leaf), wants, strict=True):
        assert leaf.grad.dtype == dtype
        assert (leaf.grad.double() - want).abs().max() <= step * want.abs().max()


def test_adding_up_in_fp32_rounds_the_gradient_of_the_weight_once():
    # 256 rows that each add 2**-9 of the first one's share: each alone is lost beside it in bf16, together not.
    hidden_NH = torch.cat([torch.ones(1, 1), torch.full((255, 1), 2.0**-9)]).bfloat16()
    weight_VH = torch.zeros(2, 1, dtype=torch.bfloat16)
    labels_N = torch.zeros(256, dtype=torch.int64)
    shares = {}
    for fp32 in (True, False):
        leaf_VH = weight_VH.clone().requires_grad_()
        linear_domain_cross_entropy(
            *(hidden_NH, leaf_VH, labels_N, labels_N, 1), normaliser=1.0, chunk_rows=1, accumulate_fp32=fp32
        ).loss.backward()
        shares[fp32] = leaf_VH.grad[1].item()
    assert shares[True] == pytest.approx(0.5 * (1 + 255 / 512), rel=2**-8)
    assert shares[False] == 0.5


def test_only_what_needs_a_gradient_gets_one():
    labels_N = torch.arange(5)
    for needs_hidden, needs_weight in [(True, False), (False, True)]:
        hidden_NH = torch.randn(5, 4, requires_grad=needs_hidden)
        weight_VH = torch.randn(6, 4, requires_grad=needs_weight)
        linear_domain_cross_entropy(hidden_NH, weight_VH, labels_N, labels_N, 5).loss.backward()
        assert (hidden_NH.grad is not None, weight_VH.grad is not None) == (needs_hidden, needs_weight)
    with torch.no_grad():
        out = linear_domain_cross_entropy(hidden_NH, weight_VH, labels_N, labels_N, 5)
    assert not out.loss.requires_grad


def test_no_rows_from_hidden_states():
    hidden_NH, weight_VH = torch.zeros(0, 4, requires_grad=True), torch.zeros(6, 4, requires_grad=True)
    none_N = torch.zeros(0, dtype=torch.int64)
    out = linear_domain_cross_entropy(hidden_NH, weight_VH, none_N, none_N, 2, return_token_loss=True)
    out.loss.backward()
    assert (out.loss.item(), out.token_loss_N.shape, hidden_NH.grad.shape) == (0.0, (0,), (0, 4))
    assert not weight_VH.grad.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight_VH": torch.zeros(6, 3)}, ValueError, r"\[N, H\] and \[V, H\], got \[5, 4\] and \[6, 3\]"),
        ({"weight_VH": torch.zeros(6, 4).double()}, TypeError, "weight_VH must be a tensor of float32; got float64"),
        ({"weight_VH": torch.zeros(0, 4)}, ValueError, r"at least one row and one column, got \[0, 4\]"),
        ({"weight_VH": torch.zeros(6, 4, device="meta")}, ValueError, "weight_VH is on meta, .* on cpu"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be positive, got 0"),
        ({"vocab_size": 7}, ValueError, "vocab_size must be from 1 to 6"),
        ({"labels_N": torch.full((5,), 6)}, ValueError, r"labels_N\[0\] is 6"),
    ],
)
def test_what_the_loss_from_hidden_states_refuses(change, error, message):
    zeros_N = torch.zeros(5, dtype=torch.int64)
    arguments = {"hidden_NH": torch.zeros(5, 4), "weight_VH": torch.zeros(6, 4), "labels_N": zeros_N}
    with pytest.raises(error, match=message):
        linear_domain_cross_entropy(**(arguments | {"domain_N": zeros_N, "num_domains": 1} | change))


@pytest.mark.parametrize("chunk_rows", [16, None])
@pytest.mark.parametrize(
    ("dtype", "sum_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_the_gradient_of_the_weight_is_added_to_a_sum_that_the_caller_keeps(dtype, sum_dtype, chunk_rows):
    generator = torch.Generator().manual_seed(3)
    hidden_NH = torch.randn(37, 24, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VH = torch.randn(57, 24, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels_N, domain_N = torch.arange(37) % 50, torch.arange(37) % 3
    before_VH = torch.randn(57, 24, generator=generator).to(sum_dtype)
    sum_VH = before_VH.clone()
    call = (hidden_NH, weight_VH, labels_N, domain_N, 3)
    settings = {**OPTIONS, "gradient_scale": 0.25, "chunk_rows": chunk_rows, "weight_gradient_VH": sum_VH}
    with torch.no_grad():
        linear_domain_cross_entropy(*call, **settings)
    assert torch.equal(sum_VH, before_VH)
    out = linear_domain_cross_entropy(*call, **settings)
    (out.loss * 0.25).backward()
    assert weight_VH.grad is None
    logits_NV = (hidden_NH @ weight_VH.T).detach().double()
    _, grad_NV, *_ = oracle(logits_NV, labels_N, domain_N, 3, **OPTIONS)
    want_VH = before_VH.double() + 0.25 * grad_NV.T @ hidden_NH.detach().double()
    # The gradient of the logits has the dtype of the factors, so a wider sum is as exact as that.
    step = {torch.float32: 2**-20, torch.bfloat16: 2**-6, torch.float64: 1e-13}[dtype]
    assert (sum_VH.double() - want_VH).abs().max() <= step * want_VH.abs().max()
    want_NH = 0.25 * grad_NV @ weight_VH.detach().double()
    assert (hidden_NH.grad.double() - want_NH).abs().max() <= step * want_NH.abs().max()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gradient_scale": None}, ValueError, "before the incoming gradient is known; give gradient_scale"),
        ({"weight_gradient_VH": torch.zeros(6, 3)}, ValueError, r"is \[6, 3\] on cpu, wanted \[6, 4\] on cpu"),
        ({"weight_gradient_VH": torch.zeros(6, 4).half()}, TypeError, "must be a tensor of float32; got float16"),
    ],
)
def test_sums_that_the_gradient_of_the_weight_cannot_be_added_to(change, error, message):
    zeros_N = torch.zeros(5, dtype=torch.int64)
    settings = {"gradient_scale": 1.0, "weight_gradient_VH": torch.zeros(6, 4)} | change
    with pytest.raises(error, match=f"weight_gradient_VH .*{message}"):
        linear_domain_cross_entropy(torch.zeros(5, 4), torch.zeros(6, 4), zeros_N, zeros_N, 1, **settings)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_is_refused_where_it_would_add_the_gradient_of_the_weight_again(reentrant):
    zeros_N = torch.zeros(5, dtype=torch.int64)

    def loss(hidden_NH):
        hidden_NH = hidden_NH.tanh()  # whose result a backward pass asks for again
        settings = {"gradient_scale": 1.0, "weight_gradient_VH": torch.zeros(6, 4)}
        return linear_domain_cross_entropy(hidden_NH, torch.zeros(6, 4), zeros_N, zeros_N, 1, **settings).loss

    found = checkpoint(loss, torch.zeros(5, 4, requires_grad=True), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="take the loss out of the checkpointed part"):
        found.backward()
