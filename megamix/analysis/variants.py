"""Which runs can be compared, and which of them are seeds of one variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megamix.analysis.series import equal_tokens, up_to
from megamix.core.errors import InputError
from megamix.core.text import listed
from megamix.mixing.shadow import shadow_names
from megamix.training.config import RunConfig
from megamix.training.mixture import mixture_of
from megamix.training.objective import objective_name
from megamix.training.records.recorded_run import RecordedRun

_WITHOUT_EFFECT = (
    "run_dir", "train.seed", "train.stop_after", "train.micro_batch", "engine", "evaluate", "checkpoint", "loss", "log",
    "shadow", "data.manifest", "data.token_counts",
)  # fmt: skip
"""Keys that make no variant: they change no loss by more than rounding. Precision counts all the same."""


def check_comparable(runs: Sequence[RecordedRun]) -> None:
    """Raises InputError unless all runs were evaluated on the same samples and on every domain."""
    first, wanted = runs[0], None
    for run in runs:
        seen = _evaluation(run)
        wanted = seen if wanted is None else wanted
        for what in wanted:
            if None not in (seen[what], wanted[what]) and seen[what] != wanted[what]:
                raise InputError(
                    f"{run.run_dir} and {first.run_dir} were not evaluated alike: {what} is {seen[what]} and "
                    f"{wanted[what]}. Compare runs with the same held-out samples."
                )
        lost = [name for name, loss in run.evaluations[-1]["domain_loss"].items() if loss is None]
        if lost:
            raise InputError(
                f"{run.run_dir}: the last validation loss of '{lost[0]}' is not finite, so it has no mean."
            )


def at_equal_tokens(runs: Sequence[RecordedRun]) -> tuple[list[RecordedRun], str | None]:
    """The runs with their evaluations up to the most tokens after which all have one, and what that leaves out.

    Raises:
        InputError: a run without an evaluation after training, or runs that were never evaluated after equally many
            tokens.
    """
    for run in runs:
        if not run.evaluations or run.evaluations[-1]["step"] == 0:
            raise InputError(f"{run.run_dir} has no evaluation after training. Let it reach one (evaluate.every).")
    tokens, ends = equal_tokens(runs), [run.evaluations[-1]["tokens"] for run in runs]
    if tokens is None:
        said = listed(sorted({f"{end:,}" for end in ends}))
        raise InputError(
            f"the runs end after {said} tokens, and no number of tokens is one after which all were evaluated. Compare runs whose "
            "evaluations (evaluate.every x train.global_batch x data.seq_length) meet."
        )
    if set(ends) == {tokens}:
        return list(runs), None
    return [up_to(run, tokens) for run in runs], (
        f"the runs end after {min(ends):,} to {max(ends):,} tokens and are compared after {tokens:,}, the most after which all "
        "were evaluated; one whose learning rate falls later is not at its best there."
    )


def _evaluation(run: RecordedRun) -> dict[str, Any]:
    """Settings that must agree for losses to be comparable; None for unknown ones."""
    config, last = run.config, run.evaluations[-1]
    names = sorted(last["domain_loss"])
    found: dict[str, Any] = {
        "the set of domains": ", ".join(names),
        "the objective": objective_name(config.objective),
        "the objective's weights": ", ".join(f"{name} {weight:.4g}" for name, weight in sorted(run.objective().items()))
        or None,
        "data.seq_length": config.data.seq_length,
        "evaluate.samples": config.evaluate.samples,
        "data.eod_mask_loss": config.data.eod_mask_loss,
        "data.attention": config.data.attention,
        "data.reset_position_ids": config.data.positions_restart,
    }
    manifest = run.manifest
    known = manifest is not None and not manifest.missing(names)
    found["the tokenizer"] = manifest.tokenizer.sha256[:12] if manifest is not None else None
    for name in names:
        # The files of another data set may well be the same.
        sha256 = manifest.domain(name).validation.sha256 if known and manifest is not None else None
        found[f"the held-out text of '{name}'"] = None if sha256 is None else ", ".join(part[:12] for part in sha256)
    return found


def variant_names(runs: Sequence[RecordedRun]) -> list[str]:
    """A name for each run's variant: its mixer, or its mixture where no mixer changes it, and where that does not tell
    variants apart the keys that do."""
    settings = [_settings(run.config) for run in runs]
    plain = [_plain_name(run.config) for run in runs]
    names = []
    for name, mine in zip(plain, settings, strict=True):
        group = [other for other_name, other in zip(plain, settings, strict=True) if other_name == name]
        keys = dict.fromkeys(key for other in group for key in other)
        differing = [key for key in keys if any(other.get(key) != group[0].get(key) for other in group)]
        shown = ", ".join(f"{key}={mine.get(key, '-')}" for key in differing)
        names.append(f"{name} ({shown})" if shown else name)
    return names


def _plain_name(config: RunConfig) -> str:
    start = mixture_of(config.mixture).label()
    if config.mixer.name == "static":
        return start
    (mixer,) = shadow_names([config.mixer])
    return mixer if start == "natural" else f"{mixer} from {start}"


def _settings(config: RunConfig) -> dict[str, Any]:
    """Settings that tell variants apart, by key path."""
    kept = {
        key: value
        for key, value in flatten(config.model_dump(mode="json")).items()
        if not any(key == skipped or key.startswith(f"{skipped}.") for skipped in _WITHOUT_EFFECT)
    }
    return {**kept, "engine.precision": config.engine.precision}


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train.steps": 100, ...}``."""
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= flatten(part, f"{prefix}{key}.") if isinstance(part, Mapping) and part else {f"{prefix}{key}": part}
    return flat
