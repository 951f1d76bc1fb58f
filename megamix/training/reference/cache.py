"""Reference losses of a plan: the key of their cache, and the samples that a run will read.

Legend: K domains, n samples.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megamix.core.text import Report, Table, gib
from megamix.data.blend.blend import Blend
from megamix.data.reference_losses import DTYPE, CachedDomain, CacheKey, ReferenceLosses, Selection, read_progress
from megamix.data.tokens.manifest import digest
from megamix.mixing.mixers import DoremiConfig, StaticConfig
from megamix.training.plan import DataPlan

Ints = NDArray[np.int64]


def open_reference(plan: DataPlan) -> ReferenceLosses | None:
    """The reference losses that the plan's mixer names; None without.

    Raises:
        InputError: there are none, or they are of other data, another tokenizer or another sample length.
    """
    folder = reference_folder(plan)
    return None if folder is None else ReferenceLosses(folder, cache_key(plan))


def reference_folder(plan: DataPlan) -> Path | None:
    """The key ``reference`` of the mixer's config, or None."""
    return getattr(plan.config.mixer, "reference", None)


def describe_cache(folder: Path) -> Report:
    """Describes a folder of reference losses, for `megamix inspect`.

    Raises:
        InputError: it is damaged.
    """
    info, done = read_progress(folder)
    wanted = sum(domain.computed for domain in info.domains.values())
    state = "finished" if done == wanted else "not finished (the same `megamix reference` command goes on)"
    head = (
        f"{folder} is a cache of reference losses, {state}.\n"
        f"samples     {done:,} of {wanted:,} computed, {info.seq_length} losses each: "
        f"{gib(done * info.seq_length * DTYPE.itemsize)} of {gib(wanted * info.seq_length * DTYPE.itemsize)}\n"
        f"checkpoint  {info.checkpoint}\n"
        f"            SHA-256 {info.checkpoint_sha256}\n"
        f"tokenizer   SHA-256 {info.tokenizer}"
    )
    rows, left = [], done
    for name, domain in info.domains.items():
        here = min(left, domain.computed)
        left -= here
        rows.append((name, f"{here:,}", f"{domain.computed:,}", f"{domain.windows:,}"))
    return Report([head, Table(("domain", "computed", "to compute", "samples of the domain"), rows)])


def cache_key(plan: DataPlan) -> CacheKey:
    """The key that a cache must have for the run; no row counts as computed."""
    data = plan.config.data
    return CacheKey(
        seq_length=data.seq_length,
        reset_position_ids=data.positions_restart,
        attention=data.attention,
        tokenizer=plan.manifest.tokenizer.sha256,
        domains={
            entry.name: CachedDomain(digest=digest(entry), windows=windows, computed=0)
            for entry, windows in zip(plan.entries, plan.num_samples.tolist(), strict=True)
        },
    )


def whole_domains(plan: DataPlan) -> Selection:
    """Every sample of every domain."""
    return Selection(plan.num_samples.tolist())


def samples_read(plan: DataPlan) -> Selection:
    """The samples that a run may read, from its first step to its last.

    With fixed weights the blend says how many samples each domain gives; a mixer may take up to ``data.max_weight`` of
    all samples from any. The order of a domain's samples does not depend on the weights, so these are its first ones.
    """
    mixer, stages = plan.config.mixer, len(plan.policy.stages.steps)
    # DoReMi samples with its initial weights.
    loss_only = isinstance(mixer, DoremiConfig) and mixer.apply == "loss" and stages == 1
    fixed = isinstance(mixer, StaticConfig) or loss_only
    most_K = _counts(plan) if fixed else np.ceil(plan.policy.constraints.cap * plan.total_samples).astype(np.int64)
    # Weights may differ in the last bit in the run, or move as constraints bind: never by a sample a domain.
    most_K = most_K + plan.num_samples.size
    rows: list[Ints | int] = []
    for domain, (most, available) in enumerate(zip(most_K.tolist(), plan.num_samples.tolist(), strict=True)):
        rows.append(available if most >= available else np.sort(_first_samples(plan, domain, most)))
    return Selection(rows)


def _counts(plan: DataPlan) -> Ints:
    """int64 [K]: the samples that each domain gives to a run in which no mixer moves the weights."""
    return plan.blend(through_step=plan.config.train.steps).counts_at(plan.total_samples)


def _first_samples(plan: DataPlan, domain: int, number: int) -> Ints:
    """int64 [number]: the domain's samples in the order in which the run reads them."""
    alone = np.zeros(plan.num_samples.size)
    alone[domain] = 1.0
    blend = Blend(plan.num_samples, alone, plan.config.train.seed, domain_keys=plan.domain_keys)
    return blend.take(number)[1]
