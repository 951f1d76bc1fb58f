"""The domain loss written out in float64, row by row of its definition, and random cases for it.

Shapes: N tokens, V logits a token, K domains.
"""

import torch
import torch.nn.functional as F

# Relative to the largest gradient. The arithmetic: exp turns the rounding of its argument, which is as large as the
# largest logit, into a relative error, and logits here reach 16. The short formats also round the result.
_ARITHMETIC = {dtype: 16 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
_SHORT = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16)}
GRADIENT_TOLERANCE = {**_ARITHMETIC, **{dtype: _ARITHMETIC[torch.float32] + half for dtype, half in _SHORT.items()}}


def make_case(num_rows=37, width=57, num_domains=3, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits_NV = (torch.randn(num_rows, width, generator=generator, dtype=torch.float64) * scale).to(dtype)
    labels_N = torch.randint(0, width, (num_rows,), generator=generator)
    domain_N = torch.randint(0, num_domains, (num_rows,), generator=generator)
    return logits_NV, labels_N, domain_N


def oracle(
    logits_NV,
    labels_N,
    domain_N,
    num_domains,
    *,
    mask_N=None,
    loss_weights_K=None,
    reference_loss_N=None,
    ignore_index=-100,
    z_loss=0.0,
    softcap=0.0,
    label_smoothing=0.0,
    vocab_size=None,
    normaliser=None,
):
    """The documented formulas in float64 with autograd: (loss, gradient, token losses, nats, tokens, excess)."""
    leaf_NV = logits_NV.detach().double().requires_grad_()
    counted_N = labels_N != ignore_index
    if mask_N is not None:
        counted_N = counted_N & mask_N.bool()
    kept = counted_N.nonzero()[:, 0]
    label, domain = labels_N[kept].long(), domain_N[kept].long()
    scores = leaf_NV[kept, :vocab_size]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    log_p = torch.log_softmax(scores, dim=1)
    target = (1 - label_smoothing) * F.one_hot(label, scores.shape[1]).double() + label_smoothing / scores.shape[1]
    objective = -(target * log_p).sum(1) + z_loss * torch.logsumexp(scores, dim=1) ** 2
    weight = torch.ones(len(kept)).double() if loss_weights_K is None else loss_weights_K.double()[domain]
    loss = (weight * objective).sum() / (max(len(kept), 1) if normaliser is None else float(normaliser))
    (grad_NV,) = torch.autograd.grad(loss, leaf_NV)

    nll = -log_p.detach().gather(1, label[:, None])[:, 0]
    excess = torch.zeros_like(nll)
    if reference_loss_N is not None:
        excess = (nll - reference_loss_N[kept].double()).clamp(min=0)
    token_loss_N = torch.zeros(len(labels_N)).double().index_put((kept,), nll)
    tokens_K, nats_K, excess_K = (torch.bincount(domain, value, num_domains) for value in (None, nll, excess))
    return loss.detach(), grad_NV, token_loss_N, nats_K, tokens_K, excess_K
