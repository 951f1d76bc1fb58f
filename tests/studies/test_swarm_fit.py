"""``megamix swarm fit``: quality on runs that were not fitted, resampled fits, files, and what cannot be fitted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from synthetic import known_law, mixtures, swarm_of

from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.studies.swarm.fit.config import FitConfig
from megamix.studies.swarm.fit.fit import cross_validate, fit, learn, report
from megamix.studies.swarm.fit.fitted import Fitted
from megamix.studies.swarm.fit.huber import Problems, minimise
from megamix.studies.swarm.fit.law import fit_log_linear, log_floor, predict
from megamix.studies.swarm.fit.plots import effects
from megamix.studies.swarm.fit.quality import fold_of_runs, quality
from megamix.studies.swarm.fit.selection import pick, split
from megamix.studies.swarm.fit.tables import SwarmTable, write_metrics, write_ratios

TABLE = swarm_of(known_law(4, 5), 45, noise=0.02)
OTHERS = ("lightgbm", "gp")


def files(folder: Path, table: SwarmTable = TABLE) -> tuple[Path, Path]:
    write_ratios(folder / "ratios.csv", table.runs, table.domains, table.ratios_RK)
    write_metrics(folder / "metrics.csv", table.runs, table.metrics, table.values_RJ)
    return folder / "ratios.csv", folder / "metrics.csv"


def fit_of(folder: Path, table: SwarmTable = TABLE, **options: Any) -> Fitted:
    return learn(*files(folder, table), validate(FitConfig, {"starts": 2, "bootstrap": 0, **options}, "test"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(get_logger(), "propagate", True)
    return caplog


@pytest.mark.parametrize("regression", ["log_linear", "gp"])
def test_cross_validation_is_a_loop_over_folds(regression: str) -> None:
    """Each run is predicted by a fit to the runs of the other folds, done here one by one; the numbers are scipy's."""
    config = validate(FitConfig, {"regression": regression, "folds": 3}, "test")
    fold_R = fold_of_runs(len(TABLE.runs), 3, seed=0)
    held_out = cross_validate(TABLE, fold_R, config)
    for fold in range(3):
        others = pick(TABLE, np.flatnonzero(fold_R != fold))
        assert len(others.runs) == 30
        if regression == "gp":
            expected = gaussian_process(others, TABLE.ratios_RK[fold_R == fold])
            # Other starting points of the kernel's search may end at another maximum for a metric.
            assert np.median(np.abs(held_out[fold_R == fold] - expected)) < 1e-3
        else:
            expected = fit_log_linear(others).predict(TABLE.ratios_RK[fold_R == fold])
            assert held_out[fold_R == fold] == pytest.approx(expected, abs=1e-5)
    for j, found in enumerate(quality(TABLE.values_RJ, held_out, TABLE.metrics).values()):
        actual, predicted = TABLE.values_RJ[:, j], held_out[:, j]
        assert found["spearman"] == pytest.approx(spearmanr(actual, predicted)[0])
        assert found["rmse"] == pytest.approx(np.sqrt(np.mean((actual - predicted) ** 2)))
        assert found["r2"] == pytest.approx(1 - np.mean((actual - predicted) ** 2) / actual.var())


def gaussian_process(table: SwarmTable, x: np.ndarray) -> np.ndarray:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    columns = []
    for y in table.values_RJ.T:
        model = GaussianProcessRegressor(ConstantKernel() * RBF() + WhiteKernel(), normalize_y=True)
        columns.append(model.fit(table.ratios_RK, y).predict(x))
    return np.stack(columns, axis=1)


def test_a_run_does_not_take_part_in_its_own_prediction() -> None:
    fold_R = fold_of_runs(len(TABLE.runs), 5, seed=0)
    before = cross_validate(TABLE, fold_R, FitConfig())
    values = TABLE.values_RJ.copy()
    values[fold_R == 2] += 1.0
    after = cross_validate(replace(TABLE, values_RJ=values), fold_R, FitConfig())
    assert before[fold_R == 2] == pytest.approx(after[fold_R == 2], abs=1e-7)
    assert not np.allclose(before[fold_R != 2], after[fold_R != 2], atol=1e-3)


