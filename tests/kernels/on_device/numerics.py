"""The Triton path against float64 and against the torch path, on a GPU or under Triton's interpreter.

Run by tests/kernels/test_triton.py in a process of its own, since the interpreter must be chosen before Triton is
imported. A program of the interpreter takes 20 to 100 ms, so cases have few rows.

Shapes: N tokens, V logits a token, K domains.
"""

import itertools
import math
from unittest import mock

import pytest
import torch
from loss_oracle import GRADIENT_TOLERANCE, make_case, oracle

from megamix_kernels import DomainSums, checks, domain_cross_entropy
from megamix_kernels import triton_loss as implementation
from megamix_kernels.sums import MAX_TOKEN_NATS

DEVICE = "cpu" if implementation.INTERPRETED else "cuda"
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]
MODES = ["A", "B"]
# Every option at once; labels below 250 and 57 or more columns of padding.
ALL_OPTIONS = {
    "z_loss": 1e-2,
    "softcap": 5.0,
    "label_smoothing": 0.1,
    "vocab_size": 250,
    "loss_weights_K": torch.tensor([0.25, 0.0, 2.5], dtype=torch.float64),
    "normaliser": 17.5,
}


def on_device(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def run(logits_NV, labels_N, domain_N, num_domains, *, mode="B", incoming=3.0, **options):
    """What the call returns, on the host, and the gradient for an incoming gradient; logits as an inner tensor."""
    leaf_NV = logits_NV.detach().to(DEVICE).requires_grad_()
    options = {name: on_device(value) for name, value in options.items()}
    if mode == "A":
        options["gradient_scale"] = incoming
    out = domain_cross_entropy(
        leaf_NV * 1,  # an inner tensor may be overwritten
        *(on_device(labels_N), on_device(domain_N), num_domains),
        return_token_loss=True,
        implementation="triton",
        **options,
    )
    out.loss.backward(torch.full_like(out.loss, incoming))
    return out, leaf_NV.grad.cpu()


def check(logits_NV, labels_N, domain_N, num_domains, *, mode, incoming=3.0, **options):
    """Compare everything with float64."""
    out, grad_NV = run(logits_NV, labels_N, domain_N, num_domains, mode=mode, incoming=incoming, **options)
    loss, want_NV, token_loss_N, nats_K, tokens_K, excess_K = oracle(
        logits_NV, labels_N, domain_N, num_domains, **options
    )
    assert (out.loss.dtype, out.token_loss_N.dtype, grad_NV.dtype) == (torch.float32, torch.float32, logits_NV.dtype)
    torch.testing.assert_close(out.loss.cpu().double(), loss, rtol=4e-6, atol=2e-6)
    torch.testing.assert_close(out.token_loss_N.cpu().double(), token_loss_N, rtol=2e-6, atol=2e-6)
    bound = GRADIENT_TOLERANCE[logits_NV.dtype]
    if implementation.INTERPRETED and logits_NV.dtype == torch.bfloat16:
        bound *= 2  # the interpreter truncates to bf16
    bound = bound * incoming * want_NV.abs().max() + (2**-24 if logits_NV.dtype == torch.float16 else 1e-30)
    assert (grad_NV.double() - want_NV * incoming).abs().max() <= bound
    assert torch.equal(out.stats.tokens.cpu(), tokens_K)
    assert not out.stats.non_finite.any()
    torch.testing.assert_close(out.stats.nats.cpu(), nats_K, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.stats.excess_nats.cpu(), excess_K, rtol=2e-6, atol=4e-6)
    return out, grad_NV


# One column, an odd width of one tile, several tiles with an odd rest, exact tiles, GPT-2's width, and 2**16 + 1.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "width", "num_domains"), [(1, 1, 1), (3, 257, 22), (2, 1029, 1), (2, 2048, 1024), (1, 50257, 3)]
)
def test_plain_loss(num_rows, width, num_domains, dtype, mode):
    check(*make_case(num_rows, width, num_domains, dtype), num_domains, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_more_columns_than_16_bits(mode):
    check(*make_case(1, 65537, 1, torch.bfloat16), 1, mode=mode)


def case_with_everything(dtype):
    logits_NV, labels_N, domain_N = make_case(5, 307, dtype=dtype)
    labels_N = labels_N % 250
    labels_N[3] = -1
    logits_NV[:, 250:] = math.nan
    more = {"ignore_index": -1, "mask_N": torch.arange(5) != 1, "reference_loss_N": torch.linspace(0, 9, 5)}
    return (logits_NV, labels_N, domain_N), more


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_options_at_once(dtype, mode):
    case, more = case_with_everything(dtype)
    _, grad_NV = check(*case, 3, mode=mode, **ALL_OPTIONS, **more)
    assert not grad_NV[:, 250:].any()
    assert not grad_NV[[1, 3]].any()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("names", list(itertools.combinations(["z_loss", "softcap", "label_smoothing"], 2)))
def test_options_two_at_a_time(names, mode):
    # 515 columns of fp32 are more than one tile, so that options meet both the whole tiles and the rest.
    check(*make_case(2, 515), 3, mode=mode, **{name: ALL_OPTIONS[name] for name in names})


@pytest.mark.parametrize(("softcap", "scale"), [(1000.0, 3.0), (10.0, 2.5), (3.0, 3.0), (1.0, 40.0)])
def test_softcap_keeps_digits_near_zero_and_far_out(softcap, scale):
    # At 1000 the cap hardly acts, and 1 - 2 / (1 + exp(2 x)) alone would be off by 6e-5.
    check(*make_case(2, 300, scale=scale), 3, mode="B", softcap=softcap)


@pytest.mark.parametrize("mode", MODES)
def test_common_offset_costs_no_digits(mode):
    # Multiples of 1/64 stay exact beside 1e4 in fp32, so the loss must not move at all.
    logits_NV, labels_N, domain_N = make_case(3, 600)
    logits_NV = (logits_NV * 64).round() / 64
    near, near_grad = run(logits_NV, labels_N, domain_N, 3, mode=mode, label_smoothing=0.9)
    far, far_grad = run(logits_NV + 1e4, labels_N, domain_N, 3, mode=mode, label_smoothing=0.9)
    assert torch.equal(near.token_loss_N, far.token_loss_N)
    assert torch.equal(near_grad, far_grad)
    torch.testing.assert_close(near.loss, far.loss, rtol=2e-7, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_do_what_the_torch_path_does(dtype, mode):
    logits_NV, labels_N, domain_N = make_case(6, 300, dtype=dtype)
    logits_NV[0, 3] = math.nan
    logits_NV[1, 3] = math.inf
    logits_NV[2] = -math.inf
    labels_N[3] = 4
    logits_NV[3, 4] = -math.inf  # at the label: the loss is infinite
    labels_N[4] = 4
    logits_NV[4, 5] = -math.inf  # elsewhere: harmless
    logits_NV[5, :260] = -math.inf  # whole chunks of -inf
    labels_N[5] = 299
    out, grad_NV = run(logits_NV, labels_N, domain_N, 3, mode=mode)
    leaf_NV = logits_NV.clone().requires_grad_()
    want = domain_cross_entropy(leaf_NV, labels_N, domain_N, 3, return_token_loss=True, implementation="torch")
    want.loss.backward(torch.tensor(3.0))
    assert out.loss.isnan() == want.loss.isnan()
    close = {"equal_nan": True, "rtol": 1e-6, "atol": 2e-6}
    torch.testing.assert_close(out.token_loss_N.cpu(), want.token_loss_N, **close)
    torch.testing.assert_close(
        grad_NV.float(), leaf_NV.grad.float(), equal_nan=True, rtol=0, atol=max(3 * GRADIENT_TOLERANCE[dtype], 1e-6)
    )
    assert torch.equal(out.stats.buffer.cpu()[:, [1, 3]], want.stats.buffer[:, [1, 3]])
    assert want.stats.non_finite.sum() == 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_ignored_rows_count_for_nothing_whatever_they_hold(bad, mode):
    logits_NV, labels_N, domain_N = make_case(4, 300)
    keep_N = torch.tensor([True, False, True, False])
    want, want_grad = run(logits_NV[keep_N], labels_N[keep_N], domain_N[keep_N], 3, mode=mode)
    logits_NV[~keep_N] = bad
    domain_N[~keep_N] = -1
    labels_N[1], labels_N[3] = 10**6, -100
    out, grad_NV = run(logits_NV, labels_N, domain_N, 3, mode=mode, mask_N=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(out.stats.buffer, want.stats.buffer)
    assert torch.equal(grad_NV[keep_N], want_grad)
    assert not grad_NV[~keep_N].any()
    assert not out.token_loss_N[~keep_N].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_rows", [0, 2])
def test_nothing_counted_gives_zero(num_rows, mode):
    labels_N = torch.full((num_rows,), -100)
    out, grad_NV = run(torch.randn(num_rows, 7), labels_N, torch.zeros_like(labels_N), 2, mode=mode)
    assert out.loss.item() == 0.0
    assert grad_NV.shape == (num_rows, 7)
    assert not grad_NV.any()
    assert out.token_loss_N.tolist() == [0.0] * num_rows
    assert not out.stats.buffer.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["labels_N", "domain_N"])
def test_values_that_could_not_be_checked_make_the_loss_nan(name, mode, monkeypatch):
    monkeypatch.setattr(checks, "check_values", lambda *args, **kwargs: None)
    logits_NV, labels_N, domain_N = make_case(4, 300)
    arguments = {"labels_N": labels_N, "domain_N": domain_N}
    arguments[name][[1, 2]] = torch.tensor([-7, 10**9])
    guarded = torch.zeros(5, 4, dtype=torch.int64, device=DEVICE)
    sums = DomainSums.from_buffer(guarded[1:4])
    out, grad_NV = run(logits_NV, *arguments.values(), 3, mode=mode, sums=sums, loss_weights_K=torch.ones(3))
    assert out.loss.isnan()
    assert out.token_loss_N.isnan().tolist() == [False, True, True, False]
    assert grad_NV.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert (sums.non_finite.sum(), sums.tokens.sum()) == (2, 2)
    assert not guarded[[0, 4]].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16])
