"""Sizes of a run's global batches: which samples, and how many tokens, each step has.

Step s of a run, counted from 0, is positions [position(s), position(s + 1)) of the blend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Stretch:
    """Steps of equal batches.

    Attributes:
        step, position, tokens: before it.
        size: samples per step.
        length: tokens of a sample.
    """

    step: int
    position: int
    tokens: int
    size: int
    length: int


@dataclass(frozen=True)
class Batches:
    """The global batch of every step; steps count from 0.

    Attributes:
        sizes: (first step, samples per step) of stretches of equal batches; the first starts with step 0, and steps
            rise.
        seq_length: tokens of a sample, from the last step of ``past`` on.
        past: (tokens of a sample, end step) of the steps before that had another length; ends rise from above 0.
    """

    sizes: tuple[tuple[int, int], ...]
    seq_length: int = 1
    past: tuple[tuple[int, int], ...] = ()

    @classmethod
    def equal(cls, size: int, seq_length: int = 1) -> Batches:
        """Batches of ``size`` samples in every step."""
        return cls(((0, size),), seq_length)

    @classmethod
    def ramp(
        cls,
        stages: Sequence[tuple[int, float]],
        size: int,
        seq_length: int = 1,
        past: tuple[tuple[int, int], ...] = (),
    ) -> Batches:
        """Batches that change with the tokens trained on.

        Args:
            stages: (samples per step, tokens) in rising order of tokens: steps that begin before that many tokens.
            size: samples of the steps after them.
            past: see `Batches`.

        Raises:
            ValueError: a stage that no step begins in.
        """
        found: list[tuple[int, int]] = []
        step, here = 0, 0
        for number, (samples, tokens) in enumerate(stages, start=1):
            if here >= tokens:
                raise ValueError(
                    f"stage {number} ({samples} samples a step until {tokens:,.0f} tokens) has no step: the one before it takes "
                    f"the run to {here:,} tokens. Leave it out, or give it more tokens."
                )
            found.append((step, samples))
            while here < tokens:
                length, end = next(((each, end) for each, end in past if step < end), (seq_length, None))
                steps = -(-math.ceil(tokens - here) // (samples * length))
                if end is not None:
                    steps = min(steps, end - step)
                step, here = step + steps, here + steps * samples * length
        found.append((step, size))
        kept = [each for index, each in enumerate(found) if index == 0 or each[1] != found[index - 1][1]]
        return cls(tuple(kept), seq_length, past)

    @cached_property
    def _stretches(self) -> list[_Stretch]:
        found: list[_Stretch] = []
        for first in sorted({step for step, _ in self.sizes} | {end for _, end in self.past}):
            size = next(size for step, size in reversed(self.sizes) if step <= first)
            length = next((length for length, end in self.past if first < end), self.seq_length)
            position = tokens = 0
            if found:
                last = found[-1]
                samples = (first - last.step) * last.size
                position, tokens = last.position + samples, last.tokens + samples * last.length
            found.append(_Stretch(first, position, tokens, size, length))
        return found

    def length(self, step: int) -> int:
        """Tokens of a sample of ``step``."""
        return self._stretch_of(step).length

    def size(self, step: int) -> int:
        """Samples of ``step``."""
        return self._stretch_of(step).size

    def position(self, step: int) -> int:
        """Samples before ``step``: its first position."""
        stretch = self._stretch_of(step)
        return stretch.position + (step - stretch.step) * stretch.size

    def tokens(self, step: int) -> int:
        """Tokens before ``step``."""
        return self.tokens_at(self.position(step))

    def tokens_at(self, position: int) -> int:
        """Tokens of the samples before ``position``."""
        stretch = self._stretch_at(position)
        return stretch.tokens + (position - stretch.position) * stretch.length

    def tokens_after(self, steps: float) -> float:
        """Tokens of the first ``steps``, which may be broken."""
        whole = int(steps)
        return self.tokens(whole) + (steps - whole) * self.tokens_of(whole)

    def tokens_of(self, step: int) -> int:
        """Tokens of ``step``."""
        stretch = self._stretch_of(step)
        return stretch.size * stretch.length

    def step(self, position: int) -> int:
        """The step that ``position`` belongs to."""
        stretch = self._stretch_at(position)
        return stretch.step + (position - stretch.position) // stretch.size

    def is_start(self, position: int) -> bool:
        """Whether a step starts at ``position``."""
        return self.position(self.step(position)) == position

    def positions(self, steps: ArrayLike) -> Ints:
        """int64, the shape of ``steps``: the first position of each."""
        steps = np.asarray(steps, np.int64)
        first, start, size = np.array([(each.step, each.position, each.size) for each in self._stretches], np.int64).T
        row = np.searchsorted(first, steps, "right") - 1
        return start[row] + (steps - first[row]) * size[row]

    def first_step_from(self, tokens: float) -> int:
        """The first step with at least ``tokens`` before it."""
        stretch = self._stretch_with(tokens)
        return stretch.step - int(-(tokens - stretch.tokens) // (stretch.size * stretch.length))

    def nearest_step(self, tokens: float) -> int:
        """The step with a number of tokens before it that is nearest to ``tokens``."""
        # A step's share of the one that it falls into, rounded as a whole number is.
        stretch = self._stretch_with(tokens)
        step = stretch.step + int((tokens - stretch.tokens) // (stretch.size * stretch.length))
        return round(step + (tokens - self.tokens(step)) / self.tokens_of(step))

    def describe(self, first: int = 0) -> str:
        """``64, from step 101 on 128``: the sizes from ``first`` on; steps count from 1 in it."""
        later = [f"from step {step + 1:,} on {size}" for step, size in self.sizes if step > first]
        return ", ".join([str(self.size(first)), *later])

    def _stretch_of(self, step: int) -> _Stretch:
        return next(each for each in reversed(self._stretches) if each.step <= max(step, 0))

    def _stretch_at(self, position: int) -> _Stretch:
        return next(each for each in reversed(self._stretches) if each.position <= max(position, 0))

    def _stretch_with(self, tokens: float) -> _Stretch:
        # Of what is no number, the first one: whoever asks makes an error of the step.
        return next((each for each in reversed(self._stretches) if each.tokens <= tokens), self._stretches[0])