def test_a_ridge_is_chosen_where_it_predicts_better(tmp_path: Path) -> None:
    """None without noise, so that a true law is found to the last digits; one for few runs with much noise."""
    law = known_law(4, 6)
    exact = fit_of(tmp_path, swarm_of(law, 30))
    assert exact.details["ridge"] == 0
    x = mixtures(100, 4, seed=8)
    assert exact.predict(x) == pytest.approx(law.predict(x), abs=1e-6)
    noisy = swarm_of(law, 14, noise=0.3, seed=1)
    chosen, without = fit_of(tmp_path, noisy), fit_of(tmp_path, noisy, ridge=0)
    assert chosen.details["ridge"] > 0
    assert fit_of(tmp_path, noisy, ridge=0.25).details["ridge"] == 0.25
    # At mixtures that neither fit has seen, not only where it was chosen.
    errors = [float(np.abs(fitted.predict(x) - law.predict(x)).mean()) for fitted in (chosen, without)]
    assert errors[0] < 0.9 * errors[1]


def test_folds() -> None:
    """As even as can be, the same for the same seed; one for each of at most 40 runs, else 5."""
    for num_runs, folds, expected in ((40, None, 40), (41, None, 5), (23, 4, 4), (3, 7, 3)):
        fold_R = fold_of_runs(num_runs, folds, seed=1)
        sizes = np.bincount(fold_R)
        assert len(sizes) == expected
        assert sizes.max() - sizes.min() <= 1
        assert np.array_equal(fold_R, fold_of_runs(num_runs, folds, seed=1))
    assert not np.array_equal(fold_of_runs(41, None, 1), fold_of_runs(41, None, 2))


def test_quality_by_hand() -> None:
    """Equal values share the mean of their ranks, 3.5 1 3.5 2 beside 2 1 3 4; what is undefined is None."""
    values = np.array([[3.0], [1.0], [3.0], [2.0]]), np.array([[2.0], [1.0], [3.0], [4.0]])
    found = quality(*values, ["m"])["m"]
    assert found["spearman"] == pytest.approx(1.5 / np.sqrt(4.5 * 5))
    assert found["rmse"] == pytest.approx(np.sqrt(5 / 4))
    assert found["r2"] == pytest.approx(1 - 5 / 2.75)
    undefined = quality(np.array([[1.0], [2.0]]), np.array([[5.0], [5.0]]), ["m"])["m"]
    assert undefined["spearman"] is None
    overflow = quality(np.array([[1.0], [2.0]]), np.array([[1e300], [5.0]]), ["m"])["m"]
    assert overflow["rmse"] is None


def test_a_resampled_fit_is_the_fit_to_the_runs_drawn(tmp_path: Path) -> None:
    """Here the runs drawn stand in a table as often as they were drawn."""
    fitted = fit_of(tmp_path, bootstrap=3, seed=5, ridge=0.1)
    draws = np.random.default_rng([5, 4]).multinomial(45, np.full(45, 1 / 45), size=3)
    x = mixtures(20, 4, seed=8)
    found = fitted.bootstrap_predict(x)
    assert found.shape == (3, 20, 5)
    for one, times in zip(found, draws, strict=True):
        drawn = pick(TABLE, np.repeat(np.arange(45), times))
        assert one == pytest.approx(fit_log_linear(drawn, ridge=0.1).predict(x), abs=1e-4)


def test_intervals_hold_the_truth(tmp_path: Path) -> None:
    """95 % intervals of the law at new mixtures. Resampling is known to be a little narrow for few runs."""
    law = known_law(4, 8)
    x = mixtures(40, 4, seed=8)
    draws = fit_of(tmp_path, swarm_of(law, 80, noise=0.03), bootstrap=100).bootstrap_predict(x)
    assert draws.shape == (100, 40, 8)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    inside = (low <= law.predict(x)) & (law.predict(x) <= high)
    assert 0.8 < inside.mean() < 1
    assert np.median(high - low) < 0.05


