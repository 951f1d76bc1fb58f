"""Ledger: weights.jsonl, read back; the weights and counts at any position of a run.

Every line carries the blend's counts and deficits where its stretch of weights starts, so a position is found from one
line, in O(K), without replaying the run.

Legend: K domains of a line, N names that ever occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.data.blend.blend import Blend, Sampling, Segment
from megamix.data.blend.rest import Rest
from megamix.training.records.lines import WeightsLine, read_lines

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ledger:
    """Weights of a run by position.

    Attributes:
        lines: the lines of weights.jsonl in force, by rising position; at least one, the initial weights first.
        seed, sampling: of the run.
    """

    lines: list[dict[str, Any]]
    seed: int
    sampling: Sampling

    @classmethod
    def read(cls, path: Path, seed: int, sampling: Sampling) -> Ledger | None:
        """Reads weights.jsonl; None where it has no line yet.

        A line with ``change`` (a resume with other domains, mixture, constraints, batch or sequence length) takes the
        place of every line before it that begins at its position or later: those were announced and never came to be.

        Raises:
            InputError: a damaged line.
        """
        held: list[dict[str, Any]] = []
        for number, line in enumerate(read_lines(path, WeightsLine), start=1):
            if line.get("change"):
                while held and held[-1]["position"] >= line["position"]:
                    held.pop()
            elif held and line["domain_names"] != held[-1]["domain_names"]:
                raise InputError(
                    f"{path}, line {number} has other domains than the one before. It belongs to another run."
                )
            held.append(line)
        return cls(held, seed, sampling) if held else None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The N domains: of the last line, then earlier ones."""
        names: dict[str, None] = {}
        last = None
        for line in reversed(self.lines):
            if line["domain_names"] is not last:  # one list for all lines of many domains
                last = line["domain_names"]
                names |= dict.fromkeys(last)
        return tuple(names)

    @cached_property
    def weights(self) -> Floats:
        """float64 [lines, N]; 0 where a domain was not there. Not to be written to."""
        place = {name: index for index, name in enumerate(self.names)}
        rows = np.zeros((len(self.lines), len(place)))
        last, places = None, np.empty(0, np.int64)
        for row, line in zip(rows, self.lines, strict=True):
            if line["domain_names"] is not last:
                last = line["domain_names"]
                places = np.array([place[name] for name in last])
            row[places] = line["domain_weights"]
        rows.setflags(write=False)
        return rows

    def weights_of(self, names: Sequence[str]) -> Floats:
        """float64 [lines, len(names)]: columns of `weights`."""
        if tuple(names) == self.names:
            return self.weights
        place = {name: index for index, name in enumerate(self.names)}
        return self.weights[:, [place[name] for name in names]]

    @cached_property
    def starts(self) -> Ints:
        """int64 [lines]: the position from which on each line holds. Not to be written to."""
        starts = np.array([line["position"] for line in self.lines], np.int64)
        starts.setflags(write=False)
        return starts

    def line_at(self, position: int) -> dict[str, Any]:
        """The line in effect at ``position``."""
        return self.lines[max(int(np.searchsorted(self.starts, position, "right")) - 1, 0)]

    def blend_at(self, position: int, num_samples: Sequence[int] | Ints, domain_keys: Sequence[int]) -> Blend:
        """The blend as the run had it at ``position``, from one line.

        Args:
            num_samples, domain_keys: [K], of the domains of that line.
        """
        line = self.line_at(position)
        rests = self._rests(line)
        return Blend.from_segment(
            num_samples,
            segment_of(line),
            self.seed,
            domain_keys=domain_keys,
            sampling=self.sampling,
            rests={domain: rests[name] for domain, name in enumerate(line["domain_names"]) if name in rests},
        )

    def _rests(self, line: dict[str, Any]) -> dict[str, Rest]:
        """By domain, the rests of epochs that were cut anew (`megamix.data.blend.rest`), as a start of the run, or what
        a resume changed, has put them on record at or before a line."""
        for before in reversed(self.lines[: self.lines.index(line) + 1]):
            if "rests" in before or before.get("change"):
                return {name: Rest.from_json(rest) for name, rest in before.get("rests", {}).items()}
        return {}

    def counts(self, position: int) -> dict[str, int]:
        """Samples before ``position`` that each of the N domains gave, whatever data it had; also where the first lines
        are not on record, as of a run that continues another's checkpoint."""
        totals = dict.fromkeys(self.names, 0)
        lines = self.lines[: int(np.searchsorted(self.starts, position, "right"))]
        starts = [index for index, line in enumerate(lines) if index == 0 or line.get("change")]
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            stop = lines[end]["position"] if end < len(lines) else position
            given = self._counts_at(lines[end - 1], stop)
            if start > 0 or lines[start].get("change"):
                given = given - self._counts_at(lines[start], lines[start]["position"])
            for name, count in zip(lines[start]["domain_names"], given.tolist(), strict=True):
                totals[name] += count
        return totals

    def read_so_far(self, position: int) -> dict[str, int]:
        """Samples that the domains in effect at ``position`` have given of the data they have there."""
        line = self.line_at(position)
        return dict(zip(line["domain_names"], self._counts_at(line, position).tolist(), strict=True))

    def _counts_at(self, line: dict[str, Any], position: int) -> Ints:
        # How many samples an epoch has changes which of them are taken, not how many.
        ones = np.ones(len(line["domain_names"]), np.int64)
        return Blend.from_segment(ones, segment_of(line), self.seed, sampling=self.sampling).counts_at(position)


def segment_of(line: dict[str, Any]) -> Segment:
    """The stretch of constant weights that a line describes."""
    part = line["segment"]
    return Segment.from_json(
        {"weights": line["domain_weights"], **{key: part[key] for key in ("start", "deficits", "counts")}}
    )
