"""What a call notices of its tensors after it: a refilled normaliser, a broken promise, sums that wrapped; and a
normaliser of 0.

Shapes: N tokens, H hidden, V vocabulary, K domains.
"""

import math

import pytest
import torch
from loss_oracle import make_case

from megamix_kernels import DomainSums, checks, domain_cross_entropy, linear_domain_cross_entropy
from megamix_kernels.linear import add_product, default_chunk_rows
from megamix_kernels.loss import assert_promise, check_promise


def loss_of(form, logits_NV, *others, **options):
    """The loss of the logits, or of hidden states that give these logits."""
    if form == "logits":
        return domain_cross_entropy(logits_NV, *others, **options).loss
    return linear_domain_cross_entropy(logits_NV, torch.eye(logits_NV.shape[1]), *others, **options).loss


def known_to_the_device_only(monkeypatch):
    """Scalars stay tensors, as on a device, whose values the host does not read."""
    monkeypatch.setattr(checks, "check_scalar", lambda name, value, device, *, positive: value)


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_a_normaliser_refilled_before_the_backward_pass_raises(form, monkeypatch):
    known_to_the_device_only(monkeypatch)
    logits_NV, labels_N, domain_N = make_case(5, 7)
    normaliser = torch.tensor(5.0)
    loss = loss_of(form, logits_NV.requires_grad_(), labels_N, domain_N, 3, normaliser=normaliser)
    normaliser.fill_(9.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("device_only", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_a_normaliser_of_zero_where_all_rows_are_ignored(form, scale, device_only, monkeypatch):
    if device_only:
        known_to_the_device_only(monkeypatch)
    logits_NV, _, domain_N = make_case(5, 7)
    labels_N = torch.full((5,), -100)
    leaf_NV = logits_NV.requires_grad_()
    loss = loss_of(form, leaf_NV, labels_N, domain_N, 3, normaliser=torch.tensor(0.0), gradient_scale=scale)
    loss.backward()
    assert loss.item() == 0.0
    assert leaf_NV.grad.tolist() == torch.zeros(5, 7).tolist()


def test_a_normaliser_of_zero_with_rows_to_divide_is_refused():
    for normaliser in (torch.tensor(0), torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"normaliser must be finite and positive, got 0.0 for 5 counted rows"):
            domain_cross_entropy(*make_case(5, 7), 3, normaliser=normaliser)


def test_promises_are_compared_in_the_same_way_on_the_host_and_on_the_device():
    for promised in (0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)):
        for came, is_kept in [
            (0.25, True),
            (0.25 * (1 + 5e-7), True),
            (0.2501, False),
            (0.0, False),
            (math.nan, False),
        ]:
            for check in (check_promise, assert_promise):
                if is_kept:
                    check(torch.tensor(came), promised)
                else:
                    with pytest.raises(RuntimeError, match=r"gradient_scale promised"):
                        check(torch.tensor(came), promised)


@pytest.mark.parametrize(("column", "name"), [(0, "nats"), (2, "excess_nats")])
def test_a_total_that_has_wrapped_reads_as_nan(column, name):
    sums = DomainSums(2)
    for _ in range(2):
        sums.buffer[:, column] += torch.tensor([2**62, 2**62 - 2**40])  # int64 wraps in the first row
        sums.buffer[:, 1] += 2**30
    first, second = getattr(sums, name).tolist()
    assert math.isnan(first)
    assert second == (2**63 - 2**41) / 2**24
    # A loss of zero, rounded down.
    assert DomainSums(1).add(torch.zeros(1).long(), torch.full((1,), -1e-6)).nats.item() == -17 / 2**24


def test_the_wide_product_of_devices_has_the_signature_that_torch_knows():
    # A CPU has no such product; the meta device checks arguments, shapes and dtypes of the call that CUDA gets.
    left_VR = torch.empty(30, 9, dtype=torch.bfloat16, device="meta")
    right_RH = torch.empty(9, 8, dtype=torch.bfloat16, device="meta")
    total_VH = add_product(None, left_VR, right_RH, torch.float32)
    assert (total_VH.shape, total_VH.dtype, total_VH.device.type) == ((30, 8), torch.float32, "meta")
    assert add_product(total_VH, left_VR, right_RH, torch.float32) is total_VH


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_are_summed_in_the_wider_dtype(dtype):
    left_VR, right_RH = torch.randn(5, 4).to(dtype), torch.randn(4, 3).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total_VH = add_product(None, left_VR, right_RH, wide)
    same = add_product(total_VH, left_VR, right_RH, wide)
    assert same is total_VH
    assert total_VH.dtype == wide
    want_VH = 2 * (left_VR.double() @ right_RH.double())
    torch.testing.assert_close(total_VH.double(), want_VH, rtol=1e-5, atol=1e-5)


def test_chunks_have_a_multiple_of_128_rows():
    assert [default_chunk_rows(width) for width in (1, 50304, 128256, 2**28)] == [2**28, 5248, 2048, 128]
