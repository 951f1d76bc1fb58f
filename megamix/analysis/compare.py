"""``megamix compare``: runs beside each other by validation loss, paired over seeds.

Runs whose configs differ in ``train.seed`` only (and in what changes no loss, such as layout or logging) are one
variant. Every other variant is compared with the baseline seed by seed: differences of runs that saw the same data in
the same initial state vary less than the runs do. Their mean has a 95 % interval by Student's t.

    OUT/runs.csv         a row for each run
        variants.csv     a row for each variant and metric
        comparison.png   the objective loss of every variant and run, over tokens
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megamix.analysis.labels import run_names
from megamix.analysis.paired import Interval, t_interval
from megamix.analysis.series import first_step_at, objective_losses, worst
from megamix.analysis.variants import at_equal_tokens, check_comparable, variant_names
from megamix.core.errors import InputError, did_you_mean
from megamix.core.files import replace_file
from megamix.core.text import ABSENT, Report, Table, number, plural
from megamix.training.objective import objective_name
from megamix.training.records.recorded_run import RecordedRun

METRICS = {
    "objective": "objective loss",
    "macro": "macro loss",
    "worst": "worst domain",
    "micro": "by natural share",
    "steps": "steps to target",
    "tokens": "tokens to target",
}
"""Metrics compared, and their names in tables; losses in nats per token."""


@dataclass(frozen=True)
class RunResult:
    """Results of one run.

    Attributes:
        name: short, from its directory.
        objective, macro, worst, micro: validation loss after the last step, or where runs of different lengths are cut:
            by the objective, mean over domains, of the worst domain, weighted by natural share; None where a domain's
            natural share is not known.
        target: the objective loss to reach; None where there is none for this seed.
        steps, tokens: when the target was reached, on the line between two evaluations; None where it was not.
        curve: (tokens, objective loss) of every evaluation that has one.
    """

    run_dir: Path
    name: str
    variant: str
    seed: int
    objective: float | None
    macro: float
    worst: float
    worst_domain: str
    micro: float | None
    target: float | None
    steps: float | None
    tokens: float | None
    curve: list[tuple[int, float]]


@dataclass(frozen=True)
class Summary:
    """One metric of one variant.

    Attributes:
        seeds: number of runs of the variant.
        mean: over the seeds; None where a run has no number.
        difference: from the baseline, over the seeds that both have; None for the baseline, and where there are none.
    """

    variant: str
    metric: str
    seeds: int
    mean: Interval | None
    difference: Interval | None


@dataclass(frozen=True)
class Comparison:
    """Runs and summaries of their variants; the baseline comes first. All runs have the same ``objective``.

    Attributes:
        cut: where runs of different lengths are compared; None where they have the same.
    """

    runs: list[RunResult]
    summaries: list[Summary]
    baseline: str
    target: float | None
    objective: str
    written: list[Path]
    cut: str | None = None

    def report(self) -> Report:
        """Two tables, and how to read them."""
        words = (
            f"differences are from {self.baseline}, seed by seed, with 95 % intervals (Student's t; two seeds at least); * : "
            f"the interval does not hold 0.\nthe objective is {self.objective}; losses: on held-out text, nats per token; macro: mean over domains; target: "
            + (
                f"an objective loss of {self.target:g}."
                if self.target is not None
                else f"the objective loss that {self.baseline} ends with at the same seed."
            )
        )
        if self.cut is not None:
            words += f"\n{self.cut}"
        files = ["\n".join(map(str, self.written))] if self.written else []
        return Report([self._runs_table(), self._variants_table(), words, *files])

    def _runs_table(self) -> Table:
        columns = ("run", "variant", "seed", *METRICS.values())
        rows = [
            (
                run.name, run.variant, str(run.seed), number(run.objective), number(run.macro), f"{number(run.worst)} {run.worst_domain}",
                number(run.micro), _count(run.steps), _count(run.tokens),
            )
            for run in self.runs
        ]  # fmt: skip
        return Table(columns, rows, left=frozenset(("variant",)))

    def _variants_table(self) -> Table:
        rows = []
        for summary in self.summaries:
            text = _count if summary.metric in ("steps", "tokens") else number
            mean, difference = summary.mean, summary.difference
            rows.append(
                (
                    summary.variant,
                    METRICS[summary.metric],
                    ABSENT if mean is None else text(mean.mean),
                    ABSENT if difference is None else text(difference.mean),
                    ABSENT
                    if difference is None or difference.half_width is None
                    else f"± {text(difference.half_width)}",
                    "*" if difference is not None and difference.excludes_zero else "",
                    str(summary.seeds if difference is None else difference.number),
                )
            )
        columns = ("variant", "metric", "mean", "difference", "95 %", "", "seeds")
        return Table(columns, rows, left=frozenset(("metric",)))


def compare(
    run_dirs: Sequence[Path], target: float | None = None, baseline: str | None = None, out: Path | None = None
) -> Comparison:
    """Compares runs.

    Args:
        target: objective loss to reach. Default: for each seed what the baseline ends with.
        baseline: the name of the variant that the others are compared with. Default: that of the first run.
        out: folder for tables and a figure; None writes nothing.

    Raises:
        InputError: fewer than two runs, runs that were evaluated on different samples or never after equally many
            tokens, two of the same variant and seed, an unknown baseline, or a folder that cannot be written.
    """
    if len(run_dirs) < 2:
        raise InputError(f"{plural(len(run_dirs), 'run is', 'runs are')} given. Name at least two to compare.")
    runs, cut = at_equal_tokens([RecordedRun.open(Path(run_dir)) for run_dir in run_dirs])
    check_comparable(runs)
    variants = variant_names(runs)
    _refuse_repeated(runs, variants)
    if baseline is not None and baseline not in variants:
        raise InputError(f"--baseline {baseline}: no such variant." + did_you_mean(baseline, variants))
    base = variants[0] if baseline is None else baseline
    final = {
        run.config.train.seed: objective_losses(run)[-1]
        for run, variant in zip(runs, variants, strict=True)
        if variant == base
    }
    results = [
        _result(run, name, variant, final.get(run.config.train.seed) if target is None else target)
        for run, name, variant in zip(runs, run_names([run.run_dir for run in runs]), variants, strict=True)
    ]
    order = [base, *dict.fromkeys(variant for variant in variants if variant != base)]
    results.sort(key=lambda result: (order.index(result.variant), result.seed))
    summaries = [_summary(results, variant, metric, base) for variant in order for metric in METRICS]
    aim = objective_name(runs[0].config.objective)
    written = [] if out is None else _write(out, results, summaries, order, aim)
    return Comparison(results, summaries, base, target, aim, written, cut)


def _refuse_repeated(runs: Sequence[RecordedRun], variants: Sequence[str]) -> None:
    seen: dict[tuple[str, int], Path] = {}
    for run, variant in zip(runs, variants, strict=True):
        key = variant, run.config.train.seed
        if key in seen:
            raise InputError(
                f"{seen[key]} and {run.run_dir} are both of the variant '{variant}' with train.seed {key[1]}: their configs "
                "ask for the same run. Name one of them, or train it with another seed."
            )
        seen[key] = run.run_dir


def _result(run: RecordedRun, name: str, variant: str, target: float | None) -> RunResult:
    last = run.evaluations[-1]
    domain, highest = worst(last)
    assert domain is not None  # check_comparable has seen a loss of every domain
    assert highest is not None
    losses = objective_losses(run)
    known = [(line, loss) for line, loss in zip(run.evaluations, losses, strict=True) if loss is not None]
    reached = None if target is None else first_step_at([(line["step"], loss) for line, loss in known], target)
    return RunResult(
        run_dir=run.run_dir,
        name=name,
        variant=variant,
        seed=run.config.train.seed,
        objective=losses[-1],
        macro=last["macro_loss"],
        worst=highest,
        worst_domain=domain,
        micro=last.get("micro_loss"),
        target=target,
        steps=reached,
        tokens=None if reached is None else run.config.batches.tokens_after(reached),
        curve=[(line["tokens"], loss) for line, loss in known],
    )


def _summary(results: Sequence[RunResult], variant: str, metric: str, base: str) -> Summary:
    mine = {run.seed: getattr(run, metric) for run in results if run.variant == variant}
    mean = None if None in mine.values() else t_interval(list(mine.values()))
    if variant == base:
        return Summary(variant, metric, len(mine), mean, None)
    theirs = {run.seed: getattr(run, metric) for run in results if run.variant == base}
    pairs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
    # Leaving out the seeds that did not get there would favour whoever gets there rarely.
    missing = not pairs or any(None in pair for pair in pairs)
    return Summary(
        variant, metric, len(mine), mean, None if missing else t_interval([own - other for own, other in pairs])
    )


def _write(
    out: Path, runs: Sequence[RunResult], summaries: Sequence[Summary], order: Sequence[str], objective: str
) -> list[Path]:
    # Not at once: without --out there is nothing to draw.
    from megamix.analysis.comparison_figure import draw_comparison

    columns = (
        "run_dir", "variant", "seed", "objective", "macro", "worst", "worst_domain", "micro", "target", "steps", "tokens",
    )  # fmt: skip
    rows = [[getattr(run, column) for column in columns] for run in runs]
    paths = [out / "runs.csv", out / "variants.csv", out / "comparison.png"]
    fields = ("mean", "half_width")
    long = [
        [
            summary.variant,
            summary.metric,
            summary.seeds,
            *(getattr(summary.mean, field, None) for field in fields),
            *(getattr(summary.difference, field, None) for field in (*fields, "number")),
        ]
        for summary in summaries
    ]
    heads = ("variant", "metric", "seeds", "mean", "half_width", "difference", "difference_half_width", "pairs")
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(paths[0], _csv(columns, rows))
        replace_file(paths[1], _csv(heads, long))
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror or error}. Choose another --out.") from error
    curves = {variant: [dict(run.curve) for run in runs if run.variant == variant] for variant in order}
    draw_comparison(paths[2], curves, objective)
    return paths


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    """An empty cell where there is no number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode()


def _count(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.1f}"
