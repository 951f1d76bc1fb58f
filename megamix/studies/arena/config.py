"""The config of ``megamix arena``: a run's config, with the comparison under the key ``arena``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from megamix.core.config import Config
from megamix.training.objective import ObjectiveConfig

CONTROLS: dict[str, Any] = {"natural": "natural", "uniform": "uniform", "sqrt": {"temperature": 0.5}}
"""The arms that ``arena.controls`` adds in any case, by name, and their mixtures."""
NATURAL = "natural"
"""The arm that the others are measured by: its final loss is the target of steps_to_target."""
NO_TRAP = "none"
FROZEN = "-frozen"
"""Ends the name of an arm with the mean weights of another."""
Name = Annotated[str, pydantic.StringConstraints(pattern=r"^[A-Za-z0-9_+-]+$", max_length=48)]
"""Part of a member's name: letters, digits, _, + and -. Four of 48 fit into the name of a file."""
Kind = Literal["noise", "floor", "duplicates", "tiny", "late"]
_KEYS: dict[str, dict[str, bool]] = {
    "noise": {"share": False, "tokens": False},
    "floor": {"share": False, "tokens": False},
    "duplicates": {"domain": True, "name": False, "share": False, "tokens": False},
    "tiny": {"domain": True, "share": False, "tokens": False},
    "late": {"domain": True, "from_step": True},
}
"""The keys of each kind of trap, and whether it needs them."""


def _by_name(value: object) -> object:
    """A list of words as a mapping from each to itself."""
    if not isinstance(value, list | tuple):
        return value
    repeated = [word for word in value if value.count(word) > 1]
    if repeated:
        raise ValueError(f"objectives names {repeated[0]} twice. Name each once.")
    wrong = [word for word in value if word not in (NATURAL, "uniform")]
    if wrong:
        raise ValueError(
            f"got {wrong[0]!r}, expected natural or uniform. For weights give each a name: {{name: {{domain: weight}}}}."
        )
    return {word: word for word in value}


class TrapConfig(Config):
    """One disturbance of the data. The held-out text of the run's own domains stays as it is, and so do the domains
    that losses are averaged over."""

    kind: Kind
    """noise: one more domain, of uniformly random tokens; floor: one more domain, a short text repeated, whose loss is
    soon as low as it gets; duplicates: one more domain, a copy of documents of another one; tiny: a domain cut so that
    it runs out; late: a domain that is added at a step."""
    domain: str | None = None
    """Of duplicates, tiny and late: the domain."""
    name: Name | None = None
    """Of duplicates: the copy's name. Default: DOMAIN-copy."""
    share: float | None = pydantic.Field(default=None, gt=0, lt=1)
    """The domain's share of all training tokens. Default: 0.05; of tiny 0.002."""
    tokens: int | None = pydantic.Field(default=None, gt=0)
    """The domain's training tokens, in the place of share."""
    from_step: int | None = pydantic.Field(default=None, gt=0)
    """Of late: steps taken before the domain is added."""
    seed: int = pydantic.Field(default=0, ge=0)
    """Chooses the random tokens, or the documents."""

    @pydantic.model_validator(mode="after")
    def _keys_of_kind(self) -> TrapConfig:
        known = _KEYS[self.kind]
        for key in ("domain", "name", "share", "tokens", "from_step"):
            given = getattr(self, key) is not None
            if given and key not in known:
                raise ValueError(f"{key} is not a key of the kind {self.kind}. Remove it.")
            if not given and known.get(key):
                raise ValueError(f"the kind {self.kind} needs the key {key}. Add it.")
        if self.share is not None and self.tokens is not None:
            raise ValueError("share and tokens both say how large the domain is. Remove one.")
        return self


class ArenaConfig(Config):
    """What is compared; no other command knows this key."""

    arms: dict[Name, dict[str, Any]]
    """{name: keys of a run that differ}, nested or dotted (mixer.name). A mixture is replaced as a whole."""
    seeds: tuple[Annotated[int, pydantic.Field(ge=0)], ...] = (1, 2, 3, 4, 5)
    """Each is the train.seed of one member of every arm: the same seed is the same initial state and the same order of
    each domain's samples in all arms."""
    traps: dict[Name, TrapConfig] = pydantic.Field(default={})
    """{name: trap}. Every arm and seed runs without a trap, and once with each."""
    budgets: tuple[Annotated[int, pydantic.Field(gt=0)], ...] | None = None
    """Numbers of steps (train.steps), each for all members. Default: the run's."""
    models: dict[Name, dict[str, Any]] | None = None
    """{name: keys of model that differ}, each for all members. Default: the run's model."""
    objectives: Annotated[dict[Name, ObjectiveConfig], pydantic.BeforeValidator(_by_name)] | None = None
    """What arms are judged by: a list of natural and uniform, or {name: natural, uniform or {domain: weight}}. An arm
    whose mixer follows the objective runs once for each, all others once in all. Default: the run's objective."""
    controls: bool = True
    """Adds the static arms natural, uniform and sqrt (shares to the power 1/2), and for each objective of weights one
    of its name that samples by them, unless arms have these names. An arm called natural, uniform or sqrt may change
    other keys than its weights."""
    frozen_mean: bool = True
    """Adds for every arm with a mixer an arm NAME-frozen, with the mean weights of that arm's run of the same seed and
    trap from its first step on. Of traps of the kind late there is none: no fixed weights are the mean of those."""
    at_once: int | None = pydantic.Field(default=None, gt=0)
    """Members at a time on this machine. Default: as many as its GPUs, or its cores, are enough for."""

    @pydantic.model_validator(mode="after")
    def _once_each(self) -> ArenaConfig:
        for key, values in (("seeds", self.seeds), ("budgets", self.budgets)):
            repeated = [value for value in values or () if (values or ()).count(value) > 1]
            if repeated:
                raise ValueError(f"{key} names {repeated[0]} twice. Name each once.")
            if values is not None and not values:
                raise ValueError(f"{key} is empty. Name at least one, or remove the key.")
        for key, named in (("models", self.models), ("objectives", self.objectives)):
            if named is not None and not named:
                raise ValueError(f"{key} is empty. Name at least one, or remove the key.")
        for name in CONTROLS:
            if self.objectives and self.objectives.get(name, name) != name:
                raise ValueError(
                    f"objectives.{name} is {self.objectives[name]}, but the name means {name}. Choose another name."
                )
        if not self.arms and not self.controls:
            raise ValueError("there is no arm: arms is empty and controls is false. Name what is to be compared.")
        taken = [name for name in self.arms if name.endswith(FROZEN) and name.removesuffix(FROZEN) in self.arms]
        if self.frozen_mean and taken:
            raise ValueError(
                f"the arm name {taken[0]} is taken: frozen_mean gives it to the mean of {taken[0].removesuffix(FROZEN)}. "
                "Choose another name, or set frozen_mean to false."
            )
        if NO_TRAP in self.traps:
            raise ValueError(f"a trap cannot be called {NO_TRAP}, which stands for no trap. Choose another name.")
        return self
