"""``megamix swarm update``: what an update of the domains freezes, frees and costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megamix.core.config import validate
from megamix.core.config_files import read_yaml
from megamix.core.errors import InputError
from megamix.core.files import writing
from megamix.core.text import ABSENT, Report, Table, number, plural
from megamix.studies.swarm.priors import priors_of
from megamix.studies.swarm.propose.config import UpdateConfig
from megamix.studies.swarm.propose.proposal import read_proposal
from megamix.studies.swarm.propose.propose import propose_settled
from megamix.studies.swarm.propose.question import read_amounts
from megamix.studies.swarm.propose.reuse import EXISTING, Update, default_members, resolve_update


def read_update(path: Path, data: Path, domains: Sequence[str] | None = None) -> Update:
    """Resolves the update in a YAML file.

    Args:
        path: keys of `UpdateConfig`.
        data: a data set (its manifest or folder), or a file of priors with token counts.
        domains: some of the data set's, in this order; None: all.

    Raises:
        InputError: either cannot be read, or they do not fit together or the old mixture (`resolve_update`).
    """
    update = validate(UpdateConfig, read_yaml(path), str(path))
    if data.is_dir() or data.name == "manifest.json":
        tokens = {name: float(count) for name, count in priors_of(data, domains).token_counts.items()}
    elif domains is not None:
        raise InputError(f"domains are chosen from a data set, and {data} is none. Name its folder, or leave them out.")
    else:
        tokens = read_amounts(data).tokens
        if not tokens:
            raise InputError(f"{data} has no token_counts. Write it with `megamix swarm priors`, or name the data set.")
    return resolve_update(update, read_proposal(update.previous), tokens)


def start_update(update: Update, out: Path) -> Path | None:
    """Writes OUT/update.json; where no weight is free also OUT/mixture.json, and returns its path.

    Raises:
        InputError: they cannot be written.
    """
    with writing(f"to {out}", "Choose another directory."):
        out.mkdir(parents=True, exist_ok=True)
        update.save(out)
    return propose_settled(out, update)[1] if update.settled else None


def report(update: Update, tokens_per_run: float | None = None) -> Report:
    """The domains to find weights for, what is frozen, and the cost."""
    rows = [
        (name, number(update.prior[name]), plural(len(update.inner), "domain") if name == EXISTING else "free")
        for name in update.virtual
    ]
    parts: list[str | Table] = [Table(("domain", "prior", "stands for"), rows, left=frozenset(["stands for"]))]
    if update.inner:
        parts.append(
            Table((f"in {EXISTING}", "ratio"), [(name, number(ratio)) for name, ratio in update.inner.items()])
        )
    return Report([*parts, cost(update, tokens_per_run)])


def cost(update: Update, tokens_per_run: float | None = None, members: int | None = None) -> Table:
    """Proxy runs and tokens of the update, and of finding all weights anew.

    Args:
        members: runs of the update; None: by `default_members`.
    """
    own = default_members(len(update.virtual)) if members is None or update.settled else members
    full = default_members(len(update.domains))

    def row(what: str, domains: int, runs: int) -> tuple[str, ...]:
        tokens = ABSENT if tokens_per_run is None else f"{runs * tokens_per_run:,.0f}"
        return what, str(domains), str(runs), tokens, f"{runs / full:.0%}" if full else ABSENT

    rows = [
        row(f"this update (reuse: {update.reuse})", len(update.virtual), own),
        row("full recomputation", len(update.domains), full),
    ]
    return Table(("", "domains to weigh", "proxy runs", "tokens", "of the full cost"), rows)
