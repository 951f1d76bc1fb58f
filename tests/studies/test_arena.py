"""An arena before it runs: its members, the data of its traps, its statistics, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import chisquare, ttest_1samp, ttest_rel

from megamix.analysis.paired import smallest_visible, t_interval
from megamix.core.config_files import merge
from megamix.core.errors import InputError
from megamix.data.tokens.manifest import Manifest
from megamix.data.tokens.verify import verify_all
from megamix.studies.arena.answer import adaptation_text, answer_text
from megamix.studies.arena.checks import read_study
from megamix.studies.arena.results import Results, best_of, difference
from megamix.studies.arena.rows import Row
from megamix.studies.arena.study import ARMS, BEGIN, FROZEN_ARMS, ArenaStudy
from megamix.studies.arena.tables import markdown
from megamix.studies.arena.tasks import arena, submit_arena
from megamix.studies.slurm.resources import Resources
from megamix.training.config import KINDS, RunConfig
from megamix.training.plan import make_plan

Write = Callable[..., Path]
DOMAINS = ("code", "tables", "topics")
ODM = {"mixer": {"name": "odm", "preset": "official"}}
ARENA: dict[str, Any] = {"seeds": [1, 2, 3], "arms": {"odm": ODM}}


def config(tiny_config: Write, arena: dict[str, Any] | None = None, **sections: Any) -> Path:
    shared: dict[str, Any] = {"data": {"domains": list(DOMAINS)}, "mixer": {"name": "static"}}
    shared["arena"] = {**ARENA, **(arena or {})}
    return tiny_config(**merge(shared, sections, KINDS))


def study(tiny_config: Write, **arena: Any) -> ArenaStudy:
    return read_study(config(tiny_config, arena), [])


# Members


def test_members_of_an_arena(tiny_config: Write) -> None:
    """Arms, controls and the mean of what is online, with every seed, condition and trap; each with its own config."""
    found = study(
        tiny_config, traps={"noise": {"kind": "noise"}}, budgets=[8, 12], models={"thin": {"hidden_size": 16}}
    )
    assert list(found.arms) == ["natural", "uniform", "sqrt", "odm", "odm-frozen"]
    assert len(found.entries) == 3 * 5 * 2 * 2
    found.write()
    paths = {path.stem: path for part in (ARMS, FROZEN_ARMS) for path in found.folder(part).glob("*.yaml")}
    assert paths.keys() == {entry.name for entry in found.entries}
    run = yaml.safe_load(paths["seed2.thin.8steps.odm"].read_text())
    assert (run["train"]["seed"], run["train"]["steps"], run["model"]["hidden_size"]) == (2, 8, 16)
    assert run["mixer"] == ODM["mixer"]
    mean = yaml.safe_load(paths["seed2.thin.8steps.noise.odm-frozen"].read_text())
    assert mean["mixture"] == {
        "from_run": str(found.run_dir / "runs" / "seed2.thin.8steps.noise.odm"),
        "which": "mean",
        "finished": True,
    }
    assert mean["mixer"] == {"name": "static"}


def test_a_mixture_replaces_and_dotted_keys_are_nested(tiny_config: Write) -> None:
    base = {"code": 0.2, "tables": 0.3, "topics": 0.5}
    arms = {
        "half": {"mixture": {"code": 0.5, "tables": 0.25, "topics": 0.25}},
        "odm": {"mixer.name": "odm", "mixture": "natural"},
    }
    found = read_study(config(tiny_config, {"arms": arms}, mixture=base), [])
    runs = {entry.arm.name: found.run(entry) for entry in found.entries}
    assert runs["half"]["mixture"] == arms["half"]["mixture"]
    assert runs["odm"]["mixer"] == {"name": "odm"}
    assert runs["odm"]["mixture"] == "natural"
    assert runs["uniform"]["mixture"] == "uniform"


def test_arms_that_ignore_the_objective_run_once(tiny_config: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from megamix.mixing.mixers import OdmMixer, RecommendedMixer

    monkeypatch.setattr(OdmMixer, "follows_objective", False)
    monkeypatch.setattr(RecommendedMixer, "follows_objective", True)
    arms = {"odm": ODM, "new": {"mixer": {"name": "recommended"}}}
    found = study(tiny_config, arms=arms, objectives=["uniform", "natural"], seeds=[1], controls=False)
    assert {entry.name for entry in found.entries} == {
        "seed1.odm", "seed1.new@uniform", "seed1.new@natural", "seed1.odm-frozen", "seed1.new-frozen@uniform",
        "seed1.new-frozen@natural",
    }  # fmt: skip
    entry = next(entry for entry in found.entries if entry.name == "seed1.new-frozen@natural")
    mean = found.run(entry)
    assert Path(mean["mixture"]["from_run"]).name == "seed1.new@natural"


def test_objectives_of_weights(tiny_config: Write) -> None:
    """They are judged by name beside the words, normalised, and given to the mixers that follow the objective."""
    arms = {"new": {"mixer": {"name": "recommended"}}}
    asked = {"natural": "natural", "mostly": {"code": 0.0, "tables": 3.0, "topics": 1.0}}
    found = study(tiny_config, arms=arms, objectives=asked, seeds=[1], controls=False, frozen_mean=False)
    assert found.objectives.keys() == asked.keys()
    assert found.objectives["mostly"] == {"code": 0.0, "tables": 0.75, "topics": 0.25}
    objectives = {entry.name: found.run(entry)["objective"] for entry in found.entries}
    assert objectives == {"seed1.new@natural": "natural", "seed1.new@mostly": found.objectives["mostly"]}


def test_an_objective_of_weights_has_a_control_that_samples_by_them(tiny_config: Write) -> None:
    """Its own static mixture, the one to beat; an arm of that name takes its place, and words have theirs already."""
    asked = {"natural": "natural", "mostly": {"code": 0.0, "tables": 3.0, "topics": 1.0}}
    found = study(tiny_config, objectives=asked, seeds=[1], frozen_mean=False)
    assert list(found.arms) == ["natural", "uniform", "sqrt", "mostly", "odm"]
    run = next(found.run(entry) for entry in found.entries if entry.arm.name == "mostly")
    assert run["mixture"] == {"code": 0.0, "tables": 0.75, "topics": 0.25}
    assert found.arms["mostly"].is_static
    own = study(tiny_config, objectives=asked, arms={"mostly": ODM}, seeds=[1], frozen_mean=False)
    assert list(own.arms) == ["natural", "uniform", "sqrt", "mostly"]
    assert not own.arms["mostly"].is_static
    assert "mostly" not in study(tiny_config, objectives=asked, controls=False).arms


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"sqrt": {"code": 0.2, "tables": 0.3, "topics": 0.5}}, "the name means sqrt"),
        (["uniform", "uniform"], "objectives names uniform twice"),
        (["code"], "got 'code', expected natural or uniform"),
        ([], "objectives is empty"),
        ({"natural": "uniform"}, "the name means natural"),
        ({"mine": {"nowhere": 1.0}}, "arena.objectives: .*nowhere"),
    ],
)
def test_objectives_that_cannot_be(tiny_config: Write, objectives: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        study(tiny_config, objectives=objectives)


def begin(found: ArenaStudy, name: str) -> Path:
    """The run of a member as `megamix train` begins it."""
    run = next(found.config_of(ARMS, entry) for entry in found.entries if entry.name == name)
    folder = found.run_dir / "runs" / name
    folder.mkdir(parents=True)
    resolved = RunConfig.model_validate(run).model_dump(mode="json")
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(resolved))
    return folder


def test_a_member_that_has_begun_keeps_its_config(tiny_config: Write) -> None:
    """Also one that was left out of the arena for a while; what no result follows from may change."""
    found = study(tiny_config)
    arena(config(tiny_config), [], only="data")
    for name in ("seed1.odm", "seed1.odm-frozen", "seed1.natural"):
        begin(found, name)
    arena(config(tiny_config, {"seeds": [1, 4]}, log={"every": 7}, checkpoint={"every": 3}), [], only="data")
    assert sorted(path.stem for path in found.folder(ARMS).glob("*.odm.yaml")) == ["seed1.odm", "seed4.odm"]
    other = {"odm": merge(ODM, {"mixer": {"alpha": 0.5}})}
    arena(config(tiny_config, {"arms": {}}), [], only="data")
    assert not list(found.folder(ARMS).glob("*.odm.yaml"))
    with pytest.raises(
        InputError, match=r"the member seed1\.odm of .* has begun, and has another config now: mixer.alpha is 0.5"
    ):
        arena(config(tiny_config, {"arms": other}), [], only="data")
    with pytest.raises(InputError, match=r"seed1\.natural of .*: train.lr is 0.001, and was 0.003\. Its results"):
        arena(config(tiny_config, {"arms": {}}, train={"lr": 1e-3}), [], only="data")


def test_the_objective_of_a_member_is_part_of_its_config(tiny_config: Write) -> None:
    """A member's name has the objective only where there are several."""
    arms = {"new": {"mixer": {"name": "recommended"}}}
    begin(study(tiny_config, arms=arms, objectives=["uniform"]), "seed1.new")
    arena(config(tiny_config, {"arms": arms, "objectives": ["uniform", "natural"]}), [], only="data")
    with pytest.raises(InputError, match=r"objective is natural, and was uniform"):
        arena(config(tiny_config, {"arms": arms, "objectives": ["natural"]}), [], only="data")


