"""Proposals: recovery of a known optimum, priors and bounds from files, searches, and how sure a proposal is."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_solvers import by_slsqp, objective
from scipy.stats import spearmanr
from synthetic import known_law, swarm_of
from typer.testing import CliRunner

from megamix.core.errors import InputError
from megamix.mixing.weight_files import read_weights
from megamix.studies.swarm.cli import app
from megamix.studies.swarm.fit.config import FitConfig
from megamix.studies.swarm.fit.fit import fit
from megamix.studies.swarm.fit.fitted import Fitted
from megamix.studies.swarm.fit.law import LogLinearLaw, fit_log_linear
from megamix.studies.swarm.fit.tables import SwarmTable, write_metrics, write_ratios
from megamix.studies.swarm.propose.config import ProposeConfig
from megamix.studies.swarm.propose.proposal import read_proposal
from megamix.studies.swarm.propose.propose import propose, propose_in, read_options
from megamix.studies.swarm.propose.report import report
from megamix.studies.swarm.propose.solve import Problem

Floats = Any


def fitted_of(
    law: LogLinearLaw, table: SwarmTable, resampled: list[LogLinearLaw] | None = None, **other: Any
) -> Fitted:
    laws = resampled or []
    shape = (0, len(law.metrics), len(law.domains))
    return Fitted(
        families=other.get("families", {}),
        regression="log_linear",
        model=law,
        table=table,
        cross_validation={},
        family_cross_validation={},
        held_out_RJ=table.values_RJ,
        boot_c_BJ=np.stack([one.c_J for one in laws]) if laws else np.zeros(shape[:2]),
        boot_A_BJK=np.stack([one.A_JK for one in laws]) if laws else np.zeros(shape),
    )


def uniform(law: LogLinearLaw) -> dict[str, float]:
    return dict.fromkeys(law.domains, 1 / len(law.domains))


def true_problem(law: LogLinearLaw, caps: dict[str, float] | None, kl: float) -> Problem:
    size, metrics = len(law.domains), len(law.metrics)
    cap_K = np.array([1.0 if caps is None else min(caps[name], 1.0) for name in law.domains])
    return Problem(np.full(metrics, 1 / metrics), law.A_JK, kl, np.full(size, 1 / size), np.zeros(size), cap_K)


@pytest.mark.parametrize("size", [2, 8, 24, 64])
@pytest.mark.parametrize("capped", [False, True])
def test_without_noise_the_optimum_of_the_true_law_is_found(size: int, capped: bool) -> None:
    law = known_law(size, 2)
    caps = dict.fromkeys(law.domains, 1.5 / size) if capped else None
    table = swarm_of(law, 2 * size + 8)
    found = propose(fitted_of(fit_log_linear(table, starts=2), table), uniform(law), kl=0.05, caps=caps)
    p = true_problem(law, caps, 0.05)
    best = by_slsqp(p)
    assert np.array(list(found.weights.values())) == pytest.approx(best, abs=1e-3)
    assert list(found.predicted.values()) == pytest.approx(law.predict(best[None])[0], abs=1e-3)
    at_cap = [weight > caps[name] - 1e-6 for name, weight in found.weights.items()] if caps else [False]
    assert any(at_cap) == capped


def test_with_noise_more_runs_lose_less() -> None:
    """By how much the true objective at the proposal is above the true minimum: small, and smaller with more runs."""
    law = known_law(6, 3)
    p = true_problem(law, None, 0.05)
    best = objective(p, by_slsqp(p))
    lost = {}
    for runs in (14, 28, 112):
        regrets = []
        for seed in range(4):
            table = swarm_of(law, runs, noise=0.03, seed=seed)
            found = propose(fitted_of(fit_log_linear(table, starts=2), table), uniform(law), kl=0.05)
            regrets.append(objective(p, np.array(list(found.weights.values()))) - best)
        lost[runs] = float(np.mean(regrets))
    assert 0 <= lost[112] < lost[28] < lost[14]
    assert lost[112] < 0.01


def test_objective_weights_by_metric_and_family() -> None:
    law = known_law(3, 4)
    table = swarm_of(law, 12)
    fitted = fitted_of(law, table, families={"ab": ("m0", "m1"), "c": ("m2",)})
    for given, wanted in (
        (None, [0.25] * 4),
        ({"m3": 2.0}, [0, 0, 0, 1]),
        ({"ab": 1.0, "m3": 1.0}, [0.25, 0.25, 0, 0.5]),
        ({"ab": 1.0, "m0": 1.0, "c": 0.0}, [0.75, 0.25, 0, 0]),
    ):
        found = propose(fitted, uniform(law), objective=given)
        metrics = np.array([found.details["objective"].get(name, 0.0) for name in law.metrics])
        assert metrics == pytest.approx(wanted)
        x = np.array(list(found.weights.values()))
        p = Problem(np.maximum(metrics, 1e-300), law.A_JK, 0.05, np.full(3, 1 / 3), np.zeros(3), np.ones(3))
        assert x == pytest.approx(by_slsqp(p), abs=1e-4)
    with pytest.raises(InputError, match=r"no metric or family 'mm3'\. Did you mean 'm3'"):
        propose(fitted, uniform(law), objective={"mm3": 1.0})
    with pytest.raises(InputError, match="all weights are 0"):
        propose(fitted, uniform(law), objective={"m1": 0.0})
    with pytest.raises(InputError, match="weight of 'm1' is -1"):
        propose(fitted, uniform(law), objective={"m1": -1.0})


def test_how_sure_by_hand() -> None:
    """Distances, percentiles over the resampled laws, and what lies beyond any mixture tried."""
    law = known_law(3, 2)
    ratios = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1]])
    table = SwarmTable(("a", "b", "c"), law.domains, law.metrics, ratios, law.predict(ratios))
    random = np.random.default_rng(0)
    laws = [
        LogLinearLaw(law.domains, law.metrics, law.c_J, law.A_JK + 0.1 * random.normal(size=(2, 3))) for _ in range(9)
    ]
    found = propose(fitted_of(law, table, laws), uniform(law), kl=0.02, resamples=5)
    x, details = np.array(list(found.weights.values())), found.details
    apart = [sum(abs(a - b) for a, b in zip(x, row, strict=True)) / 2 for row in ratios]
    assert details["distance"]["nearest_run"] == "abc"[int(np.argmin(apart))]
    assert details["distance"]["total_variation"] == pytest.approx(min(apart))
    assert details["distance"]["median_among_runs"] == pytest.approx(np.median([0.3, 0.3, 0.5]))
    assert details["distance"]["share_as_far"] == np.mean(np.array([0.3, 0.3, 0.5]) >= min(apart))
    nearer = details["with_larger_kl"]
    assert [row["kl"] for row in nearer] == pytest.approx([0.02, 0.04, 0.1, 0.2, 0.4])
    assert nearer[0]["gain_over_prior"] == pytest.approx(details["gain_over_prior"]["value"])
    assert nearer[0]["interval"] == pytest.approx(details["gain_over_prior"]["interval"])
    for less, more in itertools.pairwise(nearer):
        assert more["from_prior"] < less["from_prior"]
        assert more["gain_over_prior"] < less["gain_over_prior"]
    again = propose(fitted_of(law, table, laws), uniform(law), kl=0.2, resamples=0)
    assert nearer[3]["nearest_run"] == pytest.approx(again.details["distance"]["total_variation"])
    beyond = {name: [w, m] for name, w, m in zip(law.domains, x, [0.5, 0.8, 0.5], strict=True) if w > m}
    assert beyond
    assert details["distance"]["beyond_tried"] == beyond
    prior = np.full(3, 1 / 3)
    gains = [(one.predict(prior[None]) - one.predict(x[None])).mean() for one in laws]
    assert details["gain_over_prior"]["interval"] == pytest.approx(np.percentile(gains, [5, 95]))
    at = np.stack([one.predict(x[None])[0] for one in laws])
    assert details["intervals"]["m1"] == pytest.approx(np.percentile(at[:, 1], [5, 95]))
    again = np.stack(
        [by_slsqp(Problem(np.full(2, 0.5), one.A_JK, 0.02, prior, np.zeros(3), np.ones(3))) for one in laws[:5]]
    )
    assert np.array(list(details["weight_intervals"].values())) == pytest.approx(
        np.percentile(again, [5, 95], axis=0).T, abs=2e-4
    )
    measured = table.values_RJ.mean(axis=1)
    assert details["best_tried"]["run"] == "abc"[int(np.argmin(measured))]
    text = report(found, Path("mixture.json")).text()
    assert "It lies outside of what was tried: " in text
    assert "in 90 % of 9 resamples" in text
    assert ("0% of the runs are as far from their nearest" in text) == (min(apart) > 0.5)
    unsure = dataclasses.replace(
        found, details={**details, "gain_over_prior": {"value": 0.1, "interval": [-0.1, 0.3], "resamples": 9}}
    )
    assert "By some resamples it is worse than the prior" in report(unsure, Path("mixture.json")).text()
    assert "By some resamples" not in text or details["gain_over_prior"]["interval"][0] < 0


def test_the_error_of_the_objective_is_that_of_unseen_runs() -> None:
    """Errors of metrics that cancel in the objective are none of the objective's, and equal ones all are."""
    law = known_law(3, 2)
    table = swarm_of(law, 12)
    off = np.random.default_rng(1).normal(scale=0.3, size=12)
    for signs, wanted in (((1, -1), np.zeros(12)), ((1, 1), off)):
        held_out = table.values_RJ + off[:, None] * np.array(signs)
        fitted = dataclasses.replace(fitted_of(law, table), held_out_RJ=held_out)
        found = propose(fitted, uniform(law), kl=0.5)
        actual, error = table.values_RJ.mean(axis=1), found.details["fit"]["objective"]
        assert error["rmse"] == pytest.approx(np.sqrt(np.mean(wanted**2)), abs=1e-12)
        assert error["spearman"] == pytest.approx(spearmanr(actual, actual + wanted).statistic)
        text = report(found, Path("mixture.json")).text()
        assert f"misses the objective by {error['rmse']:.4f} (root mean square)" in text
        assert 0 < found.details["gain_over_prior"]["value"] < 0.2
        assert ("more than the gain" in text) == bool(wanted.any())


