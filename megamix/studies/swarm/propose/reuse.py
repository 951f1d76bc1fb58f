"""Mixture reuse: when the domains change, only the weights that the change touches are found anew.

The unchanged old domains keep their ratios and become one virtual domain, `existing`. The swarm is drawn, and the law
fitted, over the virtual domains: `existing` and the free ones. `Update.expand` turns a virtual mixture into one of the
real domains.

    weight_d = x_d                        of a free domain d
    weight_i = x_existing * inner_i       of a frozen one, inner_i = its old weight over the sum of all frozen ones'

Source: Olmix, Chen et al., arXiv 2602.12237 (full and partial mixture reuse; removal only renormalises).

Legend: N mixtures, K real domains, V virtual ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from numpy.typing import NDArray

from megamix.core.config import first_problem
from megamix.core.errors import InputError, did_you_mean
from megamix.core.files import read_json, replace_json
from megamix.studies.swarm.propose.config import UpdateConfig
from megamix.studies.swarm.propose.proposal import Proposal

Floats = NDArray[np.float64]
EXISTING = "existing"
"""Name of the frozen old mixture, as in Olmix."""
UPDATE_FILE = "update.json"
MEMBERS_PER_DOMAIN = 5
FEWEST_MEMBERS = 16
SPAN_TOLERANCE = 1e-6
"""By how much, of the sum of all weights, a mixture may differ from the ratios of the frozen domains."""


def default_members(num_domains: int) -> int:
    """Proxy runs for a swarm over that many (virtual) domains: 5 a domain, 16 at least; 0 where there is only one.

    The number grows in proportion to the domains, as the paper's does (128 runs at first, then 64, 16, 16, 0 and 64 for
    its updates). A law has a coefficient a domain and a constant for each metric, so this is 4 or more runs for each.
    """
    return 0 if num_domains <= 1 else max(FEWEST_MEMBERS, MEMBERS_PER_DOMAIN * num_domains)


@dataclass(frozen=True)
class Update:
    """Resolved update of a mixture.

    Attributes:
        domains: the K real domains after the update.
        virtual: the V domains whose weights are found; `existing`, if any, is the last.
        inner: {domain: share}, the ratios inside `existing`, which sum to 1; empty without it.
        prior: {virtual domain: share}, which sum to 1.
        previous: directory of the old mixture.
        old_weights: its weights.
        change: the config's keys about domains.
        reuse: full, partial or none.
        history: the chain of updates up to the old mixture.
    """

    domains: tuple[str, ...]
    virtual: tuple[str, ...]
    inner: dict[str, float]
    prior: dict[str, float]
    previous: str
    old_weights: dict[str, float]
    change: dict[str, Any]
    reuse: str
    history: tuple[dict[str, Any], ...]

    @property
    def settled(self) -> bool:
        """Whether the weights follow from the old ones without any proxy run."""
        return len(self.virtual) == 1

    @property
    def summary(self) -> dict[str, Any]:
        """The update in the history of mixtures."""
        return {
            "previous": self.previous,
            **self.change,
            "reuse": self.reuse,
            "frozen": self.inner,
            "weights_before": self.old_weights,
        }

    @property
    def matrix(self) -> Floats:
        """float64 [V, K]: the real weights of each virtual domain."""
        rows = np.zeros((len(self.virtual), len(self.domains)))
        for number, name in enumerate(self.virtual):
            for member, share in self._members(name).items():
                rows[number, self.domains.index(member)] = share
        return rows

    def expand(self, x_NV: Floats) -> Floats:
        """float64 [N, K] (or [K]): the real weights of virtual ones, float64 [N, V] (or [V])."""
        return np.asarray(x_NV, np.float64) @ self.matrix

    def contract(self, w_NK: Floats) -> Floats:
        """float64 [N, V] (or [V]): the virtual weights of real ones, float64 [N, K] (or [K]).

        Raises:
            InputError: the frozen domains do not have the ratios that they have inside `existing`.
        """
        w = np.asarray(w_NK, np.float64)
        x = w @ (self.matrix > 0).T
        rows, wanted = np.atleast_2d(w), np.atleast_2d(self.expand(x))
        off = np.abs(rows - wanted)
        if off.max(initial=0.0) > SPAN_TOLERANCE:
            row, column = np.unravel_index(int(off.argmax()), off.shape)
            raise InputError(
                f"mixture {row + 1}: the weight of domain '{self.domains[column]}' is {rows[row, column]:.6g}, expected "
                f"{wanted[row, column]:.6g}, by its ratio to the other frozen domains. Mixtures of this update keep the ratios "
                f"inside '{EXISTING}'."
            )
        return x

    def caps(self, caps: Mapping[str, float]) -> dict[str, float]:
        """Caps of the virtual domains from caps of the real ones: for `existing` the smallest cap / ratio of its
        domains."""
        return {
            name: min(caps.get(member, np.inf) / share for member, share in self._members(name).items() if share > 0)
            for name in self.virtual
        }

    def binding(self, name: str, caps: Mapping[str, float]) -> str:
        """The real domain whose cap bounds a virtual one."""
        members = {member: share for member, share in self._members(name).items() if share > 0}
        return min(members, key=lambda member: caps.get(member, np.inf) / members[member])

    def contract_prior(self, prior: Mapping[str, float]) -> dict[str, float]:
        """Shares of the virtual domains from (relative) shares of the K real ones."""
        total = sum(prior[name] for name in self.domains)
        return {name: sum(prior[member] for member in self._members(name)) / total for name in self.virtual}

    def _members(self, name: str) -> dict[str, float]:
        """The real domains of a virtual one, and their ratios."""
        return self.inner if name == EXISTING and self.inner else {name: 1.0}

    def save(self, directory: Path) -> None:
        """Writes DIR/update.json, which `propose` reads."""
        content = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        replace_json(directory / UPDATE_FILE, content)

    @classmethod
    def open(cls, directory: Path) -> Update | None:
        """Reads DIR/update.json; None where there is none.

        Raises:
            InputError: it is damaged.
        """
        path = Path(directory) / UPDATE_FILE
        if not path.is_file():
            return None
        content = read_json(path)
        try:
            return pydantic.TypeAdapter(cls).validate_python(content)
        except ValueError as error:
            raise InputError(
                f"{path} is not what `megamix swarm generate` writes ({first_problem(error)}). Make it anew."
            ) from error


def resolve_update(config: UpdateConfig, old: Proposal, token_counts: Mapping[str, float]) -> Update:
    """Determines which domains are frozen and which are free.

    Args:
        old: the mixture in ``config.previous``.
        token_counts: {domain: tokens} of the K domains after the update, in their order; the prior follows from them.

    Raises:
        InputError: an update of a domain that is not there or there already, two updates of one, data that does not
            have the domains that follow, or frozen domains that have no weight.
    """
    _check_names(config, old.weights)
    kept = _carried_over(config, old.weights)
    free = {*config.add, *config.revise, *config.unfreeze}
    free |= {part for parts in config.partition.values() if isinstance(parts, tuple) for part in parts}
    _check_data({*kept, *free}, config, old, token_counts)
    domains = tuple(token_counts)
    if config.reuse == "none":
        frozen: dict[str, float] = {}
    else:
        frozen = {name: kept[name] for name in domains if name in kept and name not in free}
    if frozen and not sum(frozen.values()) > 0:
        raise InputError(
            f"swarm.update: the old domains that would be frozen ({', '.join(frozen)}) all have weight 0 in "
            f"{config.previous}, so they have no ratios to keep. Use reuse: none, or unfreeze them."
        )
    inner = {name: weight / sum(frozen.values()) for name, weight in frozen.items()}
    virtual = tuple(name for name in domains if name not in inner) + ((EXISTING,) if inner else ())
    change = config.model_dump(mode="json", include={"add", "remove", "partition", "revise", "unfreeze"})
    update = Update(domains, virtual, inner, {}, str(config.previous), old.weights, change, config.reuse, old.history)
    return Update(**{**vars(update), "prior": _prior(update, config, token_counts)})


def _prior(update: Update, config: UpdateConfig, token_counts: Mapping[str, float]) -> dict[str, float]:
    shares = update.contract_prior(token_counts)
    share = config.existing_share
    if share is None or update.settled:
        return shares
    if EXISTING not in shares:
        raise InputError("swarm.update.existing_share is given, but no domain is frozen. Leave it out.")
    rest = 1 - shares[EXISTING]
    return {name: share if name == EXISTING else x * (1 - share) / rest for name, x in shares.items()}


def _carried_over(config: UpdateConfig, old: Mapping[str, float]) -> dict[str, float]:
    """Old weights under the new names, of every domain that has one already."""
    gone = {*config.remove, *config.partition}
    kept = {name: weight for name, weight in old.items() if name not in gone}
    for whole, parts in config.partition.items():
        if isinstance(parts, Mapping):
            total = sum(parts.values())
            kept |= {part: old[whole] * share / total for part, share in parts.items()}
    return kept


def _check_names(config: UpdateConfig, old: Mapping[str, float]) -> None:
    """Refuses a name that is used twice, or that must exist and does not, or the reverse."""
    key, where = "swarm.update", f"the mixture in {config.previous}"
    parts = {part: whole for whole, given in config.partition.items() for part in given}
    uses: dict[str, str] = {}
    named = [("add", config.add), ("remove", config.remove), ("partition", tuple(config.partition))]
    named += [("revise", config.revise), ("unfreeze", config.unfreeze)]
    named += [(f"a part of '{whole}'", tuple(given)) for whole, given in config.partition.items()]
    for use, names in named:
        for name in names:
            if name in uses:
                raise InputError(f"{key}: '{name}' is named twice ({uses[name]} and {use}). Say one thing of a domain.")
            uses[name] = use
            if use != "add" and name not in parts and name not in old:
                raise InputError(f"{key}.{use}: {where} has no domain '{name}'." + did_you_mean(name, old))
            if name in old and (use == "add" or name in parts):
                wanted = "add" if use == "add" else "partition"
                raise InputError(
                    f"{key}.{wanted}: {where} has a domain '{name}' already. Give the new one another name."
                )
    if EXISTING in {*old, *uses}:
        raise InputError(f"{key}: a domain is called '{EXISTING}', the name of the frozen old mixture. Rename it.")
    for whole, given in config.partition.items():
        shares = list(given.values()) if isinstance(given, Mapping) else [1.0]
        if not given or min(shares) < 0 or not 0 < sum(shares) < np.inf:
            raise InputError(f"{key}.partition: '{whole}' has the parts {given}, expected names, or shares above 0.")


def _check_data(expected: set[str], config: UpdateConfig, old: Proposal, token_counts: Mapping[str, float]) -> None:
    missing = sorted(name for name in expected if name not in token_counts)
    extra = [name for name in token_counts if name not in expected]
    if missing:
        kept = [name for name in missing if name in old.weights and name not in config.revise]
        hint = f" Domains that are gone belong under remove: {', '.join(kept)}." if kept else ""
        raise InputError(
            f"swarm.update: the data does not have {', '.join(missing)}; it has {', '.join(token_counts)}. Prepare them, or "
            f"correct the names.{hint}"
        )
    if extra:
        gone = [name for name in extra if name in old.weights]
        unnamed = [name for name in extra if name not in old.weights]
        said = [f"{', '.join(gone)}, which the update takes away"] if gone else []
        said += [f"{', '.join(unnamed)}, which it does not name"] if unnamed else []
        raise InputError(
            f"swarm.update: the data also has {'; and '.join(said)}. Name new ones under add or partition; leave others out by "
            "data.domains (--domains of `megamix swarm update`)."
        )