def test_jobs_of_an_arena(tiny_config: Write) -> None:
    """Member i of an array is the i-th file of its folder, as the job script counts them (`LC_ALL=C ls`)."""
    arms = {"odm": ODM, "odm-2": ODM, "odm+": ODM, "odm_": ODM}
    traps = {"late": {"kind": "late", "domain": "tables", "from_step": 5}}
    path = config(tiny_config, {"arms": arms, "traps": traps, "seeds": [1, 10, 2], "controls": False})
    said = submit_arena(path, [], Resources(), 2, dry_run=True)
    found = read_study(path, [])
    for part, number in ((BEGIN, 12), (ARMS, 24), (FROZEN_ARMS, 12)):
        files = sorted(found.folder(part).glob("*.yaml"), key=lambda file: os.fsencode(file.name))
        assert [member.path for member in found.members(part)] == files
        assert len(files) == number
        numbers = ",".join(map(str, range(number)))
        assert re.search(rf"--array={numbers}%2 .*swarm\.sbatch {found.folder(part)}$", said, re.MULTILINE)
    waits = re.findall(r"^# (\w+)\n.* sbatch (?:.*--dependency=(\w+:<\w+>))?", said, re.MULTILINE)
    assert waits == [
        ("begin", ""),
        ("run", "afterany:<begin>"),
        ("frozen", "afterany:<run>"),
        ("results", "afterany:<frozen>"),
    ]
    assert re.search(rf"command\.sbatch arena {path} --only collect$", said, re.MULTILINE)