@pytest.mark.parametrize("regression", ["log_linear", *OTHERS])
def test_a_fit_is_read_back_and_is_the_same_again(tmp_path: Path, regression: str) -> None:
    out = tmp_path / "out"
    config = validate(FitConfig, {"regression": regression, "families": {"one": ["m0", "m4"]}, "folds": 2}, "test")
    fitted = fit(*files(tmp_path), out, config)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    opened = Fitted.open(out)
    x = mixtures(10, 4, seed=3)
    assert opened.predict(x) == pytest.approx(fitted.predict(x), rel=1e-12)
    assert np.array_equal(opened.bootstrap_predict(x), fitted.bootstrap_predict(x))
    assert opened.bootstrap_predict(x).shape == (100 if regression == "log_linear" else 0, 10, 5)
    assert (opened.law is not None) == (regression == "log_linear")
    assert (opened.domains, opened.metrics, opened.families) == (TABLE.domains, TABLE.metrics, {"one": ("m0", "m4")})
    assert opened.table.runs == TABLE.runs
    assert opened.cross_validation == fitted.cross_validation
    assert np.array_equal(opened.held_out_RJ, fitted.held_out_RJ)
    fit(*files(tmp_path), out, config)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert report(opened, out).text() == report(fitted, out).text()


@pytest.mark.parametrize("regression", OTHERS)
def test_other_regressions_learn_the_law(tmp_path: Path, regression: str) -> None:
    law = known_law(3, 2)
    fitted = fit_of(tmp_path, swarm_of(law, 80), regression=regression, folds=2)
    x = mixtures(200, 3, seed=8)
    for j in range(2):
        assert float(spearmanr(fitted.predict(x)[:, j], law.predict(x)[:, j])[0]) > 0.9


def test_families(tmp_path: Path) -> None:
    """The law of a family is that of the mean of its metrics; beside single metrics, its mean prediction is judged."""
    families = {"even": ["m0", "m2", "m4"], "odd": ["m1"]}
    aggregated = fit_of(tmp_path, families=families, per="family")
    means = np.stack([TABLE.values_RJ[:, ::2].mean(axis=1), TABLE.values_RJ[:, 1]], axis=1)
    assert (aggregated.metrics, aggregated.families) == (("even", "odd"), {})
    assert aggregated.table.values_RJ == pytest.approx(means)
    single = fit_of(tmp_path, families=families, drop_metrics=["m4", "m3"])
    assert (single.metrics, single.families) == (("m0", "m1", "m2"), {"even": ("m0", "m2"), "odd": ("m1",)})
    held_out, actual = single.held_out_RJ[:, [0, 2]].mean(axis=1), TABLE.values_RJ[:, [0, 2]].mean(axis=1)
    assert single.family_cross_validation["even"]["spearman"] == pytest.approx(spearmanr(held_out, actual)[0])
    assert single.family_cross_validation["odd"] == single.cross_validation["m1"]


def test_runs_that_are_chosen(tmp_path: Path) -> None:
    """Test runs are in no fit, and those for the fit can be fewer."""
    fitted = fit_of(tmp_path, test_runs=10, train_split=20)
    assert len(fitted.table.runs) == 20
    assert fitted.details["test"]["m0"]["spearman"] > 0.9
    assert len(fit_of(tmp_path, train_split=0.5).table.runs) == 22
    kept, tested = split(TABLE, FitConfig(test_runs=10, train_split=35))
    assert tested is not None
    assert sorted(kept.runs + tested.runs) == sorted(TABLE.runs)
    assert len(tested.runs) == 10
    assert split(TABLE, FitConfig(test_runs=10, seed=1))[0].runs != kept.runs


def test_runs_on_some_domains_only(tmp_path: Path) -> None:
    ratios = TABLE.ratios_RK.copy()
    ratios[:30, 2:] = 0
    ratios[:4, 0] = 0
    ratios /= ratios.sum(axis=1, keepdims=True)
    table = replace(TABLE, ratios_RK=ratios)
    fitted = fit_of(tmp_path, table, support_domains=["d1", "d0"])
    assert (fitted.domains, fitted.table.runs) == (("d1", "d0"), TABLE.runs[:30])
    assert fitted.table.ratios_RK == pytest.approx(ratios[:30, [1, 0]])
    assert fit_of(tmp_path, table, support_domains=["d1", "d0"], support_nonzero=True).table.runs == TABLE.runs[4:30]
    with pytest.raises(InputError, match="none of 45 runs lies on the support_domains d2 alone"):
        fit_of(tmp_path, table, support_domains=["d2"])
    with pytest.raises(InputError, match="support_domains names 'd9'"):
        fit_of(tmp_path, table, support_domains=["d9"])


