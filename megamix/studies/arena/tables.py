"""The tables of an arena's results, as text and as markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megamix.core.text import ABSENT, Report, Table, number, plural
from megamix.studies.arena.answer import adaptation_text, answer_text
from megamix.studies.arena.config import NO_TRAP
from megamix.studies.arena.members import Condition
from megamix.studies.arena.results import WITHOUT_TRAP, Cell, Difference, Results, arm_record

COLUMNS = (
    "arm", "objective loss", "sd", "n", "against natural", "against the best static", "verdict", "steps to target",
    "macro", "micro", "worst", "seconds",
)  # fmt: skip
TRAP_COLUMNS = (
    "arm", "objective loss", "against the best static without the trap", "verdict", "tokens on the trap", "seconds"
)  # fmt: skip
HOW_TO_READ = (
    "Losses are on held-out text, in nats per token, means over the seeds; sd: standard deviation over the seeds. "
    "Differences are the arm's objective loss less the baseline's, seed by seed (below 0: the arm is better), with 95 % intervals by "
    "Student's t. The best static arm is chosen on these same seeds, by its mean, so what it leads by is flattered; it is itself compared "
    "with the second best.{chance} Steps to target: until the objective loss is down to the final one of natural, mean over the seeds; - "
    "where a seed does not get there, or has no natural."
)


def status(results: Results) -> str:
    """How many members are done, and what the results lack."""
    if results.done < results.total:
        said = f"{results.done} of {results.total} members are done: the results are of these."
    else:
        said = f"All {results.total} members are done."
    if results.left_out:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in results.left_out.items())
        said += f" Of these {len(results.left_out)} cannot be used and are left out:{reasons}"
    if results.missing:
        arms = ", ".join(f"{arm} {number}" for arm, number in results.missing.items())
        said += f"\nMembers that the results lack, by arm: {arms}."
    return said


def how_to_read(results: Results) -> str:
    """What the columns mean."""
    count = results.num_comparisons
    often = "about one in 20 excludes 0 by chance alone, where there is no difference."
    chance = f" Of {plural(count, 'comparison')} {often}" if count else ""
    return HOW_TO_READ.format(chance=chance)


def title(cell: Cell) -> str:
    """``objective uniform, 800 steps, trap noise``."""
    return f"objective {cell.objective}, {condition_text(cell.condition)}"


def condition_text(condition: Condition) -> str:
    """``small, 800 steps, trap noise``."""
    model = [] if condition.model is None else [f"model {condition.model}"]
    trap = [] if condition.trap == NO_TRAP else [f"trap {condition.trap}"]
    return ", ".join([*model, f"{condition.steps} steps", *trap])


def _arms(cell: Cell) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Difference]]]:
    """(arm, its means, its differences by what they are against), the lowest loss first."""
    records = {arm: arm_record(cell, arm) for arm in cell.rows}
    for arm in sorted(records, key=lambda name: records[name]["objective_loss"]):
        yield arm, records[arm], {one.against: one for one in cell.differences[arm]}


def cell_table(cell: Cell) -> Table:
    """The arms of a cell, the lowest loss first."""
    rows = []
    for arm, record, found in _arms(cell):
        best = found.get("best_static")
        rows.append(
            (
                arm,
                number(record["objective_loss"]),
                number(record["deviation"]),
                str(len(record["seeds"])),
                difference_text(found.get("natural")),
                ABSENT if best is None else f"{difference_text(best)} ({best.baseline})",
                ABSENT if best is None else best.verdict,
                number(record["steps_to_target"], 0),
                number(record["macro_loss"]),
                number(record["micro_loss"]),
                number(record["worst_loss"]),
                number(record["seconds"], 0),
            )
        )
    return Table(COLUMNS, rows, left=frozenset(("verdict",)))


def trap_table(cell: Cell) -> Table:
    """The arms of a cell with a trap, against the best static arm without it."""
    rows = []
    for arm, record, found in _arms(cell):
        plain = found.get(WITHOUT_TRAP)
        share = record["noise_share"]
        rows.append(
            (
                arm,
                number(record["objective_loss"]),
                ABSENT if plain is None else f"{difference_text(plain)} ({plain.baseline})",
                ABSENT if plain is None else plain.verdict,
                ABSENT if share is None else f"{100 * share:.1f} %",
                number(record["seconds"], 0),
            )
        )
    return Table(TRAP_COLUMNS, rows, left=frozenset(("verdict",)))


def difference_text(found: Difference | None) -> str:
    """``-0.0123 ± 0.0045``."""
    if found is None:
        return ABSENT
    half = found.interval.half_width
    return f"{found.interval.mean:+.4f}" + ("" if half is None else f" ± {half:.4f}")


def visible_text(cell: Cell) -> str:
    """What the number of seeds can show."""
    known = [one for found in cell.differences.values() for one in found if one.against == "best_static"]
    seen = sorted(one.smallest_visible for one in known if one.smallest_visible is not None)
    if not known:
        return "There is no static arm to compare with."
    if not seen:
        return "With fewer than two seeds no difference can be told from chance."
    return (
        f"Differences of {seen[0]:.4f} (the steadiest pair) to {seen[-1]:.4f} (the least steady) from the best static arm would be found "
        "in four of five such arenas."
    )


def in_words(results: Results, cell: Cell) -> list[str]:
    """The answer, what adaptation gave, and what the number of seeds can show."""
    return [text for text in (answer_text(results, cell), adaptation_text(cell), visible_text(cell)) if text]


def report(results: Results, written: Sequence[Path]) -> Report:
    """What the command prints."""
    parts: list[str | Table] = []
    for cell in results.cells:
        parts += [f"{title(cell)}:", cell_table(cell)]
        if cell.condition.trap != NO_TRAP:
            parts.append(trap_table(cell))
        parts.append("\n".join(in_words(results, cell)))
    return Report([*parts, how_to_read(results), status(results), "\n".join(map(str, written))])


def markdown(results: Results) -> str:
    """results.md."""
    lines = [status(results), "", how_to_read(results)]
    for cell in results.cells:
        answer, *words = in_words(results, cell)
        lines += [
            "",
            f"## {title(cell)[0].upper()}{title(cell)[1:]}",
            "",
            answer,
            "",
            *_markdown_table(cell_table(cell)),
        ]
        if cell.condition.trap != NO_TRAP:
            lines += ["", *_markdown_table(trap_table(cell))]
        for text in words:
            lines += ["", text]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    right = ["---" if column == 0 or name in table.left else "---:" for column, name in enumerate(table.columns)]
    return [f"| {' | '.join(line)} |" for line in (table.columns, right, *table.rows)]