# Traps


def written(found: ArenaStudy, name: str) -> Manifest:
    folder = found.run_dir / "traps" / name
    found.traps[name].write(folder, 64)
    return Manifest.load(folder)


def tokens_of(manifest: Manifest, name: str, split: Any = "train") -> np.ndarray:
    stream = manifest.open_domain(name, split)
    return stream.read(0, stream.num_tokens)


def test_noise_is_uniform_and_leaves_the_rest_as_it_is(tiny_config: Write) -> None:
    found = study(tiny_config, traps={"noise": {"kind": "noise", "share": 0.2, "seed": 3}})
    manifest, source = written(found, "noise"), found.plan.manifest
    assert manifest.domain_names == [*DOMAINS, "noise"]
    for name in DOMAINS:
        for split in ("train", "validation"):
            assert getattr(manifest.domain(name), split).sha256 == getattr(source.domain(name), split).sha256
    verify_all(manifest)
    assert manifest.natural_weights()[-1] == pytest.approx(0.2, abs=1e-5)
    tokens, eod = tokens_of(manifest, "noise"), source.tokenizer.eod_id
    assert tokens[-1] == eod
    counts = np.bincount(tokens, minlength=source.tokenizer.vocab_size)
    assert counts[eod] == manifest.domain("noise").train.documents
    assert chisquare(np.delete(counts, eod)).pvalue > 0.01
    held_out = tokens_of(manifest, "noise", "validation")
    assert held_out.size > 64
    assert not np.array_equal(held_out[:64], tokens[:64])
    assert manifest.domain("noise").validation.unigram_nats == pytest.approx(np.log(511), rel=0.05)


