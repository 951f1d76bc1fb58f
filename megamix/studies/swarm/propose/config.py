"""Options of ``megamix swarm propose``, and of an update of a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic

from megamix.core.config import Config

OPTIONS_FILE = "propose.json"
"""Options that stay with a fit: keys of `ProposeConfig`; the command line overrides them."""


class ProposeConfig(Config):
    """Objective and bounds of the proposed mixture. DIR/propose.json has the same keys."""

    kl: float = pydantic.Field(default=0.05, ge=0, allow_inf_nan=False)
    """Factor of the penalty KL(mixture || prior), in the unit of the objective; 0: no penalty."""
    use_natural_kl: bool = False
    """Take the KL to the natural shares (of the token counts), whatever prior the swarm was drawn around."""
    priors: Path | None = None
    """JSON or YAML: the output of `swarm priors`, or {domain: share}. Default: DIR/priors.json, else the shares of the
    token counts, else the mean of the mixtures tried."""
    target_tokens: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
    """Tokens of the run that the mixture is for; with it no domain is read more than `repetition` times."""
    repetition: float = pydantic.Field(default=4.0, gt=0, allow_inf_nan=False)
    """Times that a domain may be read: weight * target_tokens <= repetition * tokens of the domain."""
    token_counts: Path | dict[str, float] | None = None
    """{domain: tokens}, or a file like `priors`. Default: the counts in the priors."""
    objective: Path | dict[str, float] | None = None
    """{metric or family: weight} of the mean to minimise, or a JSON or YAML file with it. Default: all metrics
    alike."""
    fixed_weight: dict[str, float] = pydantic.Field(default={})
    """{domain: weight} that the mixture keeps."""
    worst: bool = False
    """Find the mixture with the largest objective within the same bounds, for comparison."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Seed of all random draws."""
    resamples: int = pydantic.Field(default=20, ge=0)
    """Resamples of the runs for which the mixture is found again; they give the intervals of its weights."""


class UpdateConfig(Config):
    """Changes of the domains since an earlier mixture, for ``swarm.update``."""

    previous: Path
    """Directory of the swarm whose mixture.json is updated."""
    add: tuple[str, ...] = ()
    """New domains."""
    remove: tuple[str, ...] = ()
    """Dropped domains; the others are scaled up."""
    partition: dict[str, tuple[str, ...] | dict[str, float]] = pydantic.Field(default={})
    """{domain: [parts]}: parts replace the domain, each with a weight to find; {domain: {part: share}}: they share its
    weight as stated."""
    revise: tuple[str, ...] = ()
    """Domains with new data under the same name."""
    reuse: Literal["full", "partial", "none"] = "full"
    """full: unaffected old domains keep their ratios, as one virtual domain `existing`; partial: all but those in
    unfreeze; none: all weights are found anew."""
    unfreeze: tuple[str, ...] = ()
    """Unaffected old domains whose weights are found anew."""
    existing_share: float | None = pydantic.Field(default=None, gt=0, lt=1)
    """Share of `existing` in the prior. Default: the sum of its domains' shares."""

    @pydantic.model_validator(mode="after")
    def _is_an_update(self) -> UpdateConfig:
        if not (self.add or self.remove or self.partition or self.revise or self.unfreeze):
            raise ValueError("nothing changes. Say what to add, remove, partition, revise or unfreeze.")
        if bool(self.unfreeze) != (self.reuse == "partial"):
            raise ValueError(
                f"reuse is {self.reuse} and unfreeze {list(self.unfreeze)}: unfreeze names the old domains that reuse: partial "
                "frees, and no others. Give both or neither."
            )
        if self.reuse == "none" and self.existing_share is not None:
            raise ValueError("with reuse: none there is no `existing` domain. Leave existing_share out.")
        return self
