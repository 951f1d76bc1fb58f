"""Objective, prior and bounds of a proposal, from options and the files of a swarm.

Legend: K domains of the fit (virtual ones in an update), J metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError, check_known, did_you_mean
from megamix.core.files import read_text
from megamix.core.paths import expand
from megamix.core.text import by_name, listed
from megamix.core.yaml_text import parse_yaml
from megamix.studies.swarm.fit.fitted import Fitted
from megamix.studies.swarm.priors import FILE as PRIORS_FILE
from megamix.studies.swarm.propose.config import ProposeConfig
from megamix.studies.swarm.propose.reuse import EXISTING, UPDATE_FILE, Update
from megamix.studies.swarm.propose.solve import Problem, solve

Floats = NDArray[np.float64]
Amounts = dict[str, float]
_KEYS = ("relative_sizes", "token_counts")


@dataclass(frozen=True)
class Question:
    """Objective, prior and bounds of a proposal, as arrays.

    Attributes:
        v_J: float64 [J], weights of the metrics; sum 1.
        prior_K: float64 [K], sum 1.
        kl_prior_K: float64 [K], q of the KL term.
        floor_K, cap_K: float64 [K].
    """

    fitted: Fitted
    v_J: Floats
    prior_K: Floats
    kl_prior_K: Floats
    kl: float
    floor_K: Floats
    cap_K: Floats
    worst: bool
    seed: int

    def problem(self, A_JK: Floats) -> Problem:
        """The convex problem for a law's coefficients."""
        used = self.v_J > 0
        return Problem(self.v_J[used], A_JK[used], self.kl, self.kl_prior_K, self.floor_K, self.cap_K)

    @property
    def bounds(self) -> tuple[Floats, Floats]:
        """float64 [K] each: see `Problem.bounds`."""
        return self.problem(np.zeros((self.v_J.size, self.prior_K.size))).bounds

    def answer(self, A_JK: Floats) -> Floats:
        """float64 [K]: the best mixture for a law's coefficients."""
        return solve(self.problem(A_JK)).x_K


@dataclass(frozen=True)
class Prior:
    """Prior of a proposal.

    Attributes:
        shares: {domain of the fit: share}, sum 1.
        source: where they come from, for messages.
        kl: q of the KL term by domain of the fit; need not sum to 1. In an update the share of `existing` is multiplied
            by exp(-KL(its ratios || their shares)), so that the term is the KL of the real domains.
    """

    shares: Amounts
    source: str
    kl: Amounts


@dataclass(frozen=True)
class Amount:
    """Shares and token counts from one file or option; either may be empty."""

    shares: Amounts = field(default_factory=dict)
    tokens: Amounts = field(default_factory=dict)


def read_amounts(path: Path) -> Amount:
    """Reads what `megamix swarm priors` writes, {"relative_sizes": ..., "token_counts": ...}, also under the key
    ``priors``; or {domain: number}. JSON or YAML.

    Raises:
        InputError: it cannot be read, or holds anything else.
    """
    content = _mapping(path)
    content = content["priors"] if isinstance(content.get("priors"), Mapping) else content
    if any(isinstance(content.get(key), Mapping) for key in _KEYS):
        shares, tokens = (_numbers(content.get(key) or {}, f"{path}, {key}") for key in _KEYS)
    else:
        shares, tokens = _numbers(content, str(path)), {}
    if not shares and not tokens:
        raise InputError(f"{path} names no domain. Write it with `megamix swarm priors`, or give {{domain: number}}.")
    return Amount(shares or tokens, tokens)


def read_objective(path: Path) -> Amounts:
    """{metric or family: weight} from a JSON or YAML file."""
    return _numbers(_mapping(path), str(path))


def read_pairs(option: str, given: Sequence[str] | None, *, or_file: bool = False) -> Amounts | Path | None:
    """NAME=NUMBER items of the command line, or the path of a file of them.

    Args:
        or_file: whether a file may stand in their place.

    Raises:
        InputError: an item that is neither.
    """
    if not given:
        return None
    if or_file and len(given) == 1 and "=" not in given[0]:
        return Path(expand(given[0]))
    found: Amounts = {}
    for item in given:
        name, equals, text = item.rpartition("=")
        try:
            found[name] = float(text) if equals else float("nan")
        except ValueError:
            found[name] = float("nan")
        if not name or not 0 <= found[name] < np.inf:
            raise InputError(f"{option} {item}: expected NAME=NUMBER, for example web=0.3, with a number from 0 on.")
    return found


def _mapping(path: Path) -> dict[str, Any]:
    content = parse_yaml(read_text(path), str(path))  # which JSON is
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, expected a mapping of names to numbers.")
    return content