def test_a_trap_is_the_same_again_and_refuses_other_settings(tiny_config: Write, tmp_path: Path) -> None:
    found = study(tiny_config, traps={"noise": {"kind": "noise"}, "small": {"kind": "tiny", "domain": "code"}})
    for name, trap in found.traps.items():
        first = written(found, name)
        trap.write(tmp_path / "again" / name, 64)
        assert Manifest.load(tmp_path / "again" / name).fingerprint == first.fingerprint
    changed = study(tiny_config, traps={"noise": {"kind": "noise", "seed": 1}})
    with pytest.raises(InputError, match="made with other settings of the trap 'noise'"):
        written(changed, "noise")


def test_floor_repeats_one_short_text(tiny_config: Write) -> None:
    found = study(tiny_config, traps={"floor": {"kind": "floor", "tokens": 5000}})
    manifest = written(found, "floor")
    tokens, eod = tokens_of(manifest, "floor"), manifest.tokenizer.eod_id
    length = int(np.argmax(tokens == eod)) + 1
    assert tokens.size == 5000
    assert np.array_equal(tokens[:-length][: 40 * length], np.tile(tokens[:length], 40))


def test_tiny_and_duplicates_are_documents_of_their_domain(tiny_config: Write) -> None:
    traps = {
        "tiny": {"kind": "tiny", "domain": "topics", "tokens": 3000},
        "copied": {"kind": "duplicates", "domain": "topics", "name": "more", "share": 0.02},
    }
    found = study(tiny_config, traps=traps)
    source = found.plan.manifest
    whole, eod = tokens_of(source, "topics"), source.tokenizer.eod_id
    documents = {part.tobytes() for part in np.split(whole, np.flatnonzero(whole == eod) + 1)}
    tiny, copied = written(found, "tiny"), written(found, "copied")
    assert tiny.domain_names == list(DOMAINS)
    assert tiny.domain("topics").train.tokens == 3000
    assert tiny.domain("topics").validation.sha256 == source.domain("topics").validation.sha256
    assert copied.domain_names == [*DOMAINS, "more"]
    assert copied.natural_weights()[-1] == pytest.approx(0.02, abs=1e-4)
    assert copied.domain("more").validation.sha256 == source.domain("topics").validation.sha256
    for manifest, name in ((tiny, "topics"), (copied, "more")):
        tokens = tokens_of(manifest, name)
        assert tokens[-1] == eod
        parts = np.split(tokens, np.flatnonzero(tokens == eod) + 1)[:-1]
        assert len(parts) == manifest.domain(name).train.documents
        assert all(part.tobytes() in documents for part in parts[:-1])


def test_members_with_a_trap(tiny_config: Write) -> None:
    """No mixer is told which domain is the trap: `natural` and `uniform` count it like any other, and weights by name,
    of a mixture or an objective, leave it its share."""
    given = {"code": 0.5, "tables": 0.25, "topics": 0.25}
    found = study(
        tiny_config,
        arms={"given": {"mixture": given}, "told": {"mixer": {"name": "recommended"}}},
        traps={"noise": {"kind": "noise", "share": 0.2}},
        objectives={"natural": "natural", "uniform": "uniform", "mine": given},
    )
    written(found, "noise")
    trapped = [entry for entry in found.entries if entry.condition.trap == "noise"]
    runs = {entry.arm.name: found.run(entry) for entry in trapped}
    assert runs["given"]["mixture"] == pytest.approx(
        {"code": 0.4, "tables": 0.2, "topics": 0.2, "noise": 0.2}, abs=1e-5
    )
    assert runs["natural"]["mixture"] == "natural"
    plan = make_plan(RunConfig.model_validate(runs["sqrt"]))
    assert plan.domain_names == (*DOMAINS, "noise")
    objectives = {entry.objective: found.run(entry)["objective"] for entry in trapped if entry.arm.name == "told"}
    assert (objectives["natural"], objectives["uniform"]) == ("natural", "uniform")
    assert objectives["mine"] == runs["given"]["mixture"]


