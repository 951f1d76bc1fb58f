"""The config of an update: what becomes of the domains, and how much of the old mixture stays."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic

from megamix.config import Config


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
