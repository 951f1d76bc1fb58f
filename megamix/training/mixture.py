"""The kinds of ``mixture``; each resolves and describes itself.

Legend: K domains, M stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from megamix.core.config import ByKey, Config
from megamix.core.errors import InputError
from megamix.data.batches import Batches
from megamix.mixing.mixers import normalise_weights
from megamix.mixing.ramps import RampShape
from megamix.mixing.sources import WeightsBySource, weights_by_domain
from megamix.mixing.weight_files import read_swarm_weights, read_weights
from megamix.mixing.weight_policy import Stages

Floats = NDArray[np.float64]
Names = tuple[str, ...]
Word = Literal["uniform", "natural"]


@dataclass(frozen=True)
class MixFrame:
    """The run that a mixture is resolved for.

    Attributes:
        natural: float64 [K], shares of the training tokens.
        num_samples: int64 [K], training windows per domain and epoch.
        read_run: the weights of a run directory by domain: mean or final; whether it must have reached its last step.
        document_tokens: float64 [K], mean tokens of a training document; None where the data are not there.
    """

    names: Names
    natural: Floats
    num_samples: NDArray[np.int64]
    num_steps: int
    batches: Batches
    read_run: Callable[[Path, str, bool], Mapping[str, float]]
    document_tokens: Floats | None = None

    @property
    def total_samples(self) -> int:
        """Samples of the whole run, in the length that they have now."""
        return self.batches.tokens(self.num_steps) // self.batches.seq_length


class Mixture:
    """One kind of mixture."""

    has_stages: ClassVar[bool] = False

    def describe(self) -> str:
        """Where the weights come from."""
        raise NotImplementedError

    def label(self) -> str:
        """A short name for tables and plots."""
        raise NotImplementedError

    def given(self) -> dict[str, float] | None:
        """{domain: weight} that the config itself states; None for weights from elsewhere."""
        return None

    def weights(self, frame: MixFrame, source: str) -> Floats:
        """float64 [K], sum 1.

        Args:
            source: the key, for messages.

        Raises:
            InputError: an unknown or missing domain, a weight that cannot be used, or a source without weights.
        """
        raise NotImplementedError

    def resolve(self, frame: MixFrame) -> Stages:
        """The weights over the whole run.

        Raises:
            InputError: see `weights`; or stages that do not rise from 0.
        """
        return Stages((0,), self.weights(frame, "mixture")[None])

    def fingerprint(self, names: Names, stages: Stages) -> object:
        """What must not change on resume, JSON-serialisable. A source may move, so its weights count, not its path."""
        rows = [dict(zip(names, row, strict=True)) for row in stages.weights.tolist()]
        ramps = {"ramps": list(stages.ramps)} if any(stages.ramps) else {}
        return {"steps": list(stages.steps), "weights": rows, **ramps}


@dataclass(frozen=True)
class _PlainMixture(Mixture):
    """``uniform``, ``natural`` or ``{domain: weight}``."""

    value: str | dict[str, float]

    def describe(self) -> str:
        return self.value if isinstance(self.value, str) else "as given"

    def label(self) -> str:
        return self.value if isinstance(self.value, str) else "given weights"

    def given(self) -> dict[str, float] | None:
        return self.value if isinstance(self.value, dict) else None

    def weights(self, frame: MixFrame, source: str) -> Floats:
        if isinstance(self.value, dict):
            return normalise_weights(self.value, frame.names, source)
        return frame.natural if self.value == "natural" else np.full(len(frame.names), 1 / len(frame.names))

    def fingerprint(self, names: Names, stages: Stages) -> object:
        return self.value


class TemperatureMixture(Config, Mixture):
    """Natural shares to a power, normalised.

    The power is the alpha of XLM-R and mT5 (Conneau et al., 2020; Xue et al., 2021) and the inverse of a sampling
    temperature T (Arivazhagan et al., 2019): shares^(1/T).
    """

    temperature: float = pydantic.Field(ge=0, allow_inf_nan=False)
    """The power: 0 is uniform, 0.5 the square root of the shares, 1 natural."""

    def describe(self) -> str:
        return f"natural shares to the power {self.temperature:g}"

    def label(self) -> str:
        return "sqrt" if self.temperature == 0.5 else f"natural^{self.temperature:g}"

    def weights(self, frame: MixFrame, source: str) -> Floats:
        # Divided by the largest first, so that a large power leaves one of them.
        powers = (frame.natural / frame.natural.max()) ** self.temperature
        return powers / powers.sum()

    def fingerprint(self, names: Names, stages: Stages) -> object:
        return {"temperature": self.temperature}


class UnimaxConfig(Config):
    """Settings of a UniMax mixture."""

    max_epochs: float = pydantic.Field(gt=0, allow_inf_nan=False)
    """Times that no domain is read more often than."""


class UnimaxMixture(Config, Mixture):
    """The samples of a run, spread over the domains as evenly as a bound on epochs allows (UniMax, Chung et al., 2023,
    arXiv 2304.09151, algorithm 1)."""

    unimax: UnimaxConfig
    """max_epochs: times that no domain is read more often than."""

    def describe(self) -> str:
        return f"uniform with at most {self.unimax.max_epochs:g} epochs of a domain (UniMax)"

    def label(self) -> str:
        return f"unimax {self.unimax.max_epochs:g}"

    def weights(self, frame: MixFrame, source: str) -> Floats:
        limit, budget = self.unimax.max_epochs, frame.total_samples
        most = limit * frame.num_samples
        if budget > most.sum():
            raise InputError(
                f"{source}: unimax.max_epochs is {limit:g}, which allows {most.sum():,.0f} samples of "
                f"{frame.num_samples.sum():,} in the data, but the run reads {budget:,}. Use at least "
                f"{_rounded_up(budget / frame.num_samples.sum())}, or train for fewer steps."
            )
        samples, left = np.zeros(most.size), float(budget)
        # From the smallest domain on, so that what one cannot take is spread over all that are left.
        for taken, domain in enumerate(np.argsort(most, kind="stable")):
            samples[domain] = min(most[domain], left / (most.size - taken))
            left -= samples[domain]
        return samples / samples.sum()


def _rounded_up(value: float) -> str:
    """Four digits of a positive number, not less than it."""
    digits = 3 - math.floor(math.log10(value))
    return f"{math.ceil(value * 10**digits) / 10**digits:.4g}"


class FileMixture(Config, Mixture):
    """Weights from a file."""

    file: Path
    """JSON: {domain: weight}, DoReMi's domain config, a line of weights.jsonl; or Megatron's blend as text or JSON."""

    def describe(self) -> str:
        return f"from {self.file}"

    def label(self) -> str:
        return self.file.stem

    def weights(self, frame: MixFrame, source: str) -> Floats:
        found = read_weights(self.file, frame.names)
        return normalise_weights(found, frame.names, f"{source}, file {self.file}")


class DocumentsMixture(Config, Mixture):
    """Shares of the documents that are read, rather than of their tokens: the weight of a domain is its share times the
    mean length of its training documents in tokens, normalised."""

    documents: Annotated[
        Literal["uniform"] | WeightsBySource | FileMixture,
        ByKey({"file": FileMixture}, mapping=WeightsBySource, plain=Literal["uniform"]),
    ]
    """The shares: uniform, {domain: share} or {file: PATH}."""

    def describe(self) -> str:
        return f"shares of documents, {self._shares.describe()}, times mean lengths in tokens"

    def label(self) -> str:
        return f"documents {self._shares.label()}"

    @property
    def _shares(self) -> Mixture:
        return mixture_of(self.documents)

    def weights(self, frame: MixFrame, source: str) -> Floats:
        if frame.document_tokens is None:
            raise InputError(
                f"{source}: shares of documents follow the lengths of the documents, and the data set is not there to count "
                "them. Prepare it first, or give weights by tokens."
            )
        tokens = self._shares.weights(frame, f"{source}, documents") * frame.document_tokens
        return tokens / tokens.sum()


class RunMixture(Config, Mixture):
    """Weights that a run has found."""

    from_run: Path
    """Its directory; its domains must be those of this run."""
    which: Literal["mean", "final"] = "mean"
    """mean: over the samples it has trained on, or DoReMi's mean of alpha; final: the last ones, or DoReMi's last
    alpha."""
    finished: bool = False
    """Refuses a run that has not reached its last step, whose mean is of a part."""

    def describe(self) -> str:
        return f"{self.which} weights of the run {self.from_run}"

    def label(self) -> str:
        return f"{self.which} of {self.from_run.name}"

    def weights(self, frame: MixFrame, source: str) -> Floats:
        found = frame.read_run(self.from_run, self.which, self.finished)
        return normalise_weights(found, frame.names, f"{source}, {self.describe()}")


class SwarmMixture(Config, Mixture):
    """Weights that a swarm of proxy runs has led to."""

    from_swarm: Path
    """Its directory, with the mixture.json of `megamix swarm propose`; its domains must be those of this run."""

    def describe(self) -> str:
        return f"proposed by the swarm {self.from_swarm}"

    def label(self) -> str:
        return f"swarm {self.from_swarm.name}"

    def weights(self, frame: MixFrame, source: str) -> Floats:
        found = read_swarm_weights(self.from_swarm)
        return normalise_weights(found, frame.names, f"{source}, {self.describe()}")


_ANYWHERE = {
    "temperature": TemperatureMixture,
    "file": FileMixture,
    "from_run": RunMixture,
    "from_swarm": SwarmMixture,
    "documents": DocumentsMixture,
}


class StageConfig(Config):
    """One stretch of a staged mixture."""

    from_tokens: float = pydantic.Field(ge=0)
    """Tokens of the run before it."""
    weights: Annotated[
        Word | WeightsBySource | TemperatureMixture | FileMixture | RunMixture | SwarmMixture | DocumentsMixture,
        ByKey(_ANYWHERE, mapping=WeightsBySource, plain=Word),
    ]
    """uniform, natural, {domain: weight}, {source: {weight: WEIGHT, topics: {...}}}, {documents: ...}, {temperature:
    POWER}, {file: PATH}, {from_run: RUN} or {from_swarm: DIR}."""
    ramp: RampShape | None = None
    """How the weights get here, from the start of the stage before on: linear, or cosine (half a wave). Default: at
    once."""


class StagedMixture(Config, Mixture):
    """Weights that change at stated numbers of tokens, at once or on a ramp between them."""

    has_stages: ClassVar[bool] = True

    stages: tuple[StageConfig, ...]
    """In rising order; the first has from_tokens 0."""

    def describe(self) -> str:
        ways = (f" ({stage.ramp} ramp)" if stage.ramp else "" for stage in self.stages)
        parts = (f"{stage.from_tokens:,.0f}{way}" for stage, way in zip(self.stages, ways, strict=True))
        return f"stages from {', '.join(parts)} tokens on"

    def label(self) -> str:
        return "stages"

    def starts(self, batches: Batches) -> list[int]:
        """The step that each stage starts with: the first that begins at or after its ``from_tokens``."""
        return [batches.first_step_from(stage.from_tokens) for stage in self.stages]

    def resolve(self, frame: MixFrame) -> Stages:
        starts, batches = [stage.from_tokens for stage in self.stages], frame.batches
        if not starts or starts[0] != 0:
            first = f"starts at {starts[0]:g} tokens" if starts else "is missing"
            raise InputError(f"mixture.stages: the first stage {first}, expected from_tokens: 0.")
        if self.stages[0].ramp is not None:
            raise InputError(
                f"mixture.stages: the first stage has ramp {self.stages[0].ramp}, and nothing before it to come from. Give the "
                "ramp to the stage that it leads to."
            )
        steps = self.starts(batches)
        for number in range(1, len(steps)):
            if steps[number] <= steps[number - 1]:
                raise InputError(
                    f"mixture.stages: stage {number + 1} starts at {starts[number]:g} tokens and the one before it at "
                    f"{starts[number - 1]:g}, which is not a step of {batches.tokens_of(steps[number - 1])} tokens earlier. Give stages in rising order."
                )
            if steps[number] >= frame.num_steps:
                raise InputError(
                    f"mixture.stages: stage {number + 1} starts at {starts[number]:g} tokens, but the last of {frame.num_steps} steps "
                    f"begins at {batches.tokens(frame.num_steps - 1)}. Leave the stage out or train longer."
                )
        rows = [
            mixture_of(stage.weights).weights(frame, f"mixture.stages, stage {number}")
            for number, stage in enumerate(self.stages, start=1)
        ]
        return Stages(tuple(steps), np.stack(rows), tuple(stage.ramp for stage in self.stages))


MixtureConfig = Annotated[
    Word
    | WeightsBySource
    | DocumentsMixture
    | TemperatureMixture
    | UnimaxMixture
    | FileMixture
    | RunMixture
    | SwarmMixture
    | StagedMixture,
    ByKey({"unimax": UnimaxMixture, "stages": StagedMixture, **_ANYWHERE}, mapping=WeightsBySource, plain=Word),
]


def mixture_of(value: str | WeightsBySource | Mixture) -> Mixture:
    """The kind of a value of ``mixture``, or of the ``weights`` of a stage.

    Raises:
        InputError: a domain is given in two ways.
    """
    if isinstance(value, Mixture):
        return value
    return _PlainMixture(value if isinstance(value, str) else weights_by_domain(value, "mixture"))