def _numbers(content: Mapping[str, Any], source: str) -> Amounts:
    for name, value in content.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
            raise InputError(f"{source}: '{name}' is {value!r}, expected a number that is not negative.")
    return {str(name): float(value) for name, value in content.items()}


def find_prior(directory: Path, fitted: Fitted, options: ProposeConfig, update: Update | None) -> tuple[Prior, Amount]:
    """Finds the prior and the token counts.

    The prior is the first of these: the file in the options, DIR/priors.json, the prior in DIR/update.json, the shares
    of the given token counts, the mean of the mixtures tried.

    Raises:
        InputError: a file that cannot be used, or domains that are not those of the fit.
    """
    path = directory / PRIORS_FILE
    found = given = Amount()
    counts = options.token_counts
    if counts is not None:
        read = read_amounts(counts) if isinstance(counts, Path) else Amount(tokens=_numbers(counts, "token_counts"))
        given = Amount(tokens=read.tokens or read.shares)
    if options.priors is not None:
        found, source = read_amounts(options.priors), str(options.priors)
    elif path.is_file():
        found, source = read_amounts(path), str(path)
    elif update is not None:
        found, source = Amount(update.prior), str(directory / UPDATE_FILE)
    elif given.tokens:
        found, source = Amount(given.tokens), "the shares of the token counts"
    else:
        source = "the mean of the mixtures tried"
    amount = Amount(found.shares, given.tokens or found.tokens)
    if not found.shares:
        mean = fitted.table.ratios_RK.mean(axis=0)
        prior = _as_prior(by_name(fitted.domains, mean), fitted, None, source)
    else:
        prior = _as_prior(found.shares, fitted, update, source, amount.tokens)
    if options.use_natural_kl:
        if not amount.tokens:
            raise InputError("use_natural_kl needs token counts, and there are none. Give --token-counts.")
        prior = Prior(prior.shares, prior.source, _as_prior(amount.tokens, fitted, update, "the token counts").kl)
    return prior, amount


def _as_prior(
    shares: Amounts, fitted: Fitted, update: Update | None, source: str, tokens: Amounts | None = None
) -> Prior:
    """Shares of the fit's domains, or in an update of the real ones, as a prior.

    Args:
        tokens: token counts. Inside `existing` the prior is by these, if they are known: ``shares`` may have the ratios
            of the old mixture there.
    """
    real = update is not None and shares.keys() == set(update.domains)
    check_names(shares, update.domains if real and update is not None else fitted.domains, source)
    if not sum(shares.values()) > 0:
        raise InputError(f"{source}: all shares are 0. Give at least one domain a share above 0.")
    contracted = update.contract_prior(shares) if real and update is not None else shares
    total = sum(contracted.values())
    result = {name: contracted[name] / total for name in fitted.domains}
    kl = dict(result)
    natural = next((x for x in (tokens, shares) if x and update is not None and x.keys() == set(update.domains)), None)
    if natural is not None and update is not None and update.inner:
        empty = [name for name, x in update.inner.items() if x > 0 and not natural[name] > 0]
        if empty:
            raise InputError(
                f"{source}: the share of '{empty[0]}' is 0, but it has a weight in the old mixture, which is frozen. Give it a "
                "share above 0, or unfreeze it."
            )
        kl[EXISTING] *= float(np.exp(-_divergence(update.inner, natural)))
    return Prior(result, source, kl)


def _divergence(inner: Amounts, shares: Amounts) -> float:
    """KL of the ratios inside `existing` to the shares of the same domains."""
    total = sum(shares[name] for name in inner)
    return float(sum(x * np.log(x * total / shares[name]) for name, x in inner.items() if x > 0))


def check_names(found: Mapping[str, object], wanted: tuple[str, ...], source: str) -> None:
    """Raises InputError unless ``found`` has exactly the domains of the fit."""
    extra = [name for name in found if name not in wanted]
    if extra:
        raise InputError(
            f"{source}: the swarm has no domain '{extra[0]}'"
            + (f" (nor {len(extra) - 1} more)" if extra[1:] else "")
            + "."
            f"{did_you_mean(extra[0], wanted)} Name exactly the {len(wanted)} domains that the swarm was drawn over."
        )
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(f"{source} lacks the domain {', '.join(missing)}, which the swarm was drawn over. Add it.")


@dataclass(frozen=True)
class Caps:
    """Largest weights that the limit of repetition allows.

    Attributes:
        largest: by domain of the fit; may be above 1.
        by: in an update, the real domain that bounds `existing`.
    """

    largest: Amounts
    by: dict[str, str] = field(default_factory=dict)

    def label(self, name: str) -> str:
        """A domain and its cap, for messages."""
        bound = f" (bounded by {self.by[name]})" if self.by.get(name, name) != name else ""
        return f"{name} {self.largest[name]:.4g}{bound}"


