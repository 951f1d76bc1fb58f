"""Lines of a run's record, checked as they are read back: valid JSON of a wrong type is a damaged line, too.

Only the keys that megamix reads are checked; a mixer may record others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from megamix.core.errors import InputError
from megamix.core.files import parse_json, read_json_lines
from megamix.core.text import shortened
from megamix.training.records.wide_lines import ARRAYS, WideLine, WideReader, side_path

Count = Annotated[int, Field(ge=0, le=2**53)]
Weight = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0)]


_TAIL = 2**22
"""Bytes in which the last line of a record is looked for."""


class _Part(pydantic.BaseModel):
    """Strict about types; keys that are not named here are left unread."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StepLine(_Part):
    """Any line of a step."""

    step: Count


class MetricsLine(StepLine):
    """Any line of metrics.jsonl."""

    event: str
    tokens: Count
    domain_loss: dict[str, float | None]


class TrainLine(MetricsLine):
    """A line of metrics.jsonl with ``event: train``."""

    loss: float
    tokens_per_second: float
    domain_tokens: dict[str, Share] = {}
    step_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    communication_seconds: float = 0.0
    mixing_seconds: float = 0.0

    @pydantic.model_validator(mode="after")
    def _losses_have_tokens(self) -> TrainLine:
        bare = [
            name for name, loss in self.domain_loss.items() if loss is not None and not self.domain_tokens.get(name, 1)
        ]
        if bare:
            raise ValueError(f"domain_tokens of '{bare[0]}' is 0, but it has a loss")
        return self


class EvaluateLine(MetricsLine):
    """A line of metrics.jsonl with ``event: evaluate``."""

    macro_loss: float | None
    micro_loss: float | None = None
    objective_loss: float | None = None
    objective: dict[str, Share] = {}
    worst_domain: str | None = None


class _SegmentPart(_Part):
    start: Count
    counts: list[Count]
    deficits: list[float]


class _StatisticsPart(_Part):
    tokens: list[Share]


class _RestPart(_Part):
    tokens: Count
    window: Annotated[int, Field(ge=1)]
    epoch: Count
    key: Annotated[int, Field(ge=0, lt=2**64)]
    place: Count
    seq_length: Annotated[int, Field(ge=1)]
    start: Count
    extra: Count


class _ChangePart(_Part):
    parts: list[str] = []
    domains: Any = None
    manifest: str | None = None


class _CommandPart(_Part):
    id: str
    what: str
    note: str = ""


class _SteeringPart(_Part):
    commands: list[_CommandPart] = []


class _AnyWeightsLine(StepLine):
    """What a line of weights has for any number of domains."""

    position: Count
    effective_step: Count = 0
    change: _ChangePart | None = None
    rests: dict[str, _RestPart] = {}
    steering: _SteeringPart = _SteeringPart()
    left_out: list[str] = []
    exploration_rate: float | None = None


class WeightsLine(_AnyWeightsLine):
    """A line of weights.jsonl, or of a shadow."""

    domain_names: Annotated[list[str], Field(min_length=1)]
    domain_weights: list[Weight]
    segment: _SegmentPart
    statistics: _StatisticsPart | None = None
    loss_weights: list[Share] | None = None
    average_weights: list[Weight] | None = None
    perdomain_scores: list[float | None] | None = None
    loss_slope: list[float | None] | None = None

    @pydantic.field_validator("loss_weights", "average_weights", mode="before")
    @classmethod
    def _there_or_not(cls, given: Any, field: pydantic.ValidationInfo) -> Any:
        # Whether a line has them says what kind of mixer wrote it; none writes null.
        if given is None:
            raise ValueError(f"{field.field_name} is null, expected a number for each domain, or no such key")
        return given

    @pydantic.model_validator(mode="after")
    def _one_for_each_domain(self) -> WeightsLine:
        if len(set(self.domain_names)) < len(self.domain_names):
            raise ValueError("domain_names names a domain twice")
        for key, values in self._by_domain():
            if values is not None and len(values) != len(self.domain_names):
                raise ValueError(f"{key} has {len(values)} numbers for {len(self.domain_names)} domains")
        if abs(sum(self.domain_weights) - 1) > 1e-6:
            raise ValueError(f"domain_weights sum to {sum(self.domain_weights)}, expected 1")
        if self.segment.start > self.position:
            raise ValueError(f"segment.start is {self.segment.start}, after the position {self.position}")
        return self

    def _by_domain(self) -> Iterator[tuple[str, Sequence[Any] | None]]:
        yield "segment.counts", self.segment.counts
        yield "segment.deficits", self.segment.deficits
        yield "statistics.tokens", None if self.statistics is None else self.statistics.tokens
        for key in ("domain_weights", "loss_weights", "average_weights", "perdomain_scores", "loss_slope"):
            yield key, getattr(self, key)