# In a directory. -----------------------------------------------------------------------------------------------------

COUNTS = {"d0": 100.0, "d1": 300.0, "d2": 600.0}


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a fit by each regression."""
    law = known_law(3, 2, seed=1)
    table = swarm_of(law, 24, noise=0.01)
    found = {}
    for regression in ("log_linear", "gp", "lightgbm"):
        folder = found[regression] = tmp_path_factory.mktemp(regression)
        write_ratios(folder / "ratios.csv", table.runs, table.domains, table.ratios_RK)
        write_metrics(folder / "metrics.csv", table.runs, table.metrics, table.values_RJ)
        config = FitConfig(regression=regression, starts=2, folds=2, bootstrap=8 if regression == "log_linear" else 0)
        fit(folder / "ratios.csv", folder / "metrics.csv", folder, config)
    return found


def options(**given: Any) -> ProposeConfig:
    return ProposeConfig.model_validate(given)


def test_where_the_prior_comes_from(fits: dict[str, Path], tmp_path: Path) -> None:
    folder = fits["log_linear"]
    mean = Fitted.open(folder).table.ratios_RK.mean(axis=0)

    def prior(**given: Any) -> tuple[str, list[float]]:
        found = propose_in(folder, options(**given))[0].details["prior"]
        return found["source"], list(found["shares"].values())

    assert prior() == ("the mean of the mixtures tried", pytest.approx(mean))
    assert prior(token_counts=COUNTS) == ("the shares of the token counts", pytest.approx([0.1, 0.3, 0.6]))
    path = folder / "priors.json"
    path.write_text(json.dumps({"token_counts": COUNTS, "relative_sizes": {"d0": 0.5, "d1": 0.3, "d2": 0.2}}))
    assert prior(token_counts=COUNTS) == (str(path), pytest.approx([0.5, 0.3, 0.2]))
    given = tmp_path / "mine.yaml"
    given.write_text("d2: 4\nd0: 4\nd1: 2\n")
    assert prior(priors=given) == (str(given), pytest.approx([0.4, 0.2, 0.4]))
    given.write_text("priors:\n  token_counts: {d0: 1, d1: 1, d2: 2}\n")
    assert prior(priors=given) == (str(given), pytest.approx([0.25, 0.25, 0.5]))
    # The KL is to the natural shares when asked for: strongly held, the mixture is those.
    natural = propose_in(folder, options(kl=1e4, use_natural_kl=True))[0]
    assert list(natural.weights.values()) == pytest.approx([0.1, 0.3, 0.6], abs=1e-3)
    held = propose_in(folder, options(kl=1e4))[0]
    assert list(held.weights.values()) == pytest.approx([0.5, 0.3, 0.2], abs=1e-3)
    path.unlink()


def test_the_file_is_whole_and_can_be_trained_with(fits: dict[str, Path]) -> None:
    folder = fits["log_linear"]
    proposal, path = propose_in(folder, options(token_counts=COUNTS, target_tokens=1200, repetition=2))
    json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert read_proposal(folder) == proposal
    assert read_weights(path, ("d2", "d0", "d1")) == pytest.approx(proposal.weights)
    assert (folder / "mixture.png").read_bytes()[:4] == b"\x89PNG"
    assert proposal.details["caps"]["d0"] == pytest.approx(2 * 100 / 1200)
    assert all(proposal.weights[name] <= 2 * COUNTS[name] / 1200 + 1e-12 for name in COUNTS)
    (entry,) = proposal.history
    assert entry["weights"] == proposal.weights
    assert (entry["runs"], entry["update"]) == (24, None)
    before = path.read_bytes()
    assert propose_in(folder, options(worst=True, priors=None))[1] == folder / "worst" / "mixture.json"
    assert path.read_bytes() == before
    assert propose_in(folder, options(token_counts=COUNTS, target_tokens=1200, repetition=2))[1].read_bytes() == before


def test_caps_that_cannot_be_met_name_what_would_do(fits: dict[str, Path]) -> None:
    folder = fits["log_linear"]
    asked = {"token_counts": COUNTS, "target_tokens": 5000, "repetition": 4}
    with pytest.raises(InputError) as caught:
        propose_in(folder, options(**asked))
    text = str(caught.value)
    assert "gives 0.8 of 5000 tokens" in text
    assert "1000 tokens are missing" in text
    assert "d0 0.08, d1 0.24, d2 0.48" in text
    assert "target_tokens to 4000 at most, or raise repetition to 5 at least" in text
    for change in ({"target_tokens": 4000}, {"repetition": 5}):
        weights = propose_in(folder, options(**{**asked, **change}))[0].weights
        assert list(weights.values()) == pytest.approx([0.1, 0.3, 0.6])
    fixed = {**asked, "target_tokens": 2000, "fixed_weight": {"d0": 0.5}}
    with pytest.raises(InputError, match=r"'d0' has 0\.5, but read 4 times it is 0\.2 of 2000 tokens"):
        propose_in(folder, options(**fixed))
    found = propose_in(folder, options(**{**fixed, "fixed_weight": {"d0": 0.15}}))[0]
    assert found.weights["d0"] == 0.15
    with pytest.raises(InputError, match="needs the tokens of each"):
        propose_in(folder, options(target_tokens=10))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"d0": 1, "d1": 1, "d2": 1, "d22": 1}, r"the swarm has no domain 'd22'\. Did you mean 'd2'"),
        ({"d0": 1, "d2": 1}, r"mine\.json lacks the domain d1"),
        ({"d0": 1, "d1": -1, "d2": 1}, r"'d1' is -1, expected a number that is not negative"),
        ({"d0": 0, "d1": 0, "d2": 0}, r"all shares are 0"),
        ({"d0": "1", "d1": 1, "d2": 1}, r"'d0' is '1', expected a number"),
        ([1, 2], r"holds list, expected a mapping"),
        ({}, r"mine\.json names no domain"),
        ({"relative_sizes": {}}, r"mine\.json names no domain"),
    ],
)
def test_a_prior_of_other_domains(fits: dict[str, Path], tmp_path: Path, given: Any, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(given))
    with pytest.raises(InputError, match=message):
        propose_in(fits["log_linear"], options(priors=path))


def test_fixed_weights_that_leave_nothing(fits: dict[str, Path], tmp_path: Path) -> None:
    folder = fits["log_linear"]
    with pytest.raises(InputError, match=r"fixed_weight: the swarm has no domain 'd9'"):
        propose_in(folder, options(fixed_weight={"d9": 0.1}))
    with pytest.raises(InputError, match="sum to 1 at most"):
        propose_in(folder, options(fixed_weight={"d0": 0.7, "d1": 0.7}))
    (tmp_path / "p.json").write_text(json.dumps({"d0": 1, "d1": 0, "d2": 0}))
    with pytest.raises(InputError, match=r"leaves 0\.5 of the mixture to no domain"):
        propose_in(folder, options(fixed_weight={"d0": 0.5}, priors=tmp_path / "p.json"))


@pytest.mark.parametrize(("regression", "worst"), [("gp", True), ("lightgbm", False)])
def test_a_search_finds_what_a_grid_does(fits: dict[str, Path], regression: str, worst: bool) -> None:
    folder = fits[regression]
    fitted = Fitted.open(folder)
    asked = options(kl=0.02, token_counts=COUNTS, target_tokens=1000, repetition=2, worst=worst, seed=3)
    found = propose_in(folder, asked)[0]
    cap, q = np.array([0.2, 0.6, 1.0]), np.array([0.1, 0.3, 0.6])
    steps = np.arange(0, 51) / 50
    grid = np.array([[a, b, 1 - a - b] for a in steps for b in steps if a <= 0.2 and b <= 0.6 and a + b <= 1])

    def height(x: Floats) -> Floats:
        x = np.atleast_2d(x)
        kl = np.where(x > 0, x * np.log(np.maximum(x, 1e-300) / q), 0).sum(axis=1)
        return (-1 if worst else 1) * fitted.predict(x).mean(axis=1) + 0.02 * kl

    x = np.array(list(found.weights.values()))
    assert (x <= cap + 1e-12).all()
    assert height(x)[0] <= height(grid).min() + 2e-3
    assert "search: the best of" in found.details["optimality"]["method"]
    assert "better ones may exist" in report(found, folder).text()
    assert propose_in(folder, asked)[0] == found


def test_options_of_the_directory_under_those_given(fits: dict[str, Path]) -> None:
    folder = fits["log_linear"]
    assert read_options(folder, {}) == ProposeConfig()
    (folder / "propose.json").write_text(json.dumps({"kl": 0.5, "seed": 3}))
    found = read_options(folder, {"seed": 4, "objective": {"m0": 1.0}})
    assert found == ProposeConfig(kl=0.5, seed=4, objective={"m0": 1.0})
    (folder / "propose.json").write_text(json.dumps({"kll": 0.5}))
    with pytest.raises(InputError, match=r"unknown key 'kll'\. Did you mean 'kl'"):
        read_options(folder, {})
    (folder / "propose.json").unlink()


def test_a_domain_that_the_prior_leaves_out(fits: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"d0": 1, "d1": 0, "d2": 3}))
    asked = {"priors": tmp_path / "p.json"}
    assert propose_in(fits["log_linear"], options(**asked))[0].weights["d1"] == 0
    with pytest.raises(InputError, match=r"'d1' has 0\.2, but share 0 in the prior"):
        propose_in(fits["log_linear"], options(**asked, fixed_weight={"d1": 0.2}))
    found = propose_in(fits["log_linear"], options(**asked, fixed_weight={"d1": 0.2}, kl=0))[0]
    assert found.weights["d1"] == 0.2
    assert "without KL others may be as good" in report(found, tmp_path).text()


def test_the_command(fits: dict[str, Path], tmp_path: Path) -> None:
    folder = fits["log_linear"]
    (tmp_path / "counts.json").write_text(json.dumps(COUNTS))
    (folder / "propose.json").write_text(json.dumps({"kl": 0.2, "objective": {"m0": 1.0}}))
    counts = ["--token-counts", str(tmp_path / "counts.json"), "--target-tokens", "1e3", "--repetition", "2"]
    given = ["--objective", "m0=1", "--objective", "m1=3", "--fixed-weight", "d0=0.1", "--resamples", "0"]
    shown = CliRunner().invoke(app, ["propose", str(folder), *counts, *given])
    assert shown.exit_code == 0, shown.output
    assert "KL weight 0.2, prior: the shares of the token counts; caps: repetition 2 in 1000 tokens" in shown.output
    found = read_proposal(folder)
    assert found.details["objective"] == {"m0": 0.25, "m1": 0.75}
    assert found.weights["d0"] == 0.1
    assert found.details["weight_intervals"] is None
    assert found == propose_in(
        folder,
        options(
            kl=0.2, token_counts=COUNTS, target_tokens=1000, repetition=2, objective={"m0": 1, "m1": 3},
            fixed_weight={"d0": 0.1}, resamples=0,
        ),
    )[0]  # fmt: skip
    with pytest.raises(InputError, match=r"--fixed-weight d0: expected NAME=NUMBER"):
        CliRunner().invoke(app, ["propose", str(folder), "--fixed-weight", "d0"], catch_exceptions=False)
    with pytest.raises(InputError, match=r"--objective m1=x: expected NAME=NUMBER"):
        CliRunner().invoke(app, ["propose", str(folder), "--objective", "m1=x"], catch_exceptions=False)
    (folder / "propose.json").unlink()
