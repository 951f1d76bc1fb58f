"""``megamix blend export``: runs and data sets as blends that megatron.core builds and DoReMi reads."""

from __future__ import annotations

import json
import re
import subprocess
import types
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from interop_files import EOD, VOCAB, blend, error_of, write_documents, write_tokenizer

from megamix.data.blend import Blend
from megamix.data.manifest import Manifest
from megamix.interop.average import mean_weights
from megamix.interop.weights import read_weights
from megamix.ledger import Ledger
from megamix.summary import RecordedRun

BATCH, SEQ, STEPS = 6, 8, 50
NAMES = ("web", "code", "books")
SIZES = (600, 200, 100)
SHARDS = (400, 200)
Line = dict[str, Any]


def write_data(folder: Path) -> Path:
    """Three domains with files of their own for validation; the training files of web are two, of 400 and 200
    tokens."""
    raw = folder / "raw"
    for name, size in zip(NAMES, SIZES, strict=True):
        parts = (
            [(f"train-0000{n}-of-00002", part) for n, part in enumerate(SHARDS)] if name == "web" else [("train", size)]
        )
        for part, tokens in parts:
            write_documents(raw / name / part, [10] * (tokens // 10), seed=tokens)
        write_documents(raw / name / "validation", [10] * 5, seed=1)
    web = [f"{raw}/web/train-0000{n}-of-00002" for n in range(2)]
    train = [*web, f"{raw}/code/train", f"{raw}/books/train"]
    valid = [f"{raw}/{name}/validation" for name in NAMES]
    (folder / "blend.json").write_text(json.dumps({"train": train, "valid": valid, "test": None}))
    blend("adopt", "--per-split-data-args-path", folder / "blend.json", "--out", folder / "data", "--tokenizer",
          write_tokenizer(folder))  # fmt: skip
    return folder / "data"


def write_run(run_dir: Path, manifest: Path, lines: Sequence[Line], steps: int = STEPS) -> Path:
    """The record of a run of ``steps`` steps with these lines of weights.jsonl."""
    run_dir.mkdir()
    config = {
        "run_dir": str(run_dir),
        "data": {"manifest": str(manifest), "seq_length": SEQ},
        "model": {"architecture": "neox", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 16},
        "mixer": {"name": "odm"},
        "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": 2, "lr": 1e-3, "seed": 7},
    }
    (run_dir / "config.resolved.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (run_dir / "weights.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    metrics = {"event": "train", "step": steps, "tokens": steps * BATCH * SEQ, "domain_loss": {}, "loss": 1.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(metrics) + "\n" if steps else "", encoding="utf-8")
    return run_dir


def lines_of(
    changes: Mapping[int, Sequence[float]], names: Sequence[str] = NAMES, state: Blend | None = None
) -> tuple[list[Line], Blend]:
    """Lines of weights.jsonl for weights by position, and the blend that goes on from there."""
    blend = state or Blend([50, 20, 10], changes[0], 7)
    lines = []
    for position, weights in changes.items():
        blend.set_weights(weights, at=position)
        segment = blend.segment_at(position)
        line = {"step": position // BATCH, "position": position, "domain_names": list(names)}
        lines.append({**line, "domain_weights": segment.weights.tolist(), "segment": segment.to_json()})
    return lines, blend


def some_changes(seed: int, number: int) -> dict[int, list[float]]:
    rng = np.random.default_rng(seed)
    positions = [0, *sorted(rng.choice(np.arange(1, STEPS), number, replace=False) * BATCH)]
    return {int(position): rng.dirichlet(np.ones(3)).tolist() for position in positions}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def run(data: Path) -> tuple[Path, list[Line], Blend]:
    """A run of 50 steps whose weights changed 12 times, and once more past its end."""
    changes = {**some_changes(1, 12), STEPS * BATCH: [0.1, 0.1, 0.8], (STEPS + 1) * BATCH: [0.2, 0.0, 0.8]}
    lines, state = lines_of(changes)
    return write_run(data.parent / "run", data, lines), lines, state


def at_every_position(lines: Sequence[Line], start: int, end: int) -> list[list[float]]:
    """The weights at each of the positions [start, end), looked up one by one."""
    return [
        [line for line in lines if line["position"] <= position][-1]["domain_weights"] for position in range(start, end)
    ]


def as_dict(text: str) -> dict[str, float]:
    return json.loads(text)


def test_mean_is_the_integral(run: tuple[Path, list[Line], Blend]) -> None:
    run_dir, lines, state = run
    end = STEPS * BATCH
    mean = as_dict(blend("export", run_dir, "--format", "json"))
    expected = [sum(map(Fraction, column)) / end for column in zip(*at_every_position(lines, 0, end), strict=True)]
    for name, exact in zip(NAMES, expected, strict=True):
        assert abs(Fraction(mean[name]) - exact) < Fraction(1, 10**15)
    realised = as_dict(blend("export", run_dir, "--format", "json", "--which", "realised"))
    counts = state.counts_at(end)
    assert realised == {name: count / end for name, count in zip(NAMES, counts.tolist(), strict=True)}
    for name in NAMES:
        assert abs(realised[name] - mean[name]) * end <= (len(NAMES) - 1) / 2 + 1e-9
    assert as_dict(blend("export", run_dir, "--format", "json", "--which", "initial")) == dict(
        zip(NAMES, lines[0]["domain_weights"], strict=True)
    )
    assert as_dict(blend("export", run_dir, "--format", "json", "--which", "final")) == {
        "web": 0.2,
        "code": 0,
        "books": 0.8,
    }


def test_mean_of_many_changes_does_not_drift() -> None:
    """0.1 + 0.2 + 0.7 at a hundred thousand positions: adding up in floats would be off by 1e-12."""
    lines, _ = lines_of({position: [0.1, 0.2, 0.7] for position in (0, 1)})
    ledger = Ledger([{**lines[0], "position": position} for position in range(100_000)], 0, "low_discrepancy")
    assert list(mean_weights(ledger, 0, 300_000).values()) == [0.1, 0.2, 0.7]


def test_a_domain_that_left_and_one_that_came(data: Path, tmp_path: Path) -> None:
    """math was there up to position 120, when books came."""
    first, state = lines_of(
        {0: [0.5, 0.25, 0.25], 60: [0.25, 0.25, 0.5], 180: [0.0, 0.0, 1.0]}, ("math", "web", "code")
    )
    state.take(120)
    state = state.with_domains([20, 10, 30], [1, 2, 9], [1, 2, None], lambda weights: [0.25, 0.5, 0.25])
    segment = state.segment_at(120)
    change = {
        "step": 20, "position": 120, "domain_names": list(NAMES), "change": {"add": ["books"], "remove": ["math"]},
        "domain_weights": segment.weights.tolist(), "segment": segment.to_json(),
    }  # fmt: skip
    run_dir = write_run(
        tmp_path / "run", data, [*first, change]
    )  # the change takes the place of what was announced for 180
    mean = as_dict(blend("export", run_dir, "--format", "json"))
    # Of 300 positions 60 with the first weights, 60 with the second, 180 with the last.
    assert mean == pytest.approx(
        {
            "math": (60 * 0.5 + 60 * 0.25) / 300,
            "web": (60 * 0.25 + 60 * 0.25 + 180 * 0.25) / 300,
            "code": (60 * 0.25 + 60 * 0.5 + 180 * 0.5) / 300,
            "books": 180 * 0.25 / 300,
        },
        rel=1e-14,
    )
    realised = as_dict(blend("export", run_dir, "--format", "json", "--which", "realised"))
    assert sum(realised.values()) == pytest.approx(1)
    assert all(abs(realised[name] - mean[name]) * 300 <= 2 for name in mean)
    assert "domain 'math' has the weight 0.15 and no files in" in error_of("export", run_dir)
    # Before 120 there is no books, after it no math.
    blend("export", run_dir, "--stages-at", 120 * SEQ, "--format", "json", "--out", tmp_path / "phases")
    after = read_weights(tmp_path / "phases/phase_2.json", ["math", *NAMES])
    assert after == {"math": 0, "web": 0.25, "code": 0.5, "books": 0.25}
    assert blend("export", run_dir, "--which", "final").startswith("0.1666")  # the last change, web's two files
    blend("export", run_dir, "--format", "doremi", "--out", tmp_path / "doremi.json")
    doremi = json.loads((tmp_path / "doremi.json").read_text())
    assert doremi["eval_domain_weights"]["math"] == 0


def test_text_for_megatron(run: tuple[Path, list[Line], Blend], data: Path, tmp_path: Path) -> None:
    run_dir, raw = run[0], data.parent / "raw"
    shown = blend("export", run_dir, "--which", "final", "--out", tmp_path / "blend.txt")
    assert shown == f"{tmp_path}/blend.txt\n"
    words = (tmp_path / "blend.txt").read_text().split()
    assert words[1::2] == [f"{raw}/web/train-00000-of-00002", f"{raw}/web/train-00001-of-00002", f"{raw}/books/train"]
    assert [float(word) for word in words[::2]] == [0.2 * (400 / 600), 0.2 * (200 / 600), 0.8]
    assert read_weights(tmp_path / "blend.txt", NAMES) == pytest.approx({"web": 0.2, "code": 0, "books": 0.8})

    mean = as_dict(blend("export", run_dir, "--format", "json"))
    blend("export", run_dir, "--format", "per-split-json", "--out", tmp_path / "blend.json")
    written = json.loads((tmp_path / "blend.json").read_text())
    assert read_weights(tmp_path / "blend.json", NAMES) == pytest.approx(mean, rel=1e-14)
    assert written["test"] is None
    assert written["valid"][1::2] == [f"{raw}/{name}/validation" for name in NAMES]
    assert [float(word) for word in written["valid"][::2]] == [600 / 900, 200 / 900, 100 / 900]

    blend("export", run_dir, "--format", "doremi", "--out", tmp_path / "doremi.json")
    doremi = json.loads((tmp_path / "doremi.json").read_text())
    assert doremi == {
        "train_domain_weights": mean,
        "eval_domain_weights": dict(zip(NAMES, (6 / 9, 2 / 9, 1 / 9), strict=True)),
    }
    assert read_weights(tmp_path / "doremi.json", NAMES) == pytest.approx(mean, rel=1e-14)


def test_a_data_set_and_weights_from_a_file(data: Path, tmp_path: Path) -> None:
    assert as_dict(blend("export", data, "--format", "json")) == dict(zip(NAMES, (6 / 9, 2 / 9, 1 / 9), strict=True))
    config = {"train_domain_weights": {"web": 1, "code": 3, "books": 0}}
    (tmp_path / "doremi.json").write_text(json.dumps(config))
    words = blend("export", data / "manifest.json", "--weights", tmp_path / "doremi.json").split()
    assert [float(word) for word in words[::2]] == pytest.approx([0.25 * 2 / 3, 0.25 / 3, 0.75])


def gpt_config(**keys: Any) -> Any:
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is in the dev extra")
    tokenizer = types.SimpleNamespace(eod=EOD, pad=None, vocab_size=VOCAB, unique_identifiers={"class": "stand-in"})
    return gpt.GPTDatasetConfig(
        random_seed=3, sequence_length=SEQ, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        tokenizer=tokenizer, mid_level_dataset_surplus=0.05, **keys,
    )  # fmt: skip


def build(samples: int, config: Any) -> list[Any]:
    """Megatron's own train, valid and test data sets."""
    builder = pytest.importorskip(
        "megatron.core.datasets.blended_megatron_dataset_builder", reason="megatron-core is in the dev extra"
    )
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    sizes = [samples, 30, None if config.blend_per_split else 0]
    return builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, sizes, lambda: True, config).build()


def shares_of(dataset: Any) -> dict[str, float]:
    """Which share of a blend's samples comes from each file."""
    counts = np.bincount(dataset.dataset_index, minlength=len(dataset.datasets))
    paths = [part.dataset.path_prefix for part in dataset.datasets]
    return dict(zip(paths, (counts / counts.sum()).tolist(), strict=True))


def parsed(words: Sequence[str]) -> Any:
    utils = pytest.importorskip("megatron.core.datasets.utils", reason="megatron-core is in the dev extra")
    return utils.get_blend_from_list(words)


@pytest.mark.parametrize("which", ["mean", "final"])
def test_megatron_builds_the_exported_blend(run: tuple[Path, list[Line], Blend], tmp_path: Path, which: str) -> None:
    """Real GPTDatasets: as many samples of every file as its weight says; of a domain of weight 0, none."""
    samples = 4000
    out = tmp_path / "blend.json"
    blend("export", run[0], "--which", which, "--format", "per-split-json", "--out", out)
    written = json.loads(out.read_text())
    config = gpt_config(blend_per_split=[parsed(written[split]) for split in ("train", "valid", "test")])
    train, valid, test = build(samples, config)
    assert test is None
    shares = shares_of(train)
    words = written["train"]
    for weight, prefix in zip(words[::2], words[1::2], strict=True):
        assert abs(shares[prefix] - float(weight)) * samples <= len(shares)
    assert len(shares) == (4 if which == "mean" else 3)
    web = [share for prefix, share in shares.items() if "/web/" in prefix]
    assert web[0] == pytest.approx(2 * web[1], abs=len(shares) / samples)
    assert shares_of(valid)[written["valid"][1]] == pytest.approx(6 / 9, abs=0.1)
    sample = train[0]
    assert sample["tokens"].shape == (SEQ,)


def test_megatron_refuses_a_weight_of_0(data: Path) -> None:
    """Why such a domain is left out."""
    prefixes = [f"{data.parent}/raw/{name}/train" for name in ("code", "books")]
    with pytest.raises(AssertionError):
        build(100, gpt_config(blend_per_split=[(prefixes, [1.0, 0.0]), None, None]))


def test_megatron_splits_adopted_files_where_we_do(tmp_path: Path) -> None:
    for name, number in (("web", 37), ("code", 25)):
        write_documents(tmp_path / name, [12] * number, seed=number)
    split = "80,10,10"
    blend("adopt", f"web={tmp_path}/web", f"code={tmp_path}/code", "--out", tmp_path / "data", "--tokenizer",
          write_tokenizer(tmp_path), "--split", split)  # fmt: skip
    words = blend("export", tmp_path / "data").split()
    train, valid, _ = build(500, gpt_config(blend=parsed(words), split=split))
    manifest = Manifest.load(tmp_path / "data")
    for theirs, ours in ((train, "train"), (valid, "validation")):
        for part, entry in zip(theirs.datasets, manifest.domains, strict=True):
            (ends,) = getattr(entry, ours).ranges
            assert (part.indices[0], part.indices[-1] + 1) == ends
    assert "cannot say. Use --format megatron" in error_of("export", tmp_path / "data", "--format", "per-split-json")


def test_phases(run: tuple[Path, list[Line], Blend], tmp_path: Path) -> None:
    run_dir, lines, _ = run
    out = tmp_path / "phases"
    shown = blend("export", run_dir, "--stages", 4, "--out", out)
    names = ["phase_1.json", "phase_2.json", "phase_3.json", "phase_4.json", "phases.json", "phases.sh"]
    assert shown.split() == [str(out / name) for name in names]
    phases = json.loads((out / "phases.json").read_text())
    assert phases["phase_transition_iterations"] == [12, 25, 38]  # 12.5 and 37.5, halves to the even one
    assert (phases["train_samples"], phases["global_batch_size"], phases["seq_length"]) == (300, BATCH, SEQ)
    total = dict.fromkeys(NAMES, 0.0)
    for number, (phase, (first, end)) in enumerate(
        zip(phases["phases"], ((0, 12), (12, 25), (25, 38), (38, 50)), strict=True), start=1
    ):
        assert phase["iterations"] == [first, end]
        assert (phase["samples"], phase["tokens"]) == ((end - first) * BATCH, (end - first) * BATCH * SEQ)
        expected = np.mean(at_every_position(lines, first * BATCH, end * BATCH), axis=0)
        np.testing.assert_allclose([phase["weights"][name] for name in NAMES], expected, rtol=1e-13)
        read = read_weights(out / f"phase_{number}.json", NAMES)
        np.testing.assert_allclose([read[name] for name in NAMES], expected, rtol=1e-13)
        for name in NAMES:
            total[name] += phase["weights"][name] * phase["samples"] / 300
    assert total == pytest.approx(as_dict(blend("export", run_dir, "--format", "json")), rel=1e-13)

    tokens = BATCH * SEQ
    blend(
        "export",
        run_dir,
        "--stages-at",
        f"{10.4 * tokens},{30 * tokens:.6e}",
        "--format",
        "megatron",
        "--out",
        tmp_path / "two",
    )
    again = json.loads((tmp_path / "two/phases.json").read_text())
    assert again["phase_transition_iterations"] == [10, 30]
    assert (tmp_path / "two/phase_1.txt").read_text().count("/train") == 4


@pytest.mark.parametrize(
    ("iteration", "file"), [(None, 1), (0, 1), (11, 1), (12, 2), (24, 2), (25, 3), (49, 4), (50, 4)]
)
def test_the_script_picks_the_phase_of_a_checkpoint(
    run: tuple[Path, list[Line], Blend], tmp_path: Path, iteration: int | None, file: int
) -> None:
    out, saved = tmp_path / "my phases", tmp_path / "checkpoints"
    blend("export", run[0], "--stages", 4, "--out", out)
    saved.mkdir()
    if iteration is not None:
        (saved / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    script = f'set -eu; source "{out}/phases.sh"; pick_phase "{saved}"; printf "%s\\n" "${{PHASE_ARGS[@]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "--global-batch-size", str(BATCH), "--seq-length", str(SEQ), "--train-samples", "300",
        "--phase-transition-iterations", "12,25,38", "--per-split-data-args-path", f"{out}/phase_{file}.json",
    ]  # fmt: skip


def test_one_phase_has_no_transitions(run: tuple[Path, list[Line], Blend], tmp_path: Path) -> None:
    blend("export", run[0], "--stages", 1, "--format", "megatron", "--out", tmp_path)
    script = (tmp_path / "phases.sh").read_text()
    assert "--phase-transition-iterations" not in script.split("PHASE_ARGS=(")[1]
    assert '--split 100,0,0 --data-args-path "$folder/$file"' in script
    assert (tmp_path / "phase_1.txt").read_text() == blend("export", run[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--which", "best"], "--which best: no such weights. Known: final, initial, mean, realised"),
        (["{run}", "--format", "megatrom"], "--format megatrom: no such format. Did you mean 'megatron'"),
        (["{run}", "--weights", "w.json"], "--weights is for data sets, but .* is a run"),
        (["{data}", "--which", "mean"], "--which mean is for runs, but .* is a data set"),
        (["{data}", "--weights", "absent.json"], "cannot read absent.json"),
        (["{data}", "--stages", "2", "--out", "x"], "--stages is for runs, but .* is a data set"),
        (["{data}/absent"], "absent is neither a run .* nor a data set"),
        (["{run}", "--stages", "2"], "--stages writes several files. Give their folder with --out"),
        (["{run}", "--stages", "0", "--out", "x"], "--stages 0: .*run has 50 iterations on record. Give 1 to 50"),
        (["{run}", "--stages", "51", "--out", "x"], "--stages 51: .* Give 1 to 50"),
        (["{run}", "--stages", "2", "--stages-at", "5", "--out", "x"], "--stages and --stages-at are both given"),
        (["{run}", "--stages", "2", "--which", "final", "--out", "x"], "--which final does not go with it"),
        (["{run}", "--stages", "2", "--format", "x", "--out", "x"], "--format x: no such format"),
        (["{run}", "--stages-at", "many", "--out", "x"], "--stages-at many: expected numbers of tokens"),
        (["{run}", "--stages-at", "nan", "--out", "x"], "--stages-at nan: expected numbers of tokens"),
        (
            ["{run}", "--stages-at", "1e9", "--out", "x"],
            r"cuts at the iterations \d+ \(48 tokens each\), .* between 48 and 2352",
        ),
        (["{run}", "--stages-at", "480,240", "--out", "x"], "at the iterations 10, 5 .* leaves a phase from 10 to 5"),
        (["{run}", "--stages-at", "3", "--out", "x"], "leaves a phase from 0 to 0"),
        (["{run}", "--out", "{run}/metrics.jsonl/x"], r"cannot write .*metrics.jsonl/x: "),
        (["{fresh}"], "has not trained yet: no weights to average. Use --which initial"),
        (["{fresh}", "--stages", "1", "--out", "x"], "fresh has 0 iterations on record"),
        (["{lost}"], "--format megatron needs its data set. cannot read the manifest .* Or use --format json"),
        (["{lost}", "--format", "doremi"], "--format doremi needs its data set"),
        (["{back}", "--format", "json"], "line 2 .* is at position -6, expected positions that rise"),
    ],
)
def test_refused(
    run: tuple[Path, list[Line], Blend], data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    lines = run[1]
    places = {"run": run[0], "data": data}
    places["fresh"] = write_run(tmp_path / "fresh", data, lines[:1], steps=0)
    places["lost"] = write_run(tmp_path / "lost", tmp_path / "nowhere", lines)
    places["back"] = write_run(tmp_path / "back", data, [lines[0], {**lines[1], "position": -6}])
    given = [re.sub(r"{(\w+)}", lambda found: str(places[found[1]]), argument) for argument in arguments]
    seen = error_of("export", *given)
    assert re.search(message, seen), seen
    assert not Path("x").exists()


def test_a_run_without_its_data_still_has_weights(run: tuple[Path, list[Line], Blend], tmp_path: Path) -> None:
    lost = write_run(tmp_path / "lost", tmp_path / "nowhere", run[1])
    assert RecordedRun.open(lost).manifest is None
    assert blend("export", lost, "--format", "json") == blend("export", run[0], "--format", "json")
    fresh = write_run(tmp_path / "fresh", tmp_path / "nowhere", run[1][:1], steps=0)
    assert list(as_dict(blend("export", fresh, "--format", "json", "--which", "initial"))) == list(NAMES)


def test_files_with_white_space(tmp_path: Path) -> None:
    data = write_data(tmp_path / "my files")
    assert "holds white space, at which Megatron cuts --data-path" in error_of("export", data)
    written = json.loads(blend("export", data, "--format", "per-split-json"))
    assert parsed(written["train"])[0][2] == f"{tmp_path}/my files/raw/code/train"
