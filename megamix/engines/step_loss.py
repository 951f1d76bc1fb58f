"""Loss function of an engine's last stage, with the domain sums of a step, and the check that a step is finite.

Legend: M micro-batches, B samples, S tokens, H hidden size, V vocabulary, K domains, C statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megamix.core.errors import InputError
from megamix.data.loader import IGNORED_LABEL
from megamix.engines.models.factors import OutputFactors
from megamix_kernels import DomainSums, LossOptions, domain_cross_entropy, linear_domain_cross_entropy
from megamix_kernels.loss import choose_backend
from megamix_kernels.sums import MAX_TOKEN_NATS, NON_FINITE


@dataclass(frozen=True)
class Objective:
    """Objective of a step: the sum over its tokens of loss_weights[domain] * loss / normaliser.

    Attributes:
        normaliser: counted tokens of the global batch, which every rank knows before the forward pass.
        loss_weights: float32 [K] on the engine's device; None weighs every token 1.
    """

    normaliser: float
    loss_weights: torch.Tensor | None = None


class StepLoss:
    """Loss of each micro-batch; adds the token losses to their domains' sums.

    In training it hands the step's sums over after the last micro-batch; in evaluation it only collects them.

    Args:
        vocab_size: token ids that join the softmax, over all ranks of ``process_group``.
        process_group: ranks that share the vocabulary; None: the logits hold all of it.
        sample_dim: dimension of the samples in logits and targets: 0, or 1 where tokens come first.

    Raises:
        InputError: the implementation cannot be used on the device.
    """

    def __init__(
        self,
        num_domains: int,
        vocab_size: int,
        device: torch.device,
        implementation: str,
        process_group: Any = None,
        sample_dim: int = 0,
    ) -> None:
        self._num_domains = num_domains
        self._process_group = process_group
        self._token_dim = 1 - sample_dim
        try:
            self._options = LossOptions(
                ignore_index=IGNORED_LABEL,
                vocab_size=vocab_size,
                process_group=process_group,
                implementation=implementation,
            )
            choose_backend(implementation, torch.empty(1, 1, device=device))
        except ValueError as error:
            raise InputError(f"loss.implementation: {error}.") from error
        self._training = DomainSums(num_domains, device)
        self._evaluation = DomainSums(num_domains, device)
        self._objective = Objective(1.0)
        self._gradient_scale: float | None = None
        self._left = 0
        self._bad: list[torch.Tensor] = []
        self._token_losses: list[torch.Tensor] | None = None
        self._on_statistics: Callable[[torch.Tensor], None] | None = None

    def share_vocabulary(self, process_group: Any) -> None:
        """From now on the logits hold a part of the vocabulary, as if ``process_group`` had been given at first."""
        if process_group is self._process_group:
            return
        self._process_group = process_group
        self._options = replace(self._options, process_group=process_group)

    def start_step(
        self,
        num_micro_batches: int,
        objective: Objective,
        gradient_scale: float | None,
        on_statistics: Callable[[torch.Tensor], None],
    ) -> None:
        """Begins a training step.

        Args:
            num_micro_batches: number of calls in the step.
            gradient_scale: the gradient that the engine's backward pass will send to each loss, if known; loss and
                gradient then take one reading of the logits.
            on_statistics: receives the step's int64 [K, C] sums.
        """
        self._training.zero_()
        self._bad = []
        self._left = num_micro_batches
        self._objective = objective
        self._gradient_scale = gradient_scale
        self._on_statistics = on_statistics

    def start_evaluation(self, *, keep_token_losses: bool = False) -> None:
        self._evaluation.zero_()
        self._on_statistics = None
        self._token_losses = [] if keep_token_losses else None

    @property
    def evaluation_sums(self) -> torch.Tensor:
        """int64 [K, C] sums of the evaluation in progress."""
        return self._evaluation.buffer

    @property
    def non_finite_counts(self) -> torch.Tensor | None:
        """Tokens of each sample that the sums of the training step count as non-finite, int32 [M, B]; None on all but
        one of the ranks that share the vocabulary."""
        speaks = self._process_group is None or dist.get_rank(self._process_group) == 0
        return torch.stack(self._bad) if speaks else None

    @property
    def non_finite_tokens(self) -> torch.Tensor:
        """Non-finite tokens of the training step, int64 []; counted once where ranks share the vocabulary."""
        return self._training.buffer[:, NON_FINITE].sum()

    def token_losses(self) -> torch.Tensor | None:
        """Returns the token losses that the evaluation kept, float32 [M, B, S]; None without micro-batches."""
        kept, self._token_losses = self._token_losses, None
        return torch.stack(kept) if kept else None

    def __call__(self, output: torch.Tensor | OutputFactors, targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Returns the scalar to differentiate of one micro-batch.

        Args:
            output: logits [B, S, V] of this rank's part of the vocabulary, or their factors.
            targets: labels int64, domains int32 and, with a reference model, its losses float32, [B, S] each.
        """
        labels_BS, domain_BS, *reference_BS = targets
        training = self._on_statistics is not None
        tokens = (labels_BS.flatten(), domain_BS.flatten(), self._num_domains)
        options: dict[str, Any] = {
            "reference_loss_N": reference_BS[0].flatten() if reference_BS else None,
            "loss_weights_K": self._objective.loss_weights if training else None,
            "sums": self._training if training else self._evaluation,
            "options": self._options,
            "normaliser": self._objective.normaliser if training else 1.0,
            "gradient_scale": self._gradient_scale if training else None,
            "return_token_loss": training or self._token_losses is not None,
        }
        if isinstance(output, OutputFactors):
            factors = (output.hidden.flatten(0, 1), output.weight_VH)
            options["weight_gradient_VH"] = output.weight_gradient_VH
            out = linear_domain_cross_entropy(*factors, *tokens, **options)
        else:
            out = domain_cross_entropy(output.flatten(0, 1), *tokens, **options)
        if self._token_losses is not None and out.token_loss_N is not None:
            self._token_losses.append(out.token_loss_N.detach().view_as(labels_BS))
        if training:
            assert self._on_statistics is not None
            assert out.token_loss_N is not None
            self._bad.append(self._count_bad(out.token_loss_N.view_as(labels_BS), labels_BS, *reference_BS))
            self._left -= 1
            if self._left == 0:
                self._on_statistics(self._training.buffer)
        return out.loss

    def _count_bad(
        self, loss_BS: torch.Tensor, labels_BS: torch.Tensor, reference_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens of each sample that `DomainSums` leaves out, int32 [B]; does not wait for the device."""
        # Comparisons with NaN are false.
        bad_BS = ~(loss_BS.detach().abs() <= MAX_TOKEN_NATS)
        if reference_BS is not None:
            bad_BS |= ~(reference_BS.abs() <= MAX_TOKEN_NATS) & (labels_BS != IGNORED_LABEL)
        return bad_BS.sum(self._token_dim, dtype=torch.int32)


def is_finite_everywhere(gradients: Sequence[torch.Tensor], bad_tokens: torch.Tensor) -> bool:
    """Returns whether every loss and the gradient norm are finite over all ranks of the job; the same on all ranks.
    Takes one all-reduce, and the step's only host read.

    Args:
        gradients: this rank's gradients, summed over the batch; ranks may hold copies or parts.
        bad_tokens: this rank's tokens with a non-finite loss, [] on the device.
    """
    norm = torch.nn.utils.get_total_norm(gradients).to(bad_tokens.device, torch.float32)
    # Squares: a norm that overflows fp32 in the engine then overflows here as well.
    numbers = torch.stack([norm.square(), bad_tokens.to(torch.float32)])
    dist.all_reduce(numbers)
    square, bad = numbers.tolist()
    return math.isfinite(square) and bad == 0
