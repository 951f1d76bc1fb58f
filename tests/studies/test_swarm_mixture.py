"""A proposed mixture as the weights of a run, in stages, and as bounds; and what a resume makes of a changed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import lines
from small_config import small

from megamix.analysis.doctor import doctor
from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.mixing.constraints import Constraints
from megamix.studies.swarm.propose.proposal import Proposal, read_proposal, write_proposal
from megamix.training.checkpoints.fingerprints import data_fingerprints
from megamix.training.config import DataConfig, RunConfig
from megamix.training.mix_plan import read_constraints, read_stages
from megamix.training.plan import make_data_plan

NAMES = ("web", "code", "mail")
WEIGHTS = {"code": 0.5, "web": 0.3, "mail": 0.2}
DOMAINS = ("code", "packages", "tables", "topics")


@pytest.fixture
def swarm(tmp_path: Path) -> Path:
    folder = tmp_path / "swarm"
    folder.mkdir()
    write_proposal(folder, Proposal(WEIGHTS, {"loss": 2.0}))
    return folder


def stages_of(mixture: Any) -> Any:
    config = {
        "run_dir": "run",
        "data": {"manifest": "data", "seq_length": 100},
        "model": {"preset": "neox-2m"},
        "mixture": mixture,
        "train": {"steps": 100, "global_batch": 10, "micro_batch": 1, "lr": 1e-3},
    }
    return read_stages(validate(RunConfig, config, "test"), NAMES, np.array([600, 300, 100]), np.array([0.6, 0.3, 0.1]))


def bounds(**data: Any) -> Constraints:
    config = validate(DataConfig, {"manifest": "data", "seq_length": 16, **data}, "test")
    return read_constraints(config, NAMES, np.array([100, 100, 100]), 200)


def test_the_weights_of_a_run_and_of_a_stage(swarm: Path) -> None:
    mixture = {"from_swarm": str(swarm)}
    assert stages_of(mixture).at(50) == pytest.approx([0.3, 0.5, 0.2])
    stages = [{"from_tokens": 0, "weights": "natural"}, {"from_tokens": 3000, "weights": mixture}]
    found = stages_of({"stages": stages})
    assert found.at(2) == pytest.approx([0.6, 0.3, 0.1])
    assert found.at(3) == pytest.approx([0.3, 0.5, 0.2])
    assert stages_of({"file": str(swarm / "mixture.json")}).at(0) == pytest.approx([0.3, 0.5, 0.2])


def test_what_is_missing_is_named(swarm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere has no proposed mixture: there is no such directory"):
        stages_of({"from_swarm": str(tmp_path / "nowhere")})
    (tmp_path / "young").mkdir()
    with pytest.raises(InputError, match=r"it has no mixture\.json\. Make one: megamix swarm propose .*young"):
        stages_of({"from_swarm": str(tmp_path / "young")})
    write_proposal(swarm, Proposal({"web": 0.5, "cod": 0.5}, {}))
    with pytest.raises(InputError, match=r"mixture, proposed by the swarm .*no domain 'cod'\. Did you mean 'code'"):
        stages_of({"from_swarm": str(swarm)})
    write_proposal(swarm, Proposal({"web": 0.5, "code": 0.5}, {}))
    with pytest.raises(InputError, match=r"no weight for mail"):
        stages_of({"from_swarm": str(swarm)})
    (swarm / "mixture.json").write_text('{"weights": [1]}')
    with pytest.raises(InputError, match=r"weights is \[1\], expected an object"):
        stages_of({"from_swarm": str(swarm)})
    (swarm / "mixture.json").write_text('{"weights": {"web": -1, "code": 2, "mail": 0}}')
    with pytest.raises(InputError, match=r"the weight of domain 'web' is -1"):
        stages_of({"from_swarm": str(swarm)})
    (swarm / "mixture.json").write_text(json.dumps({"weights": WEIGHTS}))
    with pytest.raises(InputError, match=r"has format None, version None, expected 'megamix swarm mixture'"):
        read_proposal(swarm)
    with pytest.raises(InputError, match=r"unknown key 'mixture\.factor'"):
        stages_of({"from_swarm": str(swarm), "factor": 2})


def test_bounds_around_the_mixture(swarm: Path) -> None:
    found = bounds(
        max_weight={"from_swarm": str(swarm), "factor": 2.5}, min_weight={"from_swarm": str(swarm), "factor": 0.5}
    )
    assert found.cap == pytest.approx([0.75, 1.0, 0.5])
    assert found.floor == pytest.approx([0.15, 0.25, 0.1])
    for weights in np.random.default_rng(0).dirichlet(np.ones(3), size=50):
        kept = found.apply(weights, [0, 0, 0], 0)
        assert kept.sum() == pytest.approx(1)
        assert (kept <= found.cap + 1e-12).all()
        assert (kept >= found.floor - 1e-12).all()
    assert bounds(max_weight={"from_swarm": str(swarm), "factor": 2}, min_weight=0.05).floor.tolist() == [0.05] * 3
    with pytest.raises(InputError, match=r"data\.max_weight sums to 0\.9 over 3 domains, less than 1"):
        bounds(max_weight={"from_swarm": str(swarm), "factor": 0.9})
    with pytest.raises(InputError, match=r"data\.min_weight sums to 1\.2"):
        bounds(min_weight={"from_swarm": str(swarm), "factor": 1.2})
    with pytest.raises(InputError, match=r"data\.min_weight 0\.6 is above data\.max_weight 0\.5"):
        bounds(min_weight={"code": 0.6}, max_weight={"from_swarm": str(swarm), "factor": 1})
    with pytest.raises(InputError, match=r"max_weight.*factor.*missing"):
        bounds(max_weight={"from_swarm": str(swarm)})
    with pytest.raises(InputError, match=r"greater than or equal to 0"):
        bounds(max_weight={"from_swarm": str(swarm), "factor": -1})
    write_proposal(swarm, Proposal({"web": 1.0}, {}))
    with pytest.raises(InputError, match=r"data\.max_weight, proposed by the swarm .*no weight for code"):
        bounds(max_weight={"from_swarm": str(swarm), "factor": 2})


@pytest.mark.parametrize(
    ("before", "override", "after"),
    [
        ({"web": 1.0}, "mixture={from_swarm: D}", {"from_swarm": "D"}),
        ({"from_swarm": "D"}, "mixture={web: 1.0}", {"web": 1.0}),
        ({"from_swarm": "D"}, "mixture={from_run: R}", {"from_run": "R", "which": "mean", "finished": False}),
        ({"from_run": "R", "which": "final"}, "mixture={from_swarm: D}", {"from_swarm": "D"}),
        ({"from_run": "R"}, "mixture.which=final", {"from_run": "R", "which": "final", "finished": False}),
    ],
)
def test_one_kind_of_mixture_replaces_another(before: Any, override: str, after: Any) -> None:
    first = f"mixture={json.dumps(before)}"
    assert small(first, override).model_dump(mode="json")["mixture"] == after


def test_overrides_of_bounds() -> None:
    given = "data.max_weight={from_swarm: D, factor: 2}"
    assert (
        small(given, "data.max_weight.factor=3").data.max_weight
        == small("data.max_weight={from_swarm: D, factor: 3}").data.max_weight
    )
    assert small(given, "data.max_weight={web: 0.5}").data.max_weight == {"web": 0.5}
    assert small("data.max_weight={web: 0.5}", given).data.max_weight == small(given).data.max_weight
    assert small(given, "data.max_weight=0.5").data.max_weight == 0.5


def test_a_resume_compares_the_numbers_not_the_path(tmp_path: Path, data_dir: Path) -> None:
    prints = []
    for name, weights in (
        ("a", [0.4, 0.3, 0.2, 0.1]),
        ("moved", [0.4, 0.3, 0.2, 0.1]),
        ("changed", [0.1, 0.2, 0.3, 0.4]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_proposal(folder, Proposal(dict(zip(DOMAINS, weights, strict=True)), {}))
        config = small(
            f"data.manifest={data_dir}", f"mixture={{from_swarm: {folder}}}",
            f"data.max_weight={{from_swarm: {folder}, factor: 2}}",
        )  # fmt: skip
        prints.append(data_fingerprints(make_data_plan(config, 1)))
        if name == "a":
            text = doctor(config).text()
            assert f"proposed by the swarm {folder}" in text
            assert f"at most 2 times what the swarm {folder} proposes" in text
    assert prints[0] == prints[1]
    differing = {part for part in prints[0] if prints[0][part] != prints[2][part]}
    assert differing == {"mixture", "constraints"}
    json.dumps(prints[0])


def test_an_online_run_around_a_proposal(
    megamix: Callable[..., Any], tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    """ODM starts from the mixture and stays within a factor of it; a mixture that changed meanwhile refuses a resume,
    until it is accepted."""
    folder, run = tmp_path / "swarm", tmp_path / "run"
    folder.mkdir()
    proposed = [0.4, 0.3, 0.2, 0.1]
    write_proposal(folder, Proposal(dict(zip(DOMAINS, proposed, strict=True)), {}))
    config = tiny_config(
        run_dir=str(run), mixture={"from_swarm": str(folder)}, mixer={"name": "odm", "preset": "official"}
    )
    bounded = [
        f"data.max_weight={{from_swarm: {folder}, factor: 1.2}}",
        f"data.min_weight={{from_swarm: {folder}, factor: 0.8}}",
    ]
    megamix("train", config, *bounded, "train.stop_after=6")
    write_proposal(folder, Proposal(dict(zip(DOMAINS, proposed[::-1], strict=True)), {}))
    assert "made with another" in megamix("train", config, *bounded, code=3).stderr
    write_proposal(folder, Proposal(dict(zip(DOMAINS, proposed, strict=True)), {}))
    megamix("train", config, *bounded)
    # Those of a position after the last sample bind nobody.
    ledger = [line for line in lines(run / "weights.jsonl") if line["position"] < 12 * 8]
    rows = np.array([line["domain_weights"] for line in ledger])
    assert rows[0] == pytest.approx(proposed)
    assert len(rows) > 6
    assert (rows <= 1.2 * np.array(proposed) + 1e-9).all()
    assert (rows >= 0.8 * np.array(proposed) - 1e-9).all()
    # The bounds are felt: some weight is at one of them.
    assert (np.abs(rows / proposed - 1) > 0.2 - 1e-9).any()
