"""Domains of weight 0: any rule mixes the others as if these were not there, and none of them comes back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from megamix.core.errors import InputError
from megamix.mixing.mixers import MIXERS, DomainStats, Mixer, adopt_state, make_mixer

RULES: dict[str, dict[str, Any]] = {
    **{preset: {"name": "odm", "preset": preset} for preset in ("official", "paper", "exp3", "dataflex")},
    "ado": {"name": "ado", "smoothing_window": 5, "fit_from": 8, "start": 12, "refit_every": 8, "fit_every": 1},
    "aioli": {"name": "aioli", "update_steps": 20, "lp_rounds": 1, "lp_steps": 2},
    "recommended": {"name": "recommended"},
    "doremi": {"name": "doremi", "smoothing": 0.1},
    "doremi sampling": {"name": "doremi", "smoothing": 0.1, "apply": "sampling"},
    "static": {"name": "static"},
}
WITH, WITHOUT = ("a", "b", "none", "c"), ("a", "b", "c")
KEPT = [0, 1, 3]


def feed(mixer: Mixer, steps: range, number: int) -> list[np.ndarray]:
    """The weights after each step, on losses that fall; a domain left out has tokens of an evaluation all the same."""
    found = []
    for step in steps:
        rng = np.random.default_rng(step)
        tokens, loss = rng.integers(100, 900, 4), 1.5 + 4 * step ** -np.array([0.2, 0.4, 0.9, 0.6])
        index = KEPT if number == 3 else list(range(4))
        found.append(mixer.update(DomainStats((tokens * loss)[index], tokens[index]), step))
    return found


@pytest.mark.parametrize("rule", RULES)
def test_the_others_are_mixed_as_in_a_run_without_it(rule: str) -> None:
    whole = make_mixer(RULES[rule], WITH, [2, 1, 0, 1], [2, 1, 4, 1])
    part = make_mixer(RULES[rule], WITHOUT, [2, 1, 1], [2, 1, 1])
    for mine, other in zip(feed(whole, range(1, 41), 4), feed(part, range(1, 41), 3), strict=True):
        assert mine[2] == 0
        assert mine[KEPT].tolist() == other.tolist()
    assert whole.has_updated == part.has_updated == (rule != "static")
    if part.loss_weights is not None:
        assert whole.loss_weights is not None
        assert whole.loss_weights[KEPT].tolist() == part.loss_weights.tolist()
    record = json.loads(json.dumps(whole.record(), allow_nan=False))
    assert record.pop("left_out") == ["none"]
    for key, value in part.record().items():
        if isinstance(value, list) and len(value) == 3:
            assert [record[key][index] for index in KEPT] == value
            assert record[key][2] == (0.0 if key.endswith("weights") else None)
        else:
            assert record[key] == value


@pytest.mark.parametrize("rule", RULES)
def test_its_state_goes_on_bit_for_bit(rule: str) -> None:
    def make() -> Mixer:
        return make_mixer(RULES[rule], WITH, [2, 1, 0, 1], [2, 1, 4, 1])

    whole, again = make(), make()
    feed(whole, range(1, 11), 4)
    again.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
    assert again.weights.tolist() == whole.weights.tolist()
    for mine, other in zip(feed(whole, range(11, 31), 4), feed(again, range(11, 31), 4), strict=True):
        assert mine.tolist() == other.tolist()
    with pytest.raises(InputError, match="the state is not whole"):
        make_mixer(RULES[rule], WITH, [1, 1, 1, 1]).load_state_dict(whole.state_dict())
    with pytest.raises(InputError, match=r"of other domains: it mixes a, b, c, this a, b, none"):
        make_mixer(RULES[rule], WITH, [1, 1, 1, 0]).load_state_dict(whole.state_dict())


def estimates(mixer: Mixer) -> dict[str, Any]:
    return dict(zip(mixer.domains, mixer.record()["estimated_rewards"], strict=True))


@pytest.mark.parametrize("left_out", [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0]])
def test_estimates_follow_by_name_whoever_is_left_out(left_out: list[int]) -> None:
    """From a, b, none, c to c, new, a, none, where other domains, or none, are left out."""
    old = make_mixer(RULES["official"], WITH, [2, 1, 0, 1])
    feed(old, range(1, 6), 4)
    new = make_mixer(RULES["official"], ("c", "new", "a", "none"), left_out)
    adopt_state(new, old.state_dict(), [3, None, 0, 2], np.array(left_out) / sum(left_out))
    before, after = estimates(old), estimates(new)
    assert (after["a"], after["c"]) == (before["a"], before["c"])
    mean = np.mean([before[name] for name in WITHOUT])
    for name, weight in zip(("new", "none"), left_out[1::2], strict=True):
        assert after[name] == (pytest.approx(mean) if weight else None)
    feed(new, range(6, 8), 4)
    assert [weight == 0 for weight in new.weights] == [not given for given in left_out]


def test_a_weight_that_a_rule_brought_to_0_is_not_left_out() -> None:
    """A run resumes with the weights in effect, where a domain that was used up has 0."""
    mixer = make_mixer(RULES["official"], ["a", "b"], [1, 0], left_out=())
    mixer.update(DomainStats([10.0, 30.0], [10, 10]), 1)
    assert mixer.weights.tolist() == [0.5, 0.5]  # the first update explores alone


def test_an_objective_without_any_domain_that_is_sampled() -> None:
    with pytest.raises(InputError, match=r"'recommended' follows the objective.*left out: none"):
        make_mixer(RULES["recommended"], WITH, [2, 1, 0, 1], [0, 0, 1, 0])
    make_mixer(RULES["official"], WITH, [2, 1, 0, 1], [0, 0, 1, 0])


def test_statistics_of_another_number_of_domains() -> None:
    mixer = make_mixer(RULES["official"], WITH, [2, 1, 0, 1])
    with pytest.raises(InputError, match="statistics of 3 domains, expected 4"):
        mixer.update(DomainStats([1.0] * 3, [1] * 3), 1)


def test_all_rules_are_here() -> None:
    assert {rule["name"] for rule in RULES.values()} == set(MIXERS)
