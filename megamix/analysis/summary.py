"""Result table of a run: shares, losses and epochs of every domain, from the run's directory alone.

Domain shares and epochs are exact: they follow from the ledger of weight changes. What only the data set knows (natural
shares, epochs, the unigram loss) is left out where the data set is no longer there.

Legend: N domains, those of the end of the run and those it had before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megamix.core.text import ABSENT, Report, Table, listed, most_of, number
from megamix.training.objective import objective_name, weighted_loss
from megamix.training.records.recorded_run import RecordedRun


@dataclass(frozen=True)
class DomainRow:
    """One domain of a run; None where a number is not known.

    Attributes:
        natural_share: of the training tokens.
        realised_share: of the samples trained on so far.
        first_loss, last_loss: validation loss, mean nats per token.
        unigram_loss: of the domain's word frequencies alone, on the same text.
        epochs: read so far.
        present: whether it is still one of the run's domains.
        evaluated: whether it has validation text.
    """

    domain: str
    natural_share: float | None
    initial_weight: float | None
    final_weight: float
    realised_share: float | None
    first_loss: float | None
    last_loss: float | None
    unigram_loss: float | None
    epochs: float | None
    present: bool = True
    evaluated: bool = True

    @property
    def beats_unigram(self) -> bool | None:
        if self.last_loss is None or self.unigram_loss is None:
            return None
        return self.last_loss < self.unigram_loss


@dataclass(frozen=True)
class RunTable:
    """A run in one table; a mean over the present domains with validation text is None unless every one has the number.

    Attributes:
        objective: weights of the domains; empty where they are not known.
    """

    run_dir: Path
    steps: int
    total_steps: int
    tokens: int
    rows: list[DomainRow]
    objective: dict[str, float]
    objective_name: str
    missing_data: str | None = None

    @property
    def _present(self) -> list[DomainRow]:
        return [row for row in self.rows if row.present and row.evaluated]

    @property
    def unevaluated(self) -> list[str]:
        """The present domains that have no validation text."""
        return [row.domain for row in self.rows if row.present and not row.evaluated]

    def by_objective(self, loss: str) -> float | None:
        """Mean of ``first_loss``, ``last_loss`` or ``unigram_loss``, weighted by the objective."""
        return (
            weighted_loss(self.objective, {row.domain: getattr(row, loss) for row in self.rows})
            if self.objective
            else None
        )

    def macro(self, loss: str) -> float | None:
        """Mean over domains of ``first_loss``, ``last_loss`` or ``unigram_loss``."""
        present = self._present
        return _sum([(getattr(row, loss), 1 / len(present)) for row in present])

    def by_natural_share(self, loss: str) -> float | None:
        """Mean of such a loss, weighted by natural share."""
        mean = _sum([(getattr(row, loss), row.natural_share) for row in self._present])
        return (
            mean
            if mean is None or not self.unevaluated
            else mean / sum(row.natural_share or 0 for row in self._present)
        )

    @property
    def fall(self) -> float | None:
        """Share of its first value by which the mean validation loss has fallen."""
        first, last = self.macro("first_loss"), self.macro("last_loss")
        return None if first is None or last is None else 1 - last / first

    def table(self) -> Table:
        columns = (
            "domain", "natural", "initial", "final", "trained", "first loss", "last loss", "unigram", "beaten", "epochs",
        )  # fmt: skip
        rows = [
            (
                row.domain,
                number(row.natural_share),
                number(row.initial_weight),
                number(row.final_weight),
                number(row.realised_share),
                number(row.first_loss, 3),
                number(row.last_loss, 3),
                number(row.unigram_loss, 3),
                {True: "yes", False: "NO", None: ABSENT}[row.beats_unigram],
                number(row.epochs, 2),
            )
            for row in self.rows
        ]
        moved = [abs(row.final_weight - (row.initial_weight or 0.0)) for row in self.rows]
        rows = most_of(rows, moved)
        means = {
            f"objective ({self.objective_name})": self.by_objective,
            "mean over domains": self.macro,
            "by natural share": self.by_natural_share,
        }
        for name, mean in means.items():
            first, last, unigram = (number(mean(loss), 3) for loss in ("first_loss", "last_loss", "unigram_loss"))
            rows.append((name, "", "", "", "", first, last, unigram, "", ""))
        return Table(columns, rows, footer=len(means))

    def report(self) -> Report:
        """The table and its results in words."""
        legend = (
            "natural: share of the training tokens; initial, final: sampling weight; trained: share of the tokens "
            "trained on;\nlosses: on held-out text, nats per token; unigram: what word frequencies alone reach there."
        )
        notes = [f"{self.run_dir}: step {self.steps} of {self.total_steps}, {self.tokens:,} tokens."]
        first, last = self.by_objective("first_loss"), self.by_objective("last_loss")
        if first is not None and last is not None:
            notes.append(f"The objective loss ({self.objective_name}) went from {first:.3f} to {last:.3f}.")
        if self.fall is not None:
            change = f"fell by {self.fall:.1%}" if self.fall >= 0 else f"rose by {-self.fall:.1%}"
            notes.append(f"The mean validation loss over domains {change}.")
        known = [row for row in self._present if row.beats_unigram is not None]
        behind = [row.domain for row in known if not row.beats_unigram]
        if behind:
            notes.append(f"It does not beat a unigram model on: {listed(behind, 40)}.")
        elif known and len(known) == len(self._present):
            notes.append("It beats a unigram model on every domain.")
        if self.unevaluated:
            notes.append(f"Without validation text, and so in no evaluation: {listed(self.unevaluated)}.")
        if self.missing_data:
            notes.append(f"Shares, epochs and unigram losses are unknown here: {self.missing_data}")
        return Report([self.table(), legend, " ".join(notes)])


def run_table(run: RecordedRun) -> RunTable:
    counts = run.tokens_read()
    total = sum(counts.values())
    first = run.evaluations[0]["domain_loss"] if run.evaluations else {}
    last = run.evaluations[-1]["domain_loss"] if run.evaluations else {}
    natural, epochs, weights = run.natural_shares(), run.epochs(), run.ledger.weights
    present = set(run.ledger.lines[-1]["domain_names"])
    rows = [
        DomainRow(
            domain=name,
            natural_share=natural.get(name),
            initial_weight=float(weights[0, k]) if run.ledger.starts[0] == 0 else None,
            final_weight=float(weights[-1, k]),
            realised_share=counts[name] / total if total else None,
            first_loss=first.get(name),
            last_loss=last.get(name),
            unigram_loss=run.manifest.domain(name).validation.unigram_nats
            if run.manifest and name in natural
            else None,
            epochs=epochs.get(name),
            present=name in present,
            evaluated=not last or name in last,
        )
        for k, name in enumerate(run.ledger.names)
    ]
    name = objective_name(run.config.objective)
    return RunTable(
        run.run_dir, run.steps, run.config.train.steps, run.tokens, rows, run.objective(), name, run.missing_data
    )


def _sum(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """The sum of products; None unless every factor is known."""
    known = [value * weight for value, weight in pairs if value is not None and weight is not None]
    return sum(known) if known and len(known) == len(pairs) else None
