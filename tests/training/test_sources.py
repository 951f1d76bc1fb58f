"""Mixtures by source and topic, and by shares of documents, wherever a mixture is given."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_config import small

from megamix.analysis.doctor import doctor
from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.data.tokens.manifest import Manifest
from megamix.mixing.sources import weights_by_domain
from megamix.mixing.weight_files import read_weights
from megamix.studies.arena.study import names_domains
from megamix.training.checkpoints.fingerprints import data_fingerprints
from megamix.training.config import RunConfig
from megamix.training.mix_plan import planned_mix, read_stages
from megamix.training.mixture import mixture_of
from megamix.training.objective import objective_weights
from megamix.training.plan import make_data_plan
from megamix.training.steer.steer import _mixture
from megamix.training.steer.steered_run import SteeredRun

NAMES = ("web:news", "code", "web:forums")
NATURAL, SIZES, LENGTHS = np.array([0.5, 0.3, 0.2]), np.array([500, 300, 200]), np.array([400.0, 1000.0, 50.0])
WEB = {"weight": 6, "topics": {"news": 3, "forums": 1}}
BY_SOURCE = {"web": WEB, "code": 4}
WANTED = [0.45, 0.4, 0.15]


def config_of(mixture: Any, **changes: Any) -> RunConfig:
    config = {
        "run_dir": "run",
        "data": {"manifest": "data", "seq_length": 100},
        "model": {"preset": "neox-2m"},
        "mixture": mixture,
        "train": {"steps": 100, "global_batch": 10, "micro_batch": 1, "lr": 1e-3},
        **changes,
    }
    return validate(RunConfig, config, "test")


def weights_of(mixture: Any, step: int = 0, lengths: Any = LENGTHS) -> list[float]:
    """Of a run with 1000 tokens a step."""
    return read_stages(config_of(mixture), NAMES, SIZES, NATURAL, lengths).at(step).tolist()


def test_a_source_shares_its_weight_out_over_topics(tmp_path: Path) -> None:
    assert weights_of(BY_SOURCE) == pytest.approx(WANTED)
    stages = [{"from_tokens": 0, "weights": "natural"}, {"from_tokens": 3000, "weights": BY_SOURCE}]
    assert weights_of({"stages": stages}, 3) == pytest.approx(WANTED)
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(BY_SOURCE), encoding="utf-8")
    assert list(read_weights(path, NAMES).values()) == pytest.approx(WANTED)
    assert weights_of({"file": str(path)}) == pytest.approx(WANTED)
    run: Any = SimpleNamespace(names=NAMES)
    assert _mixture(run, json.dumps(BY_SOURCE)).tolist() == pytest.approx(WANTED)
    assert _mixture(run, str(path)).tolist() == pytest.approx(WANTED)
    config = config_of("natural", objective=BY_SOURCE)
    assert objective_weights(config.objective, NAMES, NATURAL).tolist() == pytest.approx(WANTED)


def test_a_config_with_sources_is_itself_when_read_again() -> None:
    config = config_of(BY_SOURCE, objective=BY_SOURCE)
    again = validate(RunConfig, config.model_dump(mode="json"), "test")
    assert again == config
    assert mixture_of(again.mixture).given() == {"web:news": 4.5, "web:forums": 1.5, "code": 4}


def test_weights_without_sources_stay_what_they_are() -> None:
    given = {"web:news": 1, "topics": 2.5, "code": 0}
    assert weights_by_domain(given, "here") == given


def test_sources_and_topics_may_have_any_name(tmp_path: Path) -> None:
    """Also those that formats of files know."""
    path, names = tmp_path / "weights.json", ("weights:topics", "weights:weight", "train")
    path.write_text(json.dumps({"weights": {"weight": 1, "topics": {"topics": 1, "weight": 3}}, "train": 1}))
    assert list(read_weights(path, names).values()) == [0.125, 0.375, 0.5]
    path.write_text(json.dumps({"train_domain_weights": {"topics": 1, "weight": 3}, "eval_domain_weights": {}}))
    assert list(read_weights(path, ("topics", "weight")).values()) == [0.25, 0.75]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"web": 6, "code": 4}, r"mixture: 'web' is no domain, but a source of web:news, web:forums\. Give each"),
        ({"web": {"weight": 6, "topics": {"news": 3, "forum": 1}}, "code": 4}, r"no domain 'web:forum'\. Did you mean 'we"),
        ({"web": {"weight": 6, "topics": {"news": 3}}, "code": 4}, r"mixture: no weight for web:forums\. Give every"),
        ({"web": WEB}, r"mixture: no weight for code"),
        ({"web": {"topics": {"news": 3}}, "code": 4}, r"the key 'mixture\.web\.weight' is missing"),
        ({"web": {"weight": 6}, "code": 4}, r"the key 'mixture\.web\.topics' is missing"),
        ({"web": {"weight": 6, "topic": {}}, "code": 4}, r"unknown key 'mixture\.web\.topic'\. Did you mean 'topics'"),
        ({"web": {"weight": 6, "topics": {"news": None}}}, r"mixture\.web\.topics\.news: Input should be a valid number"),
        ({"web": {"weight": 6, "topics": {"news": -1}}}, r"mixture\.web\.topics\.news: Input should be greater than or eq"),
        ({"web": {"weight": -6, "topics": {"news": 1}}}, r"mixture\.web\.weight: Input should be greater than or eq"),
        ({"web": {"weight": 6, "topics": {}}}, r"mixture\.web\.topics: Dictionary should have at least 1 item"),
        ({"web": {"weight": 6, "topics": {"news": 0}}}, r"mixture\.web: the weights of its topics are all 0, but that of"),
        ({**BY_SOURCE, "web:news": 1}, r"mixture: 'web:news' has a weight of its own and one as a topic of 'web'"),
        ({"web": {**WEB, "weight": 0}, "code": 0}, r"the weights of all 3 domains .* are 0"),
        ({"stages": [{"from_tokens": 0, "weights": {"web": {"weight": 1}}}]}, r"'mixture\.stages\.0\.weights\.web\.topics'"),
        ({"documents": {"web": {"weight": 1}}}, r"the key 'mixture\.documents\.web\.topics' is missing"),
        ({"documents": {"web": 1, "code": 2}}, r"mixture, documents: 'web' is no domain, but a source of"),
        ({"documents": "natural"}, r"mixture\.documents: Input should be 'uniform', got 'natural'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(mixture: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        weights_of(mixture)


def test_sources_in_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"web": {"topics": {"news": 1}}, "code": 1}), encoding="utf-8")
    with pytest.raises(InputError, match=r"weights\.json, source 'web': the key 'weight' is missing"):
        read_weights(path, NAMES)


@pytest.mark.parametrize("shares", [{"web:news": 1, "code": 2, "web:forums": 5}, "uniform", BY_SOURCE])
def test_documents_are_read_in_the_shares_given(shares: Any) -> None:
    """The tokens of a domain over the mean length of its documents is their number."""
    documents = np.array(weights_of({"documents": shares})) / LENGTHS
    wanted = [1 / 3] * 3 if shares == "uniform" else weights_of(shares)
    assert (documents / documents.sum()).tolist() == pytest.approx(wanted)


def test_documents_in_stages_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(BY_SOURCE), encoding="utf-8")
    by_file = {"documents": {"file": str(path)}}
    assert weights_of(by_file) == weights_of({"documents": BY_SOURCE})
    stages = [{"from_tokens": 0, "weights": "natural"}, {"from_tokens": 3000, "weights": by_file, "ramp": "linear"}]
    assert weights_of({"stages": stages}, 3) == weights_of(by_file)


def test_shares_of_documents_of_real_data(data_dir: Path) -> None:
    """As many documents of each domain as there are is all of its tokens: the natural weights. Doctor says where
    weights come from, and a resume compares the weights."""
    manifest = Manifest.load(data_dir)
    counts = {entry.name: entry.train.documents for entry in manifest.domains}
    config = small(f"data.manifest={data_dir}", f"mixture={json.dumps({'documents': counts})}")
    plan = make_data_plan(config, 1)
    assert plan.policy.initial_weights.tolist() == pytest.approx(plan.natural_weights.tolist())
    assert "shares of documents, as given, times mean lengths in tokens" in doctor(config).text()
    run = SteeredRun(Path("run"), config, True, plan.domain_names, plan.natural_weights, 0, ())
    given = json.dumps({"documents": dict.fromkeys(reversed(list(counts)), 1)})
    lengths = plan.natural_weights / np.array([counts[name] for name in plan.domain_names])
    assert _mixture(run, given).tolist() == pytest.approx((lengths / lengths.sum()).tolist())
    other = make_data_plan(small(f"data.manifest={data_dir}", "mixture={documents: uniform}"), 1)
    mine, others = (data_fingerprints(each)["mixture"]["mixture"] for each in (plan, other))
    assert mine != others
    assert others["weights"][0] == dict(zip(plan.domain_names, other.policy.initial_weights.tolist(), strict=True))


def test_shares_of_documents_need_the_data() -> None:
    config = config_of(
        {"documents": "uniform"}, data={"manifest": "data", "seq_length": 100, "token_counts": {"a": 1e6, "b": 1e6}}
    )
    with pytest.raises(
        InputError, match=r"mixture: shares of documents follow the lengths of the documents, and the data"
    ):
        planned_mix(config)


def test_shares_of_all_documents_name_no_domain() -> None:
    """So an arena may give the mixture to a data set with one domain more."""
    assert not names_domains({"documents": "uniform"})
    assert names_domains({"documents": {"web": 1}})
