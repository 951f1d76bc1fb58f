"""The mixtures of a swarm: what they keep, their distribution, that they are the same again, and what is refused."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_swarm import swarm_config

from megamix.core.config import load_config, validate
from megamix.core.config_files import read_yaml
from megamix.core.errors import InputError
from megamix.mixing.sources import weights_by_domain
from megamix.studies.swarm.config import SwarmStudyConfig
from megamix.studies.swarm.generate.config import GenerateConfig
from megamix.studies.swarm.generate.levels import Floats, strength_of
from megamix.studies.swarm.generate.mixtures import MixtureSpace, draw_mixtures
from megamix.studies.swarm.priors import priors_of
from megamix.studies.swarm.study import read_study
from megamix.studies.swarm.tasks import swarm
from megamix.training.config import RunConfig

FLAT = tuple(f"d{index}" for index in range(8))
TREE = ("web:a", "web:b", "web:c", "code:py", "code:c", "wiki")
TREE_PRIOR = np.array([0.3, 0.2, 0.1, 0.2, 0.1, 0.1])


def space(
    domains: tuple[str, ...] = FLAT, prior: Floats | None = None, tokens: float = 1e6, run: float = 0.0, **options: Any
) -> MixtureSpace:
    """Of domains that have ``tokens`` each, and runs of ``run`` tokens."""
    shares = np.random.default_rng(3).dirichlet(np.ones(len(domains))) if prior is None else prior
    config = validate(GenerateConfig, options, "test")
    return MixtureSpace(domains, shares, config, dict.fromkeys(domains, tokens), run)


def of_source(domains: tuple[str, ...], source: str) -> np.ndarray[Any, Any]:
    return np.array([name.split(":")[0] == source for name in domains])


EXTREMES = {"min_strength": 0.02, "max_strength": 50.0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        EXTREMES,
        {"support": "dense", **EXTREMES},
        {"support": "sparse", **EXTREMES},
        {"nonzero_weight": ["d0", "d7"], "minimum_weight": 0.03, **EXTREMES},
        {"repetition": 2.0, **EXTREMES},
        {"repetition": 1.3, "minimum_weight": 0.05, "nonzero_weight": ["d1"], **EXTREMES},
        {"max_weight": {"d0": 0.1, "d3": 0.0}, "minimum_weight": 0.04, **EXTREMES},
    ],
)
def test_weights_are_mixtures_within_their_bounds(options: dict[str, Any]) -> None:
    """A weight is 0 or at least the minimum, at most what repetition allows; required ones are never 0. No slack but
    rounding, whatever is drawn."""
    asked = space(run=6e6, **options)
    found = draw_mixtures(asked, 60)
    least = asked.config.minimum_weight
    assert found.shape == (60, 8)
    assert np.abs(found.sum(axis=1) - 1).max() < 1e-12
    assert ((found == 0) | (found >= least - 1e-12)).all()
    cap = np.minimum([asked.config.max_weight.get(name, 1.0) for name in FLAT], 1.0)
    if asked.config.repetition is not None:
        cap = np.minimum(cap, asked.config.repetition * 1e6 / 6e6)
    assert (found <= cap + 1e-9).all()
    for name in asked.config.nonzero_weight:
        assert (found[:, FLAT.index(name)] >= least - 1e-12).all()
    if asked.config.support == "dense":
        assert (found > 0).all()


def test_sparse_members_have_more_zeros_and_topics_only() -> None:
    kinds = {kind: draw_mixtures(space(TREE, TREE_PRIOR, support=kind, min_strength=20, max_strength=20), 80)
             for kind in ("threshold", "sparse", "dense")}  # fmt: skip
    zeros = {kind: (found == 0).mean() for kind, found in kinds.items()}
    assert zeros["dense"] == 0
    assert zeros["sparse"] > zeros["threshold"] + 0.2
    # A source without topics is not left out at random, and a source does not vanish with some of its topics.
    assert (kinds["sparse"][:, 5] > 0).mean() > 0.8
    # Half of the topics, but for members whose source would be left with none.
    web = kinds["sparse"][:, of_source(TREE, "web")]
    assert 0.35 < (web[web.sum(axis=1) > 0] == 0).mean() < 0.6


@pytest.mark.parametrize("strength", [0.5, 4.0, 60.0])
def test_moments_of_the_draws_are_those_of_the_distribution(strength: float) -> None:
    """Without bounds: mean p and covariance (diag(p) - p p') / (s + 1), each within five standard errors."""
    prior = np.array([0.5, 0.3, 0.15, 0.05])
    free = {"min_strength": strength, "max_strength": strength, "minimum_weight": 0.0, "min_distance": 0.0}
    number = 3000
    found = draw_mixtures(space(FLAT[:4], prior, include_prior=False, **free), number)
    covariance = (np.diag(prior) - np.outer(prior, prior)) / (strength + 1)
    error = np.sqrt(np.diag(covariance) / number)
    assert (np.abs(found.mean(axis=0) - prior) < 5 * error).all()
    # The standard error of a product of deviations, from the draws.
    products = np.einsum("ni,nj->nij", found - prior, found - prior)
    assert (np.abs(products.mean(axis=0) - covariance) < 5 * products.std(axis=0) / np.sqrt(number)).all()


def test_moments_of_the_hierarchy() -> None:
    """Sources and shares in a source have the moments of their own distribution, and do not depend on each other."""
    options = {
        "min_source_strength": 3.0, "max_source_strength": 3.0, "min_topic_strength": 9.0, "max_topic_strength": 9.0,
        "minimum_weight": 0.0, "min_distance": 0.0, "include_prior": False,
    }  # fmt: skip
    number = 3000
    found = draw_mixtures(space(TREE, TREE_PRIOR, **options), number)
    web = found[:, of_source(TREE, "web")]
    size, shares = web.sum(axis=1), web / web.sum(axis=1, keepdims=True)
    assert abs(size.mean() - 0.6) < 5 * size.std() / np.sqrt(number)
    assert size.var() == pytest.approx(0.6 * 0.4 / 4, rel=0.1)
    inside = np.array([3, 2, 1]) / 6
    assert (np.abs(shares.mean(axis=0) - inside) < 5 * shares.std(axis=0) / np.sqrt(number)).all()
    np.testing.assert_allclose(shares.var(axis=0), inside * (1 - inside) / 10, rtol=0.1)
    assert np.abs(np.corrcoef(np.column_stack([size, shares[:, :2]]).T)[0, 1:]).max() < 0.1


def test_strengths_are_even_in_their_logarithm_for_any_number_of_members() -> None:
    for number in (16, 64):
        logs = np.sort(np.log([strength_of(index, 0.1, 5.0) for index in range(number)]))
        np.testing.assert_allclose(logs, np.log(0.1) + np.log(50) * np.arange(number) / number)


@pytest.mark.parametrize("support", ["threshold", "sparse"])
def test_a_larger_swarm_begins_with_the_smaller_one(support: str) -> None:
    small, large = (draw_mixtures(space(TREE, TREE_PRIOR, support=support), number) for number in (10, 25))
    assert (small == large[:10]).all()
    assert not (draw_mixtures(space(TREE, TREE_PRIOR, support=support, seed=43), 10)[1:] == small[1:]).all(axis=1).any()


def test_members_keep_their_distance_from_each_other_and_from_others() -> None:
    others = draw_mixtures(space(min_strength=20.0, max_strength=20.0, seed=1), 20)
    asked = space(min_strength=20.0, max_strength=20.0, min_distance=0.15, include_prior=False)
    found = draw_mixtures(asked, 30, others)
    apart = [np.abs(a - b).sum() / 2 for a, b in itertools.combinations(found, 2)]
    assert min(apart) >= 0.15
    assert min(np.abs(a - b).sum() / 2 for a in found for b in others) >= 0.15
    near = draw_mixtures(space(min_strength=20.0, max_strength=20.0, min_distance=0.0, include_prior=False), 30)
    assert min(np.abs(a - b).sum() / 2 for a, b in itertools.combinations(near, 2)) < 0.15


def test_priors_by_hand_temperature_and_what_is_fixed() -> None:
    asked = space(TREE, TREE_PRIOR, manual_prior={"wiki": 0.6}, manual_topic_prior={"code:py": 0.0})
    # 0.6 + 0.3 + 0.6 of the sources, scaled to 1; code is all C now.
    np.testing.assert_allclose(asked.centre, np.array([0.3, 0.2, 0.1, 0.0, 0.3, 0.6]) / 1.5)
    np.testing.assert_allclose(draw_mixtures(asked, 1)[0], asked.centre, atol=1e-12)
    strong = {"min_strength": 1e6, "max_strength": 1e6, "min_distance": 0.0, "include_prior": False}
    flat = draw_mixtures(space(TREE, TREE_PRIOR, source_mix_temperature=0.5, topic_mix_temperature=1e-6, **strong), 3)
    roots = np.sqrt([0.6, 0.3, 0.1]) / np.sqrt([0.6, 0.3, 0.1]).sum()
    wanted = np.repeat(roots / [3, 2, 1], [3, 2, 1])
    np.testing.assert_allclose(flat, np.tile(wanted, (3, 1)), atol=0.005)
    fixed = draw_mixtures(
        space(TREE, TREE_PRIOR, fixed_source_weights={"web": 0.5}, fixed_topic_weights={"code:py": 0.3, "code:c": 0.1}),
        20,
    )
    np.testing.assert_allclose(fixed[:, of_source(TREE, "web")].sum(axis=1), 0.5)
    code = fixed[:, 3] > 0
    assert code.sum() > 5
    np.testing.assert_allclose(fixed[code, 3] / fixed[code, 4], 3.0)


def test_bounds_of_topics_and_of_sources_hold_together() -> None:
    """The web can have 0.9 by its tokens, and 0.5 by its own bound; its topics share that out within theirs."""
    asked = space(
        TREE, TREE_PRIOR, run=4e6, repetition=1.2, max_weight={"web": 0.5, "wiki": 0.25}, minimum_topic_weight=0.2,
        nonzero_weight=["web:c", "code"], **EXTREMES,
    )  # fmt: skip
    found = draw_mixtures(asked, 60)
    assert (found <= 0.3 + 1e-9).all()
    assert (found[:, 5] <= 0.25 + 1e-9).all()
    web, code = found[:, of_source(TREE, "web")], found[:, of_source(TREE, "code")]
    assert (web.sum(axis=1) <= 0.5 + 1e-9).all()
    assert (code.sum(axis=1) > 0).all()
    assert (web[:, 2] >= 0.2 * web.sum(axis=1) - 1e-9).all()
    assert (web[:, 2] > 0).all()
    for part in (web, code):
        share = part[part.sum(axis=1) > 0] / part.sum(axis=1)[part.sum(axis=1) > 0, None]
        assert ((share == 0) | (share >= 0.2 - 1e-9)).all()


def random_space(random: np.random.Generator) -> MixtureSpace:
    """Any hierarchy, prior, tokens and options: about a quarter of them cannot be met."""
    topics = [int(random.integers(1, 6)) for _ in range(random.integers(1, 7))]
    domains = [f"s{s}:t{t}" if number > 1 else f"s{s}" for s, number in enumerate(topics) for t in range(number)]
    options: dict[str, Any] = {
        "min_strength": random.choice([0.01, 0.1, 1.0]), "max_strength": random.choice([1.0, 10.0, 100.0]),
        "minimum_weight": random.choice([0.0, 0.002, 0.05, 0.15]), "min_distance": 0.0,
        "support": str(random.choice(["threshold", "dense", "sparse"])),
    }  # fmt: skip
    if random.random() < 0.5:
        options["repetition"] = random.choice([1.0, 2.0, 4.0])
    if random.random() < 0.3:
        options["nonzero_weight"] = [str(name) for name in random.choice(domains, min(2, len(domains)), replace=False)]
    if random.random() < 0.3:
        options["max_weight"] = {str(random.choice(domains)): random.choice([0.05, 0.3])}
    if random.random() < 0.2:
        options["fixed_source_weights"] = {f"s{random.integers(len(topics))}": random.choice([0.1, 0.4])}
    prior = random.dirichlet(np.full(len(domains), random.choice([0.3, 1.0, 5.0])))
    tokens = dict(zip(domains, random.dirichlet(np.ones(len(domains))) * 1e6, strict=True))
    run = random.choice([3e5, 9e5, 2e6])
    return MixtureSpace(tuple(domains), prior, validate(GenerateConfig, options, "test"), tokens, run)


def test_whatever_is_asked_is_refused_or_kept() -> None:
    """No config passes the check and cannot be drawn, and every draw keeps all bounds of both levels."""
    random = np.random.default_rng(11)
    met = 0
    for _ in range(80):
        asked = random_space(random)
        config = asked.config
        try:
            asked.check()
        except InputError:
            continue
        met += 1
        drawn = (asked.draw(number, np.random.default_rng(number)) for number in range(60))
        found = list(itertools.islice((weights for weights in drawn if weights is not None), 3))
        assert found, config
        for weights in found:
            assert weights.sum() == pytest.approx(1)
            assert (weights <= asked.caps + 1e-8).all()
            for source, indices in asked.sources.items():
                total = weights[indices].sum()
                if source in config.fixed_source_weights:
                    assert total == pytest.approx(config.fixed_source_weights[source])
                else:
                    assert total == 0 or total >= config.minimum_weight - 1e-8
                if len(indices) > 1 and total > 0:
                    shares = weights[indices] / total
                    assert ((shares == 0) | (shares >= config.minimum_weight - 1e-7)).all()
            if config.minimum_weight:
                assert all(weights[asked.domains.index(name)] > 0 for name in config.nonzero_weight)
                assert config.support != "dense" or ((weights > 0) | (asked.centre == 0)).all()
    assert 45 < met < 75


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nonzero_weight": ["d0", "d1", "d2"], "minimum_weight": 0.4}, r"3 domains .* 0\.4 each .* 1\.2, .* at most 0\.333"),
        ({"support": "dense", "minimum_weight": 0.2}, r"8 domains .* together 1\.6, more than 1"),
        ({"max_weight": dict.fromkeys(FLAT, 0.1)}, r"can have 0\.8 of the weight together, less than 1"),
        ({"nonzero_weight": ["d0"], "max_weight": {"d0": 0.01}, "minimum_weight": 0.05}, r"'d0' .* 0\.05 .* can have 0\.01"),
        ({"repetition": 2.0}, r"allows 16,000,000 tokens .* a run has 20,000,000 tokens. Repetition of at least 2\.5"),
        ({"fixed_source_weights": {"d0": 0.7, "d1": 0.6}}, r"sum to 1\.3, expected at most 1"),
        ({"fixed_source_weights": {"d0": 0.7}, "max_weight": {"d0": 0.5}}, r"'d0' is to have 0\.7, but can have 0\.5"),
        ({"nonzero_weight": ["d9"]}, r"generate.nonzero_weight: there is no 'd9'. Known: d0"),
        ({"min_strength": 7.0}, r"smallest strength of a source is 7, above the largest, 5"),
        ({"min_distance": 0.6, "min_strength": 50.0, "max_strength": 50.0}, r"each of 200 draws is nearer than .* 0\.6"),
        ({"fixed_source_weights": {"d0": 0.0}, "nonzero_weight": ["d0"]}, r"'d0' is fixed at 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_said_with_numbers(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        draw_mixtures(space(run=2e7, **options), 10)


def test_a_topic_without_its_share_and_a_required_domain_without_prior() -> None:
    with pytest.raises(InputError, match=r"names some topics of 'web', but not web:b, web:c"):
        draw_mixtures(space(TREE, TREE_PRIOR, fixed_topic_weights={"web:a": 1.0}), 4)
    with pytest.raises(InputError, match=r"'wiki' is to have a weight in every member, but its prior is 0"):
        draw_mixtures(space(TREE, np.array([0.4, 0.2, 0.1, 0.2, 0.1, 0.0]), nonzero_weight=["wiki"]), 4)
    with pytest.raises(InputError, match=r"3 topics of 'web' .* more than 1"):
        draw_mixtures(space(TREE, TREE_PRIOR, support="dense", minimum_topic_weight=0.4), 4)


def test_one_domain_has_one_mixture() -> None:
    assert draw_mixtures(space(("only",), np.ones(1)), 1).tolist() == [[1.0]]
    with pytest.raises(InputError, match=r"member 1 of 2: each of 200 draws is nearer"):
        draw_mixtures(space(("only",), np.ones(1)), 2)


# From a config to files ----------------------------------------------------------------------------------------------


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which says who held it when."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_members_are_configs_of_runs_and_the_same_again(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config, run = swarm_config(tiny_config, swarm={"proxy": {"train": {"steps": 3}}}), tmp_path / "run"
    assert swarm(config, [], "generate") == 0
    first = tree_of(run)
    assert {name for name in first if name.startswith("members/")} == {f"members/{n:04}.yaml" for n in range(4)}
    member = read_yaml(run / "members" / "0002.yaml")
    assert (member["run_dir"], member["mixer"]) == (str(run / "runs" / "0002"), {"name": "static"})
    assert member["train"]["steps"] == 3
    assert member["checkpoint"]["every"] == 4
    with (run / "swarm.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [f"{n:04}" for n in range(4)]
    assert {name: float(rows[2][name]) for name in ("code", "tables", "topics")} == member["mixture"]
    natural = priors_of(read_study(config, []).plan.config.data.manifest, ["code", "tables", "topics"]).relative_sizes
    assert read_yaml(run / "members" / "0000.yaml")["mixture"] == pytest.approx(natural)
    assert swarm(config, [], "generate") == 0
    assert tree_of(run) == first
    # More members leave the first ones as they were; fewer take the others away.
    assert swarm(config, ["swarm.generate.members=6"], "generate") == 0
    more = tree_of(run)
    assert {name for name in more if name.startswith("members/")} == {f"members/{n:04}.yaml" for n in range(6)}
    assert all(more[name] == content for name, content in first.items() if name.startswith("members/"))
    assert swarm(config, [], "generate") == 0
    assert tree_of(run) == first


def test_the_priors_alone_leave_no_config_of_a_target(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config = swarm_config(tiny_config, swarm={"target": {}})
    assert swarm(config, [], "priors") == 0
    assert set(tree_of(tmp_path / "run")) == {"swarm.yaml", "priors.json"}


def test_a_member_that_was_run_is_not_replaced_by_another(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config, run = swarm_config(tiny_config), tmp_path / "run"
    assert swarm(config, [], "generate") == 0
    (run / "runs" / "0003").mkdir(parents=True)
    before = tree_of(run / "members")
    for change, said in (("swarm.generate.seed=8", "has another config now"),
                         ("swarm.generate.members=3", "is no longer one of the swarm's")):  # fmt: skip
        with pytest.raises(InputError, match=f"member 0003 .* {said}"):
            swarm(config, [change], "generate")
    assert tree_of(run / "members") == before


def test_members_stay_away_from_another_swarm(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    assert swarm(swarm_config(tiny_config), [f"run_dir={tmp_path}/other", "swarm.generate.seed=3"], "generate") == 0
    options = [f"swarm.generate.existing_mix_file={tmp_path}/other/swarm.csv", "swarm.generate.include_prior=false"]
    assert (
        swarm(
            swarm_config(tiny_config),
            [*options, "swarm.generate.seed=3", "swarm.generate.min_distance=0.05"],
            "generate",
        )
        == 0
    )
    rows = {}
    for name in ("run", "other"):
        with (tmp_path / name / "swarm.csv").open(newline="") as file:
            rows[name] = [[float(row[d]) for d in ("code", "tables", "topics")] for row in csv.DictReader(file)]
    near = [np.abs(np.subtract(a, b)).sum() / 2 for a in rows["run"] for b in rows["other"]]
    assert min(near) >= 0.05


def test_repetition_counts_the_tokens_of_members_or_of_the_target(
    tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = swarm_config(
        tiny_config, swarm={"target": {"train": {"steps": 5000}}, "generate": {"members": 3, "repetition": 1.0}}
    )
    job = read_study(config, [])
    tokens = job.token_counts
    assert job.space.repetition_tokens == 12 * 8 * 64
    target = read_study(config, ["swarm.generate.repetition_tokens=1e6"])
    assert target.space.caps.tolist() == pytest.approx([tokens[name] / 1e6 for name in tokens])
    with pytest.raises(InputError, match=r"a run has 2,560,000 tokens"):
        read_study(config, ["swarm.generate.repetition_tokens=target"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("swarm.generate.variants=3", r"unknown key 'generate.variants'"),
        ("swarm.proxy.run_dir=x", r"swarm.proxy.run_dir cannot be set"),
        ("swarm.target={mixture: natural}", r"swarm.target.mixture cannot be set"),
        ("swarm.proxy.train.stpes=3", r"proxy run: unknown key 'train.stpes'. Did you mean 'steps'"),
        ("swarm.propose.worst=true", r"swarm.propose.worst cannot be set"),
        ("swarm.priors={code: 1}", r"no weight for tables, topics"),
        ("swarm.metrics={validation: false}", r"no metric is collected"),
    ],
)
def test_a_key_that_is_wrong_is_named(tiny_config: Callable[..., Path], change: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        swarm(swarm_config(tiny_config), [change], "generate")


def test_the_config_of_a_swarm_is_not_that_of_a_run(tiny_config: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"the key swarm is for `megamix swarm all`"):
        load_config(RunConfig, swarm_config(tiny_config))


def test_a_prior_by_source_and_topic_is_that_of_its_domains() -> None:
    given = {"web": {"weight": 0.6, "topics": {"news": 3, "forums": 1}}, "code": 0.4}
    priors = validate(SwarmStudyConfig, {"priors": given}, "test").priors
    assert isinstance(priors, dict)
    assert weights_by_domain(priors, "swarm.priors") == pytest.approx(
        {"web:news": 0.45, "web:forums": 0.15, "code": 0.4}
    )
    with pytest.raises(InputError, match=r"topics"):
        validate(SwarmStudyConfig, {"priors": {"web": {"weight": 0.6, "topics": {"news": 0}}}}, "test")
    assert validate(SwarmStudyConfig, {"priors": "shares.json"}, "test").priors == Path("shares.json")


def test_shares_from_a_file_or_the_config_are_those_of_the_first_member(
    tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    wanted = {"code": 0.5, "tables": 0.3, "topics": 0.2}
    path = tmp_path / "priors.yaml"
    path.write_text(yaml.safe_dump({"relative_sizes": {name: 2 * share for name, share in wanted.items()}}))
    for number, given in enumerate((str(path), "{code: 5, tables: 3, topics: 2}")):
        run = tmp_path / f"run{number}"
        assert swarm(swarm_config(tiny_config), [f"swarm.priors={given}", f"run_dir={run}"], "generate") == 0
        assert read_yaml(run / "members" / "0000.yaml")["mixture"] == pytest.approx(wanted)
        assert read_yaml(run / "priors.json")["relative_sizes"] == pytest.approx(wanted)
