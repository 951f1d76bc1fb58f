"""Continued blend: where a resumed run samples on, and the weights that change there.

With another sequence length, each domain goes on where it stands in tokens (`megamix.data.blend.another_length`).
Weights follow from those in effect by the rules of `megamix.training.domain_change`, or are the mixture's where that
was changed and accepted. Then the constraints are applied, where they, the data or the length of the run changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.data.blend.another_length import with_length
from megamix.data.blend.blend import Blend
from megamix.training.checkpoints.batch_change import saved_batches
from megamix.training.checkpoints.state import RunState
from megamix.training.domain_change import DomainChange
from megamix.training.plan import DataPlan

Floats = NDArray[np.float64]
SAID_OF_LENGTH = (
    "every domain goes on where it stands in tokens: the rest of its epoch in the old order, cut anew, so nothing is lost "
    "and less than one sample a domain is read twice; its next epoch has samples of the new length"
)


def continued_blend(
    state: RunState, plan: DataPlan, domains: DomainChange | None, accepted: tuple[str, ...]
) -> tuple[Blend, dict[str, Any] | None]:
    """The blend to continue with, and its change for weights.jsonl; None where nothing changed.

    Args:
        accepted: parts of the fingerprints that differ.
    """
    blend = _standing(state, plan, accepted)
    parts = [part for part in ("mixture", "constraints", "data", "batch", "sequence") if part in accepted]
    length = _change_of_length(state, plan)
    if domains is None and not parts and length is None:
        return blend, None
    sources = tuple(range(blend.num_domains)) if domains is None else domains.sources
    kept, policy = _kept_counts(blend, domains), plan.policy
    if "mixture" in parts:
        (_, weights), *later = _of_mixture(state, plan)
    else:
        (_, weights), *later = _in_effect(blend, domains)
        if "batch" in parts:
            # What was announced for a step holds from that step on, of whatever size the steps before it are.
            before = saved_batches(state.fingerprints)
            later = [(policy.batches.position(before.step(position)), wanted) for position, wanted in later]
    here = blend.state_dict()
    present = Blend.from_state_dict({**here, "segments": here["segments"][:1]})
    moves = ["sequence"] if policy.constraints.trivial else []
    if domains is None and not set(parts) - {"batch", *moves} and length is None:
        for position, wanted in later:
            present.set_weights(wanted, at=position)
        return present, {"parts": parts, "domains": None, "manifest": state.manifest}
    result = present.with_domains(
        plan.num_samples,
        plan.domain_keys,
        sources,
        lambda _: policy.allowed(weights, kept, blend.position),
        restarted=() if domains is None else [domains.after.index(name) for name in domains.restarted],
    )
    for position, wanted in later:
        result.set_weights(policy.allowed(wanted, result.counts_at(position), position), at=position)
    only_length = domains is None and not parts
    if only_length and not policy.constraints.depends_on_length and _ahead(blend) == _ahead(result):
        return blend, None
    record: dict[str, Any] = {"parts": parts, "domains": None if domains is None else domains.record()}
    if length is not None:
        record |= {"parts": [*parts, "length"], "length": length}
    return result, {**record, "manifest": state.manifest}


def check_rest(state: RunState, plan: DataPlan, domains: DomainChange | None, accepted: tuple[str, ...]) -> None:
    """Checks that what is left of a run in which something changed can be sampled within the constraints.

    Raises:
        InputError: it cannot.
    """
    same = domains is None and not accepted and _change_of_length(state, plan) is None
    if same or plan.policy.constraints.trivial:
        return  # to the last sample it goes on as it was planned, and whole samples may differ from the weights
    blend = _standing(state, plan, accepted)
    plan.policy.constraints.check_from(_kept_counts(blend, domains), blend.position)


def _standing(state: RunState, plan: DataPlan, accepted: tuple[str, ...]) -> Blend:
    """The blend of a state, with samples of the length that they have from here on."""
    blend = Blend.from_state_dict(state.sampler["blend"])
    if "sequence" not in accepted:
        return blend
    tokens = [stream.num_tokens - 1 for stream in plan.domains]
    return with_length(blend, tokens, saved_batches(state.fingerprints).seq_length, plan.config.data.seq_length)


def check_length(state: RunState, plan: DataPlan, domains: DomainChange | None) -> None:
    """Checks that a run can go on with another sequence length.

    Raises:
        InputError: it cannot.
    """
    before, now = saved_batches(state.fingerprints).seq_length, plan.config.data.seq_length
    if domains is not None:
        raise InputError(
            f"data.seq_length changes from {before} to {now} and the domains or their data change, too: where each stands in tokens "
            "is then not known. Make one change, train a step, and make the other."
        )
    if getattr(plan.config.mixer, "reference", None) is not None:
        raise InputError(
            f"data.seq_length changes from {before} to {now}, but mixer {plan.config.mixer.name} reads reference losses of whole "
            "samples, and the rest of an epoch is cut anew. Keep data.seq_length, or start a new run_dir."
        )


def _kept_counts(blend: Blend, domains: DomainChange | None) -> NDArray[np.int64]:
    """int64 [K]: samples that each domain of the plan has given of the data it has now."""
    if domains is None:
        return blend.counts
    of_old = [
        0 if source is None or name in domains.restarted else blend.counts[source]
        for name, source in zip(domains.after, domains.sources, strict=True)
    ]
    return np.array(of_old, np.int64)


def _change_of_length(state: RunState, plan: DataPlan) -> dict[str, int] | None:
    """The samples of the run before and now; None where they are the same, or nothing bounds the weights."""
    before, now = state.total_samples, plan.total_samples
    if before is None:  # a checkpoint of before they were kept; those of other trainers do not say
        steps = state.fingerprints.get("train", {}).get("steps")
        batches = saved_batches(state.fingerprints)
        before = now if steps is None else batches.position(int(steps))
    return None if before == now or plan.policy.constraints.trivial else {"before": before, "now": now}


def _of_mixture(state: RunState, plan: DataPlan) -> list[tuple[int, Floats]]:
    """(position, weights) of the mixture: now, and where a stage starts too early for the mixer's steps to announce it.

    Stages end with the mixer's first update.
    """
    policy = plan.policy
    is_mixed = state.mixer is not None and state.mixer["num_updates"] > 0
    soon = () if is_mixed else range(state.step + 1, policy.effective_step(state.step))
    steps = [state.step, *(step for step in soon if policy.stages.changes_at(step))]
    return [(policy.batches.position(step), policy.stages.at(step)) for step in steps]


def _in_effect(blend: Blend, domains: DomainChange | None) -> list[tuple[int, Floats]]:
    """(position, weights) now and as announced for later, by the rules of a change of domains."""
    found = [(position, np.array(weights)) for position, weights in _ahead(blend)]
    return found if domains is None else [(position, domains.rescale(weights)) for position, weights in found]


def _ahead(blend: Blend) -> list[tuple[int, list[float]]]:
    """The ledger of a blend from where it stands."""
    here = blend.position
    return [(here, blend.weights.tolist()), *((at, weights) for at, weights in blend.ledger if at > here)]
