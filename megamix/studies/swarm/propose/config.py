"""Options of ``megamix swarm propose``, and of an update of a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic

from megamix.core.config import Config

OPTIONS_FILE = "propose.json"
"""Options that stay with a fit: keys of `ProposeConfig`; the command line overrides them."""


class ProposeConfig(Config):
    """What the proposed mixture is to be best at, and within which bounds. DIR/propose.json has the same keys."""

    kl: float = pydantic.Field(default=0.05, ge=0, allow_inf_nan=False)
    """How strongly the mixture is held near the prior: lambda of lambda * KL(mixture || prior), in the unit of the
    objective. 0: not at all."""
    use_natural_kl: bool = False
    """The KL is to the natural shares (of the token counts), whatever prior the swarm was drawn around."""
    priors: Path | None = None
    """JSON or YAML: what `swarm priors` writes, or {domain: share}. Default: DIR/priors.json, else the shares of the
    token counts, else the mean of the mixtures tried."""
    target_tokens: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
    """Tokens of the run that the mixture is for. With it no domain is read more often than `repetition` times."""
    repetition: float = pydantic.Field(default=4.0, gt=0, allow_inf_nan=False)
    """How often a domain may be read: weight * target_tokens <= repetition * tokens of the domain."""
    token_counts: Path | dict[str, float] | None = None
    """{domain: tokens}, or a file like that of `priors`. Default: those of the priors."""
    objective: Path | dict[str, float] | None = None
    """{metric or family: weight}, or a JSON or YAML file of it: the mean to be made small. Default: all metrics
    alike."""
    fixed_weight: dict[str, float] = pydantic.Field(default={})
    """{domain: weight} that is settled beforehand."""
    worst: bool = False
    """Look for the mixture with the largest objective within the same bounds, for comparison."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Of everything drawn at random."""
    resamples: int = pydantic.Field(default=20, ge=0)
    """Resamples of the runs for which the mixture is worked out again, to see how far its weights vary."""


class UpdateConfig(Config):
    """How the domains differ from those of a mixture that was found before, for ``swarm.update``."""

    previous: Path
    """Directory of the swarm whose mixture.json is brought up to date."""
    add: tuple[str, ...] = ()
    """Domains that are new."""
    remove: tuple[str, ...] = ()
    """Domains that are no longer there; the others are scaled up."""
    partition: dict[str, tuple[str, ...] | dict[str, float]] = pydantic.Field(default={})
    """{domain: [parts]}: the domain is replaced by parts, each with a weight that is to be found; {domain: {part:
    share}}: the parts share the weight of the domain as stated, and nothing is to be found."""
    revise: tuple[str, ...] = ()
    """Domains with other data under the same name."""
    reuse: Literal["full", "partial", "none"] = "full"
    """full: the old domains that nothing happens to keep the ratios they have, as one virtual domain `existing`;
    partial: but for those in unfreeze; none: the weights of all domains are found anew."""
    unfreeze: tuple[str, ...] = ()
    """Old domains that nothing happens to, whose weights are to be found anew all the same."""
    existing_share: float | None = pydantic.Field(default=None, gt=0, lt=1)
    """Share of `existing` in the prior. Default: that of its domains together."""

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