def test_members_of_a_late_domain_begin_without_it(tiny_config: Write) -> None:
    given = {"code": 0.5, "tables": 0.25, "topics": 0.25}
    arms = {"given": {"mixture": given}, "odm": ODM}
    found = study(tiny_config, arms=arms, traps={"late": {"kind": "late", "domain": "tables", "from_step": 5}})
    begin, after = found.configs(BEGIN), found.configs(ARMS)
    assert begin.keys() == {name for name in after if ".late." in name}
    assert not any(".late." in name for name in found.configs(FROZEN_ARMS))
    first, then = begin["seed1.late.given"], after["seed1.late.given"]
    assert first["data"]["domains"] == ["code", "topics"]
    assert first["mixture"] == {"code": 0.5, "topics": 0.25}
    assert first["train"]["stop_after"] == 5
    assert "stop_after" not in then["train"]
    assert then["checkpoint"]["domains"] == {"add": {"tables": 0.25}}
    assert first["run_dir"] == then["run_dir"]


def test_a_late_domain_comes_with_the_weight_that_its_rule_begins_with(tiny_config: Write) -> None:
    mine = {"code": 0.5, "tables": 0.2, "topics": 0.3}
    objectives, late = (
        {"uniform": "uniform", "mine": mine},
        {"late": {"kind": "late", "domain": "tables", "from_step": 5}},
    )
    found = study(tiny_config, arms={"rule": {"mixer": {"name": "recommended"}}}, objectives=objectives, traps=late)
    after, begin = found.configs(ARMS), found.configs(BEGIN)
    for objective, weight in (("uniform", 1 / 3), ("mine", 0.2)):
        came = after[f"seed1.late.rule@{objective}"]["checkpoint"]["domains"]["add"]
        assert came == {"tables": pytest.approx(weight)}
    assert make_plan(RunConfig.model_validate(begin["seed1.late.rule@mine"])).policy.initial_weights == pytest.approx(
        [0.625, 0.375]
    )


def test_bounds_of_a_late_domain_come_with_it(tiny_config: Write) -> None:
    arms = {"odm": {**ODM, "data.max_weight": {"tables": 0.4, "code": 0.7}}}
    found = study(tiny_config, arms=arms, traps={"late": {"kind": "late", "domain": "tables", "from_step": 5}})
    first, then = (found.configs(part)["seed1.late.odm"] for part in (BEGIN, ARMS))
    assert first["data"]["max_weight"] == {"code": 0.7}
    assert then["data"]["max_weight"] == {"tables": 0.4, "code": 0.7}
    assert then["checkpoint"]["accept_changed"] == ["constraints"]


# Statistics


def row(arm: str, seed: int, loss: float, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "arm": arm, "objective": "natural", "model": "", "budget": 12, "trap": "none", "seed": seed,
        "objective_loss": loss, "macro_loss": loss, "micro_loss": loss, "worst_loss": loss, "worst_domain": "code",
        "steps_to_target": None, "tokens": 6144, "noise_tokens": None, "seconds": 1.0, "member": f"seed{seed}.{arm}",
        "curve": (),
    }  # fmt: skip
    return Row(**{**values, **changes})


def test_smallest_visible_difference_is_seen_four_times_in_five() -> None:
    """By simulation, against scipy's own test."""
    rng = np.random.default_rng(5)
    for number in (3, 5, 8):
        shift = smallest_visible(2.0, number)
        assert shift is not None
        drawn = rng.normal(shift, 2.0, (40_000, number))
        assert (ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)
    assert smallest_visible(2.0, 1) is None
    assert smallest_visible(0.0, 5) == 0.0


