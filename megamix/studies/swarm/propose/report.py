"""Report and plot of a proposal, and the origin of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megamix.core.errors import check_known
from megamix.core.text import ABSENT, Report, Table, number, plural
from megamix.studies.swarm.fit.quality import GOOD_RANKS
from megamix.studies.swarm.propose.proposal import Proposal
from megamix.studies.swarm.propose.reuse import EXISTING

PLOT = "mixture.png"
REMOTE = 0.1
"""A mixture is remote where fewer runs than this are as far from the nearest other run."""


def report(proposal: Proposal, path: Path) -> Report:
    """Report of `propose`; ``path`` is the file written."""
    details = proposal.details
    parts: list[str | Table] = [_headline(details), _weights_table(proposal), _metrics_table(proposal)]
    if "virtual" in details:
        parts.insert(2, _updated_table(proposal))
    if details["with_larger_kl"]:
        parts.append(_kl_table(details["with_larger_kl"]))
    parts.append("\n".join([*_sureness(details), f"The mixture is in {path}."]))
    return Report(parts)


def _in_short(details: Mapping[str, Any]) -> str:
    fit, which = details["fit"], "worst" if details["worst"] else "best"
    return (
        f"the {which} mixture by a {fit['regression']} fit to {fit['runs']} runs; KL weight {details['kl']['weight']:g}"
    )


def _headline(details: Mapping[str, Any]) -> str:
    said = f"{_in_short(details)}, prior: {details['prior'].get('source', 'as given')}"
    if details["caps"] is not None:
        said += f"; caps: {details.get('caps_from', 'as given')}"
    return said


def _weights_table(proposal: Proposal) -> Table:
    details = proposal.details
    found = details.get("virtual", proposal.weights)
    shares, caps = details["prior"]["shares"], details["caps"]
    intervals, beyond = details["weight_intervals"] or {}, details["distance"]["beyond_tried"]
    rows = []
    for name, weight in found.items():
        cap = ABSENT if caps is None else number(caps[name])
        notes = [f"above any tried ({beyond[name][1]:.4f})"] if name in beyond else []
        if name in details["fixed"]:
            notes.append("fixed")
        elif caps is not None and weight > caps[name] - 1e-6:
            notes.append("at its cap")
        rows.append((name, number(shares[name]), number(weight), _interval(intervals.get(name)), cap, ", ".join(notes)))
    return Table(("domain", "prior", "proposal", "5 to 95 %", "cap", "note"), rows, left=frozenset(["note"]))


def _updated_table(proposal: Proposal) -> Table:
    """The real domains of an update, which stand for virtual ones in the other table."""
    entry = proposal.history[-1]
    before, frozen = entry["update"]["weights_before"], _frozen(entry)
    rows = [
        (name, number(before.get(name)), number(weight), "frozen ratio" if name in frozen else "found")
        for name, weight in proposal.weights.items()
    ]
    return Table(("domain", "before", "after the update", "how"), rows, left=frozenset(["how"]))


def _metrics_table(proposal: Proposal) -> Table:
    details = proposal.details
    predictions, intervals = details["predictions"], details["intervals"] or {}
    quality, objective = details["fit"]["cross_validation"], details["objective"]
    columns = (
        "metric",
        "in the objective",
        "prior",
        "best tried",
        "proposal",
        "5 to 95 %",
        "held-out rank correlation",
    )
    rows = [
        (
            name,
            number(objective.get(name)),
            *(number(predictions[where][name]) for where in ("prior", "best_tried", "proposal")),
            _interval(intervals.get(name)),
            number(quality.get(name, {}).get("spearman"), 2),
        )
        for name in proposal.predicted
    ]
    values = details["objective_value"]
    whole = (number(values[where]) for where in ("prior", "best_tried", "proposal"))
    ranks = number(details["fit"]["objective"]["spearman"], 2)
    return Table(columns, [*rows, ("objective", "1", *whole, "", ranks)], footer=1)


def _kl_table(alternatives: list[dict[str, Any]]) -> Table:
    """Gains with larger weights of the KL."""
    rows = [
        (
            f"{row['kl']:g}" + (" (this)" if place == 0 else ""),
            number(row["gain_over_prior"]),
            _interval(row["interval"]),
            number(row["from_prior"], 3),
            number(row["nearest_run"], 3),
        )
        for place, row in enumerate(alternatives)
    ]
    return Table(("KL weight", "gain over the prior", "5 to 95 %", "from the prior", "from the nearest run"), rows)


def _interval(bounds: list[float] | None) -> str:
    return ABSENT if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"


def _sureness(details: Mapping[str, Any]) -> list[str]:
    """Sentences on the confidence, one a line."""
    lines = [_gain(details), *_error(details), _distance(details["distance"]), _exactness(details["optimality"])]
    ranks = [row["spearman"] for row in details["fit"]["cross_validation"].values() if row.get("spearman") is not None]
    if ranks and np.mean(ranks) < GOOD_RANKS:
        lines.append(
            f"The fit ranks runs that it has not seen poorly (mean rank correlation {np.mean(ranks):.2f}): take the mixture for a guess."
        )
    return lines


def _gain(details: Mapping[str, Any]) -> str:
    gain, best = details["gain_over_prior"], details["best_tried"]
    said, unsure = f"Predicted gain over the prior: {gain['value']:.4f}", ""
    if gain["interval"] is not None:
        low, high = gain["interval"]
        said += f" ({low:.4f} to {high:.4f} in 90 % of {gain['resamples']} resamples of the runs)"
        if low < 0 < gain["value"]:
            unsure = " By some resamples it is worse than the prior: more runs, or a larger KL, would make it surer."
    bounds = "" if best["within_bounds"] else ", whose mixture is beyond the bounds"
    return f"{said}; the best run tried is {best['run']}, measured {best['measured']:.4f}{bounds}.{unsure}"


def _error(details: Mapping[str, Any]) -> list[str]:
    """Of the objective, for runs that the fit has not seen."""
    error, gain = details["fit"]["objective"]["rmse"], details["gain_over_prior"]["value"]
    if error is None:
        return []
    said = f"Of a run that it has not seen the fit misses the objective by {error:.4f} (root mean square)"
    if 0 < gain < error:
        said += ", more than the gain: try the mixture beside the prior, with several seeds, before you rely on it"
    return [f"{said}. What a larger or longer run gains the proxies cannot say."]


def _distance(distance: Mapping[str, Any]) -> str:
    apart, median = distance["total_variation"], distance["median_among_runs"]
    said = f"The nearest mixture tried is that of run {distance['nearest_run']}, {apart:.3f} away (half the sum of the differences"
    said += ")." if median is None else f"; runs are {median:.3f} from their nearest, on the median)."
    beyond, outside = distance["beyond_tried"], []
    if beyond:
        shown = ", ".join(f"{name} {weight:.4f} (tried up to {most:.4f})" for name, (weight, most) in beyond.items())
        outside.append(f"it lies outside of what was tried: {shown}")
    if median is not None and distance["share_as_far"] < REMOTE:
        outside.append(f"{distance['share_as_far']:.0%} of the runs are as far from their nearest")
    if not outside:
        return f"{said} No weight is above the largest tried."
    words = "; ".join(outside)
    return f"{said} {words[0].upper()}{words[1:]}. What is predicted there is extrapolated; a larger KL stays nearer."


def _exactness(exact: Mapping[str, Any]) -> str:
    if "duality_gap" not in exact:
        return f"It was found by a {exact['method']}; better ones may exist."
    said = f"No mixture within the bounds has an objective lower by more than {exact['duality_gap']:.1e}"
    if exact["weights_within"] is None:
        return f"{said}; without KL others may be as good."
    return f"{said}; the weights are those of the best to {exact['weights_within']:.1e} in all."


def explain(proposal: Proposal, domain: str | None = None) -> Report:
    """Origin of the weights: a column for each link of the chain of updates, and a sentence for each link.

    Raises:
        InputError: a domain that no link has.
    """
    history = proposal.history
    names = list(dict.fromkeys(name for entry in reversed(history) for name in entry["weights"]))
    shown = names if domain is None else [domain]
    check_known(shown, names, "no mixture in the chain has a domain")
    rows = [(name, *(_cell(entry, name) for entry in history)) for name in shown]
    columns = ("domain", *(f"{n}. {Path(entry['directory']).name}" for n, entry in enumerate(history, 1)))
    runs = sum(entry["runs"] for entry in history)
    said = [_link(entry) if domain is None else _path_of(entry, domain) for entry in history]
    words = [f"{n}. {entry['directory']}: {text}" for n, (entry, text) in enumerate(zip(history, said, strict=True), 1)]
    note = "* frozen: its ratio to the other frozen ones is that of the mixture before"
    return Report([Table(columns, rows), note, "\n".join(words), f"{plural(runs, 'proxy run')} in all"])


def _frozen(entry: Mapping[str, Any]) -> dict[str, float]:
    return entry["update"]["frozen"] if entry["update"] else {}


def _cell(entry: Mapping[str, Any], name: str) -> str:
    weight = entry["weights"].get(name)
    return number(weight) + ("*" if weight is not None and name in _frozen(entry) else "")


def _link(entry: Mapping[str, Any]) -> str:
    update = entry["update"]
    if update is None:
        return f"found by a swarm of {plural(entry['runs'], 'run')} over {plural(len(entry['weights']), 'domain')}"
    changes = [f"{what} {', '.join(update[what])}" for what in ("add", "remove", "revise", "unfreeze") if update[what]]
    changes += [f"partition {whole} into {', '.join(parts)}" for whole, parts in update["partition"].items()]
    found = (
        f"{plural(entry['runs'], 'run')} over {plural(len(entry['found']), 'domain')}" if entry["runs"] else "no runs"
    )
    return f"update of {update['previous']}: {'; '.join(changes)}; reuse: {update['reuse']}; {found}"


def _path_of(entry: Mapping[str, Any], name: str) -> str:
    """Origin of a domain's weight in one link."""
    weight, update = entry["weights"].get(name), entry["update"]
    if weight is None:
        return f"has no domain '{name}'"
    if name in _frozen(entry):
        ratio, whole = _frozen(entry)[name], entry["found"][EXISTING]
        before = update["weights_before"].get(name)
        origin = "a stated share of the domain it is a part of" if before is None else f"{before:.4f} before"
        return f"{weight:.4f} = {whole:.4f} of '{EXISTING}' x {ratio:.4f}, its ratio among the frozen ones ({origin})"
    return f"{weight:.4f}, found by {plural(entry['runs'], 'run')} over {plural(len(entry['found']), 'domain')}"