def test_integer_dtypes(dtype):
    logits_NV, labels_N, domain_N = make_case(3, 100)
    want, _ = run(logits_NV, labels_N, domain_N, 3)
    mask_N = torch.ones(3, dtype=torch.bool if dtype == torch.uint16 else dtype)
    out, _ = run(logits_NV, labels_N.to(torch.int32), domain_N.to(dtype), 3, mask_N=mask_N)
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(out.stats.buffer, want.stats.buffer)


@pytest.mark.parametrize("mode", MODES)
def test_a_part_of_a_tensor_is_left_alone(mode):
    """Its gradient arrives at the whole, and is 0 beside it; the part begins off a 16-byte step."""
    logits_NV, labels_N, domain_N = make_case(3, 300)
    want, want_grad = run(logits_NV, labels_N, domain_N, 3, mode=mode)
    base = torch.full((3, 2, 333), 7.0, device=DEVICE)
    base[:, 1, 5:305] = logits_NV.to(DEVICE)
    root = base.clone().requires_grad_() * 1
    root.retain_grad()
    scale = 3.0 if mode == "A" else None
    out = domain_cross_entropy(
        root[:, 1, 5:305], on_device(labels_N), on_device(domain_N), 3, gradient_scale=scale, implementation="triton"
    )
    (out.loss * 3.0).backward()
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-6, atol=0)
    assert torch.equal(root.detach(), base)
    beside = torch.ones(3, 2, 333, dtype=torch.bool)
    beside[:, 1, 5:305] = False
    assert root.grad is not None
    torch.testing.assert_close(root.grad[:, 1, 5:305].cpu(), want_grad, rtol=1e-5, atol=1e-7)
    assert (root.grad.cpu()[beside] == 0.0).all()