def test_differences_are_paired_by_seed() -> None:
    rng = np.random.default_rng(1)
    theirs = {seed: row("natural", seed, 4 + loss) for seed, loss in enumerate(rng.normal(0, 0.1, 6))}
    mine = {
        seed: row("odm", seed, theirs[seed].objective_loss - 0.02 + noise)
        for seed, noise in enumerate(rng.normal(0, 0.01, 6))
    }
    found = difference("natural", "natural", mine, theirs, len(mine))
    assert found is not None
    test = ttest_rel([r.objective_loss for r in mine.values()], [r.objective_loss for r in theirs.values()])
    low, high = test.confidence_interval(0.95)
    half = found.interval.half_width
    assert half is not None
    assert (found.interval.mean - half, found.interval.mean + half) == pytest.approx((low, high))
    assert found.verdict == f"better by {-(low + high) / 2:.4f} ({-high:.4f} to {-low:.4f})"
    # Another order of the seeds, one that only one of the two has: the same pairs.
    again = difference("natural", "natural", dict(reversed(mine.items())) | {9: row("odm", 9, 0.0)}, theirs, 7)
    assert again is not None
    assert again.interval.mean == pytest.approx(found.interval.mean)
    assert again.interval.number == 6
    assert again.verdict == f"{found.verdict}, on 6 of 7 seeds"


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([4.1, 4.1, 4.1], "worse by 0.1000 (0.1000 to 0.1000)"),
        ([4.1, 3.9, 4.0], "no difference found"),
        ([3.9], "one seed, no interval"),
    ],
)
def test_verdicts(losses: list[float], verdict: str) -> None:
    theirs = {seed: row("natural", seed, 4.0) for seed in range(len(losses))}
    mine = {seed: row("odm", seed, loss) for seed, loss in enumerate(losses)}
    found = difference("natural", "natural", mine, theirs, len(mine))
    assert found is not None
    assert found.verdict == verdict


def test_the_best_static_arm_is_chosen_on_the_seeds_that_all_have() -> None:
    rows = {
        "natural": {1: row("natural", 1, 4.0), 2: row("natural", 2, 4.0)},
        "uniform": {1: row("uniform", 1, 3.9), 2: row("uniform", 2, 4.05)},
        "sqrt": {1: row("sqrt", 1, 3.95)},
    }
    assert best_of(rows) == ("uniform", "sqrt", "natural")
    del rows["sqrt"]
    assert best_of(rows) == ("uniform", "natural")
    assert best_of({"natural": {1: row("natural", 1, 4.0)}, "uniform": {2: row("uniform", 2, 4.0)}}) == ()


def test_results_of_rows(tiny_config: Write) -> None:
    """What each arm is compared with, in results.json, and the same in the tables."""
    found = study(tiny_config, traps={"noise": {"kind": "noise"}})
    losses = {"natural": 4.0, "uniform": 3.9, "sqrt": 3.8, "odm": 3.7, "odm-frozen": 3.6}
    rng, rows = np.random.default_rng(2), []
    for trap in ("none", "noise"):
        spent = {"trap": trap, "noise_tokens": 614 if trap == "noise" else None}
        for seed in (1, 2, 3):
            for arm, loss in losses.items():
                more = 0.5 if trap == "noise" else 0.0
                rows.append(row(arm, seed, loss + more + 0.001 * rng.standard_normal(), **spent))
    results = Results(found, tuple(rows), 30, 30)
    plain, noise = results.json()["cells"]
    # In each cell 4 arms against natural, 3 more pairs with the best static one, sqrt, and odm with its mean weights; 5
    # against sqrt without the trap.
    assert results.json()["comparisons"] == 2 * (4 + 3 + 1) + 5
    # The mean of an online arm is no control, whatever its loss.
    assert plain["best_static"] == "sqrt"
    against = {arm: plain["arms"][arm]["differences"].get("best_static", {}).get("baseline") for arm in losses}
    assert against == {"natural": "sqrt", "uniform": "sqrt", "sqrt": "uniform", "odm": "sqrt", "odm-frozen": "sqrt"}
    assert "natural" not in plain["arms"]["natural"]["differences"]
    mine = [r.objective_loss for r in rows if (r.arm, r.trap) == ("odm", "noise")]
    theirs = [r.objective_loss for r in rows if (r.arm, r.trap) == ("sqrt", "none")]
    record = noise["arms"]["odm"]["differences"]["best_static_without_trap"]
    low, high = ttest_rel(mine, theirs).confidence_interval(0.95)
    assert record["interval"] == pytest.approx([low, high])
    assert record["verdict"].startswith("worse by 0.39")
    assert noise["arms"]["odm"]["noise_share"] == pytest.approx(614 / 6144)
    assert noise["arms"]["odm"]["deviation"] == pytest.approx(np.std(mine, ddof=1))
    read = list(csv.DictReader(results.csv().splitlines()))
    assert [(line["arm"], line["seed"], line["trap"]) for line in read] == [(r.arm, str(r.seed), r.trap) for r in rows]
    text = markdown(results)
    assert f"| {record['verdict']} | 10.0 % |" in text
    assert len(re.findall(r"^\| odm ", text, re.MULTILINE)) == 3
    json.dumps(results.json(), allow_nan=False)


