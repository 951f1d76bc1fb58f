"""The Triton path and the logits it has written its gradient over; checkpointing; rows of weight 0.

Run like numerics.py beside this file.

Shapes: N tokens, V vocabulary, K domains.
"""

import pytest
import torch
from loss_oracle import make_case, oracle
from loss_surroundings import FORMS, check_checkpointing

from megamix_kernels import domain_cross_entropy
from megamix_kernels import triton_loss as implementation

DEVICE = "cpu" if implementation.INTERPRETED else "cuda"


def leaf_and_others(num_rows=3):
    logits_NV, labels_N, domain_N = (tensor.to(DEVICE) for tensor in make_case(num_rows, 40))
    return logits_NV.requires_grad_(), (labels_N, domain_N, 3)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_recomputation_adds_nothing_to_the_sums(form, reentrant):
    check_checkpointing(form, "triton", DEVICE, reentrant)


@pytest.mark.parametrize("again", ["triton", "torch"])
@pytest.mark.parametrize("view", ["itself", "reshaped", "detached", "part"])
@pytest.mark.parametrize("mode", ["A", "B"])
def test_a_call_on_logits_that_have_become_a_gradient_is_refused(mode, view, again):
    leaf_NV, others = leaf_and_others()
    logits_NV = leaf_NV * 1
    scale = 1.0 if mode == "A" else None
    loss = domain_cross_entropy(logits_NV, *others, gradient_scale=scale, implementation="triton").loss
    if mode == "B":
        loss.backward()
    labels_N, domain_N, num_domains = others
    views = {
        "itself": logits_NV,
        "reshaped": logits_NV.view(3, 1, 40).flatten(0, 1),
        "detached": logits_NV.detach(),
        "part": logits_NV[:2],
    }
    rows = len(views[view])
    with pytest.raises(RuntimeError, match="hold the gradient that an earlier domain_cross_entropy wrote over them"):
        domain_cross_entropy(views[view], labels_N[:rows], domain_N[:rows], num_domains, implementation=again)


def test_logits_that_are_filled_again_are_logits():
    leaf_NV, others = leaf_and_others()
    logits_NV = leaf_NV * 1
    first = domain_cross_entropy(logits_NV, *others, gradient_scale=1.0, implementation="triton").loss
    with torch.no_grad():
        logits_NV.copy_(leaf_NV)
        second = domain_cross_entropy(logits_NV, *others, implementation="triton").loss
    assert torch.equal(first, second)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_losses_of_the_parts_of_one_tensor(scale):
    leaf_NV, (labels_N, domain_N, num_domains) = leaf_and_others(4)
    logits_NV = leaf_NV * 1
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        total = (
            total
            + 0.5
            * domain_cross_entropy(
                *(logits_NV[rows], labels_N[rows], domain_N[rows], num_domains),
                normaliser=4.0,
                gradient_scale=scale,
                implementation="triton",
            ).loss
        )
    total.backward()
    loss, grad_NV, *_ = oracle(leaf_NV.detach().cpu(), labels_N.cpu(), domain_N.cpu(), 3)
    torch.testing.assert_close(total.cpu().double(), 0.5 * loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf_NV.grad.cpu().double(), 0.5 * grad_NV, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_rows_of_weight_zero_add_nothing_whatever_their_loss(scale):
    leaf_NV, (labels_N, _, _) = leaf_and_others(4)
    domain_N = torch.tensor([0, 1, 0, 1], device=DEVICE)
    with torch.no_grad():
        leaf_NV[0, labels_N[0]] = -torch.inf
        leaf_NV[2] = torch.nan
    weights = torch.tensor([0.0, 2.0], device=DEVICE)
    out = domain_cross_entropy(
        *(leaf_NV * 1, labels_N, domain_N, 2), loss_weights_K=weights, gradient_scale=scale, implementation="triton"
    )
    out.loss.backward()
    logits_NV, labels_N = leaf_NV.detach().cpu()[1::2], labels_N.cpu()[1::2]
    loss, grad_NV, *_ = oracle(logits_NV, labels_N, torch.ones(2).long(), 2, normaliser=2)
    torch.testing.assert_close(out.loss.cpu().double(), loss, rtol=1e-6, atol=0)
    assert not leaf_NV.grad[::2].any()
    torch.testing.assert_close(leaf_NV.grad[1::2].cpu().double(), grad_NV, rtol=1e-5, atol=1e-7)
    assert out.stats.non_finite.tolist() == [2, 0]


def test_a_normaliser_of_zero_where_all_rows_are_ignored():
    leaf_NV, (labels_N, domain_N, _) = leaf_and_others()
    labels_N.fill_(-100)
    normaliser = torch.zeros((), device=DEVICE)
    loss = domain_cross_entropy(leaf_NV * 1, labels_N, domain_N, 3, normaliser=normaliser, implementation="triton").loss
    loss.backward()
    assert loss.item() == 0.0
    assert not leaf_NV.grad.any()