def few(num: int) -> SwarmTable:
    return pick(TABLE, np.arange(num))


def with_values(column: int, values: Any) -> SwarmTable:
    changed = TABLE.values_RJ.copy()
    changed[:, column] = values
    return replace(TABLE, values_RJ=changed)


def without_domain() -> SwarmTable:
    ratios = TABLE.ratios_RK.copy()
    ratios[:, 1] = 0
    return replace(TABLE, ratios_RK=ratios / ratios.sum(axis=1, keepdims=True))


def moving_together() -> SwarmTable:
    ratios = TABLE.ratios_RK.copy()
    ratios[:, 0] = 2 * ratios[:, 3]
    return replace(TABLE, ratios_RK=ratios / ratios.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (few(4), {}, "4 runs for 4 domains: the log-linear law has 5 parameters a metric .* better 10"),
        (few(4), {"regression": "gp"}, "4 runs for 4 domains: at least 5 are needed"),
        (with_values(1, 2.5), {}, "'m1' is 2.5 in every run: nothing can be learned"),
        (with_values(1, np.linspace(-1, 1, 45)), {}, "'m1' is -1 in run 0000, but the log-linear law is above 0"),
        (without_domain(), {}, "no run has a weight above 0 for d1"),
        (moving_together(), {}, "45 runs vary in 3 of 4 directions: they do not tell apart d3, d0,"),
        (pick(TABLE, np.arange(45)), {"test_runs": 45}, "test_runs is 45, but there are 45 runs"),
        (TABLE, {"train_split": 46}, "train_split is 46, expected a share up to 1 or a whole number up to 45"),
        (TABLE, {"train_split": 20.5}, "train_split is 20.5"),
        (TABLE, {"families": {"a": ["m9"]}}, "family 'a' has the metric 'm9'"),
        (TABLE, {"families": {"a": ["m1"]}, "drop_metrics": ["m1"]}, "family 'a' has no metric left"),
        (TABLE, {"families": {"a": ["m1"], "b": ["m1"]}}, "'m1' is in 'a' and in 'b'"),
        (TABLE, {"per": "family"}, "there are no families"),
        (TABLE, {"regression": "gp", "bootstrap": 5}, "only log_linear has resampled fits"),
        (TABLE, {"regressions": "gp"}, "unknown key 'regressions'. Did you mean 'regression'"),
    ],
)
def test_what_cannot_be_fitted(tmp_path: Path, table: SwarmTable, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_of(tmp_path, table, **options)


def test_warnings(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    """Few runs, and metrics that do not follow from the mixture, are said; the fit is made."""
    fitted = fit_of(tmp_path, few(9))
    assert "9 runs for 4 domains are few: a law of 5 parameters a metric wants 10" in said.text
    said.clear()
    noise = np.random.default_rng(1).normal(3, 0.5, 45)
    fitted = fit_of(tmp_path, with_values(2, noise))
    text = report(fitted, tmp_path / "out").text()
    assert "below 0.5 for 1 of 5 metrics: m2 (" in said.text
    assert f"{fitted.cross_validation['m2']['spearman']:.3f}" in text
    assert abs(fitted.cross_validation["m2"]["spearman"] or 0) < 0.5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("fit.json", None, "has no fit.json. Fit the swarm first"),
        ("fit.json", b"{}", "is not a fit of"),
        ("fit.json", b'{"format": "megamix swarm fit", "version": 99}', "has version 99, this megamix reads 1"),
        ("fit.json", b'{"format": "megamix swarm fit", "version": 1}', "has no 'runs'"),
        ("fit.json", b"{", "is not valid JSON.*Fit the swarm again"),
        ("fit.npz", None, "cannot read"),
        ("fit.npz", b"PK\x03\x04 cut off", "cannot read"),
    ],
)
def test_fits_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    fit_of(tmp_path, folds=2).save(tmp_path / "out")
    path = tmp_path / "out" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        Fitted.open(tmp_path / "out")