def results_of(found: ArenaStudy, losses: dict[str, list[float]], total: int | None = None) -> Results:
    """Results with these losses of seeds 1, 2, ..."""
    rows = [row(arm, seed, loss) for arm, all_seeds in losses.items() for seed, loss in enumerate(all_seeds, 1)]
    return Results(found, tuple(rows), len(rows), total or len(rows))


@pytest.mark.parametrize(
    ("odm", "natural", "answer"),
    [
        ([3.90, 3.92, 3.90], [4.0, 4.01, 3.99],
         "Answer: take 'odm', which is better by 0.0933 (0.0790 to 0.1077) than the best static mixture, 'natural'; worse than it: 'uniform'."),
        ([4.10, 3.92, 3.90], [4.0, 4.01, 3.99],
         "Answer: take the static mixture 'natural', which no rule beats beyond noise; not told apart from it: 'odm'; worse than it: 'uniform'."),
        ([4.10], [4.0, 4.01, 3.99],
         "Answer: take the static mixture 'natural', which no rule beats beyond noise; worse than it: 'uniform'; of a single seed: 'odm'."),
        ([3.90, 3.92], [4.0, 4.01, 3.99],
         "Answer: take 'odm', which is better by 0.0950 (0.0315 to 0.1585) than the best static mixture, 'natural', on 2 of 3 seeds; "
         "worse than it: 'uniform'."),
        ([3.9], [4.0], "Answer: none, for an interval takes two seeds that an arm and the best static arm, 'natural', both have."),
    ],
)  # fmt: skip
def test_the_answer_in_words(tiny_config: Write, odm: list[float], natural: list[float], answer: str) -> None:
    uniform = [loss + 0.2 + 0.001 * place for place, loss in enumerate(natural)]
    results = results_of(study(tiny_config), {"natural": natural, "uniform": uniform, "odm": odm})
    assert answer_text(results, results.cells[0]) == answer
    assert answer in markdown(results)
    part = results_of(study(tiny_config), {"natural": natural, "uniform": uniform, "odm": odm}, total=99)
    assert answer_text(part, part.cells[0]) == answer.replace("Answer", "Answer so far")


def test_a_rule_is_compared_with_its_own_mean_weights(tiny_config: Write) -> None:
    """Was it the adaptation? Also in the words; and a pair that is compared under two headings counts once."""
    losses = {"natural": [4.0, 4.1], "uniform": [4.2, 4.31], "odm": [3.9, 4.01], "odm-frozen": [3.8, 3.92]}
    results = results_of(study(tiny_config), losses)
    cell = results.cells[0]
    (record,) = results.json()["cells"]
    found = record["arms"]["odm"]["differences"]["frozen"]
    assert found["baseline"] == "odm-frozen"
    assert found["mean"] == pytest.approx(0.095)
    assert "frozen" not in record["arms"]["odm-frozen"]["differences"]
    verdict = found["verdict"]
    assert adaptation_text(cell) == f"Against its own mean weights from the first step on, 'odm' is {verdict}."
    assert adaptation_text(cell) in markdown(results)
    # natural-uniform, natural-odm, natural-frozen, odm-frozen: natural is the best static arm as well.
    assert results.json()["comparisons"] == 4
    assert results.num_comparisons < sum(len(found) for found in cell.differences.values())


def test_words_of_an_arena_without_static_arms_or_intervals(tiny_config: Write) -> None:
    found = study(tiny_config, controls=False, frozen_mean=False, seeds=[1, 2])
    text = markdown(Results(found, (row("odm", 1, 4.0), row("odm", 2, 4.1)), 2, 2))
    assert "There is no static arm to compare with." in text
    assert "by chance alone" not in text
    assert text.startswith("All 2 members are done.\n")


# What is refused


