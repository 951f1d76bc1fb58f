"""Initial weights: a mixture for the whole run, one from a file or another run, and stages by tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_config import small

from megamix.analysis.doctor import doctor
from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.data.batches import Batches
from megamix.interop.blend_files.export import export_blend
from megamix.mixing.weight_policy import Stages
from megamix.training.checkpoints.fingerprints import data_fingerprints
from megamix.training.config import RunConfig
from megamix.training.mix_plan import read_stages
from megamix.training.mixture import MixFrame, StagedMixture, UnimaxConfig, UnimaxMixture, mixture_of
from megamix.training.plan import DataPlan, make_data_plan

NAMES = ("web", "code")
NATURAL = np.array([0.8, 0.2])
SIZES = np.array([800, 200])


def config_of(steps: int = 100, **keys: Any) -> RunConfig:
    """Of a run with 1000 tokens, 10 samples, a step."""
    config = {
        "run_dir": "run",
        "data": {"manifest": "data", "seq_length": 100},
        "model": {"preset": "neox-2m"},
        "train": {"steps": steps, "global_batch": 10, "micro_batch": 1, "lr": 1e-3},
    }
    return validate(RunConfig, {**config, **keys}, "test")


def stages_of(mixture: Any, steps: int = 100) -> Stages:
    """Of `config_of`; see `SIZES` for the samples there are."""
    return read_stages(config_of(steps, mixture=mixture), NAMES, SIZES, NATURAL)


def test_one_mixture_holds_for_the_whole_run() -> None:
    for mixture, weights in (("natural", [0.8, 0.2]), ("uniform", [0.5, 0.5]), ({"code": 3, "web": 1}, [0.25, 0.75])):
        found = stages_of(mixture)
        assert found.at(0).tolist() == found.at(99).tolist() == weights
        assert not any(found.changes_at(step) for step in range(100))


def test_without_a_mixture_recommended_begins_with_the_objective() -> None:
    topics = {"web": {"weight": 1, "topics": {"news": 3, "forums": 1}}}
    by_topic, as_given = {"web:news": 0.75, "web:forums": 0.25}, {"web": 3, "code": 1}
    cases = (
        ("recommended", "uniform", [0.5, 0.5]),
        ("recommended", "natural", [0.8, 0.2]),
        ("recommended", as_given, [0.75, 0.25]),
        ("recommended", {"web": 1, "code": 0}, [0.8, 0.2]),  # as its mixture it would leave code out of the whole run
        ("odm", "uniform", [0.8, 0.2]),
        ("static", as_given, [0.8, 0.2]),
    )
    for mixer, objective, weights in cases:
        found = config_of(mixer={"name": mixer}, objective=objective)
        assert read_stages(found, NAMES, SIZES, NATURAL).at(0) == pytest.approx(weights)
    recommended = {"name": "recommended"}
    assert config_of(mixer=recommended, objective="uniform", mixture="natural").mixture == "natural"
    found = config_of(mixer=recommended, objective=topics)
    assert read_stages(found, tuple(by_topic), SIZES, NATURAL).at(0).tolist() == [*by_topic.values()]


def test_a_bad_key_says_nothing_about_the_mixture_that_follows_it() -> None:
    with pytest.raises(InputError) as caught:
        config_of(mixer={"name": "recommended"}, objective="macro")
    assert "objective: got 'macro'" in str(caught.value)
    assert "mixture" not in str(caught.value)


def test_natural_shares_to_a_power() -> None:
    for power, weights in ((0, [0.5, 0.5]), (1, NATURAL), (0.5, [2 / 3, 1 / 3]), (2, [16 / 17, 1 / 17]), (1e6, [1, 0])):
        assert stages_of({"temperature": power}).at(0) == pytest.approx(weights, abs=1e-12)
    stages = [{"from_tokens": 0, "weights": "natural"}, {"from_tokens": 3000, "weights": {"temperature": 0.5}}]
    assert stages_of({"stages": stages}).at(3) == pytest.approx([2 / 3, 1 / 3])
    for power in (-0.5, math.inf, True):
        with pytest.raises(InputError, match=r"mixture.*temperature"):
            stages_of({"temperature": power})


def unimax_by_levels(sizes: list[int], budget: int, epochs: float) -> list[float]:
    """Shares that are even up to a level which is found by bisection: an independent form of the rule."""
    low, high = 0.0, float(budget)
    for _ in range(200):
        level = (low + high) / 2
        low, high = (low, level) if sum(min(level, epochs * size) for size in sizes) > budget else (level, high)
    return [min(low, epochs * size) / budget for size in sizes]


@pytest.mark.parametrize("epochs", [1.0, 1.5, 2.0, 4.0, 1e9])
@pytest.mark.parametrize("steps", [10, 60, 100])
def test_unimax_is_even_as_far_as_epochs_allow(steps: int, epochs: float) -> None:
    found = stages_of({"unimax": {"max_epochs": epochs}}, steps).at(0)
    assert found == pytest.approx(unimax_by_levels(SIZES.tolist(), 10 * steps, epochs), abs=1e-12)
    assert (found * 10 * steps <= epochs * SIZES * (1 + 1e-12)).all()


def test_unimax_over_many_domains() -> None:
    """Of every size, several equal, in no order; also the budget that takes all there is."""
    sizes = np.random.default_rng(0).integers(1, 500, 40)
    sizes[[3, 9, 30]] = 77
    for epochs in (1.0, 3.0):
        for budget in (1, 40, 3000, int(sizes.sum() * epochs)):
            frame = MixFrame(("",) * 40, sizes / sizes.sum(), sizes, 1, Batches.equal(budget), lambda path, which: {})
            found = UnimaxMixture(unimax=UnimaxConfig(max_epochs=epochs)).weights(frame, "mixture")
            assert found == pytest.approx(unimax_by_levels(sizes.tolist(), budget, epochs), abs=1e-12)
            assert found.sum() == pytest.approx(1, abs=1e-15)


def test_a_budget_that_unimax_cannot_meet() -> None:
    assert stages_of({"unimax": {"max_epochs": 1}}).at(0) == pytest.approx(NATURAL)  # exactly what there is
    message = r"mixture: unimax\.max_epochs is 1, which allows 1,000 samples of 1,000 in the data, but the run reads 1,010\. Use at least 1\.01"
    with pytest.raises(InputError, match=message):
        stages_of({"unimax": {"max_epochs": 1}}, steps=101)
    with pytest.raises(InputError, match=r"mixture.*max_epochs"):
        stages_of({"unimax": {"max_epochs": 0}})
    with pytest.raises(InputError, match=r"unknown key 'mixture\.unimax\.epochs'"):
        stages_of({"unimax": {"epochs": 4}})
    with pytest.raises(InputError, match=r"Use at least 123\.5,"):
        stages_of({"unimax": {"max_epochs": 1}}, steps=12344)  # 123.44, of which less would be refused again


def test_published_mixtures_in_a_plan(data_dir: Path) -> None:
    """They follow from the data and the length of the run; a resume compares what they depend on."""

    def plan(mixture: str, *overrides: str) -> DataPlan:
        return make_data_plan(small(f"data.manifest={data_dir}", f"mixture={mixture}", *overrides), 1)

    sqrt, more = plan("{temperature: 0.5}"), plan("{temperature: 0.6}")
    root = np.sqrt(sqrt.natural_weights)
    assert sqrt.policy.initial_weights == pytest.approx(root / root.sum(), abs=1e-15)
    assert data_fingerprints(sqrt)["mixture"] != data_fingerprints(more)["mixture"]
    nearly_all = int(3.9 * sqrt.num_samples.sum()) // sqrt.config.train.global_batch
    short, long = (plan("{unimax: {max_epochs: 4}}", f"train.steps={steps}") for steps in (1, nearly_all))
    for found in (short, long):
        wanted = unimax_by_levels(found.num_samples.tolist(), found.total_samples, 4)
        assert found.policy.initial_weights == pytest.approx(wanted, abs=1e-12)
    assert short.policy.initial_weights == pytest.approx([0.25] * 4)
    assert long.policy.initial_weights == pytest.approx(long.natural_weights, rel=0.05)
    assert long.epochs.max() > 3.99
    assert data_fingerprints(short)["mixture"] != data_fingerprints(long)["mixture"]
    assert not any("more than 4 epochs" in warning for warning in long.warnings())
    assert "uniform with at most 4 epochs of a domain (UniMax)" in doctor(long.config).text()


def test_domains_with_the_names_of_kinds() -> None:
    """A mapping of several names to numbers is of domains."""
    with pytest.raises(InputError, match=r"no domain 'temperature'"):
        stages_of({"temperature": 0.5, "web": 0.5})


def test_stages_change_at_the_first_step_from_their_tokens_on() -> None:
    found = stages_of(
        {
            "stages": [
                {"from_tokens": 0, "weights": "uniform"},
                {"from_tokens": 2000, "weights": {"web": 1, "code": 0}},
                {"from_tokens": 5.5e3, "weights": "natural"},
            ]
        }
    )
    assert found.steps == (0, 2, 6)  # 5500 tokens are not a whole number of steps: the next one
    assert [found.at(step).tolist() for step in (1, 2, 5, 6, 99)] == [
        [0.5, 0.5],
        [1, 0],
        [1, 0],
        [0.8, 0.2],
        [0.8, 0.2],
    ]
    assert [step for step in range(100) if found.changes_at(step)] == [2, 6]


RAMPS = [
    {"from_tokens": 0, "weights": {"web": 1, "code": 0}},
    {"from_tokens": 10_000, "weights": {"web": 0.25, "code": 0.75}, "ramp": "linear"},
    {"from_tokens": 20_000, "weights": {"web": 0.25, "code": 0.75}},
    {"from_tokens": 36_000, "weights": "uniform", "ramp": "cosine"},
    {"from_tokens": 50_000, "weights": "natural"},
]


def web_on_the_ramps(step: int) -> float:
    """The weight of web at a step of 1000 tokens, from the formula."""
    if step < 10:
        return 1 - 0.75 * step / 10
    if step < 20:
        return 0.25
    if step < 36:
        return 0.25 + 0.25 * math.sin(math.pi * (step - 20) / 16 / 2) ** 2
    return 0.5 if step < 50 else 0.8


def test_ramps_are_a_function_of_the_step() -> None:
    found = stages_of({"stages": RAMPS})
    wanted = np.array([web_on_the_ramps(step) for step in range(100)])
    np.testing.assert_allclose([found.at(step) for step in range(100)], np.stack([wanted, 1 - wanted], 1), atol=1e-15)
    assert [found.at(step)[0] for step in (0, 10, 19, 20, 36, 49, 50)] == [1, 0.25, 0.25, 0.25, 0.5, 0.5, 0.8]
    changes = [*range(1, 11), *range(20, 37), 50]
    assert [step for step in range(100) if found.changes_at(step)] == changes
    assert [*found.changes(99)] == changes
    assert [*found.changes(23)] == [*range(1, 11), 20, 21, 22, 23]


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_stretches_of_ramps_have_the_sum_of_their_steps(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """So the epochs that doctor shows are those of the run, however few stretches are looked at."""
    monkeypatch.setattr("megamix.mixing.weight_policy._MOST_STRETCHES", most)
    stretches = [*stages_of({"stages": RAMPS}).stretches(100)]
    assert [first for first, _, _ in stretches] == [0, *(end for _, end, _ in stretches[:-1])]
    assert stretches[-1][1] == 100
    for first, end, weights in stretches:
        assert weights[0] == pytest.approx(np.mean([web_on_the_ramps(step) for step in range(first, end)]), rel=1e-13)


def test_a_ramp_is_part_of_what_a_resume_compares_and_needs_a_stage_before_it() -> None:
    at_once = [{key: value for key, value in stage.items() if key != "ramp"} for stage in RAMPS]
    prints = [
        mixture_of(StagedMixture.model_validate({"stages": stages})).fingerprint(NAMES, stages_of({"stages": stages}))
        for stages in (RAMPS, at_once)
    ]
    assert prints[0] != prints[1]
    assert prints[1] == {key: value for key, value in dict(prints[0]).items() if key != "ramps"}  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"the first stage has ramp linear, and nothing before it"):
        stages_of({"stages": [{"from_tokens": 0, "weights": "natural", "ramp": "linear"}]})


def test_a_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"code": 0.6, "web": 0.2}))
    assert stages_of({"file": str(path)}).at(0) == pytest.approx([0.25, 0.75])
    stages = [{"from_tokens": 0, "weights": "natural"}, {"from_tokens": 3000, "weights": {"file": str(path)}}]
    assert stages_of({"stages": stages}).at(3) == pytest.approx([0.25, 0.75])


def write_run(run_dir: Path, mixer: str, lines: list[dict[str, Any]], position: int = 100) -> str:
    """The record of a run of 10 samples a step up to ``position``.

    Args:
        lines: of weights.jsonl; the blend's counts and deficits play no part.
    """
    run_dir.mkdir()
    config = {
        "run_dir": str(run_dir),
        "data": {"manifest": "gone", "seq_length": 100},
        "model": {"preset": "neox-2m"},
        "mixer": {"name": mixer},
        "train": {"steps": 20, "global_batch": 10, "micro_batch": 1, "lr": 1e-3},
    }
    (run_dir / "config.resolved.yaml").write_text(json.dumps(config))
    recorded = [{"domain_names": NAMES, "step": line["position"], **line} for line in lines]
    for line in recorded:
        zeros = [0] * len(line["domain_names"])
        line["segment"] = {"start": 0, "counts": zeros, "deficits": list(map(float, zeros))}
    (run_dir / "weights.jsonl").write_text("".join(json.dumps(line) + "\n" for line in recorded))
    evaluation = {"event": "evaluate", "step": position // 10, "tokens": 0, "domain_loss": {}, "macro_loss": None}
    (run_dir / "metrics.jsonl").write_text(json.dumps(evaluation) + "\n")
    return str(run_dir)


CHANGES = [
    {"position": 0, "domain_weights": [0.5, 0.5]},
    {"position": 20, "domain_weights": [0.25, 0.75]},
    {"position": 70, "domain_weights": [0.9, 0.1]},
    {"position": 110, "domain_weights": [0.6, 0.4]},  # announced, and never sampled with
]
ALPHA = [
    {"position": 0, "domain_weights": [0.5, 0.5], "average_weights": [0.5, 0.5], "loss_weights": [0.5, 0.5]},
    {"position": 10, "domain_weights": [0.5, 0.5], "average_weights": [0.3, 0.7], "loss_weights": [0.2, 0.8]},
]


@pytest.mark.parametrize(
    ("mixer", "lines", "mean", "final"),
    [
        ("odm", CHANGES, (20 * 0.5 + 50 * 0.25 + 30 * 0.9) / 100, 0.6),
        ("doremi", ALPHA, 0.3, 0.2),
        ("doremi", [{key: line[key] for key in list(line)[:3]} for line in ALPHA], 0.3, 0.5),  # apply: sampling
        ("nobodys_module:Mixer", CHANGES, 0.495, 0.6),
    ],
)
def test_the_weights_of_a_run(tmp_path: Path, mixer: str, lines: list[Any], mean: float, final: float) -> None:
    """Its mean over positions, its last ones, and of a DoReMi run its alpha; `megamix blend export` says the same."""
    run = write_run(tmp_path / "run", mixer, lines)
    for mixture, wanted in (
        ({"from_run": run}, mean),
        ({"from_run": run, "which": "mean"}, mean),
        ({"from_run": run, "which": "final"}, final),
    ):
        found = stages_of(mixture).at(5)
        assert found == pytest.approx([wanted, 1 - wanted], abs=1e-12)
        exported = json.loads(export_blend(Path(run), "json", mixture.get("which")).text)
        assert [exported[name] for name in NAMES] == pytest.approx(found.tolist(), abs=1e-15)
    stages = [{"from_tokens": 0, "weights": "natural"}, {"from_tokens": 3000, "weights": {"from_run": run}}]
    assert stages_of({"stages": stages}).at(3) == pytest.approx([mean, 1 - mean])


def test_runs_without_such_weights(tmp_path: Path) -> None:
    other = [{**line, "domain_names": ["web", "cod"]} for line in CHANGES]
    for name, lines, position, message in (
        (
            "other",
            other,
            100,
            r"mixture, mean weights of the run .*other: there is no domain 'cod'\. Did you mean 'code'",
        ),
        ("fewer", [{"position": 0, "domain_weights": [1.0], "domain_names": ["web"]}], 100, r"no weight for code"),
        ("young", CHANGES, 0, r"young has not trained yet: no weights to average"),
        ("empty", [], 0, r"empty has recorded nothing yet"),
    ):
        run = write_run(tmp_path / name, "odm", lines, position)
        with pytest.raises(InputError, match=message):
            stages_of({"from_run": run})
    with pytest.raises(InputError, match=r"nowhere is not a run: there is no such directory"):
        stages_of({"from_run": str(tmp_path / "nowhere")})
    half = write_run(tmp_path / "half", "odm", CHANGES)
    with pytest.raises(
        InputError, match=r"the run .*half has trained \d+ of its \d+ steps, so its mean weights are not yet"
    ):
        stages_of({"from_run": half, "finished": True})
    with pytest.raises(InputError, match=r"mixture\.which: Input should be 'mean' or 'final', got 'last'"):
        stages_of({"from_run": "run", "which": "last"})


def test_a_resume_compares_the_weights_not_the_path(tmp_path: Path, data_dir: Path) -> None:
    """The run may move; when its weights have changed, so has the mixture. `doctor` says where they are from."""
    names = ["code", "packages", "tables", "topics"]
    lines = [{"position": 0, "domain_names": names, "domain_weights": [0.4, 0.3, 0.2, 0.1]}]
    override = "mixture={{from_run: {}, which: final}}".format
    runs = [write_run(tmp_path / name, "static", lines) for name in ("first", "moved")]
    lines[0] = {**lines[0], "domain_weights": [0.1, 0.2, 0.3, 0.4]}
    runs.append(write_run(tmp_path / "changed", "static", lines))
    configs = [small(f"data.manifest={data_dir}", override(run)) for run in runs]
    prints = [data_fingerprints(make_data_plan(config, 1))["mixture"] for config in configs]
    assert prints[0] == prints[1] != prints[2]
    report = doctor(configs[0]).text()
    assert f"final weights of the run {runs[0]}" in report
    assert "0.4000" in report


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"the first stage is missing, expected from_tokens: 0"),
        (
            [{"from_tokens": 1000, "weights": "uniform"}],
            r"the first stage starts at 1000 tokens, expected from_tokens: 0",
        ),
        (
            [{"from_tokens": 0, "weights": "uniform"}, {"from_tokens": 0, "weights": "natural"}],
            r"stage 2 starts at 0 tokens and the one before it at 0",
        ),
        (
            [{"from_tokens": number, "weights": "uniform"} for number in (0, 1001, 1999)],
            r"stage 3 starts at 1999 tokens and the one before it at 1001, which is not a step of 1000 tokens earlier",
        ),
        (
            [{"from_tokens": 0, "weights": "uniform"}, {"from_tokens": 1e5, "weights": "natural"}],
            r"stage 2 starts at 100000 tokens, but the last of 100 steps begins at 99000",
        ),
        ([{"from_tokens": 0, "weights": {"web": 1}}], r"mixture\.stages, stage 1: no weight for code"),
        ([{"from_tokens": 0, "weights": {"web": 1, "cod": 1}}], r"no domain 'cod'\. Did you mean 'code'"),
        ([{"from_tokens": 0, "weights": "uni"}], r"mixture\.stages\.0\.weights"),
        ([{"from_tokens": -1, "weights": "uniform"}], r"mixture\.stages\.0\.from_tokens"),
        ([{"until": 0, "weights": "uniform"}], r"unknown key 'mixture\.stages\.0\.until'"),
    ],
)
def test_bad_stages_are_named(stages: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        stages_of({"stages": stages})