def test_vectors_with_strides():
    logits_NV, labels_N, domain_N = make_case(4, 60)
    more = {"mask_N": torch.tensor([1, 1, 0, 1]), "reference_loss_N": torch.linspace(0, 9, 4)}
    more["loss_weights_K"] = torch.tensor([0.5, 1.0, 2.0])
    want, want_grad = run(logits_NV, labels_N, domain_N, 3, **more)

    def apart(values):
        return torch.stack([values, torch.full_like(values, 77)], dim=1).to(DEVICE)[:, 0]

    spread = {name: apart(value) for name, value in more.items()}
    out, grad_NV = run(logits_NV, apart(labels_N), apart(domain_N), 3, **spread)
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(out.stats.buffer, want.stats.buffer)
    assert torch.equal(grad_NV, want_grad)


def test_offsets_beyond_32_bits():
    # Three rows 2**30 elements apart; only the pages that are used become memory.
    logits_NV, labels_N, domain_N = make_case(3, 40, dtype=torch.float16)
    far_NV = torch.empty(2**31 + 40, dtype=torch.float16, device=DEVICE).as_strided((3, 40), (2**30, 1))
    far_NV.copy_(logits_NV)
    want, _ = run(logits_NV, labels_N, domain_N, 3)
    out = domain_cross_entropy(
        far_NV, on_device(labels_N), on_device(domain_N), 3, return_token_loss=True, implementation="triton"
    )
    assert torch.equal(out.token_loss_N, want.token_loss_N)
    assert torch.equal(out.stats.buffer, want.stats.buffer)


def test_folding_in_the_loss_scale_before_rounding():
    # Alone, most of these fp16 gradients lie below the smallest number; the loss scale must reach them first.
    case = make_case(2, 4096, dtype=torch.float16)
    want_NV = oracle(*case, 3, normaliser=8192)[1] * 2.0**16
    for mode in MODES:
        _, grad_NV = run(*case, 3, mode=mode, incoming=2.0**16, normaliser=8192)
        torch.testing.assert_close(grad_NV.double(), want_NV, rtol=2**-9, atol=2**-23)