@pytest.mark.parametrize(
    ("arena", "said"),
    [
        ({"seeds": [1, 1]}, "seeds names 1 twice"),
        ({"seeds": []}, "seeds is empty"),
        ({"arms": {"a.b": {}}}, "a.b"),
        ({"arms": {"odm": ODM, "odm-frozen": {}}}, "the arm name odm-frozen is taken"),
        ({"arms": {"bad": {"train": {"lrr": 1}}}}, "arm bad: unknown key 'train.lrr'. Did you mean 'lr'?"),
        ({"arms": {"bad": {"mixture": {"code": 1}}}}, "arm bad: .*tables"),
        ({"arms": {"bad": {"mixer.": 1}}}, "arm bad: 'mixer.' is no key"),
        ({"arms": {"bad": {"train.global_batch": 16}}}, "arm bad: train.global_batch is 16, and 8 in the run's config"),
        ({"arms": {"bad": {"data.seq_length": 32}}}, "arm bad: data.seq_length is 32"),
        ({"arms": {"bad": {"evaluate.every": 1}}}, r"arm bad: evaluate\.every is 1"),
        ({"arms": {"bad": {"run_dir": "elsewhere"}}}, "arm bad: run_dir is elsewhere"),
        ({"traps": {"none": {"kind": "noise"}}}, "a trap cannot be called none"),
        ({"traps": {"t": {"kind": "nois"}}}, "kind: .*noise"),
        ({"traps": {"t": {"kind": "tiny", "domain": "cod"}}}, "the run has no domain 'cod'. Did you mean 'code'?"),
        ({"traps": {"t": {"kind": "tiny"}}}, "the kind tiny needs the key domain"),
        ({"traps": {"t": {"kind": "noise", "from_step": 3}}}, "from_step is not a key of the kind noise"),
        ({"traps": {"t": {"kind": "noise", "share": 0.1, "tokens": 9}}}, "share and tokens both"),
        ({"traps": {"t": {"kind": "noise", "tokens": 64}}}, "would have 64 training tokens, and one sample needs 65"),
        ({"traps": {"code": {"kind": "noise"}}}, "the data has a domain 'code' already"),
        ({"traps": {"t": {"kind": "late", "domain": "code", "from_step": 12}}}, "from_step is 12, and members end after 12"),
        ({"traps": {"t": {"kind": "noise", "seed": -1}}}, "traps.t.seed: .*greater than or equal to 0"),
        ({"seeds": [-1]}, "seeds.0: .*greater than or equal to 0"),
        ({"arms": {"a" * 49: {}}}, "at most 48"),
        ({"arms": {}, "controls": False}, "there is no arm"),
        ({"arms": {"natural": ODM}}, "arm natural: the name is that of a control, static with the mixture natural"),
        ({"arms": {"sqrt": {"mixture": "uniform"}}}, "arm sqrt: the name is that of a control"),
        ({"budgets": [12], "arms": {"bad": {"mixer": {"name": "aioli", "update_steps": 3}}}}, "arm bad, 12 steps: .*leaves none of a round of 3"),
        ({"arms": {"bad": {"mixer": {"name": "doremi", "reference": "nowhere"}}}}, "arm bad: .*nowhere/reference.json"),
        ({"arms": {"bad": {"mixture": {"code": 1, "tables": 0, "topics": 0}}}, "traps": {"t": {"kind": "late", "domain": "code", "from_step": 3}}},
         "arm bad, trap t, before its domain comes: .*are 0"),
        ({"models": {"m": {}}, "arms": {"bad": {"model.hidden_size": 16}}}, "model.hidden_size is 16, and 32 in the run's config"),
        ({"armz": {}}, "unknown key 'armz'"),
    ],
)  # fmt: skip
def test_refused(tiny_config: Write, arena: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_study(config(tiny_config, arena), [])


def test_a_run_that_stops_early_is_refused(tiny_config: Write) -> None:
    with pytest.raises(InputError, match=r"train\.stop_after is 5, so members would not reach their last step"):
        read_study(config(tiny_config, train={"stop_after": 5}), [])


def test_an_arm_given_twice_is_refused(tiny_config: Write) -> None:
    path = config(tiny_config)
    path.write_text(path.read_text().replace("  arms:\n", "  arms:\n    odm: {}\n"))
    with pytest.raises(InputError, match="odm"):
        read_study(path, [])


def test_interval_of_one_number_is_none() -> None:
    assert t_interval([1.0]).half_width is None