def find_caps(options: ProposeConfig, amount: Amount, fitted: Fitted, update: Update | None) -> Caps | None:
    """The caps of the fit's domains; None without ``target_tokens``.

    Raises:
        InputError: no token counts, or not of these domains.
    """
    if options.target_tokens is None:
        return None
    if not amount.tokens:
        raise InputError(
            "target_tokens bounds how often a domain is read, which needs the tokens of each. Give --token-counts FILE, or "
            "priors with token_counts."
        )
    caps = {name: options.repetition * tokens / options.target_tokens for name, tokens in amount.tokens.items()}
    if update is not None and caps.keys() == set(update.domains):
        return Caps(update.caps(caps), {name: update.binding(name, caps) for name in update.virtual})
    check_names(caps, fitted.domains, "the token counts")
    return Caps(caps)


def check_feasible(options: ProposeConfig, caps: Caps | None, prior: Prior) -> None:
    """Refuses bounds that no mixture meets.

    Raises:
        InputError: they cannot; with the numbers that bind, and those that would do.
    """
    fixed = options.fixed_weight
    check_known(fixed, prior.shares, "fixed_weight: the swarm has no domain")
    if any(not 0 <= weight <= 1 for weight in fixed.values()) or sum(fixed.values()) > 1 + 1e-12:
        raise InputError(f"fixed_weight is {fixed}, expected weights from 0 to 1 that sum to 1 at most.")
    unwanted = [name for name, weight in fixed.items() if weight > 0 and options.kl > 0 and not prior.kl[name] > 0]
    if unwanted:
        raise InputError(
            f"fixed_weight: '{unwanted[0]}' has {fixed[unwanted[0]]:.6g}, but share 0 in the prior ({prior.source}), which the KL "
            "keeps at 0. Give it a share above 0, or use kl 0."
        )
    left = 1 - sum(fixed.values())
    free = [name for name in prior.shares if name not in fixed and (options.kl == 0 or prior.kl[name] > 0)]
    if left > 1e-9 and not free:
        raise InputError(
            f"fixed_weight leaves {left:.6g} of the mixture to no domain: all others have share 0 in the prior ({prior.source}). Fix "
            "less, or use kl 0."
        )
    if caps is None:
        return
    assert options.target_tokens is not None
    over = [name for name, weight in fixed.items() if weight > caps.largest[name] * (1 + 1e-9)]
    if over:
        name = over[0]
        raise InputError(
            f"fixed_weight: '{name}' has {fixed[name]:.6g}, but read {options.repetition:g} times it is {caps.largest[name]:.6g} of "
            f"{options.target_tokens:g} tokens. Fix less, or raise repetition."
        )
    available = sum(min(caps.largest[name], 1.0) for name in free)
    if available < left - 1e-9:
        smallest = sorted(free, key=lambda name: caps.largest[name])
        raise InputError(
            f"the caps cannot fill the mixture: every domain read {options.repetition:g} times gives {available:.4g} of "
            f"{options.target_tokens:g} tokens, and {left:.4g} is needed; {(left - available) * options.target_tokens:.4g} tokens "
            f"are missing. The caps: {listed(map(caps.label, smallest))}. Lower target_tokens to {options.target_tokens * available / left:.4g} at most, or "
            f"raise repetition to {options.repetition * left / available:.4g} at least."
        )


def objective_weights(objective: Mapping[str, float] | None, fitted: Fitted) -> Floats:
    """float64 [J], which sum to 1: all alike, or as given; the weight of a family goes to its metrics in equal parts.

    Raises:
        InputError: an unknown name, or weights that are negative or all 0.
    """
    size = len(fitted.metrics)
    if objective is None:
        return np.full(size, 1 / size)
    result = np.zeros(size)
    for name, weight in objective.items():
        members = (name,) if name in fitted.metrics else fitted.families.get(name)
        if members is None:
            raise InputError(
                f"objective: the fit has no metric or family '{name}'."
                + did_you_mean(name, {*fitted.metrics, *fitted.families})
            )
        if not 0 <= weight < np.inf:
            raise InputError(f"objective: the weight of '{name}' is {weight}, expected a number that is not negative.")
        for member in members:
            result[fitted.metrics.index(member)] += weight / len(members)
    if not result.sum() > 0:
        raise InputError("objective: all weights are 0. Give at least one metric a weight above 0.")
    return result / result.sum()
