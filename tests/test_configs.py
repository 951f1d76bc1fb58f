"""The configs that ship: each loads and plans, its model is the size it says, and the parts go together."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megamix.analysis.doctor import doctor
from megamix.core.config import load_config, validate
from megamix.core.config_files import merge, read_yaml
from megamix.core.files import shipped_folder
from megamix.data.sampler import Slice
from megamix.engines.models.config import ModelConfig
from megamix.engines.models.layers import Decoder, Embedding, Head
from megamix.studies.arena.config import ArenaConfig
from megamix.studies.arena.members import nested
from megamix.studies.runs import read_section
from megamix.training.config import KINDS, RunConfig
from megamix.training.mixture import FileMixture

CONFIGS = shipped_folder("configs")
RUNS = sorted(CONFIGS.glob("*.yaml"))
PILE_RUNS = [path for path in RUNS if path.stem.startswith("pile_")]
SIZES = ("160m", "280m", "410m")
MIXTURES = ("odm", "shares", "uniform", "doremi_256k", "doremi_50k", "doremi_proxy")
GPUS = {"deepspeed_1": 1, "deepspeed_8": 8, "deepspeed_64": 64, "megatron_1": 1, "megatron_8": 8, "megatron_64": 64}
# Table 1 of the Pile's paper (arXiv 2101.00027): GiB and epochs of each component.
PILE = {
    "Pile-CC": (227.12, 1.0), "PubMed Central": (90.27, 2.0), "Books3": (100.96, 1.5), "OpenWebText2": (62.77, 2.0),
    "ArXiv": (56.21, 2.0), "Github": (95.16, 1.0), "FreeLaw": (51.15, 1.5), "StackExchange": (32.20, 2.0),
    "USPTO Backgrounds": (22.90, 2.0), "PubMed Abstracts": (19.26, 2.0), "Gutenberg (PG-19)": (10.88, 2.5),
    "OpenSubtitles": (12.98, 1.5), "Wikipedia (en)": (6.38, 3.0), "DM Mathematics": (7.75, 2.0),
    "Ubuntu IRC": (5.52, 2.0), "BookCorpus2": (6.30, 1.5), "EuroParl": (4.59, 2.0), "HackerNews": (3.90, 2.0),
    "YoutubeSubtitles": (3.73, 2.0), "PhilPapers": (2.38, 2.0), "NIH ExPorter": (1.89, 2.0), "Enron Emails": (0.88, 2.0),
}  # fmt: skip
EFFECTIVE = sum(size * epochs for size, epochs in PILE.values())


@pytest.fixture(autouse=True)
def outside_of_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an empty folder, beside the one file that a config expects another run to have left."""
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    wanted = load_config(RunConfig, CONFIGS / "pile_doremi_3_target.yaml").mixture
    assert isinstance(wanted, FileMixture)
    wanted.file.parent.mkdir(parents=True)
    wanted.file.write_text(json.dumps(dict.fromkeys(PILE, 1 / len(PILE))))


def load(path: Path, *overrides: str) -> RunConfig:
    """The config with a vocabulary, as the data would give it."""
    config = load_config(RunConfig, path, list(overrides))
    return config if config.model.vocab_size else load_config(RunConfig, path, [*overrides, "model.vocab_size=1024"])


def real_parameters(model: ModelConfig, seq_length: int) -> int:
    """Counted on the layers themselves, without memory for them."""
    with torch.device("meta"):
        decoders = [Decoder(model, index + 1, 1, seq_length) for index in range(model.num_layers)]
        layers = [Embedding(model, 0, 1), *decoders, Head(model, model.num_layers + 1, 1)]
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_each_run_has_a_plan_and_a_model_of_the_size_it_says(path: Path) -> None:
    config = load(path)
    count = real_parameters(config.model, config.data.seq_length)
    assert count == config.model.num_parameters()
    text = doctor(config, plan_only=True).text()
    train, tokens = config.train, config.train.steps * config.train.global_batch * config.data.seq_length
    assert f"{count:,} parameters" in text
    assert f"{train.steps:,} steps, {train.steps * train.global_batch:,} samples, {tokens:,} tokens" in text
    assert f"{config.engine.world_size()} = " in text
    assert "memory per rank, GiB" in text


