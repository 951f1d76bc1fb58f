"""Domain changes on resume: what changed, whether the config asks for it, and the new weights.

Rules for the weights w of the run so far:

- a split domain's weight is shared by its parts, by training tokens or as the config says;
- an added domain begins with the weight the config gives it;
- all others keep their ratios: they are scaled so that the sum is 1. A removed domain's weight thus goes to those that
  stay, and a replaced domain keeps its own.

Domains that stay go on reading where they stood; new ones, parts and replaced ones start at their beginning.

Legend: K domains before, K' after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError, ResumeRefused
from megamix.data.tokens.manifest import digest
from megamix.training.config import DomainChangeConfig
from megamix.training.plan import DataPlan

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DomainChange:
    """Change from one set of domains to another.

    Attributes:
        before, after: the names, [K] and [K'].
        sources: [K'], the index that each domain has in ``before``; None where it is new there.
        parents: [K'], the same, and for a part of a split domain the index of the whole.
        shares: float64 [K'], of the parent's weight; 1 but for parts.
        added: float64 [K'], the weights that added domains begin with; 0 for all others.
        restarted: names that stay but have other data.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    sources: tuple[int | None, ...]
    parents: tuple[int | None, ...]
    shares: Floats
    added: Floats
    restarted: tuple[str, ...] = ()

    def rescale(self, weights: Floats) -> Floats:
        """float64 [K'], sum 1: the new weights for ``weights`` (float64 [K]).

        Raises:
            InputError: nothing is left of them.
        """
        kept = np.array([0.0 if parent is None else weights[parent] for parent in self.parents]) * self.shares
        total, room = kept.sum(), 1.0 - self.added.sum()
        if total == 0 and room > 1e-12:
            raise InputError(
                f"the domains that stay ({', '.join(self.after)}) all had weight 0, so {room:.4f} of the weights has nowhere to "
                "go. Give new domains a weight with checkpoint.domains.add, or accept another mixture "
                "(checkpoint.accept_changed=[mixture])."
            )
        return kept * (room / total if total else 0.0) + self.added

    def record(self) -> dict[str, Any]:
        """The change for weights.jsonl, JSON-serialisable."""
        parts: dict[str, list[str]] = {}
        for name, source, parent in zip(self.after, self.sources, self.parents, strict=True):
            if source is None and parent is not None:
                parts.setdefault(self.before[parent], []).append(name)
        gone = [name for index, name in enumerate(self.before) if index not in self.sources and name not in parts]
        return {
            "before": list(self.before),
            "added": [name for name, parent in zip(self.after, self.parents, strict=True) if parent is None],
            "removed": gone,
            "split": parts,
            "replaced": list(self.restarted),
        }


def find_change(saved: Mapping[str, str], plan: DataPlan, accept_data: bool, where: str) -> DomainChange | None:
    """The change from the domains of a checkpoint to the domains of ``plan``; None where there is none.

    Args:
        saved: `digest` of every domain by name, in their order.
        accept_data: continue with changed data of a domain as if it were the old.
        where: the checkpoint, for messages.

    Raises:
        ResumeRefused: a difference that the config does not ask for.
        InputError: the config asks for a change that the data does not make.
    """
    asked = plan.config.checkpoint.domains
    present = {entry.name: digest(entry) for entry in plan.entries}
    changed = tuple(name for name in present if name in saved and present[name] != saved[name])
    if list(saved) == list(present) and not changed:
        return None
    problems = _problems(saved, present, asked, changed, accept_data)
    if problems:
        raise ResumeRefused(
            f"the checkpoint {where} was made with other data: {'; '.join(problems)}. "
            "Use the data the run was started with, or allow the change as said."
        )
    _check_asked(saved, present, asked)
    before = tuple(saved)
    index = {name: number for number, name in enumerate(before)}
    restarted = tuple(name for name in changed if name in asked.replace)
    sources = tuple(index.get(name) for name in present)
    shares_of = _shares(saved, plan, asked)
    parents = tuple(
        index[shares_of[name][0]] if name in shares_of else source
        for name, source in zip(present, sources, strict=True)
    )
    return DomainChange(
        before,
        tuple(present),
        sources,
        parents,
        shares=np.array([shares_of[name][1] if name in shares_of else 1.0 for name in present]),
        added=np.array(
            [asked.add[name] if parent is None else 0.0 for name, parent in zip(present, parents, strict=True)]
        ),
        restarted=restarted,
    )


def _problems(
    saved: Mapping[str, str],
    present: Mapping[str, str],
    asked: DomainChangeConfig,
    changed: tuple[str, ...],
    accept_data: bool,
) -> list[str]:
    """Differences that the config does not ask for, each with the override that allows it."""
    parts = {part for whole, given in asked.split.items() if whole in saved for part in given}
    found = [
        f"domain '{name}' is new (checkpoint.domains.add={{{name}: WEIGHT}})"
        for name in present
        if name not in saved and name not in asked.add and name not in parts
    ]
    found += [
        f"domain '{name}' is gone (checkpoint.domains.remove=[{name}])"
        for name in saved
        if name not in present and name not in asked.remove and name not in asked.split
    ]
    found += [
        f"the data of domain '{name}' was {saved[name][:12]}, now {present[name][:12]} (checkpoint.domains.replace=[{name}] "
        "reads it from its beginning, checkpoint.accept_changed=[data] goes on where the old one stood)"
        for name in changed
        if name not in asked.replace and not accept_data
    ]
    common = [name for name in saved if name in present]
    if common != [name for name in present if name in saved] and not accept_data:
        order = ", ".join(saved)
        found.append(f"the domains stand in another order (data.domains=[{order}] is the old one)")
    return found


def _check_asked(saved: Mapping[str, str], present: Mapping[str, str], asked: DomainChangeConfig) -> None:
    key = "checkpoint.domains"
    for name in (*asked.remove, *asked.split):
        if name in present:
            raise InputError(
                f"{key} takes '{name}' away, but the data still has it. Leave it out of data.domains or of the manifest."
            )
    for name in (*asked.add, *asked.replace):
        if name not in present:
            raise InputError(f"{key} names '{name}', which the data does not have ({', '.join(present)}).")
    for whole, parts in asked.split.items():
        missing = [part for part in parts if part not in present]
        if missing or not parts:
            raise InputError(f"{key}.split: '{whole}' has the parts {list(parts)}, of which the data lacks {missing}.")
    added = {name: weight for name, weight in asked.add.items() if name not in saved}
    bad = [name for name, weight in added.items() if not 0 <= weight <= 1]
    if bad or sum(added.values()) > 1:
        shown = f"'{bad[0]}' has the weight {added[bad[0]]}" if bad else f"the weights sum to {sum(added.values()):g}"
        raise InputError(f"{key}.add: {shown}, expected weights from 0 to 1 that leave room for the others.")


def _shares(saved: Mapping[str, str], plan: DataPlan, asked: DomainChangeConfig) -> dict[str, tuple[str, float]]:
    """Part -> (its whole, its share of the whole's weight), for splits that are not made yet."""
    tokens = {entry.name: float(entry.train.tokens) for entry in plan.entries}
    found: dict[str, tuple[str, float]] = {}
    for whole, parts in asked.split.items():
        if whole not in saved:
            continue
        given = parts if isinstance(parts, Mapping) else {part: tokens[part] for part in parts}
        total = sum(given.values())
        if not total > 0 or min(given.values()) < 0:
            raise InputError(
                f"checkpoint.domains.split: the shares of '{whole}' are {given}, expected positive numbers."
            )
        for part, share in given.items():
            if part in saved or part in found:
                raise InputError(f"checkpoint.domains.split: the part '{part}' of '{whole}' is a domain already.")
            found[part] = (whole, share / total)
    return found
