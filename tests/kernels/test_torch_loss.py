"""The PyTorch path against the same formulas in float64, row by row of the definition.

Shapes: N tokens, V logits a token, K domains.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from loss_oracle import GRADIENT_TOLERANCE, make_case, oracle
from tolerance import rounding

from megamix_kernels import DomainSums, checks, domain_cross_entropy, torch_loss


def check(logits_NV, labels_N, domain_N, num_domains, **options):
    """Compare everything with the oracle; returns what the implementation gave and the gradient."""
    leaf_NV = logits_NV.detach().requires_grad_()
    out = domain_cross_entropy(leaf_NV, labels_N, domain_N, num_domains, return_token_loss=True, **options)
    (grad_NV,) = torch.autograd.grad(out.loss, leaf_NV)
    loss, want_NV, token_loss_N, nats_K, tokens_K, excess_K = oracle(
        logits_NV, labels_N, domain_N, num_domains, **options
    )

    result_dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    assert (out.loss.dtype, out.loss.shape, out.token_loss_N.dtype) == (result_dtype, (), result_dtype)
    assert (grad_NV.dtype, grad_NV.shape) == (logits_NV.dtype, logits_NV.shape)
    # Subtraction at the size of the largest logit bounds what the dtype can give.
    near = rounding(result_dtype)
    torch.testing.assert_close(out.loss.double(), loss, rtol=4 * near, atol=near)
    torch.testing.assert_close(out.token_loss_N.double(), token_loss_N, rtol=2 * near, atol=near)
    bound = GRADIENT_TOLERANCE[logits_NV.dtype] * max(float(want_NV.abs().max()) if want_NV.numel() else 0.0, 1e-30)
    if logits_NV.dtype == torch.float16:
        bound += 2**-24  # the smallest fp16 number
    assert (grad_NV.double() - want_NV).abs().le(bound).all()
    assert torch.equal(out.stats.tokens, tokens_K)
    assert not out.stats.non_finite.any()
    slack = {"rtol": 2 * near, "atol": 2e-6}
    torch.testing.assert_close(out.stats.nats, nats_K, **slack)
    torch.testing.assert_close(out.stats.excess_nats, excess_K, **slack)
    return out, grad_NV


# V: one column, two, an odd number beyond a vector register, and one that makes several blocks. N: one row, odd counts.
SHAPES = [(1, 1, 1), (1, 257, 3), (5, 2, 22), (37, 257, 3), (37, 1, 22), (101, 4096, 1024)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width", "num_domains"), SHAPES)
def test_plain_loss(num_rows, width, num_domains, dtype):
    check(*make_case(num_rows, width, num_domains, dtype), num_domains)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("z_loss", "softcap", "label_smoothing", "vocab_size"),
    list(itertools.product([0.0, 1e-2], [0.0, 5.0], [0.0, 0.1], [None, 50])),
)
def test_every_combination_of_options(z_loss, softcap, label_smoothing, vocab_size, dtype):
    logits_NV, labels_N, domain_N = make_case(dtype=dtype)
    labels_N = labels_N % 50
    labels_N[::5] = -1
    if vocab_size:
        logits_NV[:, 50:] = math.nan
    num_rows = len(labels_N)
    _, grad_NV = check(
        *(logits_NV, labels_N, domain_N, 3),
        z_loss=z_loss,
        softcap=softcap,
        label_smoothing=label_smoothing,
        vocab_size=vocab_size,
        ignore_index=-1,
        mask_N=torch.arange(num_rows) % 4 > 0,
        loss_weights_K=torch.tensor([0.25, 0.0, 2.5], dtype=torch.float64),
        reference_loss_N=torch.linspace(0, 9, num_rows),
        normaliser=17.5,
    )
    assert not grad_NV[:, vocab_size or 57 :].any()
    assert not grad_NV[::5].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_vocabulary_and_the_largest_number_of_domains(dtype):
    logits_NV, labels_N, domain_N = make_case(65, 4096, 65536, dtype)
    out, grad_NV = check(logits_NV, labels_N % 4001, domain_N, 65536, vocab_size=4001, z_loss=1e-4)
    assert not grad_NV[:, 4001:].any()
    assert out.stats.buffer.shape == (65536, 4)


def test_agrees_with_torch_cross_entropy():
    logits_NV, labels_N, domain_N = make_case(200, 300)
    labels_N[::9] = -100
    for smoothing in (0.0, 0.2):
        out = domain_cross_entropy(logits_NV, labels_N, domain_N, 3, label_smoothing=smoothing)
        torch.testing.assert_close(out.loss, F.cross_entropy(logits_NV, labels_N, label_smoothing=smoothing))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32]
)
def test_integer_dtypes(dtype):
    logits_NV, labels_N, domain_N = make_case()
    labels_N[2] = -100
    want = domain_cross_entropy(logits_NV, labels_N, domain_N, 3)
    out = domain_cross_entropy(logits_NV, labels_N.to(torch.int32), domain_N.to(dtype), 3)
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(out.stats.buffer, want.stats.buffer)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_mask_dtypes(dtype):
    logits_NV, labels_N, domain_N = make_case()
    out, _ = check(logits_NV, labels_N, domain_N, 3, mask_N=(labels_N % 2).to(dtype))
    assert out.stats.tokens.sum() == (labels_N % 2).sum()


def test_strided_views_and_blocks(monkeypatch):
    logits_NV, labels_N, domain_N = make_case(64, 128)
    want, want_grad = check(logits_NV, labels_N, domain_N, 3, softcap=4.0)
    wide = torch.full((64, 2, 200), math.nan)
    wide[:, 1, :128] = logits_NV
    column_major = logits_NV.T.contiguous().T
    for limit in (1, 500, 2**17):
        monkeypatch.setattr(torch_loss, "BLOCK_ELEMENTS_CPU", limit)
        for view_NV in (wide[:, 1, :128], column_major):
            out, grad_NV = check(view_NV, labels_N, domain_N, 3, softcap=4.0)
            torch.testing.assert_close(grad_NV, want_grad)
            torch.testing.assert_close(out.loss, want.loss)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_common_offset_costs_no_digits(offset):
    # Multiples of 1/64 stay exact beside 1e4 in fp32, so the loss must not move at all.
    logits_NV, labels_N, domain_N = make_case(64, 257)
    logits_NV = (logits_NV * 64).round() / 64
    near = domain_cross_entropy(logits_NV, labels_N, domain_N, 3, return_token_loss=True)
    far, _ = check(logits_NV + offset, labels_N, domain_N, 3)
    assert torch.equal(near.token_loss_N, far.token_loss_N)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_non_finite_rows_do_what_torch_does(dtype, smoothing):
    logits_NV, labels_N, domain_N = make_case(8, 9, dtype=dtype)
    logits_NV[0, 3] = math.nan
    logits_NV[1, 3] = math.inf
    logits_NV[2] = -math.inf
    labels_N[3] = 4
    logits_NV[3, 4] = -math.inf  # at the label: the loss is infinite
    labels_N[4] = 4
    logits_NV[4, 5] = -math.inf  # elsewhere: harmless, but for smoothing
    leaf_NV, torch_leaf_NV = logits_NV.clone().requires_grad_(), logits_NV.double().requires_grad_()
    weights_K = torch.ones(3)
    out = domain_cross_entropy(
        leaf_NV, labels_N, domain_N, 3, label_smoothing=smoothing, loss_weights_K=weights_K, return_token_loss=True
    )
    want_N = F.cross_entropy(torch_leaf_NV, labels_N, reduction="none")
    torch.testing.assert_close(out.token_loss_N.double(), want_N.detach(), equal_nan=True, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    loss = F.cross_entropy(torch_leaf_NV, labels_N, label_smoothing=smoothing)
    loss.backward()
    assert out.loss.isnan() == loss.isnan()
    torch.testing.assert_close(
        leaf_NV.grad.double(), torch_leaf_NV.grad, equal_nan=True, rtol=0, atol=GRADIENT_TOLERANCE[dtype] / 8 + 1e-7
    )
    unusable_K = torch.bincount(domain_N[:4], minlength=3)
    assert torch.equal(out.stats.non_finite, unusable_K)
    assert torch.equal(out.stats.tokens, torch.bincount(domain_N, minlength=3) - unusable_K)
    assert out.stats.nats.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_ignored_rows_count_for_nothing_whatever_they_hold(dtype, bad):
    logits_NV, labels_N, domain_N = make_case(dtype=dtype)
    keep_N = torch.arange(37) % 3 > 0
    want, want_grad = check(logits_NV[keep_N], labels_N[keep_N], domain_N[keep_N], 3)
    logits_NV[~keep_N] = bad
    domain_N[~keep_N] = -1
    masked_labels_N = labels_N.clone()
    masked_labels_N[~keep_N] = 10**6
    ignored_labels_N = labels_N.masked_fill(~keep_N, -100)
    for options in ({"labels_N": masked_labels_N, "mask_N": keep_N}, {"labels_N": ignored_labels_N}):
        leaf_NV = logits_NV.clone().requires_grad_()
        out = domain_cross_entropy(
            leaf_NV, domain_N=domain_N, num_domains=3, z_loss=0.0, return_token_loss=True, **options
        )
        out.loss.backward()
        torch.testing.assert_close(out.loss, want.loss)
        assert torch.equal(out.stats.buffer, want.stats.buffer)
        assert torch.equal(leaf_NV.grad[keep_N], want_grad)
        assert not leaf_NV.grad[~keep_N].any()
        assert not out.token_loss_N[~keep_N].any()


@pytest.mark.parametrize("num_rows", [0, 4])
def test_nothing_counted_gives_zero_not_nan(num_rows):
    logits_NV = torch.randn(num_rows, 7).requires_grad_()
    labels_N = torch.full((num_rows,), -100)
    out = domain_cross_entropy(logits_NV, labels_N, torch.zeros_like(labels_N), 2, return_token_loss=True)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert not logits_NV.grad.any()
    assert logits_NV.grad.shape == (num_rows, 7)
    assert out.token_loss_N.shape == (num_rows,)
    assert not out.stats.buffer.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_gradcheck(smoothing, softcap):
    logits_NV, labels_N, domain_N = make_case(5, 7, dtype=torch.float64, scale=1.0)
    labels_N[1] = -100

    def loss(logits_NV):
        return domain_cross_entropy(
            *(logits_NV, labels_N, domain_N, 3),
            loss_weights_K=torch.tensor([0.5, 1.5, 3.0]),
            z_loss=0.1,
            softcap=softcap,
            label_smoothing=smoothing,
            vocab_size=7,
        ).loss

    assert torch.autograd.gradcheck(loss, logits_NV.requires_grad_())


def test_incoming_gradient_is_folded_in_before_rounding():
    # Alone, most of these fp16 gradients lie below the smallest number; the loss scale must reach them first.
    logits_NV, labels_N, domain_N = make_case(16, 4096, dtype=torch.float16)
    leaf_NV = logits_NV.requires_grad_()
    loss_scale = 2.0**16
    out = domain_cross_entropy(leaf_NV, labels_N, domain_N, 3, normaliser=8192)
    (out.loss * loss_scale).backward()
    want_NV = oracle(logits_NV, labels_N, domain_N, 3, normaliser=8192)[1] * loss_scale
    torch.testing.assert_close(leaf_NV.grad.double(), want_NV, rtol=2**-10, atol=2**-24)


def test_micro_batches_accumulate_to_the_whole_batch():
    logits_NV, labels_N, domain_N = make_case(60, 50)
    labels_N[::4] = -100
    whole_NV, parts_NV = logits_NV.clone().requires_grad_(), logits_NV.clone().requires_grad_()
    want = domain_cross_entropy(whole_NV, labels_N, domain_N, 3)
    want.loss.backward()
    sums, total = DomainSums(3), 0.0
    normaliser = (labels_N != -100).sum()
    for rows in torch.arange(60).split(13):
        out = domain_cross_entropy(parts_NV[rows], labels_N[rows], domain_N[rows], 3, normaliser=normaliser, sums=sums)
        assert out.stats is sums
        assert out.token_loss_N is None
        out.loss.backward()
        total += out.loss.item()
    assert total == pytest.approx(want.loss.item(), rel=1e-6)
    torch.testing.assert_close(parts_NV.grad, whole_NV.grad, rtol=1e-5, atol=1e-9)
    assert torch.equal(sums.buffer, want.stats.buffer)


def test_statistics_are_plain_nats_whatever_is_optimised():
    logits_NV, labels_N, domain_N = make_case()
    plain = domain_cross_entropy(logits_NV, labels_N, domain_N, 3)
    other = domain_cross_entropy(
        *(logits_NV, labels_N, domain_N, 3),
        loss_weights_K=torch.zeros(3),
        z_loss=1.0,
        label_smoothing=0.5,
        normaliser=3,
    )
    assert torch.equal(plain.stats.buffer, other.stats.buffer)
    assert not torch.equal(plain.loss, other.loss)


def test_without_gradients_and_under_autocast():
    logits_NV, labels_N, domain_N = make_case()
    want, want_grad = check(logits_NV, labels_N, domain_N, 3)
    with torch.no_grad():
        assert not domain_cross_entropy(logits_NV.requires_grad_(), labels_N, domain_N, 3).loss.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = domain_cross_entropy(logits_NV, labels_N, domain_N, 3)
        out.loss.backward()
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(logits_NV.grad, want_grad)


def test_changing_the_logits_before_backward_is_an_error():
    logits_NV, labels_N, domain_N = make_case()
    inner_NV = logits_NV.requires_grad_() * 1.0
    out = domain_cross_entropy(inner_NV, labels_N, domain_N, 3)
    inner_NV.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.parametrize("name", ["labels_N", "domain_N"])
def test_values_that_could_not_be_checked_make_the_loss_nan(name, monkeypatch):
    # What an accelerator does, where reading the values would mean waiting.
    monkeypatch.setattr(checks, "check_values", lambda *args, **kwargs: None)
    logits_NV, labels_N, domain_N = make_case()
    arguments = {"labels_N": labels_N, "domain_N": domain_N}
    arguments[name][[4, 5]] = torch.tensor([-7, 10**9])
    leaf_NV = logits_NV.requires_grad_()
    out = domain_cross_entropy(
        leaf_NV, **arguments, num_domains=3, loss_weights_K=torch.ones(3), return_token_loss=True
    )
    out.loss.backward()
    assert out.loss.isnan()
    assert out.token_loss_N.isnan().nonzero()[:, 0].tolist() == [4, 5]
    assert leaf_NV.grad.isnan().all(dim=1).nonzero()[:, 0].tolist() == [4, 5]
    assert out.stats.non_finite.sum() == 2
    assert out.stats.tokens.sum() == 35


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_value_is_read_off_the_host(dtype):
    # Meta tensors have no values, so whatever would wait for an accelerator fails here.
    logits_NV, labels_N, domain_N = (tensor.to("meta") for tensor in make_case(dtype=dtype))
    logits_NV.requires_grad_()
    out = domain_cross_entropy(
        *(logits_NV, labels_N, domain_N, 3),
        mask_N=torch.ones(37, device="meta"),
        loss_weights_K=torch.ones(3, device="meta"),
        reference_loss_N=torch.ones(37, device="meta"),
        z_loss=1e-4,
        softcap=30.0,
        label_smoothing=0.1,
        vocab_size=50,
    )
    out.loss.backward()
    assert logits_NV.grad.shape == logits_NV.shape
    assert out.stats.nats.shape == (3,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_without_a_host_synchronisation(dtype):
    case = make_case(301, 1000, dtype=dtype)
    options = {
        "mask_N": torch.arange(301) % 5 > 0,
        "reference_loss_N": torch.ones(301),
        "loss_weights_K": torch.rand(3),
    }
    want, want_grad = check(*case, 3, **options)
    leaf_NV, labels_N, domain_N = (tensor.cuda() for tensor in case)
    leaf_NV.requires_grad_()
    options = {name: value.cuda() for name, value in options.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = domain_cross_entropy(leaf_NV, labels_N, domain_N, 3, return_token_loss=True, **options)
        out.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.token_loss_N.cpu(), want.token_loss_N, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(leaf_NV.grad.cpu(), want_grad, rtol=1e-2, atol=1e-7)
    assert torch.equal(out.stats.tokens.cpu(), want.stats.tokens)
