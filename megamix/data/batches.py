"""Sizes of a run's global batches: which samples, and how many tokens, each step has.

Step s of a run, counted from 0, is positions [position(s), position(s + 1)) of the blend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batches:
    """The global batch of every step; steps count from 0.

    Attributes:
        sizes: (first step, samples per step) of stretches of equal batches; the first starts with step 0, and steps
            rise.
        seq_length: tokens of a sample.
    """

    sizes: tuple[tuple[int, int], ...]
    seq_length: int = 1

    @classmethod
    def equal(cls, size: int, seq_length: int = 1) -> Batches:
        """Batches of ``size`` samples in every step."""
        return cls(((0, size),), seq_length)

    @classmethod
    def ramp(cls, stages: Sequence[tuple[int, float]], size: int, seq_length: int = 1) -> Batches:
        """Batches that change with the tokens trained on.

        Args:
            stages: (samples per step, tokens) in rising order of tokens: steps that begin before that many tokens.
            size: samples of the steps after them.

        Raises:
            ValueError: a stage that no step begins in.
        """
        found: list[tuple[int, int]] = []
        step, position = 0, 0
        for number, (samples, tokens) in enumerate(stages, start=1):
            steps = -((position - _samples(tokens, seq_length)) // samples)
            if steps <= 0:
                raise ValueError(
                    f"stage {number} ({samples} samples a step until {tokens:,.0f} tokens) has no step: the one before it takes "
                    f"the run to {position * seq_length:,} tokens. Leave it out, or give it more tokens."
                )
            found.append((step, samples))
            step, position = step + steps, position + steps * samples
        found.append((step, size))
        kept = [each for index, each in enumerate(found) if index == 0 or each[1] != found[index - 1][1]]
        return cls(tuple(kept), seq_length)

    @cached_property
    def _places(self) -> list[tuple[int, int, int]]:
        """(first step, first position, samples per step) of each stretch."""
        found: list[tuple[int, int, int]] = []
        for first, size in self.sizes:
            before = found[-1] if found else (0, 0, 0)
            found.append((first, before[1] + (first - before[0]) * before[2], size))
        return found

    def size(self, step: int) -> int:
        """Samples of ``step``."""
        return self._stretch_of(step)[2]

    def position(self, step: int) -> int:
        """Samples before ``step``: its first position."""
        first, start, size = self._stretch_of(step)
        return start + (step - first) * size

    def tokens(self, step: int) -> int:
        """Tokens before ``step``."""
        return self.position(step) * self.seq_length

    def tokens_after(self, steps: float) -> float:
        """Tokens of the first ``steps``, which may be broken."""
        whole = int(steps)
        return self.tokens(whole) + (steps - whole) * self.tokens_of(whole)

    def tokens_of(self, step: int) -> int:
        """Tokens of ``step``."""
        return self.size(step) * self.seq_length

    def step(self, position: int) -> int:
        """The step that ``position`` belongs to."""
        first, start, size = next(place for place in reversed(self._places) if place[1] <= max(position, 0))
        return first + (position - start) // size

    def is_start(self, position: int) -> bool:
        """Whether a step starts at ``position``."""
        return self.position(self.step(position)) == position

    def positions(self, steps: ArrayLike) -> Ints:
        """int64, the shape of ``steps``: the first position of each."""
        steps = np.asarray(steps, np.int64)
        first, start, size = np.array(self._places, np.int64).T
        row = np.searchsorted(first, steps, "right") - 1
        return start[row] + (steps - first[row]) * size[row]

    def first_step_from(self, tokens: float) -> int:
        """The first step with at least ``tokens`` before it."""
        position = _samples(tokens, self.seq_length)
        return self.step(position) + (not self.is_start(position))

    def nearest_step(self, tokens: float) -> int:
        """The step with a number of tokens before it that is nearest to ``tokens``."""
        # A step's share of the one that it falls into, rounded as a whole number is.
        step = self.step(int(tokens // self.seq_length))
        return round(step + (tokens - self.tokens(step)) / self.tokens_of(step))

    def describe(self, first: int = 0) -> str:
        """``64, from step 101 on 128``: the sizes from ``first`` on; steps count from 1 in it."""
        later = [f"from step {step + 1:,} on {size}" for step, size in self.sizes if step > first]
        return ", ".join([str(self.size(first)), *later])

    def _stretch_of(self, step: int) -> tuple[int, int, int]:
        return next(place for place in reversed(self._places) if place[0] <= max(step, 0))


def _samples(tokens: float, seq_length: int) -> int:
    """The fewest samples of at least ``tokens`` together."""
    return -int(-tokens // seq_length)