class _WideSegmentPart(_Part):
    start: Count


class WideWeightsLine(_AnyWeightsLine):
    """A line of weights.jsonl whose arrays are in the file beside it (`megamix.training.records.wide_lines`)."""

    segment: _WideSegmentPart
    arrays: dict[str, Count]

    @pydantic.model_validator(mode="after")
    def _has_what_is_read(self) -> WideWeightsLine:
        for key in ("domain_names", "domain_weights", "segment.counts", "segment.deficits"):
            if key not in self.arrays:
                raise ValueError(f"arrays has no '{key}'")
        if self.segment.start > self.position:
            raise ValueError(f"segment.start is {self.segment.start}, after the position {self.position}")
        return self


class EventLine(StepLine):
    """A line of events.jsonl."""

    time: Annotated[float, Field(ge=0, le=1e11)]
    event: str
    text: str = ""


_METRICS: Mapping[object, type[MetricsLine]] = {"train": TrainLine, "evaluate": EvaluateLine}


def metrics_kind(line: Mapping[str, Any]) -> type[MetricsLine]:
    """The class of a line of metrics.jsonl."""
    event = line.get("event")
    return _METRICS.get(event, MetricsLine) if isinstance(event, str) else MetricsLine


def read_lines(path: Path, kind: type[StepLine]) -> list[dict[str, Any]]:
    """The lines of a .jsonl record, as plain data; none where there is no file.

    Raises:
        InputError: the file cannot be read, or a line is damaged; the message names file, line and key.
    """
    lines, reader = read_json_lines(path), WideReader(side_path(path))
    for index, line in enumerate(lines):
        try:
            lines[index] = checked(line, kind, reader)
        except ValueError as problem:
            raise InputError(
                f"{path}, line {index + 1} is damaged: {problem}. Remove that line, or resume the run from a checkpoint "
                "before it."
            ) from problem
    return lines


def last_line(path: Path, kind: type[StepLine]) -> dict[str, Any] | None:
    """The last whole line of a .jsonl record that may be growing, without reading the others; None where there is none.

    Raises:
        InputError: the file cannot be read, or that line is damaged.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            texts = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
    if not texts:
        return None
    try:
        line = parse_json(texts[-1])
        if not isinstance(line, dict):
            raise ValueError("it is no object")
        return checked(line, kind, WideReader(side_path(path)))
    except ValueError as problem:
        raise InputError(f"{path}: its last line is damaged: {problem}. Resume the run, which mends it.") from problem


def checked(line: dict[str, Any], kind: type[StepLine], reader: WideReader) -> dict[str, Any]:
    """A line that is what a run writes.

    Args:
        kind: what it should be; for metrics.jsonl `MetricsLine`.
        reader: of the file beside the record, for its arrays.

    Raises:
        ValueError: it is not; the message says why.
        InputError: the file beside the record cannot be read.
    """
    if kind is MetricsLine:
        kind = metrics_kind(line)
    is_wide = kind is WeightsLine and ARRAYS in line
    problem = _problem(line, WideWeightsLine if is_wide else kind)
    if problem is not None:
        raise ValueError(problem)
    if not is_wide:
        return line
    arrays = line[ARRAYS]
    wide = WideLine(line, reader, arrays, len(reader.names(arrays["domain_names"])))
    weights = wide["domain_weights"]
    if not (weights >= 0).all() or not abs(weights.sum() - 1) <= 1e-6:
        raise ValueError(f"domain_weights sum to {weights.sum()}, expected 1 and none below 0")
    return wide


def _problem(line: Mapping[str, Any], kind: type[StepLine]) -> str | None:
    """What is wrong with a line; None where nothing is."""
    try:
        kind.model_validate(line)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            return f"it has no '{key}'"
        if first["type"] == "value_error":
            return str(first.get("ctx", {}).get("error"))
        return f"{key} is {shortened(repr(first['input']))}: {first['msg']}"
    return None
