"""Domains that learn by scaling curves, without a model: for choosing and testing mixers in seconds."""

from __future__ import annotations

import numpy as np

from megamix.mixing.mixers import DomainStats, Mixer

SAMPLE_TOKENS = 256


class World:
    """Domain i has the loss E + A (1 + n / scale)^-b after n effective tokens: its own and a part of the others'.

    Measured losses are noisy, as those of a few samples are. All constants are drawn from ``seed``.

    Args:
        num_learnable: domains with E of 1 to 3, b of 0.15 to 0.6 and A such that all begin at 7.6, about ln(2000).
        noise: how many more domains there are whose loss soon is 5 and stays there.
        transfer: how much a token of another domain is worth on average, as part of one's own.
        natural_spread: standard deviation of the logarithms of the domains' natural weights.
    """

    def __init__(
        self, seed: int, num_learnable: int = 6, noise: int = 0, transfer: float = 0.0, natural_spread: float = 0.9
    ) -> None:
        self._rng = np.random.default_rng(seed)
        k = num_learnable
        self.num_learnable, self.num_domains = k, k + noise
        self._floor = np.append(self._rng.uniform(1.0, 3.0, k), [5.0] * noise)
        self._power = np.append(self._rng.uniform(0.15, 0.6, k), [2.0] * noise)
        self._scale = np.append(self._rng.uniform(800, 5000, k), [2000.0] * noise)
        self._transfer = np.eye(k + noise)
        self._transfer[:k, :k] += self._rng.uniform(0, 2 * transfer, (k, k)) * (1 - np.eye(k))
        natural = np.append(np.exp(natural_spread * self._rng.standard_normal(k)), [0.0] * noise)
        natural[k:] = 0.03 * natural.sum()
        self.natural = natural / natural.sum()
        self.tokens = np.zeros(k + noise)

    def loss(self) -> np.ndarray:
        """float64 [K], each domain's true loss in nats per token."""
        return self._floor + (7.6 - self._floor) * (1 + self._transfer @ self.tokens / self._scale) ** -self._power

    def macro_loss(self) -> float:
        """The mean loss of the domains that can be learnt."""
        return float(self.loss()[: self.num_learnable].mean())

    def step(self, weights: np.ndarray, num_samples: int = 16) -> DomainStats:
        """Trains on ``num_samples`` samples drawn with ``weights``; what was measured on them."""
        samples = self._rng.multinomial(num_samples, weights)
        measured = self.loss() + 0.4 * self._rng.standard_normal(samples.size) / np.sqrt(np.maximum(samples, 1))
        self.tokens += SAMPLE_TOKENS * samples
        return DomainStats(measured * samples * SAMPLE_TOKENS, samples * SAMPLE_TOKENS, weights=weights)

    def train(self, mixer: Mixer, steps: int) -> float:
        """`macro_loss` after training with the mixer's weights, each in force from the next step on."""
        for step in range(1, steps + 1):
            mixer.update(self.step(mixer.weights), step)
        return self.macro_loss()
