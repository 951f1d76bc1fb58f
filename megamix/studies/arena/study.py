"""The runs of an arena, from one config: which members there are, and the config of each.

arm x seed x condition (model, steps, trap), and x objective for an arm whose mixer follows it   -> a member

RUN_DIR/members/begin    of traps of the kind late: the members up to the step at which the domain comes
RUN_DIR/members/arms     all others, and how those of `begin` go on
RUN_DIR/members/frozen   arms with the mean weights of other members
RUN_DIR/runs/NAME        the runs
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megamix.core.config import validate
from megamix.core.config_files import merge
from megamix.core.errors import InputError
from megamix.core.paths import literal
from megamix.core.text import listed
from megamix.mixing.mixers import find_mixer, make_mixer
from megamix.studies.arena.config import CONTROLS, FROZEN, NO_TRAP, ArenaConfig
from megamix.studies.arena.members import STATIC, Arm, Condition, Entry, Run, naming, nested
from megamix.studies.arena.traps import Trap
from megamix.studies.runs import Member, write_yaml
from megamix.training.config import KINDS, RunConfig
from megamix.training.objective import objective_weights
from megamix.training.plan import Plan, make_plan
from megamix.training.reference.cache import open_reference

MEMBERS, RUNS, TRAPS = "members", "runs", "traps"
BEGIN, ARMS, FROZEN_ARMS = "begin", "arms", "frozen"
BOUNDS = ("max_epochs", "min_weight", "max_weight")
"""Keys of ``data`` that may name domains."""
Weights = dict[str, float]


@dataclass(frozen=True)
class ArenaStudy:
    """Resolved config of ``megamix arena``.

    Attributes:
        base: the run's config without the key ``arena``, not validated.
        source: of the config, for messages.
    """

    base: Run
    config: ArenaConfig
    run_dir: Path
    source: str

    @cached_property
    def plan(self) -> Plan:
        """Plan of the run itself, with natural weights."""
        plan = make_plan(validate(RunConfig, {**self.base, "mixture": "natural", "mixer": STATIC}, self.source))
        if plan.unevaluated:
            raise InputError(
                f"{self.source}: arms are judged on every domain, and {listed(plan.unevaluated)} has no sample of validation text. "
                "Leave such domains out of data.domains, lower data.seq_length, or prepare with a larger validation fraction."
            )
        return plan

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """The run's domains, over which all losses are averaged."""
        return self.plan.domain_names

    @cached_property
    def natural(self) -> Weights:
        """{domain: share of the training tokens}."""
        return dict(zip(self.domains, self.plan.natural_weights.tolist(), strict=True))

    @cached_property
    def objectives(self) -> dict[str, Weights]:
        """{name: weights of the domains} that arms are judged by."""
        natural, given = self.plan.natural_weights, self._given_objectives
        try:
            weights = {name: objective_weights(one, self.domains, natural) for name, one in given.items()}
        except InputError as error:
            raise InputError(f"{self.source}: arena.objectives: {error}") from error
        return {name: dict(zip(self.domains, found.tolist(), strict=True)) for name, found in weights.items()}

    @cached_property
    def _given_objectives(self) -> Mapping[str, Any]:
        """{name: objective as a config says it}."""
        own = self.plan.config.objective
        return self.config.objectives or {own if isinstance(own, str) else "given": own}

    @cached_property
    def traps(self) -> dict[str, Trap]:
        """The traps by name."""
        found = self.config.traps.items()
        return {name: Trap(name, trap, self.plan.manifest, self.domains) for name, trap in found}

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """Controls, the arms of the config, and the mean of each that has a mixer."""
        given = {name: nested(changes, f"{self.source}, arm {name}") for name, changes in self.config.arms.items()}
        of_objectives = {
            name: self.objectives[name] for name, one in self._given_objectives.items() if not isinstance(one, str)
        }
        mixtures = {**CONTROLS, **of_objectives} if self.config.controls else {}
        runs = {**{name: {"mixture": mixture, "mixer": STATIC} for name, mixture in mixtures.items()}, **given}
        found = {name: self._arm(name, changes) for name, changes in runs.items()}
        means = {
            arm.name + FROZEN: Arm(arm.name + FROZEN, {**arm.changes, "mixer": STATIC}, True, False, arm.name)
            for arm in found.values()
            if self.config.frozen_mean and not arm.is_static
        }
        return {**found, **means}

    def _arm(self, name: str, changes: Run) -> Arm:
        config = validate(RunConfig, self.with_changes(changes), f"{self.source}, arm {name}")
        mixer = find_mixer(config.mixer.name)[1]
        return Arm(name, changes, config.mixer.name == "static", mixer.follows_objective)

    @cached_property
    def conditions(self) -> list[Condition]:
        """All conditions in the order they run in here: by model, number of steps and trap, without a trap first."""
        steps = self.config.budgets or (self.plan.config.train.steps,)
        models: tuple[str | None, ...] = tuple(self.config.models or (None,))
        traps = (NO_TRAP, *self.traps)
        return [Condition(model, budget, trap) for model in models for budget in steps for trap in traps]

    @cached_property
    def entries(self) -> list[Entry]:
        """All members, those of a seed together."""
        return [
            Entry(arm, objective, condition, seed, self._name(arm, objective, condition, seed))
            for seed in self.config.seeds
            for condition in self.conditions
            for arm in self.arms.values()
            if arm.mean_of is None or not self.is_late(condition)
            for objective in self.objectives_of(arm)
        ]

    def objectives_of(self, arm: Arm) -> tuple[str | None, ...]:
        parent = arm if arm.mean_of is None else self.arms[arm.mean_of]
        return tuple(self.objectives) if parent.follows_objective else (None,)

    def is_late(self, condition: Condition) -> bool:
        """Whether a domain comes late."""
        return condition.trap != NO_TRAP and self.config.traps[condition.trap].kind == "late"

    def _name(self, arm: Arm, objective: str | None, condition: Condition, seed: int) -> str:
        parts = [
            f"seed{seed}",
            *([condition.model] if condition.model is not None else []),
            *([f"{condition.steps}steps"] if self.config.budgets else []),
            *([condition.trap] if condition.trap != NO_TRAP else []),
            arm.name if objective is None or len(self.objectives) == 1 else f"{arm.name}@{objective}",
        ]
        return ".".join(parts)

    def folder(self, part: str) -> Path:
        """The folder of the members' configs: `BEGIN`, `ARMS` or `FROZEN_ARMS`."""
        return self.run_dir / MEMBERS / part

    def parent_of(self, entry: Entry) -> Entry:
        """The member whose mean weights a member has."""
        assert entry.arm.mean_of is not None
        arm = self.arms[entry.arm.mean_of]
        return Entry(
            arm,
            entry.objective,
            entry.condition,
            entry.seed,
            self._name(arm, entry.objective, entry.condition, entry.seed),
        )

    def run_dir_of(self, entry: Entry) -> Path:
        """The directory of a member's run."""
        return self.run_dir / RUNS / entry.name

    def members(self, part: str, condition: Condition | None = None) -> list[Member]:
        """The members of a part, in the order of their array indices (that of the file names' bytes).

        Args:
            condition: of these members alone; None: all.
        """
        entries = [entry for entry in self.entries_of(part) if condition in (None, entry.condition)]
        return [
            Member(
                self.folder(part) / f"{entry.name}.yaml",
                validate(RunConfig, self.config_of(part, entry), f"{self.source}, {entry.name}"),
                self._from_step(entry) if part == BEGIN else None,
            )
            for entry in sorted(entries, key=lambda entry: f"{entry.name}.yaml".encode())
        ]

    def entries_of(self, part: str) -> Iterator[Entry]:
        """The entries of a part."""
        for entry in self.entries:
            if part == BEGIN:
                wanted = self.is_late(entry.condition)
            else:
                wanted = (entry.arm.mean_of is not None) == (part == FROZEN_ARMS)
            if wanted:
                yield entry

    def configs(self, part: str) -> dict[str, Run]:
        """{member: its run's config} of a part."""
        return {entry.name: self.config_of(part, entry) for entry in self.entries_of(part)}

    def config_of(self, part: str, entry: Entry) -> Run:
        """The run's config of a member in a part, not validated."""
        return self.begin_run(entry) if part == BEGIN else self.run(entry)

    def run(self, entry: Entry) -> Run:
        """The run's config of a member, not validated."""
        condition, arm = entry.condition, entry.arm
        run = self.with_changes(arm.changes)
        if condition.model is not None:
            run = merge(run, {"model": (self.config.models or {})[condition.model]}, KINDS)
        settled = {"train": {"seed": entry.seed, "steps": condition.steps}, "run_dir": literal(self.run_dir_of(entry))}
        run = merge(run, settled, KINDS)
        run["objective"] = self._objective(entry)
        if arm.mean_of is not None:
            parent = self.run_dir_of(self.parent_of(entry))
            run["mixture"] = {"from_run": literal(parent), "which": "mean", "finished": True}
        if condition.trap == NO_TRAP:
            return run
        return self._trapped(run, entry, self.traps[condition.trap])

    def _trapped(self, run: Run, entry: Entry, trap: Trap) -> Run:
        """The config with the data of a trap."""
        if not trap.writes_data:
            late = trap.changed_domain
            came: Run = {"domains": {"add": {late: self._weights(entry)[late]}}}
            bounds = [run["data"].get(key) for key in BOUNDS]
            if any(isinstance(bound, Mapping) and late in bound for bound in bounds):
                # Its bounds come with it.
                came["accept_changed"] = [*dict.fromkeys((*run["checkpoint"].get("accept_changed", ()), "constraints"))]
            return merge(run, {"checkpoint": came}, KINDS)
        data = {key: value for key, value in run["data"].items() if key not in ("domains", "token_counts")}
        found = {**run, "data": {**data, "manifest": literal(self.run_dir / TRAPS / trap.name)}}
        if trap.new_domain is not None and entry.arm.mean_of is None and names_domains(run.get("mixture")):
            found["mixture"] = self._with_new(self._weights(entry), trap)
        return found

    def _with_new(self, weights: Weights, trap: Trap) -> Weights:
        """The weights with the trap's new domain, by its share of the tokens: as one has them who sees nothing odd."""
        assert trap.new_domain is not None
        others = sum(self.plan.manifest.domain(name).train.tokens for name in self.domains)
        share = trap.num_tokens / (others + trap.num_tokens)
        return {**{name: weight * (1 - share) for name, weight in weights.items()}, trap.new_domain: share}

    def begin_run(self, entry: Entry) -> Run:
        """The config of a member up to the step at which a domain comes."""
        late = self.traps[entry.condition.trap].changed_domain
        run = self.run(entry)
        present = [name for name in self.domains if name != late]
        checkpoint = {key: value for key, value in run["checkpoint"].items() if key != "domains"}
        run |= {"data": {**run["data"], "domains": present}, "checkpoint": checkpoint}
        run["train"] = {**run["train"], "stop_after": self._from_step(entry)}
        if names_domains(run.get("mixture")):
            run["mixture"] = {name: weight for name, weight in self._weights(entry).items() if name != late}
        for key in BOUNDS:
            if isinstance(bound := run["data"].get(key), Mapping) and late in bound:
                run["data"] = {**run["data"], key: {name: value for name, value in bound.items() if name != late}}
        if isinstance(run.get("objective"), Mapping):
            run["objective"] = {name: weight for name, weight in run["objective"].items() if name != late}
        return run

    def _from_step(self, entry: Entry) -> int:
        step = self.config.traps[entry.condition.trap].from_step
        assert step is not None  # see TrapConfig
        return step

    def _objective(self, entry: Entry) -> str | Weights:
        """The value of ``objective`` in a run that is not told of its trap: a domain that came by it counts like any
        other, or it would be no trap to a mixer that follows the objective. Where the trap makes a domain smaller the
        weights are those without it."""
        name = entry.objective or next(iter(self.objectives))
        trap = self.traps.get(entry.condition.trap)
        keeps_sizes = trap is None or not trap.writes_data or trap.new_domain is not None
        if name in ("natural", "uniform") and keeps_sizes:
            return name
        weights = self.objectives[name]
        return weights if trap is None or trap.new_domain is None else self._with_new(weights, trap)

    def _weights(self, entry: Entry) -> Weights:
        """The weights that a member begins with, without a trap."""
        return self._first_weights[entry.arm.name, entry.objective]

    @cached_property
    def _first_weights(self) -> dict[tuple[str, str | None], Weights]:
        found = {}
        for arm in self.arms.values():
            for objective in self.objectives_of(arm) if arm.mean_of is None else ():
                aim = {} if objective is None else {"objective": self._given_objectives[objective]}
                weights = self.arm_plan(arm, None, more=aim).policy.stages.at(0).tolist()
                found[arm.name, objective] = dict(zip(self.domains, weights, strict=True))
        return found

    def arm_plan(self, arm: Arm, model: str | None, steps: int | None = None, more: Run | None = None) -> Plan:
        """Plan of an arm without a trap; raises InputError that names the arm.

        Args:
            steps: in the place of the run's.
            more: keys of the run in the place of the base's.
        """
        run, where = {**self.with_changes(arm.changes), **(more or {})}, f"{self.source}, arm {arm.name}"
        if model is not None:
            run = merge(run, {"model": (self.config.models or {})[model]}, KINDS)
            where += f", model {model}"
        if steps is not None:
            run = merge(run, {"train": {"steps": steps}}, KINDS)
            where += f", {steps} steps" if self.config.budgets else ""
        with naming(where):
            plan = make_plan(validate(RunConfig, run, where), verify=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # each member's run says them
                make_mixer(plan.config.mixer, plan.domain_names, plan.policy.stages.at(0), plan.objective_weights)
            open_reference(plan)
            return plan

    def with_changes(self, changes: Run) -> Run:
        """The base with an arm's changes; a mixture is replaced as a whole."""
        whole = {key: value for key, value in changes.items() if key == "mixture"}
        return {"checkpoint": {}, **merge(self.base, changes, KINDS), **whole}

    def write(self) -> None:
        """Writes the configs of all members; those of members that are no longer asked for are removed."""
        for part in (BEGIN, ARMS, FROZEN_ARMS):
            folder, wanted = self.folder(part), self.configs(part)
            for path in folder.glob("*.yaml") if folder.is_dir() else ():
                if path.stem not in wanted:
                    path.unlink()
            for name, run in wanted.items():
                write_yaml(folder / f"{name}.yaml", run)


def names_domains(mixture: object) -> bool:
    """Whether a value of ``mixture`` is of certain domains, so that it says nothing about one more."""
    if not isinstance(mixture, Mapping) or mixture.get("documents") == "uniform":
        return False
    return not {"temperature", "unimax"} & mixture.keys()
