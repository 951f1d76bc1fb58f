"""Another set of domains on resume: the rules by themselves, what is refused, and whole runs that change on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from records import lines, samples

from megamix.analysis.inspect import inspect_sample
from megamix.core.errors import InputError, ResumeRefused
from megamix.data.tokens.manifest import Manifest
from megamix.mixing.mixers import make_mixer
from megamix.mixing.mixers.stats import DomainStats
from megamix.prepare.pipeline import prepare
from megamix.training.config import DomainChangeConfig
from megamix.training.domain_change import find_change

Write = Callable[..., Path]
Run = Callable[..., Any]


def entry(name: str, sha256: str = "0", tokens: int = 1000) -> Any:
    split = SimpleNamespace(model_dump=lambda **_: {"sha256": sha256}, tokens=tokens)
    return SimpleNamespace(name=name, train=split, validation=split)


def plan(names: dict[str, str], tokens: dict[str, int] | None = None, **asked: Any) -> Any:
    """A plan of domains with these data, and a config that asks for these changes."""
    checkpoint = SimpleNamespace(domains=DomainChangeConfig.model_validate(asked))
    entries = [entry(name, sha256, (tokens or {}).get(name, 1000)) for name, sha256 in names.items()]
    return SimpleNamespace(entries=entries, config=SimpleNamespace(checkpoint=checkpoint))


def digests(names: dict[str, str]) -> dict[str, str]:
    from megamix.data.tokens.manifest import digest

    return {name: digest(entry(name, sha256)) for name, sha256 in names.items()}


OLD = {"web": "w", "code": "c", "mail": "m"}


def change(new: dict[str, str], accept_data: bool = False, **asked: Any) -> Any:
    tokens = asked.pop("tokens", None)
    return find_change(digests(OLD), plan(new, tokens, **asked), accept_data, "step_4")


def test_the_same_domains_are_no_change() -> None:
    assert change(OLD) is None
    assert change(OLD, remove=["gone-before"]) is None


def test_weights_by_the_rules() -> None:
    weights = np.array([0.5, 0.3, 0.2])
    removed = change({"web": "w", "mail": "m"}, remove=["code"])
    assert removed.rescale(weights) == pytest.approx([5 / 7, 2 / 7])
    added = change({"law": "l", **OLD}, add={"law": 0.1})
    assert added.rescale(weights) == pytest.approx([0.1, 0.45, 0.27, 0.18])
    tokens = {"web-en": 3000, "web-fr": 1000}
    parts = {"web-en": "e", "web-fr": "f", "code": "c", "mail": "m"}
    split = change(parts, tokens=tokens, split={"web": ["web-en", "web-fr"]})
    assert split.rescale(weights) == pytest.approx([0.375, 0.125, 0.3, 0.2])
    by_share = change(parts, split={"web": {"web-en": 1, "web-fr": 4}})
    assert by_share.rescale(weights) == pytest.approx([0.1, 0.4, 0.3, 0.2])
    replaced = change({**OLD, "code": "c2"}, replace=["code"])
    assert replaced.rescale(weights) == pytest.approx(weights)
    assert replaced.restarted == ("code",)
    everything = change(
        {"mail": "m2", "law": "l", "web-en": "e", "web-fr": "f"},
        add={"law": 0.2}, remove=["code"], replace=["mail"], split={"web": {"web-en": 1, "web-fr": 1}},
    )  # fmt: skip
    assert everything.rescale(weights) == pytest.approx([0.8 * 2 / 7, 0.2, 0.8 * 2.5 / 7, 0.8 * 2.5 / 7])
    assert everything.sources == (2, None, None, None)
    assert everything.parents == (2, None, 0, 0)
    assert everything.record() == {
        "before": ["web", "code", "mail"],
        "added": ["law"],
        "removed": ["code"],
        "split": {"web": ["web-en", "web-fr"]},
        "replaced": ["mail"],
    }


def test_what_nobody_asked_for_is_refused_all_at_once() -> None:
    with pytest.raises(ResumeRefused) as refused:
        change({"web": "w2", "law": "l", "mail": "m"})
    text = str(refused.value)
    assert "domain 'law' is new (checkpoint.domains.add={law: WEIGHT})" in text
    assert "domain 'code' is gone (checkpoint.domains.remove=[code])" in text
    assert "the data of domain 'web' was " in text
    assert "checkpoint.domains.replace=[web]" in text
    with pytest.raises(ResumeRefused, match=r"another order \(data\.domains=\[web, code, mail\] is the old one\)"):
        change({"code": "c", "web": "w", "mail": "m"})


@pytest.mark.parametrize(
    ("new", "asked", "message"),
    [
        (OLD | {"x": "x"}, {"add": {"x": 0.1}, "remove": ["code"]}, "takes 'code' away, but the data still has it"),
        (
            {"web": "w", "code": "c"},
            {"remove": ["mail"], "add": {"law": 0.1}},
            "names 'law', which the data does not have",
        ),
        (OLD | {"x": "x"}, {"add": {"x": 1.5}}, "'x' has the weight 1.5, expected weights from 0 to 1"),
        (OLD | {"x": "x", "y": "y"}, {"add": {"x": 0.6, "y": 0.6}}, "the weights sum to 1.2"),
        ({"web": "w", "code": "c", "a": "a"}, {"split": {"mail": ["a", "b"]}}, r"of which the data lacks \['b'\]"),
        ({"web": "w", "code": "c", "a": "a"}, {"split": {"mail": {"a": 0}}}, "the shares of 'mail' are .*positive"),
        ({"web": "w", "code": "c"}, {"split": {"mail": ["code"]}}, "the part 'code' of 'mail' is a domain already"),
    ],
)
def test_changes_that_cannot_be_made(new: dict[str, str], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        change(new, **asked)


def test_nothing_left_of_the_weights() -> None:
    only = change({"mail": "m"}, remove=["web", "code"])
    with pytest.raises(InputError, match=r"\(mail\) all had weight 0, so 1\.0000 of the weights has nowhere to go"):
        only.rescale(np.array([0.5, 0.5, 0.0]))


@pytest.mark.parametrize("preset", ["official", "paper", "exp3", "dataflex"])
def test_the_mixers_estimates_follow_by_name(preset: str) -> None:
    config = {"name": "odm", "preset": preset}
    old = make_mixer(config, ["web", "code", "mail"], [1, 1, 1])
    for step in (1, 2, 3):
        old.update(DomainStats(nats=[30.0, 20.0, 55.0], tokens=[10, 10, 10]), step)
    state = json.loads(json.dumps(old.state_dict()))
    new = make_mixer(config, ["mail", "law", "web-en", "web-fr"], [1, 1, 1, 1])
    new.adopt_state(state, [2, None, 0, 0], np.array([0.4, 0.2, 0.2, 0.2]))
    before, after = state["estimates"], new.state_dict()["estimates"]
    assert [after[0], after[2], after[3]] == [before[2], before[0], before[0]]
    rewards = np.exp(before) if state["reward"] == "exp_loss" else np.array(before)
    mean = np.log(rewards.mean()) if state["reward"] == "exp_loss" else rewards.mean()
    assert after[1] == pytest.approx(mean)
    assert new.weights.tolist() == [0.4, 0.2, 0.2, 0.2]
    assert new.update(DomainStats(nats=np.ones(4), tokens=np.ones(4)), 4).sum() == pytest.approx(1)
    with pytest.raises(InputError, match="the state is of other domains: only in the state: code"):
        make_mixer(config, ["web", "mail"], [1, 1]).load_state_dict(state)


# Whole runs. ---------------------------------------------------------------------------------------------------------

CHANGED = ["data.domains=[code, packages, topics]", "checkpoint.domains={remove: [tables], add: {packages: 0.25}}"]


def given(run: Path, steps: range, names: list[str]) -> dict[str, list[int]]:
    """The samples each domain gave in ``steps``, counted from 1, in order."""
    taken: dict[str, list[int]] = {name: [] for name in names}
    log = samples(run)
    for step in steps:
        for domain, sample in log[step]:
            taken[names[domain]].append(sample)
    return taken


def test_domains_are_added_and_removed_in_mid_run(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(run_dir=str(run), data={"domains": ["code", "tables", "topics"]}, engine={"pipeline": 2})
    megamix("train", config, "train.stop_after=5")
    refused = megamix("train", config, CHANGED[0], code=3).stderr
    assert "domain 'packages' is new (checkpoint.domains.add={packages: WEIGHT})" in refused
    assert "domain 'tables' is gone (checkpoint.domains.remove=[tables])" in refused
    planned = megamix("doctor", config, *CHANGED).stdout
    assert "domain 'packages' added" in planned
    assert "domain 'tables' removed" in planned
    twice = tmp_path / "twice"
    shutil.copytree(run, twice)
    megamix("train", config, *CHANGED)

    # Cursors: what stays goes on reading where it stood, and what is new starts at its beginning.
    before = given(run, range(1, 6), ["code", "tables", "topics"])
    after = given(run, range(6, 13), ["code", "packages", "topics"])
    for name in ("code", "topics"):
        whole = before[name] + after[name]
        assert len(set(whole)) == len(whole)
    alone = tmp_path / "alone"
    fresh = {"code": 0.0, "packages": 1.0, "topics": 0.0}
    megamix(
        "train", config, f"run_dir={alone}", CHANGED[0], f"mixture={json.dumps(fresh)}", "train.stop_after=2",
        "mixer={name: static}",
    )  # fmt: skip
    first = given(alone, range(1, 3), ["code", "packages", "topics"])["packages"]
    assert after["packages"][:8] == first[:8]

    # Weights: 0.25 for the new one, the others scaled; at the step resumed at, and at the one announced already.
    ledger = lines(run / "weights.jsonl")
    changes = [line for line in ledger if "change" in line]
    assert [line["position"] for line in changes] == [40, 48]
    held = next(line for line in reversed(ledger) if line["position"] <= 40 and "change" not in line)
    kept = np.array([held["domain_weights"][0], held["domain_weights"][2]])
    kept *= 0.75 / kept.sum()
    assert changes[0]["domain_names"] == ["code", "packages", "topics"]
    assert changes[0]["domain_weights"] == pytest.approx([kept[0], 0.25, kept[1]], abs=1e-12)
    assert changes[0]["change"]["domains"]["added"] == ["packages"]

    # The same change again is none; and where the job was interrupted does not matter.
    megamix("train", config, f"run_dir={twice}", *CHANGED, "train.stop_after=5")
    megamix("train", config, f"run_dir={twice}", *CHANGED, "train.stop_after=8")
    megamix("train", config, f"run_dir={twice}", *CHANGED)
    assert samples(twice) == samples(run)
    drop = ("timestamp",)
    assert [
        {key: value for key, value in line.items() if key not in drop} for line in lines(twice / "weights.jsonl")
    ] == [{key: value for key, value in line.items() if key not in drop} for line in ledger]

    # And everything that reads the run understands it.
    assert "tables" in megamix("inspect", run).stdout
    for step, names in ((3, ["code", "tables", "topics"]), (6, ["code", "packages", "topics"])):
        for row in range(8):
            domain, sample = samples(run)[step][row]
            text = inspect_sample(run, (step - 1) * 8 + row).text()
            assert f"domain      {names[domain]} " in text
            assert f"sample      {sample} of " in text
    megamix("plot", run)
    assert (run / "plots" / "weights.png").is_file()


def test_domains_are_split_and_replaced(
    megamix: Run, tiny_config: Write, text_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    run, text, data = tmp_path / "run", tmp_path / "text", tmp_path / "data"
    config = tiny_config(run_dir=str(run))
    megamix("train", config, "train.stop_after=4")
    shutil.copytree(text_dir, text)
    topics = (text / "topics.jsonl").read_text().splitlines(keepends=True)
    (text / "topics.jsonl").unlink()
    (text / "topics-a.jsonl").write_text("".join(topics[: len(topics) // 2]))
    (text / "topics-b.jsonl").write_text("".join(topics[len(topics) // 2 :]))
    tables = (text / "tables.jsonl").read_text().splitlines(keepends=True)
    (text / "tables.jsonl").write_text("".join(reversed(tables)))
    tokenizer = str(data_dir / "tokenizer.json")
    prepare([str(text)], data, tokenizer=tokenizer, validation_fraction=0.1, workers=1, progress=False)
    other = f"data.manifest={data}"
    refused = megamix("train", config, other, code=3).stderr
    assert "the data of domain 'tables' was " in refused
    assert "domain 'topics-a' is new" in refused
    asked = "checkpoint.domains={split: {topics: [topics-a, topics-b]}, replace: [tables]}"
    megamix("train", config, other, asked)
    ledger = lines(run / "weights.jsonl")
    changed = next(line for line in ledger if "change" in line)
    held = next(line for line in reversed(ledger) if line["position"] <= 32 and "change" not in line)
    old = dict(zip(held["domain_names"], held["domain_weights"], strict=True))
    new = dict(zip(changed["domain_names"], changed["domain_weights"], strict=True))
    assert new["topics-a"] + new["topics-b"] == pytest.approx(old["topics"])
    assert {name: new[name] for name in ("code", "packages", "tables")} == pytest.approx(
        {name: old[name] for name in ("code", "packages", "tables")}
    )
    counts = dict(zip(changed["domain_names"], changed["segment"]["counts"], strict=True))
    before = given(run, range(1, 5), held["domain_names"])
    assert counts == {
        "code": len(before["code"]), "packages": len(before["packages"]), "tables": 0, "topics-a": 0, "topics-b": 0,
    }  # fmt: skip
    # A sample from before the change is read from the data the run had then.
    domain, sample = samples(run)[2][0]
    text_then = inspect_sample(run, 8).text()
    assert f"domain      {held['domain_names'][domain]} " in text_then
    assert f"sample      {sample} of " in text_then


def test_a_changed_mixture_or_constraint_acts_from_the_resume_on(
    megamix: Run, tiny_config: Write, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = tiny_config(run_dir=str(run), mixer={"name": "static"}, mixture="uniform")
    megamix("train", config, "train.stop_after=4")
    mixture = "mixture={code: 0.1, packages: 0.2, tables: 0.3, topics: 0.4}"
    refused = megamix("train", config, mixture, code=3).stderr
    assert "made with another mixture" in refused
    assert "checkpoint.accept_changed=[mixture]" in refused
    megamix("train", config, mixture, "checkpoint.accept_changed=[mixture]", "train.stop_after=8")
    capped = "data.max_weight=0.3"
    assert "made with another constraints" in megamix("train", config, mixture, capped, code=3).stderr
    megamix("train", config, mixture, capped, "checkpoint.accept_changed=[constraints]")
    ledger = lines(run / "weights.jsonl")
    assert [(line["position"], line["domain_weights"]) for line in ledger] == [
        (0, [0.25] * 4),
        (32, pytest.approx([0.1, 0.2, 0.3, 0.4])),
        (64, pytest.approx([0.4 / 3, 0.8 / 3, 0.3, 0.3])),
    ]
    names = ledger[0]["domain_names"]
    assert names == ["code", "packages", "tables", "topics"]
    first = {name: len(taken) for name, taken in given(run, range(1, 5), names).items()}
    assert first == dict.fromkeys(names, 8)
    resolved = yaml.safe_load((run / "config.resolved.yaml").read_text())
    assert resolved["data"]["max_weight"] == 0.3


# Stages, and the end of the data. ------------------------------------------------------------------------------------


def test_stages_alone_and_before_a_mixer(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    """Steps of 512 tokens. Stages at steps 1 (before any statistics), 4 and 8; ODM takes over after its warm-up."""
    stages = [
        (0, "uniform"),
        (512, "natural"),
        (2048, {"code": 1, "packages": 1, "tables": 0, "topics": 2}),
        (4000, "uniform"),
    ]
    mixture = {"stages": [{"from_tokens": tokens, "weights": weights} for tokens, weights in stages]}
    alone = tmp_path / "alone"
    megamix("train", tiny_config(run_dir=str(alone), mixture=mixture, mixer={"name": "static"}))
    ledger = lines(alone / "weights.jsonl")
    assert [line["effective_step"] for line in ledger] == [0, 1, 4, 8]
    assert ledger[2]["domain_weights"] == [0.25, 0.25, 0.0, 0.5]
    assert ledger[0]["domain_weights"] == ledger[3]["domain_weights"] == [0.25] * 4
    log = samples(alone)
    assert not any(domain == 2 for step in range(5, 9) for domain, _ in log[step])
    parts = tmp_path / "parts"
    for stop in (3, 12):
        megamix(
            "train",
            tiny_config(run_dir=str(parts), mixture=mixture, mixer={"name": "static"}),
            f"train.stop_after={stop}",
        )
    assert samples(parts) == log
    warm = tmp_path / "warm"
    megamix("train", tiny_config(run_dir=str(warm), mixture=mixture, mixer={"name": "odm", "warmup_steps": 5}))
    ledger = lines(warm / "weights.jsonl")
    # The statistics of step 6 are the first to change weights, for the step after the next: counted from 0, step 7.
    assert [line["effective_step"] for line in ledger] == [0, 1, 4, 7, 8, 9, 10, 11, 12, 13]
    assert [line["is_warmup"] for line in ledger] == [True, True, True, *[False] * 7]


def test_a_run_that_stops_where_a_domain_is_used_up(
    megamix: Run, tiny_config: Write, data_dir: Path, tmp_path: Path
) -> None:
    """Two samples a step of each domain, of which one may give 11."""
    run = tmp_path / "run"
    windows = (Manifest.load(data_dir).domain("tables").train.tokens - 1) // 64
    data = {"max_epochs": {"tables": 11.5 / windows}, "on_exhausted": "stop"}
    config = tiny_config(
        run_dir=str(run), data=data, mixture="uniform", mixer={"name": "static"}, evaluate={"every": 0}
    )
    assert "so the run will stop near step 5 of 12" in megamix("doctor", config).stdout
    assert (
        f"domain 'tables' is used up after step 5 of 12 (data.max_epochs {11.5 / windows:g} x {windows} samples)"
        in (megamix("train", config).stderr)
    )
    names = lines(run / "weights.jsonl")[0]["domain_names"]
    assert {name: len(taken) for name, taken in given(run, range(1, 6), names).items()} == dict.fromkeys(names, 10)
    assert max(samples(run)) == 5
    assert [(line["event"], line["step"]) for line in lines(run / "metrics.jsonl")][-1] == ("evaluate", 5)
    record = (run / "metrics.jsonl").read_text()
    assert "is used up after step 5 of 12" in megamix("train", config).stderr
    assert (run / "metrics.jsonl").read_text() == record
    longer = [f"data.max_epochs={{tables: {15 / windows}}}", "checkpoint.accept_changed=[constraints]"]
    assert "is used up after step 7 of 12" in megamix("train", config, *longer).stderr


def test_a_run_that_begins_has_no_domains_to_change(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    """It would train with the domain that is to come later from its first step on."""
    config = tiny_config(checkpoint={"every": 0, "domains": {"add": {"tables": 0.1}}})
    said = megamix("train", config, code=2).stderr
    assert "checkpoint.domains.add changes the domains of a run that goes on, but" in said
    assert "has no checkpoint" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
