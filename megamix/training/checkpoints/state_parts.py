"""Parts of a state, checked as they are read back: JSON of wrong types or lengths is no state of a run.

Only what megamix reads is checked, and only what can be told without the run; a mixer checks what it has added.

Legend: K domains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from megamix.core.config import first_problem
from megamix.core.errors import ResumeRefused
from megamix.mixing.mixers import rule_state
from megamix.training.checkpoints.state import RunState

Count = Annotated[int, Field(ge=0, le=2**53)]
BatchSize = Annotated[int, Field(ge=1, le=10**7)]
Length = Annotated[int, Field(ge=1, le=2**30)]
Share = Annotated[float, Field(ge=0)]
P = TypeVar("P", bound="_Part")


class _Part(pydantic.BaseModel):
    """Strict about types; keys that are not named here are left unread."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Data(_Part):
    domains: Annotated[dict[str, str], Field(min_length=1)]


class _MixerSettings(_Part):
    mixer: dict[str, Any] = {}


class _Train(_Part):
    steps: Count | None = None


class _Batch(_Part):
    sizes: Annotated[list[Annotated[tuple[Count, BatchSize], Field(strict=False)]], Field(min_length=1)]
    past_lengths: list[Annotated[tuple[Length, Annotated[int, Field(ge=1)]], Field(strict=False)]] = []

    @pydantic.field_validator("sizes")
    @classmethod
    def _rise_from_the_first_step(cls, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        steps = [step for step, _ in sizes]
        if steps[0] != 0 or sorted(set(steps)) != steps:
            raise ValueError(f"its batches begin at the steps {steps}, expected rising ones from 0")
        return sizes

    @pydantic.field_validator("past_lengths")
    @classmethod
    def _rise(cls, lengths: list[tuple[int, int]]) -> list[tuple[int, int]]:
        ends = [end for _, end in lengths]
        if sorted(set(ends)) != ends:
            raise ValueError(f"its earlier lengths end with the steps {ends}, expected rising ones")
        return lengths


class _Order(_Part):
    global_batch: BatchSize | None = None
    seq_length: Length | None = None


class _Fingerprints(_Part):
    data: _Data
    order: _Order = _Order()
    batch: _Batch | None = None
    mixer: _MixerSettings = _MixerSettings()
    train: _Train = _Train()


class _Segment(_Part):
    start: Count
    weights: list[Share]
    deficits: list[Annotated[float, Field(ge=-(2.0**53), le=2.0**53)]]
    counts: list[Count]

    @pydantic.model_validator(mode="after")
    def _weights_are_shares(self) -> _Segment:
        if abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"its weights sum to {sum(self.weights)}, expected 1")
        return self


class _Rest(_Part):
    domain: Count
    tokens: Count
    window: Annotated[int, Field(ge=1)]
    epoch: Count
    key: Annotated[int, Field(ge=0, lt=2**64)]
    place: Count
    seq_length: Annotated[int, Field(ge=1)]
    start: Count
    extra: Annotated[int, Field(ge=0, le=1)]

    @pydantic.model_validator(mode="after")
    def _lies_in_its_epoch(self) -> _Rest:
        if not (self.window <= self.tokens and 0 < self.place < self.tokens):
            raise ValueError(
                f"the rest of an epoch of {self.tokens} tokens begins at {self.place}, in windows of {self.window}"
            )
        return self


class _Blend(_Part):
    position: Count
    counts: list[Count]
    seed: int
    sampling: Literal["low_discrepancy", "iid"]
    num_samples: list[Annotated[int, Field(ge=1, le=2**52)]]
    domain_keys: list[int]
    segments: Annotated[list[_Segment], Field(min_length=1)]
    rests: list[_Rest] = []

    @pydantic.model_validator(mode="after")
    def _stands_in_its_first_segment(self) -> _Blend:
        starts = [segment.start for segment in self.segments]
        if starts[0] > self.position or sorted(set(starts)) != starts:
            raise ValueError(f"its segments start at {starts}, and it stands at {self.position}")
        if any(rest.domain >= len(self.num_samples) for rest in self.rests):
            raise ValueError(f"it has {len(self.num_samples)} domains, and the rest of an epoch of another")
        return self

    def lists(self) -> Iterator[tuple[str, list[Any]]]:
        yield from (("counts", self.counts), ("num_samples", self.num_samples), ("domain_keys", self.domain_keys))
        for segment in self.segments:
            yield from (("weights", segment.weights), ("deficits", segment.deficits), ("counts", segment.counts))


