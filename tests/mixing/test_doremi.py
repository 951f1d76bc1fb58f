"""DoReMi's mixer against its paper: hand-computed cases, algorithm 1 written again, the objective, and its state."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.mixing.mixers import DomainStats, DoremiConfig, DoremiMixer, make_mixer
from megamix_kernels import domain_cross_entropy


def doremi(initial: list[float], **options: Any) -> DoremiMixer:
    """The rule itself, which knows nothing of domains that are left out."""
    config = DoremiConfig.model_validate({"name": "doremi", **options})
    return DoremiMixer(config, [f"d{i}" for i in range(len(initial))], initial)


def excess(values: list[float | None], tokens: int = 10) -> DomainStats:
    """Statistics with these mean excess losses; None: absent. The plain losses differ, so that a mix-up shows."""
    counts = [0 if value is None else tokens * (i + 1) for i, value in enumerate(values)]
    sums = [(value or 0.0) * count for value, count in zip(values, counts, strict=True)]
    return DomainStats(nats=[7.0 * count for count in counts], tokens=counts, excess_nats=sums)


def alpha_of(mixer: DoremiMixer) -> list[float]:
    weights = mixer.weights if mixer.loss_weights is None else mixer.loss_weights
    return weights.tolist()


class Algorithm1:
    """The paper's algorithm 1 for given excess losses, in plain Python: exponentiated gradient ascent on alpha,
    renormalised and smoothed, and the mean over steps. An absent domain keeps its last excess loss, at first 0."""

    def __init__(self, alpha: list[float], eta: float, c: float) -> None:
        self.alpha, self.eta, self.c = [value / math.fsum(alpha) for value in alpha], eta, c
        self.excess = [0.0] * len(alpha)
        self.history: list[list[float]] = []

    def step(self, excess: list[float | None]) -> None:
        self.excess = [old if new is None else new for old, new in zip(self.excess, excess, strict=True)]
        raised = [a * math.exp(self.eta * e) for a, e in zip(self.alpha, self.excess, strict=True)]
        total = math.fsum(raised)
        self.alpha = [(1 - self.c) * value / total + self.c / len(raised) for value in raised]
        self.history.append(self.alpha)

    def mean(self) -> list[float]:
        return [math.fsum(column) / len(column) for column in zip(*self.history, strict=True)]


@pytest.mark.parametrize("apply", ["loss", "sampling"])
@pytest.mark.parametrize(("k", "eta", "c"), [(2, 1.0, 1e-3), (22, 1.0, 1e-3), (5, 0.1, 1e-2), (3, 2.0, 0.0)])
def test_500_random_steps_follow_the_paper(k: int, eta: float, c: float, apply: str) -> None:
    rng = random.Random(k)
    initial = [rng.uniform(0.2, 2) for _ in range(k)]
    mixer, paper = doremi(initial, eta=eta, smoothing=c, apply=apply), Algorithm1(initial, eta, c)
    start, largest = mixer.weights, 0.0
    for step in range(1, 501):
        # Mean excess losses that drift apart slowly and change places, some domains absent.
        values = [None if rng.random() < 0.2 else rng.uniform(0, 0.2) * (1 + math.sin(step / 60 + i)) for i in range(k)]
        weights = mixer.update(excess(values), step)
        paper.step(values)
        np.testing.assert_allclose(alpha_of(mixer), paper.alpha, rtol=1e-10)
        np.testing.assert_array_equal(weights, start if apply == "loss" else alpha_of(mixer))
        largest = max(largest, float(np.abs(mixer.average_weights - start).max()))
    np.testing.assert_allclose(mixer.average_weights, paper.mean(), rtol=1e-10)
    np.testing.assert_allclose(mixer.record()["perdomain_scores"], paper.excess, rtol=1e-12)
    assert largest > 0.01


def test_one_hard_domain() -> None:
    """By hand: excess ln 3 of one in two triples its weight (1/2, 1/2) -> (3/4, 1/4) -> (9/10, 1/10)."""
    mixer = doremi([1, 1], smoothing=0)
    for step, wanted in ((1, [0.75, 0.25]), (2, [0.9, 0.1])):
        mixer.update(excess([math.log(3), 0.0]), step)
        np.testing.assert_allclose(alpha_of(mixer), wanted, rtol=1e-14)
    np.testing.assert_allclose(mixer.average_weights, [0.825, 0.175], rtol=1e-14)
    smoothed = doremi([1, 1], smoothing=0.2)
    smoothed.update(excess([math.log(3), 0.0]), 1)
    np.testing.assert_allclose(alpha_of(smoothed), [0.8 * 0.75 + 0.1, 0.8 * 0.25 + 0.1], rtol=1e-14)
    halved = doremi([1, 1], smoothing=0, eta=0.5)
    halved.update(excess([math.log(9), 0.0]), 1)
    np.testing.assert_allclose(alpha_of(halved), [0.75, 0.25], rtol=1e-14)


def test_equal_losses_change_nothing_but_by_smoothing() -> None:
    mixer = doremi([0.6, 0.3, 0.1], smoothing=0)
    mixer.update(excess([0.7, 0.7, 0.7]), 1)
    np.testing.assert_allclose(alpha_of(mixer), [0.6, 0.3, 0.1], rtol=1e-14)
    smoothed = doremi([0.6, 0.3, 0.1], smoothing=0.3)
    smoothed.update(excess([0.0, 0.0, 0.0]), 1)
    np.testing.assert_allclose(alpha_of(smoothed), [0.7 * 0.6 + 0.1, 0.7 * 0.3 + 0.1, 0.7 * 0.1 + 0.1], rtol=1e-14)


def test_an_absent_domain_keeps_its_last_score() -> None:
    """Domain 0 triples again in the step that it is absent from; domain 2, not seen yet, keeps its ratio to domain 1,
    whose excess loss is 0, or triples each time with that as its initial score."""
    for initial_score, factor in ((0.0, 1), (math.log(3), 3)):
        mixer = doremi([1, 1, 1], smoothing=0, initial_score=initial_score)
        mixer.update(excess([math.log(3), 0.0, None]), 1)
        mixer.update(excess([None, 0.0, None]), 2)
        wanted = np.array([9, 1, factor**2])
        np.testing.assert_allclose(alpha_of(mixer), wanted / wanted.sum(), rtol=1e-14)
        # Seen, it has its own score.
        mixer.update(excess([None, None, 0.0]), 3)
        np.testing.assert_allclose(alpha_of(mixer)[2] / alpha_of(mixer)[1], factor**2, rtol=1e-14)


def test_without_a_reference_the_loss_itself_counts() -> None:
    mixer = doremi([1, 1], smoothing=0)
    mixer.update(DomainStats(nats=[4 * math.log(3), 0.0], tokens=[4, 9]), 1)
    np.testing.assert_allclose(alpha_of(mixer), [0.75, 0.25], rtol=1e-14)
    with pytest.raises(InputError, match=r"step 1 have no excess_nats, and the reference is cache"):
        doremi([1, 1], reference="cache").update(DomainStats(nats=[1.0, 2.0], tokens=[1, 1]), 1)


def test_one_domain() -> None:
    mixer = doremi([3.0])
    for step in range(1, 4):
        mixer.update(excess([5.0]), step)
    np.testing.assert_allclose([alpha_of(mixer)[0], mixer.average_weights[0]], 1.0, rtol=1e-14)


def test_nothing_overflows() -> None:
    """Scores up to the largest float64, step sizes that take them beyond, a thousand steps, a weight of 0."""
    mixer = doremi([1, 1, 0], smoothing=0, eta=1e300)
    for step in range(1, 1001):
        mixer.update(excess([1e300, 1e299, 0.0], tokens=1), step)
        assert np.isfinite(alpha_of(mixer)).all()
    np.testing.assert_allclose(mixer.average_weights[:2].sum(), 1.0, rtol=1e-12)
    one_hot = doremi([1, 1, 0], smoothing=0)
    one_hot.update(excess([1e4, 0.0, 0.0]), 1)
    one_hot.update(excess([0.0, 1e4, 0.0]), 2)
    assert alpha_of(one_hot) == [1.0, 0.0, 0.0]  # without smoothing what fell to 0 stays there
    smoothed = doremi([1, 1, 0], smoothing=1e-3)
    smoothed.update(excess([1e4, 0.0, 0.0]), 1)
    smoothed.update(excess([0.0, 1e4, 0.0]), 2)
    np.testing.assert_allclose(alpha_of(smoothed), [1e-3 / 3, 1 - 2e-3 / 3, 1e-3 / 3], rtol=1e-12)
    json.dumps([mixer.state_dict(), mixer.record()], allow_nan=False)


def test_schedule() -> None:
    """In the warm-up alpha stays and does not count in the mean; an interval's sums are divided once; after the last
    update both stay."""
    mixer = doremi([1, 1], smoothing=0, warmup_steps=2, update_every=2, update_times=1)
    ln3 = math.log(3)
    mixer.update(DomainStats([0, 0], [1, 1], [9.0, 0.0]), 1)
    mixer.update(DomainStats([0, 0], [1, 1], [9.0, 0.0]), 2)
    assert (alpha_of(mixer), mixer.average_weights.tolist()) == ([0.5, 0.5], [0.5, 0.5])
    # (ln 3 * 4) nats over 1 + 3 tokens.
    mixer.update(DomainStats([0, 0], [1, 1], [ln3, 0.0]), 3)
    mixer.update(DomainStats([0, 0], [3, 1], [3 * ln3, 0.0]), 4)
    for step in range(5, 9):
        np.testing.assert_allclose(alpha_of(mixer), [0.75, 0.25], rtol=1e-14)
        np.testing.assert_allclose(mixer.average_weights, [0.75, 0.25], rtol=1e-14)
        mixer.update(DomainStats([0, 0], [1, 1], [0.0, 9.0]), step)


# What is differentiated

TOKENS = [3, 5, 0, 2]
DOMAIN_N = torch.tensor([0, 1, 1, 3, 0, 1, 3, 0, 1, 1])
ALPHA = np.array([0.4, 0.3, 0.2, 0.1])


def differentiated(config: DoremiConfig, sampling: np.ndarray, losses_N: torch.Tensor) -> float:
    """The objective by the domain loss itself: each token has two logits that give its loss."""
    weights_K, normaliser = config.loss_factors(ALPHA, np.array(TOKENS), sampling)
    # Label 0 with logits (0, x): loss = log(1 + e^x).
    logits_NV = torch.stack([torch.zeros_like(losses_N), torch.log(torch.expm1(losses_N))], dim=1)
    out = domain_cross_entropy(
        logits_NV,
        torch.zeros_like(DOMAIN_N),
        DOMAIN_N,
        len(TOKENS),
        loss_weights_K=torch.from_numpy(weights_K),
        normaliser=normaliser,
    )
    return out.loss.item()


def test_the_objective_is_the_papers_or_the_repositorys() -> None:
    losses = [0.5 + 0.25 * n for n in range(len(DOMAIN_N))]
    domains = DOMAIN_N.tolist()
    means = [
        math.fsum(loss for loss, d in zip(losses, domains, strict=True) if d == k) / count if count else 0.0
        for k, count in enumerate(TOKENS)
    ]
    paper = math.fsum(a * mean for a, mean in zip(ALPHA, means, strict=True))
    sampling = np.array([0.1, 0.6, 0.2, 0.1])
    ratio = [a / q for a, q in zip(ALPHA.tolist(), sampling.tolist(), strict=True)]
    per_token = [ratio[d] / sum(ratio) for d in domains]
    official = sum(w * loss for w, loss in zip(per_token, losses, strict=True)) / sum(per_token)
    losses_N = torch.tensor(losses, dtype=torch.float64)
    assert differentiated(DoremiConfig(), sampling, losses_N) == pytest.approx(paper, rel=1e-12)
    assert differentiated(DoremiConfig(normalisation="official"), sampling, losses_N) == pytest.approx(
        official, rel=1e-12
    )
    assert paper != pytest.approx(official, rel=1e-2)


def test_weights_that_are_the_sampling_weights_leave_the_loss_alone() -> None:
    """Official: alpha = q weighs all tokens alike; paper: it does where each domain has its share of the tokens."""
    tokens = np.array([40, 30, 20, 10])
    for normalisation in ("official", "paper"):
        weights_K, normaliser = DoremiConfig(normalisation=normalisation).loss_factors(ALPHA, tokens, ALPHA)
        np.testing.assert_allclose(weights_K / normaliser, 1 / 100, rtol=1e-14)


@pytest.mark.parametrize("normalisation", ["paper", "official"])
@pytest.mark.parametrize(("alpha", "tokens"), [([0.5, 0.5, 0.0], [0, 0, 4]), ([0.5, 0.3, 0.2], [0, 0, 0])])
def test_an_objective_without_weight_is_zero(normalisation: str, alpha: list[float], tokens: list[int]) -> None:
    config = validate(DoremiConfig, {"normalisation": normalisation}, "mixer")
    weights_K, normaliser = config.loss_factors(np.array(alpha), np.array(tokens), np.array([0.5, 0.5, 0.0]))
    assert normaliser > 0
    assert math.isfinite(normaliser)
    assert (weights_K * tokens).sum() == 0


# State


@pytest.mark.parametrize("apply", ["loss", "sampling"])
def test_state_continues_bit_for_bit(apply: str) -> None:
    rng = random.Random(0)
    stats = [excess([None if rng.random() < 0.4 else rng.uniform(0, 1) for _ in range(4)]) for _ in range(20)]
    options: dict[str, Any] = {"apply": apply, "update_every": 3, "warmup_steps": 4}
    whole, first, second = (doremi([4, 3, 2, 1], **options) for _ in range(3))
    for step, each in enumerate(stats, start=1):
        whole.update(each, step)
        (first if step <= 10 else second).update(each, step)
        if step == 10:
            second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.state_dict() == whole.state_dict()
    assert second.record() == whole.record()
    assert alpha_of(whole) != [0.4, 0.3, 0.2, 0.1]
    assert ("loss_weights" in whole.record()) == (apply == "loss")


@pytest.mark.parametrize("change", [{"alpha": [0.5, 0.5, 0.0]}, {"scores": [None, 1.0]}, {"num_averaged": None}])
def test_a_damaged_state_is_refused(change: dict[str, Any]) -> None:
    mixer = doremi([1, 1])
    with pytest.raises(InputError, match="the state is not whole"):
        mixer.load_state_dict({**mixer.state_dict(), **change})
    with pytest.raises(InputError, match="made with apply 'loss', the config says 'sampling'"):
        doremi([1, 1], apply="sampling").load_state_dict(mixer.state_dict())


def test_other_domains() -> None:
    """Domain b (alpha 0.4) is split into parts that share its sampling weight 3 : 1, n is new with sampling weight 0.2,
    c is gone: a and the parts keep a : b and leave n its 0.2."""
    old = make_mixer({"name": "doremi"}, ["a", "b", "c"], [1, 1, 2])
    state = {
        **old.state_dict(),
        "alpha": [0.2, 0.4, 0.4],
        "average_weights": [0.3, 0.3, 0.4],
        "scores": [1.0, 2.0, 4.0],
    }
    new = make_mixer({"name": "doremi"}, ["b1", "n", "a", "b2"], [1, 1, 1, 1])
    assert isinstance(new, DoremiMixer)
    new.adopt_state(state, [1, None, 0, 1], np.array([0.45, 0.2, 0.2, 0.15]))
    np.testing.assert_allclose(alpha_of(new), [0.8 * 2 / 3 * 0.75, 0.2, 0.8 / 3, 0.8 * 2 / 3 * 0.25], rtol=1e-14)
    np.testing.assert_allclose(new.average_weights, [0.4 * 0.75, 0.2, 0.4, 0.4 * 0.25], rtol=1e-14)
    assert new.record()["perdomain_scores"] == [2.0, pytest.approx(7 / 3), 1.0, 2.0]
    np.testing.assert_allclose(new.weights, [0.45, 0.2, 0.2, 0.15], rtol=1e-14)


def test_the_repository_counts_the_initial_weights_once_more() -> None:
    """Its running mean begins with them; ours, as the paper's, with the first update."""
    rng = random.Random(12)
    initial = [0.6, 0.3, 0.1]
    mixer, theirs, counted = doremi(initial, eta=0.3), np.array(initial), 1
    for step in range(1, 30):
        mixer.update(excess([rng.uniform(0, 2) for _ in initial]), step)
        counted += 1
        theirs = (theirs * (counted - 1) + alpha_of(mixer)) / counted
        moved = mixer.average_weights + (np.array(initial) - mixer.average_weights) / (step + 1)
        np.testing.assert_allclose(theirs, moved, rtol=1e-12)


def test_centred_scores_of_dataflex_change_nothing_while_every_domain_is_there() -> None:
    """Its code subtracts the mean of the scores of the domains seen; one that is absent counts as that mean, where ours
    keeps its last score."""
    rng = random.Random(13)
    mixer, theirs = doremi([0.25] * 4, eta=0.1, smoothing=0.01), np.full(4, 0.25)

    def dataflex(scores: list[float | None]) -> np.ndarray:
        mean = math.fsum(score for score in scores if score is not None) / sum(score is not None for score in scores)
        centred = [0.0 if score is None else max(-5.0, min(5.0, score - mean)) for score in scores]
        raised = [a * math.exp(0.1 * score) for a, score in zip(theirs, centred, strict=True)]
        return np.array([0.99 * one / math.fsum(raised) + 0.01 / 4 for one in raised])

    for step in range(1, 30):
        scores: list[float | None] = [rng.uniform(0, 4) for _ in range(4)]
        mixer.update(excess(scores), step)
        theirs = dataflex(scores)
        np.testing.assert_allclose(alpha_of(mixer), theirs, rtol=1e-12)
    scores[2] = None
    mixer.update(excess(scores), 30)
    assert np.abs(alpha_of(mixer) - dataflex(scores)).max() > 1e-4