@pytest.mark.parametrize("path", sorted((CONFIGS / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_preset_is_the_size_of_its_name(path: Path) -> None:
    model = ModelConfig.model_validate({"preset": path.stem, "vocab_size": 1024 if "-2m" in path.stem else 50304})
    said = path.stem.rpartition("-")[2]
    named = float(said[:-1]) * {"m": 1e6, "b": 1e9}[said[-1]]
    assert real_parameters(model, 64) == pytest.approx(named, rel=0.18)


def test_runs_of_the_pile_know_its_domains_and_fit_80_gb() -> None:
    assert len(PILE_RUNS) >= 12
    for path in PILE_RUNS:
        config = load(path)
        report = doctor(config, plan_only=True)
        rows = {row[0]: row for table in report.parts if not isinstance(table, str) for row in table.rows}
        assert PILE.keys() <= rows.keys()
        # Expected tokens, natural share, initial weight, planned epochs.
        weights = [float(rows[name][3]) for name in PILE]
        assert sum(weights) == pytest.approx(1.0, abs=0.002)
        tokens = config.train.steps * config.train.global_batch * config.data.seq_length
        for name, weight in zip(PILE, weights, strict=True):
            expected = weight * tokens / float(rows[name][1].replace(",", ""))
            assert float(rows[name][4]) == pytest.approx(expected, rel=0.04, abs=0.02)
        # The totals with whole logits and with the linear loss.
        stages = [row for name, row in rows.items() if name.startswith("stage")]
        assert all(max(float(row[-3]), float(row[-1])) < 70 for row in stages)


def test_the_run_of_the_paper() -> None:
    """ODM, arXiv 2312.02406: 16 layers x 2048, 49 B tokens, 2.5e-4 -> 2.5e-5, weights of the Pile for 2000 steps."""
    config = load(CONFIGS / "pile_1b_odm.yaml")
    model, train = config.model, config.train
    assert (model.num_layers, model.hidden_size, config.data.seq_length) == (16, 2048, 1024)
    assert (train.global_batch, train.steps) == (480, 100_000)
    assert train.lr_at(999) == pytest.approx(2.5e-4)
    assert train.lr_at(99_999) == pytest.approx(2.5e-5)
    assert config.mixer.model_dump()["warmup_steps"] == 2000
    assert isinstance(config.mixture, dict)
    for name, (size, epochs) in PILE.items():
        assert config.mixture[name] == pytest.approx(size * epochs / EFFECTIVE, abs=1.2e-4)


def test_tokens_of_the_pile_follow_the_size_of_its_parts() -> None:
    """An epoch of the published Pile (1254 GiB, with repetitions) is 300 B tokens; a domain's share of bytes is taken
    for its share of tokens."""
    counts = read_yaml(CONFIGS / "pile" / "data.yaml")["data"]["token_counts"]
    assert list(counts) == list(PILE)
    for name, (size, _) in PILE.items():
        assert counts[name] == pytest.approx(300e9 * size / EFFECTIVE, rel=0.02)


@pytest.mark.parametrize("name", ["shares", "doremi_256k", "doremi_50k"])
def test_mixtures_name_every_domain_in_order(name: str) -> None:
    mixture = read_yaml(CONFIGS / "pile" / f"{name}.yaml")["mixture"]
    assert list(mixture) == list(PILE)
    assert sum(mixture.values()) == pytest.approx(1.0, abs=2e-4)


def test_published_weights_are_those_of_doremi() -> None:
    """Table 1 of arXiv 2305.10429: three quarters on three domains."""
    config = load(CONFIGS / "pile_1b_doremi_256k.yaml")
    assert isinstance(config.mixture, dict)
    assert [config.mixture[name] for name in ("Pile-CC", "OpenWebText2", "Wikipedia (en)")] == [0.6057, 0.1019, 0.0699]
    text = doctor(load(CONFIGS / "pile_1b_uniform.yaml"), plan_only=True).text()
    assert "warning: domain 'Enron Emails': weight 0.0455 reads it 10.6 times" in text


@pytest.mark.parametrize(
    ("one", "other"), [("demo", "demo_megatron"), ("pile_1b_odm", "pile_1b_odm_megatron")], ids=["demo", "pile"]
)
def test_the_engines_train_the_same_run(one: str, other: str) -> None:
    """The engine block is all that differs, and where the record goes."""
    first, second = (load(CONFIGS / f"{name}.yaml") for name in (one, other))
    assert (first.engine.name, second.engine.name) == ("deepspeed", "megatron")
    assert first.engine.world_size() == second.engine.world_size()
    assert first.run_dir != second.run_dir
    change: dict[str, Any] = {"engine": first.engine, "run_dir": first.run_dir}
    assert second.model_copy(update=change) == first


def doremi_runs(path: Path) -> list[RunConfig]:
    """Reference, proxy and target of a job."""
    from megamix.studies.doremi.study import DoremiStudy, DoremiStudyConfig

    data = read_yaml(path)
    steps = validate(DoremiStudyConfig, data.pop("doremi"), path.name)
    job = DoremiStudy(data, steps, Path(data["run_dir"]), path.name)
    runs = (job.reference_run(1, None), job.proxy_run(1), job.target_run())
    return [validate(RunConfig, run, path.name) for run in runs]


@pytest.mark.parametrize("path", sorted((CONFIGS / "doremi").glob("pile_*.yaml")), ids=lambda path: path.stem)
def test_each_doremi_job_is_three_runs(path: Path) -> None:
    """A reference run and a proxy of one size, and a target of 1 B; those of 280 M are shipped by themselves too."""
    reference, proxy, target = doremi_runs(path)
    assert reference.model == proxy.model
    assert reference.model.preset == f"neox-{path.stem.partition('_')[2]}"
    assert reference.train == proxy.train
    assert target.model == load(CONFIGS / "pile_1b_odm.yaml").model
    assert target.train == load(CONFIGS / "pile_1b_odm.yaml").train
    if path.stem == "pile_280m":
        assert reference == load(CONFIGS / "pile_doremi_1_reference.yaml")
        assert proxy == load(CONFIGS / "pile_doremi_2_proxy.yaml")
        assert target == load(CONFIGS / "pile_doremi_3_target.yaml")


def test_the_demo_of_doremi() -> None:
    """The target is the demo but for its weights and steps; reference and proxy are the same run but for theirs."""
    demo = read_yaml(CONFIGS / "demo.yaml")
    reference, proxy, target = doremi_runs(CONFIGS / "doremi" / "demo.yaml")
    wanted = {
        **demo, "mixer": {"name": "static"}, "shadow": [], "mixture": target.mixture, "run_dir": target.run_dir,
        "train": {**demo["train"], "steps": 750},
    }  # fmt: skip
    assert target == validate(RunConfig, wanted, "demo.yaml")
    assert reference.train == proxy.train
    assert reference.model == proxy.model == target.model
    assert (reference.mixture, reference.mixer.name) == ("natural", "static")
    assert (proxy.mixture, proxy.mixer.name) == ("uniform", "doremi")


@pytest.mark.parametrize("engine", GPUS)
def test_sizes_and_mixtures_go_with_every_engine(engine: str, tmp_path: Path) -> None:
    for size, mixture in zip(itertools.cycle(SIZES), MIXTURES, strict=False):
        parts = [
            CONFIGS / f"{part}.yaml" for part in ("pile/run", f"pile/{size}", f"pile/{mixture}", f"engines/{engine}")
        ]
        path = tmp_path / "composed.yaml"
        path.write_text(f"include: [{', '.join(map(str, parts))}]\nrun_dir: runs/composed\n")
        config = load(path)
        ranks = config.engine.world_size()
        assert ranks == GPUS[engine]
        assert config.model.preset == f"neox-{size}"
        # Refuses a batch that does not divide.
        Slice(config.train.global_batch, config.train.micro_batch, 0, config.engine.data_size(ranks))
        assert f"{ranks} = " in doctor(config, plan_only=True).text()


@pytest.mark.parametrize(("before", "after"), itertools.permutations(GPUS, 2))
def test_engine_blocks_leave_nothing_of_each_other(before: str, after: str, tmp_path: Path) -> None:
    """Included over a run with another of them, a block means what it means alone."""

    def engine(*names: str) -> object:
        path = tmp_path / "composed.yaml"
        parts = ", ".join(
            str(CONFIGS / f"{part}.yaml") for part in ("pile/run", *(f"engines/{name}" for name in names))
        )
        path.write_text(f"include: [{parts}]\nrun_dir: runs/composed\n")
        assert all(read_yaml(CONFIGS / "engines" / f"{name}.yaml").keys() == {"engine"} for name in names)
        return load(path).engine

    assert engine(before, after) == engine(after)


ARENAS = [CONFIGS / "arena" / "demo.yaml", *sorted((CONFIGS / "evidence").glob("*.yaml"))]
PARTS = ("regime", "arms")


@pytest.mark.parametrize("path", [path for path in ARENAS if path.stem not in PARTS], ids=lambda path: path.stem)
def test_each_arena_is_of_whole_runs(path: Path) -> None:
    """Its arms are configs, at every size; its seeds are not those that a rule was made with."""
    base, arena = read_section(ArenaConfig, "arena", path, [], {}, "")
    assert not set(arena.seeds) & set(range(101, 106))
    for name, changes in arena.arms.items():
        config = validate(RunConfig, merge(base, nested(changes, name), KINDS), name)
        assert config.engine.world_size() == 1
        assert config.train.steps % config.evaluate.every == 0


def test_evidence_is_as_the_makefile_says() -> None:
    """`make evidence` runs each long arena, the small model first; each has a folder of its own."""
    makefile = (CONFIGS.parent / "Makefile").read_text(encoding="utf-8")
    (listed,) = re.findall(r"for name in (.+); do .*\n.*configs/evidence/\$\$name\.yaml", makefile)
    names = listed.split()
    assert names[:2] == ["mini-pile", "workshop"]
    assert sorted([*names, "short", *PARTS]) == sorted(path.stem for path in (CONFIGS / "evidence").glob("*.yaml"))
    assert "configs/evidence/short.yaml" in makefile
    found = {
        name: read_section(ArenaConfig, "arena", CONFIGS / "evidence" / f"{name}.yaml", [], {}, "") for name in names
    }
    assert {name: base["run_dir"] for name, (base, _) in found.items()} == {
        name: f"runs/evidence/{name}" for name in names
    }
    size = {
        name: validate(RunConfig, {**base, "model": {**base["model"], "vocab_size": 1024}}, name)
        for name, (base, _) in found.items()
    }
    assert real_parameters(size["mini-pile"].model, 128) == pytest.approx(0.5e6, rel=0.1)
    assert real_parameters(size["mini-pile-2m"].model, 128) == pytest.approx(2e6, rel=0.15)
    short, long = found["mini-pile"][1].arms["ado"], found["mini-pile-1600"][1].arms["ado"]
    assert short["mixer"]["name"] == long["mixer"]["name"] == "ado"
    for key in ("fit_from", "start", "refit_every", "fit_every"):
        assert long["mixer"][key] == 4 * short["mixer"][key]
