"""Fit configs of Olmix: the fit does as they say, what concerns the proposal is kept, and the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from synthetic import known_law, swarm_of

from megamix.core.config_files import merge
from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.studies.swarm.fit.fitted import Fitted
from megamix.studies.swarm.fit.tables import write_metrics, write_ratios
from megamix.studies.swarm.olmix import fit_from

LAW = known_law(3, 4)
TABLE = swarm_of(LAW, 40, noise=0.01)
COUNTS = {"d0": 6_000_000_000, "d1": 3_000_000_000, "d2": 1_000_000_000}
# The sections and keys of Olmix's examples.
CONFIG = """
swarm: {ratios: RATIOS, metrics: METRICS}
priors:
  relative_sizes: {d0: 0.5, d1: 0.25, d2: 0.25}
  token_counts: {d0: 6_000_000_000, d1: 3_000_000_000, d2: 1_000_000_000}
eval:
  type: offline
  tasks:
    math: [m0, m2]
    code: [m3]
regression: {type: log_linear, seed: 0, n_test: 0, train_split: 1.0, aggregate_task_families: true}
proposer: {type: exact, temperature: null, kl_reg: 0.1, fit_only: true, make_worst_mix: false}
constraints: {enabled: true, target_tokens: 10_000_000_000, repetition_factor: 4.0}
filtering:
  keep_sources: []
  drop_metrics: [m2, absent]
  obj_weights: {math: "7/52.0"}