def draw(proposal: Proposal, folder: Path) -> Path:
    """Writes mixture.png: prior, proposal with its interval, and caps, by domain."""
    import matplotlib

    from megamix.analysis.plots.drawing import STYLE, save_figure

    with matplotlib.rc_context(STYLE):
        return save_figure(_figure(proposal), folder / PLOT)


def _figure(proposal: Proposal) -> Any:
    from matplotlib.figure import Figure

    from megamix.analysis.plots.drawing import look, note, plain

    details = proposal.details
    found, shares = details.get("virtual", proposal.weights), details["prior"]["shares"]
    caps, intervals = details["caps"], details["weight_intervals"]
    names = sorted(found, key=lambda name: -found[name])
    y = np.arange(len(names))
    figure = Figure(figsize=(8.0, max(2.6, 1.2 + 0.32 * len(names))), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("proposed mixture", pad=22)
    note(axes, _in_short(details))
    axes.barh(y - 0.19, [found[name] for name in names], 0.36, color=look(0)[0], label="proposal")
    axes.barh(y + 0.19, [shares[name] for name in names], 0.36, color="#BBBBBB", label="prior")
    if intervals is not None:
        axes.hlines(y - 0.19, *np.array([intervals[name] for name in names]).T, color="#222222", linewidth=1.2,
                    label="5 to 95 % over resampled runs")  # fmt: skip
    highest = max([*found.values(), *shares.values(), *(high for _, high in (intervals or {}).values())])
    in_sight = min(1.05 * highest, 1 - 1e-9)  # 1 is no cap
    shown = [place for place, name in enumerate(names) if caps is not None and caps[name] <= in_sight]
    if caps is not None and shown:
        axes.plot([caps[names[place]] for place in shown], y[shown], "|", color=look(1)[0], markersize=15,
                  markeredgewidth=2, label="cap")  # fmt: skip
    axes.set_yticks(y, [plain(name) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.set_xlabel("weight")
    axes.set_xlim(0, 1.05 * highest)
    figure.legend(loc="outside lower center", ncols=4)
    return figure