class _Sampler(_Part):
    blend: _Blend


class _Rule(_Part):
    mixer: str
    domains: Annotated[list[str], Field(min_length=1)]
    weights: list[Share]
    num_updates: Count


class _Ramp(_Part):
    start: Count
    samples: Annotated[float, Field(gt=0)]
    origin: list[Share]


class _Course(_Part):
    free: list[Share] | None
    left_out: list[str]
    pins: dict[str, Share]
    bounds: dict[str, Annotated[tuple[Share, Share], Field(strict=False)]]
    held: bool
    mixer: dict[str, Any] | None
    ramp: _Ramp | None
    rule_changes: Count


class _Steering(_Part):
    handled: list[str]
    course: _Course | None
    past: list[Annotated[tuple[str, _Course], Field(strict=False)]]
    stirred: bool


class _Interval(_Part):
    domains: dict[str, Annotated[tuple[float, Count], Field(strict=False)]]


def check_parts(state: RunState, where: Path) -> None:
    """Checks the parts of a state that a run on rank 0 continues from.

    Args:
        where: file or checkpoint, for messages.

    Raises:
        ResumeRefused: one has another form.
    """
    try:
        domains = tuple(_checked(_Fingerprints, state.fingerprints, "fingerprints").data.domains)
        _check_sampler(state.sampler, domains, "sampler")
        _check_mixer(state.mixer, domains, "mixer")
        for name, shadow in state.shadow.items():
            _checked(_MixerSettings, shadow.config or {}, f"shadow.{name}.config")
            _check_sampler(shadow.sampler, domains, f"shadow.{name}.sampler")
            _check_mixer(shadow.mixer, domains, f"shadow.{name}.mixer")
        if state.steering is not None:
            _check_steering(_checked(_Steering, state.steering, "steering"), domains)
        if state.interval is not None:
            _checked(_Interval, state.interval, "interval")
    except ValueError as problem:
        raise ResumeRefused(
            f"{where} holds no state of a run ({problem}). Continue from another checkpoint."
        ) from problem


def _checked(kind: type[P], data: Any, name: str) -> P:
    try:
        return kind.model_validate(data)
    except pydantic.ValidationError as problem:
        raise ValueError(f"{name}.{first_problem(problem)}") from problem


def _check_sampler(data: Any, domains: tuple[str, ...], name: str) -> None:
    for key, values in _checked(_Sampler, data, name).blend.lists():
        _check_length(values, domains, f"{name}.blend.{key}")


def _check_mixer(data: Any, domains: tuple[str, ...], name: str) -> None:
    if data is None:
        return
    whole = _checked(_Rule, data, name)
    rule = _checked(_Rule, rule_state(data), f"{name}, the rule")
    if tuple(whole.domains) != domains:
        raise ValueError(f"{name}.domains are not those of the data")
    _check_known(rule.domains, domains, name)
    for each in (whole, rule):
        _check_length(each.weights, each.domains, f"{name}.weights")


def _check_steering(steering: _Steering, domains: tuple[str, ...]) -> None:
    for course in filter(None, (steering.course, *(course for _, course in steering.past))):
        _check_known([*course.pins, *course.bounds], domains, "steering")
        for values in (course.free, None if course.ramp is None else course.ramp.origin):
            if values is not None:
                _check_length(values, domains, "steering, the weights")


def _check_known(names: Iterable[str], domains: Iterable[str], name: str) -> None:
    known = set(domains)
    unknown = [each for each in names if each not in known]
    if unknown:
        raise ValueError(f"{name} names '{unknown[0]}', which the data do not have")


def _check_length(values: list[Any], domains: Any, name: str) -> None:
    if len(values) != len(domains):
        raise ValueError(f"{name} has {len(values)} numbers for {len(domains)} domains")
