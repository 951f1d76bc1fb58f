"""Cross-entropy with loss sums for each domain of the tokens.

    out = domain_cross_entropy(logits_NV, labels_N, domain_N, num_domains=K)
    out.loss.backward()                 # the scalar to differentiate
    out.stats.nats / out.stats.tokens   # mean loss of each domain, from exact integer sums

This package imports torch and nothing from megamix, so any trainer can use it.
"""

from megamix_kernels.linear import linear_domain_cross_entropy
from megamix_kernels.loss import DomainLoss, domain_cross_entropy
from megamix_kernels.options import LossOptions
from megamix_kernels.sums import DomainSums

__all__ = ["DomainLoss", "DomainSums", "LossOptions", "domain_cross_entropy", "linear_domain_cross_entropy"]
