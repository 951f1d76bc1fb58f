"""Aioli against its source's formulas, written again as its nested loops, on scripted losses and delayed weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import run_job
from records import record

from megamix.core.errors import InputError
from megamix.data.blend.blend import Blend
from megamix.mixing.mixers import AioliConfig, DomainStats, Mixer, make_mixer
from megamix.mixing.shadow import Shadow

ROUND = 40
SHORT: dict[str, Any] = {"name": "aioli", "update_steps": ROUND, "lp_rounds": 2, "lp_steps": 4, "eta": 0.5}


def aioli(k: int = 3, **options: Any) -> Mixer:
    return make_mixer({**SHORT, **options}, [f"d{i}" for i in range(k)], [1.0 + i for i in range(k)], [1.0] * k)


def scripted(evaluation: int, k: int) -> np.ndarray:
    """The losses of the n-th evaluation of a run."""
    return np.random.default_rng([7, evaluation]).uniform(2, 4, k)


def driven(mixer: Mixer, lag: int, steps: int, restart: Callable[[], Mixer] | None = None) -> list[list[float]]:
    """The weights that each step is sampled with, from step 1 on, as a run does it.

    Args:
        restart: makes the mixer anew after every step, to go on from its state.
    """
    config, k, evaluations = mixer.config, mixer.num_domains, 0
    assert isinstance(config, AioliConfig)
    sampled = [mixer.weights.tolist()] * (lag + 1)
    for step in range(1, steps + 1):
        drawn = sampled[step - 1]
        stats = DomainStats([0.0] * k, [0] * k, weights=drawn)
        if config.evaluates_at(step, lag, k):
            stats = DomainStats(scripted(evaluations, k) * 100, [100] * k, weights=drawn)
            evaluations += 1
        sampled.append(mixer.update(stats, step).tolist())
        if restart is not None:
            state = json.loads(json.dumps(mixer.state_dict()))
            mixer = restart()
            mixer.load_state_dict(state)
    return sampled[:steps]


def by_the_source(
    lag: int, rounds: int, factor: float, *, ema: float | None, normalise: bool, diagonal: bool, k: int = 3
) -> list[list[float]]:
    """The same for whole rounds: the source's loops, but for the steps that weights come late."""
    sampled = [[(1.0 + i) / sum(range(1, k + 1)) for i in range(k)]] * (1 + lag)
    main, evaluation = sampled[0], 0
    weights, smooth = np.ones(k), None
    mixtures = np.full((k, k), (1 - factor) / (k - 1))
    np.fill_diagonal(mixtures, factor)
    for number in range(rounds):
        start = len(sampled)
        before = scripted(evaluation, k)
        graph = np.zeros((k, k))
        for sweep in range(2):
            for j in np.random.default_rng([0, number, sweep]).permutation(k):
                sampled += [mixtures[j].tolist()] * 4
                evaluation += 1
                after = scripted(evaluation, k)
                graph[:, j] += before - after
                before = after
        evaluation += 1
        graph /= 2
        if diagonal:
            graph = np.diag(np.diag(graph) / factor)
        else:
            graph = np.stack([np.linalg.solve(mixtures, row) for row in graph])
        if normalise:
            graph = graph - min(graph.min(), 0)
            graph = graph / graph.sum()
        sampled += [main] * lag
        if ema is not None:
            smooth = graph if smooth is None else (1 - ema) * graph + ema * smooth
            weights = np.exp(0.5 * smooth.sum(axis=0))
        else:
            weights = weights * np.exp(0.5 * graph.sum(axis=0))
        main = (weights / weights.sum()).tolist()
        sampled += [main] * (ROUND - (len(sampled) - start))
    return sampled


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize(
    ("factor", "ema", "normalise", "diagonal"),
    [(0.5, 0.5, True, False), (1.0, None, True, False), (0.8, None, False, False), (0.7, 0.3, True, True)],
)
def test_every_step_is_sampled_as_in_the_source(
    lag: int, factor: float, ema: float | None, normalise: bool, diagonal: bool
) -> None:
    options = {"one_hot_factor": factor, "ema": ema, "normalise": normalise, "diagonal": diagonal}
    expected = by_the_source(lag, 3, factor, ema=ema, normalise=normalise, diagonal=diagonal)
    found = driven(aioli(**options), lag, len(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.ptp(expected[-1]) > 1e-3


def test_a_state_continues_bit_for_bit_in_the_middle_of_a_probe() -> None:
    assert driven(aioli(), 2, 130, restart=aioli) == driven(aioli(), 2, 130)


def test_the_objective_weighs_losses() -> None:
    """With all weight on one loss the domain that lowers it most gains most."""
    mixer = aioli(ema=None, one_hot_factor=1.0, normalise=False)
    mixer.set_objective([1.0, 0.0, 0.0])
    found = driven(mixer, 1, 40)[-1]
    falls = np.zeros(3)
    order = np.concatenate([np.random.default_rng([0, 0, sweep]).permutation(3) for sweep in range(2)])
    for n, j in enumerate(order):
        falls[j] += (scripted(n, 3) - scripted(n + 1, 3))[0] / 2
    wanted = np.exp(0.5 * 3 * falls)
    np.testing.assert_allclose(found, wanted / wanted.sum(), rtol=1e-9)


def test_one_domain_and_rounds_that_are_too_short() -> None:
    assert driven(aioli(1), 1, 50) == [[1.0]] * 50
    with pytest.raises(InputError, match=r"2 x 5 probes of 4 steps are 40 steps, which leaves none of a round of 40"):
        aioli(5)


def test_probes_that_do_not_differ_are_refused() -> None:
    """With two domains the default of three: equal weights in each probe, of which nothing can be learnt."""
    with pytest.raises(
        InputError, match=r"one_hot_factor is 0\.5, which of 2 domains is an equal weight.* more than 0\.5"
    ):
        aioli(2)
    aioli(2, one_hot_factor=0.625)
    aioli(1)


def test_other_domains_drop_the_round() -> None:
    """The evaluations of the round in which domains change do not count; the next round does."""
    old = aioli(2, one_hot_factor=0.6)
    driven(old, 1, 60)
    new = aioli(3)
    new.adopt_state(old.state_dict(), [0, 1, None], np.array([0.4, 0.4, 0.2]))
    state = new.state_dict()
    assert (state["asked"], state["left_out"], state["before"]) == ([], 1, None)
    config = new.config
    assert isinstance(config, AioliConfig)
    for step in range(61, 125):
        tokens = [100] * 3 if config.evaluates_at(step, 1, 3) else [0] * 3
        new.update(DomainStats([200.0 + step] * 3, tokens, weights=[1 / 3] * 3), step)
        assert (new.state_dict()["main"] == state["main"]) == (step < 81 + 24 + 1)


def test_it_is_no_shadow() -> None:
    with pytest.raises(InputError, match=r"shadow 'a': aioli needs an evaluation after each of its probes"):
        Shadow("a", aioli(2, one_hot_factor=0.6), Blend([100, 100], [1.0, 1.0], seed=1), None)  # type: ignore[arg-type]


def test_a_run_probes_and_resumes_in_a_probe(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """Weights in force are the probes'; a run that stops within one goes on bit for bit."""
    mixer = {"name": "aioli", "update_steps": 10, "lp_rounds": 1, "lp_steps": 2, "num_eval_samples": 2}
    never = {"every": 0}
    written = {}
    for name in ("whole", "parts"):
        config = tiny_config(run_dir=str(tmp_path / name), mixer=mixer, evaluate=never, checkpoint=never)
        written[name] = config.rename(tmp_path / f"{name}.yaml")
    run_job(1, [(written["whole"], ()), (written["parts"], ("train.stop_after=7",)), (written["parts"], ())])
    assert record(tmp_path / "parts") == record(tmp_path / "whole")
    lines = record(tmp_path / "whole")[1]
    order = np.random.default_rng([0, 0, 0]).permutation(4)
    probes = [line["domain_weights"] for line in lines[1:5]]
    assert [int(np.argmax(weights)) for weights in probes] == order.tolist()
    assert lines[-1]["estimated_effects"] is not None
