"""What a mixer beside the run's own says: new weights, and the sums they follow from."""

from __future__ import annotations

from dataclasses import dataclass

from megamix.data.blend.blend import Segment
from megamix.mixing.mixers import DomainStats


@dataclass(frozen=True)
class ShadowChange:
    """New weights of a mixer that only logs (`megamix.mixing.shadow`).

    Attributes:
        name: of the shadow.
        step: steps taken before they were computed.
        effective_step: the first step with these weights.
        position: its first sample.
        segment: the stretch of constant weights there.
        record: `Mixer.record` and the sums of the step.
    """

    name: str
    step: int
    effective_step: int
    position: int
    segment: Segment
    record: dict[str, object]


def statistics_record(stats: DomainStats) -> dict[str, object]:
    """The sums of a step in a line of weights.jsonl."""
    return {"statistics": {"nats": stats.nats.tolist(), "tokens": stats.tokens.tolist()}}
