"""Validation losses of domains with their standard errors, from the loss sums of documents.

The tokens of a document are not independent, its documents are taken to be. With n documents in a domain's samples, the
nats s_d and tokens t_d of each, and T the sum of t_d:

    loss L = sum of s_d / T          standard error = sqrt(n / (n - 1) * sum of (s_d - L t_d)^2) / T

which is the ratio estimator's for clusters of different sizes (Cochran, Sampling Techniques, 1977, section 6.3). Sums
are integers, as in `megamix_kernels.sums`, so that no layout changes a loss.

Legend: K domains, D documents, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megamix.training.objective import weighted_loss
from megamix_kernels.sums import MAX_TOKEN_NATS, UNITS_PER_NAT

Ints = NDArray[np.int64]
NATS, TOKENS = range(2)


class DocumentSums:
    """Loss sums of D documents: ``buffer`` int64 [D, 2] has units of 2**-24 nats and tokens, to be added over ranks.

    A token whose loss is not finite or above 2**20 nats is left out.
    """

    def __init__(self, num_documents: int, device: torch.device | str = "cpu") -> None:
        self.buffer = torch.zeros(num_documents, 2, dtype=torch.int64, device=device)

    def add(self, document_N: torch.Tensor, loss_N: torch.Tensor, counted_N: torch.Tensor) -> None:
        """Adds tokens.

        Args:
            document_N: int64, each token's document.
            loss_N: float32 or float64, nats.
            counted_N: bool; False leaves a token out.
        """
        good_N = counted_N & (loss_N.abs() <= MAX_TOKEN_NATS)  # a comparison with NaN is false
        nats_N = torch.where(good_N, loss_N, 0.0).mul(UNITS_PER_NAT).round().to(torch.int64)
        self.buffer.index_add_(0, document_N, torch.stack([nats_N, good_N.long()], dim=1))

    def losses(self, domain_D: Ints, names: tuple[str, ...]) -> DomainLosses:
        """The losses of K domains.

        Args:
            domain_D: each document's domain.
        """
        sums_D2 = self.buffer.cpu().numpy()
        loss, error = {}, {}
        for domain, name in enumerate(names):
            sums_d2 = sums_D2[domain_D == domain]
            sums_d2 = sums_d2[sums_d2[:, TOKENS] > 0]
            loss[name], error[name] = ratio(sums_d2[:, NATS] / UNITS_PER_NAT, sums_d2[:, TOKENS])
        return DomainLosses(loss, error)


def ratio(nats_d: NDArray[np.float64], tokens_d: Ints) -> tuple[float | None, float | None]:
    """(loss, its standard error) by the module's formulas, nats per token; None without tokens, and without a second
    document."""
    total, number = int(tokens_d.sum()), tokens_d.size
    if total == 0:
        return None, None
    loss = math.fsum(nats_d.tolist()) / total
    if number < 2:
        return loss, None
    square = float(((nats_d - loss * tokens_d) ** 2).sum())
    return loss, math.sqrt(number / (number - 1) * square) / total


@dataclass(frozen=True)
class DomainLosses:
    """Losses of K domains and their standard errors by name, nats per token; None where there is none."""

    loss: dict[str, float | None]
    error: dict[str, float | None]

    def weighted(self, weights: Mapping[str, float]) -> tuple[float | None, float | None]:
        """(loss, its standard error) under weights of the domains, whose samples are independent."""
        squares = weighted_loss(
            {name: weight**2 for name, weight in weights.items()},
            {name: None if error is None else error**2 for name, error in self.error.items()},
        )
        return weighted_loss(weights, self.loss), None if squares is None else math.sqrt(squares)

    def line(self, objective: Mapping[str, float], natural: Mapping[str, float]) -> dict[str, Any]:
        """The losses as an ``evaluate`` line of metrics.jsonl has them.

        Args:
            objective, natural: weights of the domains, each with sum 1.
        """
        known = {name: loss for name, loss in self.loss.items() if loss is not None}
        worst = max(known, key=lambda name: known[name]) if known else None
        loss, error = self.weighted(objective)
        return {
            "objective_loss": loss,
            "objective_error": error,
            "domain_loss": self.loss,
            "domain_error": self.error,
            "macro_loss": sum(known.values()) / len(known) if known else None,
            "micro_loss": self.weighted(natural)[0],
            "worst_domain": worst,
            "worst_loss": None if worst is None else known[worst],
            "objective": dict(objective),
        }