"""


def config_of(folder: Path, **changes: Any) -> Path:
    """A config with ``changes`` merged over it, beside the swarm that it names; None takes a section out."""
    write_ratios(folder / "ratios.csv", TABLE.runs, TABLE.domains, TABLE.ratios_RK)
    write_metrics(folder / "metrics.csv", TABLE.runs, TABLE.metrics, TABLE.values_RJ)
    data = yaml.safe_load(CONFIG)
    data["swarm"] = {"ratios": str(folder / "ratios.csv"), "metrics": str(folder / "metrics.csv")}
    data = {key: value for key, value in merge(data, changes).items() if value is not None}
    path = folder / "fit.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def fit_of(folder: Path, **changes: Any) -> Fitted:
    return fit_from(folder / "out", None, None, config_of(folder, **changes), ["bootstrap=0", "starts=2"])


def written(folder: Path, name: str) -> Any:
    return json.loads((folder / "out" / name).read_text())


def test_a_config_of_olmix(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Families are averaged before anything is dropped; prior, KL, bound and weights are kept for the proposal."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    fitted = fit_of(tmp_path)
    assert "filtering.drop_metrics: eval.tasks has no family m2, absent, so that nothing" in caplog.text
    assert fitted.metrics == ("math", "code")
    math = TABLE.values_RJ[:, [0, 2]].mean(axis=1)
    assert fitted.table.values_RJ == pytest.approx(np.stack([math, TABLE.values_RJ[:, 3]], axis=1))
    assert (tmp_path / "out" / "fit.json").is_file()
    assert written(tmp_path, "priors.json") == {
        "relative_sizes": {"d0": 0.5, "d1": 0.25, "d2": 0.25},
        "token_counts": COUNTS,
    }
    assert written(tmp_path, "propose.json") == {
        "kl": pytest.approx(0.1 / (7 / 52 + 1)),  # there beside a sum, here beside a mean
        "use_natural_kl": False,
        "worst": False,
        "seed": 0,
        "objective": {"math": 7 / 52, "code": 1.0},
        "target_tokens": 10e9,
        "repetition": 4.0,
    }


def test_single_metrics_of_inloop_evaluations(tmp_path: Path) -> None:
    """{family: {task: metric}}; without aggregation each of them is fitted. Without relative sizes, those of tokens."""
    path = config_of(
        tmp_path,
        priors={"relative_sizes": None},
        regression={"aggregate_task_families": False},
        proposer={"kl_reg": None, "make_worst_mix": True, "use_natural_kl": True},
        constraints={"enabled": False},
    )
    data = yaml.safe_load(path.read_text())
    data["eval"] = {"type": "inloop", "tasks": {"math": {"task a": "m1"}, "code": {"task b": "m3"}}}
    data["filtering"] = {"fixed_weight": {"d1": "1/4"}}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    fitted = fit_from(tmp_path / "out", None, None, path, ["bootstrap=0", "starts=2"])
    assert (fitted.metrics, fitted.families) == (("m1", "m3"), {"math": ("m1",), "code": ("m3",)})
    assert written(tmp_path, "priors.json")["relative_sizes"] == pytest.approx({"d0": 0.6, "d1": 0.3, "d2": 0.1})
    assert written(tmp_path, "propose.json") == {
        "kl": 0.0,
        "use_natural_kl": True,
        "worst": True,
        "seed": 0,
        "fixed_weight": {"d1": 0.25},
    }


def test_keys_that_choose_runs(tmp_path: Path) -> None:
    """n_test, train_split as a list of one, and support_domains, whose prior is renormalised."""
    ratios = TABLE.ratios_RK.copy()
    ratios[:25, 2] = 0
    ratios[:3, 0] = 0
    ratios /= ratios.sum(axis=1, keepdims=True)
    path = config_of(
        tmp_path, regression={"n_test": 4, "train_split": [12], "seed": 3}, filtering={"support_domains": ["d0", "d1"]}
    )
    write_ratios(tmp_path / "ratios.csv", TABLE.runs, TABLE.domains, ratios)
    fitted = fit_from(tmp_path / "out", None, None, path, ["bootstrap=0"])
    assert (fitted.domains, len(fitted.table.runs)) == (("d0", "d1"), 12)
    assert set(fitted.table.runs) <= set(TABLE.runs[:25])
    assert fitted.details["options"]["seed"] == 3
    assert fitted.details["test"] is not None
    assert written(tmp_path, "priors.json") == {
        "relative_sizes": {"d0": pytest.approx(2 / 3), "d1": pytest.approx(1 / 3)},
        "token_counts": {"d0": COUNTS["d0"], "d1": COUNTS["d1"]},
    }
    path = config_of(tmp_path, filtering={"keep_sources": ["d0", "d1"]})
    write_ratios(tmp_path / "ratios.csv", TABLE.runs, TABLE.domains, ratios)
    assert fit_from(tmp_path / "out", None, None, path, ["bootstrap=0"]).table.runs == TABLE.runs[3:25]


def test_runs_without_a_value_are_dropped(tmp_path: Path) -> None:
    """As Olmix does; but only for want of metrics that are fitted."""
    path = config_of(tmp_path)
    values = TABLE.values_RJ.copy()
    values[2, 0] = values[5, 1] = np.nan
    write_metrics(tmp_path / "metrics.csv", TABLE.runs, TABLE.metrics, values)
    assert fit_from(tmp_path / "out", None, None, path, ["bootstrap=0"]).table.dropped == (TABLE.runs[2],)


def test_files_and_options_of_the_command_line_come_first(tmp_path: Path) -> None:
    path = config_of(tmp_path, swarm={"ratios": "elsewhere.csv"})
    fitted = fit_from(tmp_path / "out", tmp_path / "ratios.csv", None, path, ["seed=7", "bootstrap=3", "starts=2"])
    assert (fitted.metrics, fitted.details["options"]["seed"], len(fitted.boot_c_BJ)) == (("math", "code"), 7, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"regression": {"type": "autoscale"}},
            "regression.type: autoscale has no counterpart here: its law extrapolates",
        ),
        ({"regression": {"type": "bimix"}}, "bimix has no counterpart"),
        ({"regression": {"type": "search"}}, "search has no counterpart"),
        ({"regression": {"train_split": [0.5, 0.5]}}, "splits several swarms"),
        ({"regression": {"early_stopping": 0.1}}, "unknown key 'regression.early_stopping'"),
        ({"proposer": {"type": "search"}}, "search, but for regression.type log_linear the proposal is exact or simul"),
        ({"proposer": {"type": "simulation"}}, "kl_reg is 0.1, but proposer.type simulation knows no KL"),
        ({"regression": {"type": "gp"}}, "proposer.type is exact, but for regression.type gp"),
        ({"proposer": {"temperature": 0.5}}, "proposer.temperature: 0.5 has no counterpart"),
        ({"constraints": {"target_tokens": None}}, "target_tokens is not given"),
        ({"priors": {"token_counts": None}}, "priors has no token_counts to bound"),
        ({"priors": {"token_counts": None, "relative_sizes": None}}, "neither relative_sizes nor token_counts"),
        ({"priors": {"relative_sizes": {"d0": -1}}}, r"relative_sizes: expected numbers of 0 and above.*d0 \(-1.0\)"),
        ({"priors": {"relative_sizes": {"d3": 0.1}}}, "priors.relative_sizes: d3 is no domain of the swarm"),
        ({"priors": {"token_counts": {"d3": 1}}}, "priors.token_counts: d3 is no domain of the swarm"),
        ({"eval": None}, "aggregate_task_families is true, but eval does not name the families"),
        ({"eval": {"type": "inloop"}}, r"tasks.math: expected \{task: metric\}"),
        ({"eval": {"tasks": {"math": ["m9"]}}}, "has no metric 'm9'"),
        ({"filtering": {"drop_metrics": ["math", "code"]}}, "per is family, but there are no families"),
        ({"filtering": {"obj_weights": {"m0": 1}}}, "filtering.obj_weights: m0 is no fitted metric"),
        ({"filtering": {"obj_weights": {"math": "7/x"}}}, "'7/x', expected a number or a fraction"),
        ({"filtering": {"obj_weights": {"math": "7/0"}}}, "'7/0', expected a number or a fraction"),
        ({"filtering": {"fixed_weight": {"d9": 0.1}}}, "filtering.fixed_weight: d9 is no domain of the swarm"),
        ({"filtering": {"keep_sources": ["d0"], "support_domains": ["d0"]}}, "both keep_sources and support_domains"),
        ({"filtering": {"drop_metric": ["m0"]}}, r"unknown key 'filtering.drop_metric'\. Did you mean 'drop_metrics'"),
        ({"swarm": {"ratio": "x"}}, "unknown key 'swarm.ratio'"),
        ({"priors": None}, "the key 'priors' is missing"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_of(tmp_path, **changes)


def test_a_prior_that_lacks_a_domain(tmp_path: Path) -> None:
    path = config_of(tmp_path)
    data = yaml.safe_load(path.read_text())
    del data["priors"]["relative_sizes"]["d1"]
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(InputError, match=r"priors\.relative_sizes has no d1, which the swarm has"):
        fit_from(tmp_path / "out", None, None, path, ["bootstrap=0", "starts=2"])
