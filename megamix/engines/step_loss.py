"""The loss function an engine calls on its last stage: the scalar to differentiate, and the sums per domain of the
step.

Legend: B samples, S tokens, V vocabulary, K domains, C statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megamix.data.loader import IGNORED_LABEL
from megamix.errors import InputError
from megamix_kernels import DomainSums, domain_cross_entropy
from megamix_kernels.loss import choose_backend


class StepLoss:
    """Called once per micro-batch; adds each token's loss to its domain's sums.

    In training it hands the step's sums over after the last micro-batch; in evaluation it only collects.

    Raises:
        InputError: the implementation cannot be used on the device.
    """

    def __init__(self, num_domains: int, vocab_size: int, device: torch.device, implementation: str) -> None:
        self._num_domains = num_domains
        self._vocab_size = vocab_size
        try:
            choose_backend(implementation, torch.empty(1, 1, device=device))
        except ValueError as error:
            raise InputError(f"loss.implementation: {error}.") from error
        self._implementation = implementation
        self._training = DomainSums(num_domains, device)
        self._evaluation = DomainSums(num_domains, device)
        self._normaliser = self._gradient_scale = 1.0
        self._left = 0
        self._on_statistics: Callable[[torch.Tensor], None] | None = None

    def start_step(
        self,
        num_micro_batches: int,
        normaliser: float,
        gradient_scale: float,
        on_statistics: Callable[[torch.Tensor], None],
    ) -> None:
        """Begins a training step.

        Args:
            num_micro_batches: calls to come.
            normaliser: what each divides its sum of losses by.
            gradient_scale: the gradient that the engine's backward pass will send to each loss; known before, it lets
                loss and gradient be computed in one reading of the logits.
            on_statistics: takes the step's int64 [K, C] sums.
        """
        self._training.zero_()
        self._left = num_micro_batches
        self._normaliser = normaliser
        self._gradient_scale = gradient_scale
        self._on_statistics = on_statistics

    def start_evaluation(self, num_micro_batches: int) -> None:
        self._evaluation.zero_()
        self._left = num_micro_batches
        self._on_statistics = None

    @property
    def evaluation_sums(self) -> torch.Tensor:
        """int64 [K, C]: what the evaluation in progress has collected."""
        return self._evaluation.buffer

    def __call__(self, logits_BSV: torch.Tensor, targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
        labels_BS, domain_BS = targets
        training = self._on_statistics is not None
        out = domain_cross_entropy(
            logits_BSV.flatten(0, 1),
            labels_BS.flatten(),
            domain_BS.flatten(),
            self._num_domains,
            ignore_index=IGNORED_LABEL,
            vocab_size=self._vocab_size,
            normaliser=self._normaliser,
            gradient_scale=self._gradient_scale if training else None,
            sums=self._training if training else self._evaluation,
            implementation=self._implementation,
        )
        self._left -= 1
        if training and self._left == 0:
            assert self._on_statistics is not None
            self._on_statistics(self._training.buffer)
        return out.loss