def test_scales_that_only_the_device_knows():
    case = make_case(3, 100)
    want, want_grad = run(*case, 3, mode="A", incoming=0.5, normaliser=7.0)
    leaf_NV = case[0].to(DEVICE).requires_grad_()
    out = domain_cross_entropy(
        leaf_NV,
        *(on_device(case[1]), on_device(case[2]), 3),
        normaliser=torch.tensor(7.0, device=DEVICE),
        gradient_scale=torch.tensor(0.5, device=DEVICE),
        implementation="triton",
    )
    (out.loss * 0.5).backward()
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf_NV.grad.cpu(), want_grad, rtol=1e-6, atol=1e-9)


def test_the_modes_agree_to_the_last_bit():
    case, more = case_with_everything(torch.float32)
    (first, first_grad), (second, second_grad) = (run(*case, 3, mode=mode, **ALL_OPTIONS, **more) for mode in MODES)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first_grad, second_grad)
    assert torch.equal(first.stats.buffer, second.stats.buffer)


def test_sums_are_those_of_the_token_losses():
    # The kernel's own rounding and range rules against those of DomainSums.add, on the very same losses.
    logits_NV, labels_N, domain_N = make_case(8, 70, scale=6.0)
    # Losses below 0.5 nats have digits beyond 2**-24, which are rounded away.
    logits_NV[torch.arange(4, 8), labels_N[4:8]] = torch.tensor([18.0, 19.0, 20.0, 21.0])
    logits_NV[2, labels_N[2]] = -1.5 * MAX_TOKEN_NATS
    logits_NV[3, labels_N[3]] = -0.75 * MAX_TOKEN_NATS
    reference_N = torch.linspace(0, 9, 8)
    reference_N[5] = math.inf
    out, _ = run(logits_NV, labels_N, domain_N, 3, reference_loss_N=reference_N)
    want = DomainSums(3).add(domain_N, out.token_loss_N.cpu(), reference_loss_N=reference_N)
    assert torch.equal(out.stats.buffer.cpu(), want.buffer)
    assert want.non_finite.sum() == 2
    assert (out.token_loss_N[4:] * 2**24 % 1 != 0).any()


@pytest.mark.parametrize(("width", "rows_together"), [(96, 1), (92, 2)])
def test_order_and_micro_batches_change_no_bit_of_the_sums(width, rows_together):
    """Rows of 96 bf16 logits all begin at a multiple of 16 bytes, of 92 every second one: there the last bits of a
    row's loss depend on its place, so that only pairs of rows change places."""
    logits_NV, labels_N, domain_N = make_case(12, width, num_domains=4, dtype=torch.bfloat16)
    labels_N[4] = -100
    whole, _ = run(logits_NV, labels_N, domain_N, 4)
    order = torch.randperm(12 // rows_together, generator=torch.Generator().manual_seed(1))
    order_N = (order[:, None] * rows_together + torch.arange(rows_together)).flatten()
    shuffled, _ = run(logits_NV[order_N], labels_N[order_N], domain_N[order_N], 4)
    assert torch.equal(shuffled.stats.buffer, whole.stats.buffer)
    sums = DomainSums(4, DEVICE)
    for rows in (slice(2), slice(2, 6), slice(6, 12)):
        run(logits_NV[rows], labels_N[rows], domain_N[rows], 4, mode="A", sums=sums, normaliser=11)
    assert torch.equal(sums.buffer, whole.stats.buffer)
    assert whole.stats.tokens.sum() == 11


@pytest.mark.parametrize("num_domains", [1, 3])
@pytest.mark.skipif(not implementation.INTERPRETED, reason="counts atomics of the interpreter")
def test_rows_of_one_domain_are_added_together_where_ranks_share_the_vocabulary(num_domains, monkeypatch):
    """A block of rows with one domain adds once to each of its sums, else every row does."""
    from triton.runtime.interpreter import InterpreterBuilder

    logits_NV, labels_N, _ = make_case(5, 40)
    labels_N[2] = -100
    domain_N = torch.arange(5) % num_domains
    lanes, add = [], InterpreterBuilder.create_atomic_rmw

    def counted(builder, operation, pointer, value, mask, *others):
        lanes.append(int(mask.data.sum()))
        return add(builder, operation, pointer, value, mask, *others)

    want, _ = run(logits_NV, labels_N, domain_N, num_domains, reference_loss_N=torch.linspace(0, 9, 5))
    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", counted)
    monkeypatch.setattr(implementation, "gather_partials", lambda partials_4N, group: partials_4N[None])
    group = mock.Mock(spec=torch.distributed.ProcessGroup, size=lambda: 1, rank=lambda: 0)
    out, _ = run(
        logits_NV, labels_N, domain_N, num_domains, reference_loss_N=torch.linspace(0, 9, 5), process_group=group
    )
    assert torch.equal(out.stats.buffer, want.stats.buffer)
    # Of nats, tokens and excess; none is not finite.
    assert lanes == ([1, 1, 1, 0] if num_domains == 1 else [4, 4, 4, 0])
