"""ODM's presets as their sources write them, in plain Python, and random statistics to compare with."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np

from megamix.mixing.mixers import DomainStats, Mixer, make_mixer

PRESETS = ("official", "paper", "exp3", "dataflex")


class Reference:
    """The presets as their sources write them: lists, math.exp and nothing shared with megamix.

    ``step`` takes mean losses (None: absent) and the weights the tokens were drawn with, and returns the next weights.
    """

    def __init__(self, preset: str, initial: list[float], alpha: float = 0.9, clock: int = 0) -> None:
        self.preset, self.alpha, self.clock = preset, alpha, clock
        self.k = len(initial)
        self.pi = [weight / sum(initial) for weight in initial]
        self.rewards = [0.0] * self.k
        self.rate = 1 / self.k

    def step(
        self, t: int, losses: list[float | None], drawn: list[float] | None = None, move: bool = True
    ) -> list[float]:
        drawn = self.pi if drawn is None else drawn
        old_rate = self.rate
        self.rate = min(1 / self.k, math.sqrt(math.log(self.k) / (self.k * (t + self.clock))))
        if self.preset == "dataflex":
            self.rate = max(self.rate, 0.03)
        for i, loss in enumerate(losses):
            if loss is None:
                continue
            if self.preset == "official":
                self.rewards[i] = self.alpha * self.rewards[i] + (1 - self.alpha) * math.exp(loss)
            elif self.preset == "paper":
                self.rewards[i] = self.alpha * self.rewards[i] + (1 - self.alpha) * loss / drawn[i]
            elif self.preset == "exp3":
                self.rewards[i] += (loss / 10) / drawn[i]
            else:
                new = self.alpha * self.rewards[i] + (1 - self.alpha) * 15 * loss / drawn[i]
                self.rewards[i] = max(-1e4, min(1e4, new))
        if move:
            q = self.share(old_rate)
            if q is not None:
                raw = [(1 - self.k * self.rate) * share + self.rate for share in q]
                self.pi = [value / sum(raw) for value in raw]
        return self.pi

    def share(self, old_rate: float) -> list[float] | None:
        if self.preset == "official":
            total = sum(self.rewards)
            return [reward / total for reward in self.rewards] if total else None
        exponents = [old_rate * reward for reward in self.rewards]
        if self.preset == "dataflex":
            exponents = [max(exponent - max(exponents), -5.0) for exponent in exponents]
        powers = [math.exp(exponent) for exponent in exponents]
        return [power / sum(powers) for power in powers]


class Program:
    """When each source calls its updater, and with what.

    ODM's repository and DataFlex call it after the warm-up alone, with the losses of that one step; DataFlex also
    counts steps from there. The paper updates after every step; an interval of it is taken as one step.
    """

    def __init__(self, preset: str, initial: list[float], warmup: int = 0, every: int = 1) -> None:
        self.warmup, self.every, self.whole = warmup, every, preset == "paper"
        self.updater = Reference(preset, initial, clock=-warmup if preset == "dataflex" else 0)
        self.sums = [(0.0, 0)] * len(initial)

    def step(self, step: int, stats: DomainStats) -> list[float]:
        added = zip(self.sums, stats.nats.tolist(), stats.tokens.tolist(), strict=True)
        self.sums = [(nats + more, tokens + count) for (nats, tokens), more, count in added]
        if step % self.every == 0:
            interval = [nats / tokens if tokens else None for nats, tokens in self.sums]
            self.sums = [(0.0, 0)] * len(self.sums)
            if self.whole:
                self.updater.step(step, interval, move=step > self.warmup)
            elif step > self.warmup:
                self.updater.step(step, mean_losses(stats))
        return self.updater.pi


def domain_names(k: int) -> list[str]:
    return [f"d{i}" for i in range(k)]


def odm(initial: list[float], **options: Any) -> Mixer:
    """The rule over all domains, those of weight 0 too."""
    return make_mixer({"name": "odm", **options}, domain_names(len(initial)), initial, left_out=())


def random_stats(rng: random.Random, k: int, absent: float = 0.3, low: float = 1.0, high: float = 6.0) -> DomainStats:
    """Losses that differ by domain, drift and are noisy; each domain absent with probability ``absent``."""
    tokens = [0 if rng.random() < absent else rng.randint(1, 5000) for _ in range(k)]
    nats = [n * (rng.uniform(low, high) + 0.5 * math.sin(i)) for i, n in enumerate(tokens)]
    return DomainStats(nats, tokens)


def mean_losses(stats: DomainStats) -> list[float | None]:
    return [n / t if t else None for n, t in zip(stats.nats.tolist(), stats.tokens.tolist(), strict=True)]


def close(weights: np.ndarray, expected: list[float], rtol: float = 1e-12) -> None:
    np.testing.assert_allclose(weights, expected, rtol=rtol, atol=0)
