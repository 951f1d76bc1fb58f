"""The domain loss under activation checkpointing, for the tests of both paths.

Shapes: N tokens, H hidden, V vocabulary, K domains.
"""

import torch
from torch.utils.checkpoint import checkpoint

from megamix_kernels import DomainSums, domain_cross_entropy, linear_domain_cross_entropy

FORMS = ["A", "B", "linear"]
INCOMING = 0.5


def sums_and_gradients(form, implementation, device, reentrant=None):
    """The sums' buffer and the gradients of hidden states and weight; ``reentrant`` None is without checkpointing."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(4, 6, generator=generator).to(device).requires_grad_()
    weight_VH = torch.randn(40, 6, generator=generator).to(device).requires_grad_()
    labels_N = torch.tensor([3, 39, 0, 7], device=device)
    domain_N = torch.tensor([0, 1, 1, 0], device=device)
    sums = DomainSums(2, device)
    options = {"sums": sums, "implementation": implementation, "gradient_scale": None if form == "B" else INCOMING}

    def loss(hidden_NH, weight_VH):
        if form == "linear":
            return linear_domain_cross_entropy(hidden_NH, weight_VH, labels_N, domain_N, 2, **options).loss
        return domain_cross_entropy(hidden_NH @ weight_VH.T, labels_N, domain_N, 2, **options).loss

    if reentrant is None:
        value = loss(hidden_NH, weight_VH)
    else:
        value = checkpoint(loss, hidden_NH, weight_VH, use_reentrant=reentrant)
    (value * INCOMING).backward()
    return sums.buffer.cpu(), hidden_NH.grad.cpu(), weight_VH.grad.cpu()


def check_checkpointing(form, implementation, device, reentrant):
    """Asserts that tokens are counted once and gradients stay what they are without checkpointing."""
    found = sums_and_gradients(form, implementation, device, reentrant)
    wanted = sums_and_gradients(form, implementation, device)
    assert found[0][:, 1].tolist() == [2, 2]
    assert torch.equal(found[0], wanted[0])
    for gradient, want in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-7)
