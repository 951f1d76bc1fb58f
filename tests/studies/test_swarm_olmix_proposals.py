"""Proposals from fit configs of Olmix, against the formulas of its code in plain Python: what is averaged before the
fit, how strong the KL is, and what bounds the mixture."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from synthetic import known_law, swarm_of

from megamix.core.errors import InputError
from megamix.studies.swarm.fit.config import FitConfig
from megamix.studies.swarm.fit.fitted import Fitted
from megamix.studies.swarm.fit.selection import read_selected
from megamix.studies.swarm.fit.tables import SwarmTable, write_metrics, write_ratios
from megamix.studies.swarm.mmlu import QUESTIONS
from megamix.studies.swarm.olmix import fit_from
from megamix.studies.swarm.propose.propose import propose_in, read_options

LAW = known_law(3, 4)
TABLE = swarm_of(LAW, 30, noise=0.01)
PRIOR = {"d0": 0.5, "d1": 0.3, "d2": 0.2}
COUNTS = {"d0": 6_000_000_000, "d1": 3_000_000_000, "d2": 1_000_000_000}
SUBJECTS = [f"mmlu_{subject}:rc::olmes" for category in QUESTIONS.values() for subject in category]
CATEGORIES = ("mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities")


def olmix_fit(folder: Path, table: SwarmTable = TABLE, **sections: Any) -> Fitted:
    ratios, metrics = folder / "ratios.csv", folder / "metrics.csv"
    write_ratios(ratios, table.runs, table.domains, table.ratios_RK)
    write_metrics(metrics, table.runs, table.metrics, table.values_RJ)
    config = {
        "swarm": {"ratios": str(ratios), "metrics": str(metrics)},
        "priors": {"relative_sizes": PRIOR, "token_counts": COUNTS},
        **sections,
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    options = ["bootstrap=0", "starts=1", "ridge=0", "folds=2"]
    return fit_from(folder / "out", None, None, folder / "fit.yaml", options)


def proposal(folder: Path) -> dict[str, float]:
    out = folder / "out"
    return propose_in(out, read_options(out, {"resamples": 0}))[0].weights


def olmix_value(fitted: Fitted, x: Any, weights: list[float], kl_reg: float) -> float:
    """What Olmix minimises: sum_j w_j exp(A_j . x) + kl_reg KL(x || prior), the weights as given."""
    assert fitted.law is not None
    q = list(PRIOR.values())
    losses = [math.exp(math.fsum(a * one for a, one in zip(row, x, strict=True))) for row in fitted.law.A_JK.tolist()]
    kl = math.fsum(one * math.log(one / p) for one, p in zip(x, q, strict=True) if one > 0)
    return math.fsum(w * loss for w, loss in zip(weights, losses, strict=True)) + kl_reg * kl


def best_of_grids(
    fitted: Fitted, weights: list[float], kl_reg: float, caps: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> list[float]:
    """The minimum over mixtures of three domains within caps, on finer and finer grids: the problem is convex."""
    best, width = [min(caps[0], 0.5), min(caps[1], 0.3), 0.0], 1.0
    best[2] = 1 - sum(best)
    while width > 1e-7:
        shifts = [width * number / 10 for number in range(-10, 11)]
        near = [[best[0] + a, best[1] + b, best[2] - a - b] for a in shifts for b in shifts]
        inside = [x for x in near if all(-1e-15 <= one <= cap for one, cap in zip(x, caps, strict=True))]
        best = min(inside, key=lambda x: olmix_value(fitted, x, weights, kl_reg), default=best)
        width *= 0.6
    return best


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_weights_of_the_objective_are_not_normalised_against_the_kl(tmp_path: Path, scale: float) -> None:
    """The same ``kl_reg`` holds less where the weights are larger."""
    given = {"m0": 3.0 * scale, "m1": 0.5 * scale, "m2": scale, "m3": scale}
    fitted = olmix_fit(tmp_path, proposer={"kl_reg": 0.5}, filtering={"obj_weights": given})
    expected = best_of_grids(fitted, [given[name] for name in fitted.metrics], 0.5)
    assert list(proposal(tmp_path).values()) == pytest.approx(expected, abs=1e-5)


def test_a_metric_without_a_weight_counts_1_and_no_weights_are_their_mean(tmp_path: Path) -> None:
    fitted = olmix_fit(tmp_path, proposer={"kl_reg": 0.5}, filtering={"obj_weights": {"m1": 5.0}})
    assert list(proposal(tmp_path).values()) == pytest.approx(best_of_grids(fitted, [1, 5, 1, 1], 0.5), abs=1e-5)
    fitted = olmix_fit(tmp_path, proposer={"kl_reg": 0.5})
    assert list(proposal(tmp_path).values()) == pytest.approx(best_of_grids(fitted, [0.25] * 4, 0.5), abs=1e-5)


def test_a_domain_is_read_4_times_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    """d2 is wanted most; 1e9 of 20e9 tokens, read 4 times, is a fifth."""
    wanted = {"d0": 0.01, "d1": 0.01, "d2": 0.98}
    priors = {"relative_sizes": wanted, "token_counts": COUNTS}
    constraints = {"enabled": True, "target_tokens": 20_000_000_000}
    olmix_fit(tmp_path, priors=priors, proposer={"kl_reg": 100.0}, constraints=constraints)
    assert proposal(tmp_path)["d2"] == pytest.approx(0.2, abs=1e-9)
    constraints["repetition_factor"] = 5.0
    olmix_fit(tmp_path, priors=priors, proposer={"kl_reg": 100.0}, constraints=constraints)
    assert proposal(tmp_path)["d2"] == pytest.approx(0.25, abs=1e-9)


def test_a_simulation_looks_for_the_minimum_without_a_kl(tmp_path: Path) -> None:
    """Of the weighted mean of predictions, within the bounds."""
    fitted = olmix_fit(
        tmp_path,
        proposer={"type": "simulation"},
        constraints={"enabled": True, "target_tokens": 8_000_000_000, "repetition_factor": 1.0},
        filtering={"obj_weights": {"m0": 3.0}},
    )
    found = list(proposal(tmp_path).values())
    caps = (0.75, 0.375, 0.125)  # the prior, (0.5, 0.3, 0.2), is not within them
    expected = best_of_grids(fitted, [3, 1, 1, 1], 0.0, caps)
    assert found == pytest.approx(expected, abs=1e-4)


def with_subjects(subjects: list[str] = SUBJECTS) -> SwarmTable:
    """The swarm, with a metric for each subject: a mixture of the others plus noise of its own."""
    random = np.random.default_rng(5)
    mixed = TABLE.values_RJ @ random.dirichlet(np.ones(4), len(subjects)).T
    values = np.concatenate([TABLE.values_RJ, mixed + 0.02 * random.random(mixed.shape)], axis=1)
    return replace(TABLE, metrics=(*TABLE.metrics, *subjects), values_RJ=values)


def category_mean(table: SwarmTable, category: str) -> list[float]:
    """Over the subjects, by their questions."""
    numbers = QUESTIONS[category.removeprefix("mmlu_")]
    places = [table.metrics.index(f"mmlu_{subject}:rc::olmes") for subject in numbers]
    rows = table.values_RJ[:, places].tolist()
    return [
        math.fsum(n * x for n, x in zip(numbers.values(), row, strict=True)) / sum(numbers.values()) for row in rows
    ]


def test_questions_are_those_of_the_test_set() -> None:
    """14,042 questions in 57 subjects; numbers that the paper and its data give."""
    assert [len(subjects) for subjects in QUESTIONS.values()] == [18, 14, 12, 13]
    assert [sum(subjects.values()) for subjects in QUESTIONS.values()] == [3018, 3242, 3077, 4705]
    assert QUESTIONS["humanities"]["professional_law"] == 1534
    assert QUESTIONS["stem"]["abstract_algebra"] == 100


def test_subjects_become_the_means_of_four_categories(tmp_path: Path) -> None:
    """Before the fit, whether ``eval`` names them, others, or nothing."""
    table = with_subjects()
    fitted = olmix_fit(tmp_path, table)
    assert fitted.metrics == (*TABLE.metrics, *CATEGORIES)
    for category in CATEGORIES:
        seen = fitted.table.values_RJ[:, fitted.metrics.index(category)]
        assert seen.tolist() == pytest.approx(category_mean(table, category), rel=1e-13)
    assert fitted.table.values_RJ[:, :4].tolist() == table.values_RJ[:, :4].tolist()
    tasks = {"mmlu": SUBJECTS, "other": ["m1", "m2"]}
    named = olmix_fit(
        tmp_path, table, eval={"tasks": tasks}, filtering={"drop_metrics": ["m2", "mmlu_stem", SUBJECTS[0]]}
    )
    assert (named.metrics, named.families) == (("m1", *CATEGORIES[1:]), {"other": ("m1",)})
    first = fitted.table.values_RJ[:, [1, 5, 6, 7]]
    assert named.table.values_RJ.tolist() == first.tolist()


def test_families_of_categories(tmp_path: Path) -> None:
    table = with_subjects()
    tasks = {"knowledge": ["mmlu_stem", "m1"], "math": ["m0", "m2"], "code": ["m3"]}
    by_family = {"aggregate_task_families": True}
    sections = {"eval": {"tasks": tasks}, "regression": by_family, "filtering": {"drop_metrics": ["code", "m0"]}}
    fitted = olmix_fit(tmp_path, table, **sections)
    assert fitted.metrics == ("knowledge", "math")
    stem = category_mean(table, "mmlu_stem")
    rows = zip(stem, table.values_RJ.tolist(), strict=True)
    expected = [[(mean + row[1]) / 2, (row[0] + row[2]) / 2] for mean, row in rows]
    np.testing.assert_allclose(fitted.table.values_RJ, expected, rtol=1e-13)
    sections["eval"] = {"tasks": {"mmlu": SUBJECTS, "math": ["m0"]}}
    with pytest.raises(InputError, match=r"eval\.tasks\.mmlu has MMLU's subjects alone, which become mmlu_stem, mm"):
        olmix_fit(tmp_path, table, **sections)


def test_a_run_without_a_value_for_a_dropped_metric_is_dropped(tmp_path: Path) -> None:
    """Of all metrics, or of those that ``eval`` names; families are dropped whole."""
    values = TABLE.values_RJ.copy()
    values[3, 1] = values[4, 2] = values[5, 0] = np.nan
    table = replace(TABLE, values_RJ=values)
    dropped = {"drop_metrics": ["m1"]}
    fitted = olmix_fit(tmp_path, table, filtering=dropped)
    assert (fitted.metrics, fitted.table.dropped) == (("m0", "m2", "m3"), TABLE.runs[3:6])
    fitted = olmix_fit(tmp_path, table, filtering=dropped, eval={"tasks": {"some": ["m0", "m3"]}})
    assert (fitted.metrics, fitted.table.dropped) == (("m0", "m3"), TABLE.runs[5:6])
    families = {"a": ["m0"], "b": ["m1"], "c": ["m3"]}
    sections = {"regression": {"aggregate_task_families": True}, "filtering": {"drop_metrics": ["b"]}}
    fitted = olmix_fit(tmp_path, table, eval={"tasks": families}, **sections)
    assert (fitted.metrics, fitted.table.dropped) == (("a", "c"), (TABLE.runs[3], TABLE.runs[5]))


def test_subjects_that_are_not_all_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 56 of MMLU's 57 subjects.*mmlu_world_religions:rc::olmes are missing"):
        olmix_fit(tmp_path, with_subjects(SUBJECTS[:-1]))
    folded = with_subjects(["mmlu_stem", "mmlu_other"])
    assert olmix_fit(tmp_path, folded).metrics == folded.metrics


def test_means_of_a_config_of_our_own(tmp_path: Path) -> None:
    """A mean that is not asked for is not read, nor are its metrics; one that is lies behind the others."""
    ratios, metrics = tmp_path / "ratios.csv", tmp_path / "metrics.csv"
    write_ratios(ratios, TABLE.runs, TABLE.domains, TABLE.ratios_RK)
    write_metrics(metrics, TABLE.runs, TABLE.metrics, TABLE.values_RJ)

    def read(**keys: Any) -> SwarmTable:
        config = FitConfig.model_validate({"means": {"both": {"m0": 1, "m2": 3}}, **keys})
        return read_selected(ratios, metrics, config)[0]

    values = TABLE.values_RJ
    assert read().metrics == ("m1", "m3", "both")
    np.testing.assert_allclose(read().values_RJ[:, 2], (values[:, 0] + 3 * values[:, 2]) / 4, rtol=1e-14)
    assert read(metrics=["both"]).metrics == ("both",)
    assert read(metrics=["m3"]).metrics == ("m3",)
    assert read(drop_metrics=["both"]).metrics == ("m1", "m3")
    with pytest.raises(InputError, match=r"m2: no metric to choose or drop, as it is part of a mean \(both\)"):
        read(drop_metrics=["m2"])
    with pytest.raises(ValueError, match="metric 'm0' is in 'both' and in 'again'"):
        FitConfig.model_validate({"means": {"both": {"m0": 1}, "again": {"m0": 1}}})
    with pytest.raises(ValueError, match=r"means\.none: expected metrics with weights above 0"):
        FitConfig.model_validate({"means": {"none": {"m0": 0}}})
