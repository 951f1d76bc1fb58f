"""An arena's results in words: which arm to take, and whether a rule's adaptation was worth anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megamix.studies.arena.results import Cell, Difference, Results


def answer_text(results: Results, cell: Cell) -> str:
    """Which arm to take under a cell's objective and condition, and how the others stand to the best static mixture."""
    head = "Answer" if results.done == results.total and not results.left_out else "Answer so far"
    if not cell.best_static:
        return f"{head}: none, for there is no static arm of a seed that all static arms have."
    best = cell.best_static[0]
    against = {
        arm: found for arm in cell.rows if arm != best and (found := _against(cell, arm, "best_static")) is not None
    }
    known = {arm: found for arm, found in against.items() if found.interval.half_width is not None}
    if not known:
        return (
            f"{head}: none, for an interval takes two seeds that an arm and the best static arm, '{best}', both have."
        )
    ahead = _by_mean(known, (arm for arm in known if known[arm].is_better))
    behind = _by_mean(known, (arm for arm in known if known[arm].is_worse))
    near = _by_mean(known, known.keys() - {*ahead, *behind})
    rules = not all(results.study.arms[arm].is_static for arm in cell.rows)
    if ahead:
        lead = known[ahead[0]]
        found = f"take '{ahead[0]}', which is {lead.finding} than the best static mixture, '{best}'{lead.part}"
    else:
        found = f"take the static mixture '{best}', which no {'rule' if rules else 'other arm'} beats beyond noise"
    others = [
        f"{words} {_quoted(arms)}"
        for words, arms in (
            ("better than that mixture too:", ahead[1:]), ("not told apart from it:", near), ("worse than it:", behind),
            ("of a single seed:", sorted(against.keys() - known.keys())),
        )
        if arms
    ]  # fmt: skip
    return "; ".join([f"{head}: {found}", *others]) + "."


def adaptation_text(cell: Cell) -> str:
    """What each rule gained on its own mean weights, held from the first step on; empty where there are none."""
    found = [(arm, one) for arm in cell.rows if (one := _against(cell, arm, "frozen")) is not None]
    said = [
        f"'{arm}' is {one.verdict}" if one.interval.excludes_zero else f"'{arm}': {one.verdict}" for arm, one in found
    ]
    return f"Against its own mean weights from the first step on, {'; '.join(said)}." if said else ""


def _against(cell: Cell, arm: str, against: str) -> Difference | None:
    return next((one for one in cell.differences[arm] if one.against == against), None)


def _by_mean(known: dict[str, Difference], arms: Iterable[str]) -> list[str]:
    return sorted(arms, key=lambda arm: (known[arm].interval.mean, arm))


def _quoted(arms: Sequence[str]) -> str:
    return ", ".join(f"'{arm}'" for arm in arms)