def test_a_fit_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    """Reading one runs whatever its author wrote into it."""
    fit_of(tmp_path, folds=2).save(tmp_path / "out")
    with np.load(tmp_path / "out" / "fit.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(tmp_path / "out" / "fit.npz", **{**arrays, "extra": np.array([{}], dtype=object)})
    with pytest.raises(InputError, match=r"cannot read .*fit\.npz"):
        Fitted.open(tmp_path / "out")


@pytest.mark.parametrize(("regression", "package"), [("lightgbm", "lightgbm"), ("gp", "sklearn.gaussian_process")])
def test_a_package_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regression: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        InputError, match=rf"the regression {regression} needs the package .*pip install .megamix\[swarm\]"
    ):
        fit_of(tmp_path, regression=regression)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write the fit to .*Choose another folder"):
        fit_of(tmp_path, folds=2).save(tmp_path / "out")


def test_effects_are_changes_of_the_prediction(tmp_path: Path) -> None:
    fitted = fit_of(tmp_path)
    mean = TABLE.ratios_RK.mean(axis=0)
    moved = 0.9 * mean + 0.1 * np.eye(4)[2]
    expected = (fitted.predict(moved[None]) - fitted.predict(mean[None]))[0] / TABLE.values_RJ.std(axis=0)
    assert effects(fitted)[2] == pytest.approx(expected)


def test_the_command(tmp_path: Path, megamix: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Files, options and messages as a user has them, and a result that says where it came from."""
    ratios, metrics = files(tmp_path)
    out = tmp_path / "out"
    command = ("swarm", "fit", "--ratios", ratios, "--metrics", metrics, "--out", out)
    done = megamix(*command, "families={a: [m0, m1]}", "bootstrap=4")
    assert "rank correlation" in done.stdout
    assert "family a" in done.stdout
    content = json.loads((out / "fit.json").read_text())
    assert content["coefficients"]["m3"]["A"].keys() == set(TABLE.domains)
    assert content["resamples"] == 4
    assert len(content["inputs"]["ratios"]["sha256"]) == 64
    assert {path.name for path in out.iterdir()} == {"fit.json", "fit.npz", "fit_predictions.png", "fit_effects.png"}
    assert "Did you mean 'delta'" in megamix(*command, "deltas=1", code=2).stderr
    assert "no ratios.csv is named" in megamix("swarm", "fit", "--out", out, code=2).stderr


def test_a_solution_has_no_slope() -> None:
    """Where the fit ends, the loss in float64 rises in every direction: derivatives are 0, or the floor is."""
    table = swarm_of(known_law(5, 3), 40, noise=0.1)
    fitted = fit_log_linear(table)
    step = 1e-6
    for j in range(3):
        x, y = table.ratios_RK, table.values_RJ[:, j]
        point = np.array([fitted.c_J[j], *fitted.A_JK[j]])

        def loss(at: np.ndarray, x: np.ndarray = x, y: np.ndarray = y) -> float:
            size = np.abs(y - np.exp(at[0]) - np.exp(x @ at[1:]))
            return float(np.where(size <= 0.02, size**2 / 2, 0.02 * (size - 0.01)).sum())

        slopes = [(loss(point + step * unit) - loss(point - step * unit)) / (2 * step) for unit in np.eye(6)]
        assert np.abs(slopes).max() < 1e-6


def test_a_solution_is_kept_by_the_solver() -> None:
    """Started where it ended, it does not move: what the resampled fits rely on."""
    table = swarm_of(known_law(3, 4), 30, noise=0.05)
    fitted = fit_log_linear(table)
    problems = Problems(table.ratios_RK, table.values_RJ.T, np.ones((4, 30)), 0.02)
    again = minimise(problems, np.exp(fitted.c_J), fitted.A_JK)
    assert again.converged_P.all()
    x = mixtures(20, 3, seed=2)
    assert predict(x, log_floor(again.floor_P), again.a_PK) == pytest.approx(fitted.predict(x), abs=1e-6)
