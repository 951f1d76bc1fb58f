"""``megamix blend export``: runs and data sets as blends that megatron.core builds and DoReMi reads."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from interop_files import (
    BATCH,
    NAMES,
    SEQ,
    STEPS,
    Line,
    as_dict,
    at_every_position,
    blend,
    error_of,
    lines_of,
    write_run,
)
from typer.testing import CliRunner

from megamix.cli import app
from megamix.core.config import validate
from megamix.data.blend.blend import Blend
from megamix.mixing.weight_files import read_weights
from megamix.training.config import MixConfig
from megamix.training.records.ledger import Ledger
from megamix.training.records.mean_weights import mean_weights
from megamix.training.records.recorded_run import RecordedRun, write_mix

pytest_plugins = ["interop_fixtures"]


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


@pytest.mark.parametrize("cuts", [[], [7], [3, 31]])
def test_phases_say_how_far_they_are_from_the_run(
    run: tuple[Path, list[Line], Blend], tmp_path: Path, cuts: list[int]
) -> None:
    """Against weights written out for every position."""
    run_dir, lines, _ = run
    at = ",".join(str(cut * BATCH * SEQ) for cut in cuts)
    options = ["--stages-at", at] if cuts else ["--stages", "1"]
    result = CliRunner().invoke(app, ["blend", "export", str(run_dir), *options, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "phases.json").read_text())["deviation"]
    far, where = [], []
    for first, end in itertools.pairwise([0, *cuts, STEPS]):
        rows = np.array(at_every_position(lines, first * BATCH, end * BATCH))
        far.append(np.abs(rows - rows.mean(axis=0)))
        where += range(first * BATCH, end * BATCH)
    differences = np.concatenate(far)
    assert found["most"] == pytest.approx(differences.max(), rel=1e-12)
    assert found["mean"] == pytest.approx(differences.sum(axis=1).mean() / 2, rel=1e-12)
    largest = differences[found["iteration"] * BATCH : (found["iteration"] + 1) * BATCH, NAMES.index(found["domain"])]
    assert largest.max() == pytest.approx(found["most"], rel=1e-12)
    assert f"The phases are the run but for {found['mean']:.2%} of its samples" in result.stderr


def test_a_data_set_and_weights_from_a_file(data: Path, tmp_path: Path) -> None:
    assert as_dict(blend("export", data, "--format", "json")) == dict(zip(NAMES, (6 / 9, 2 / 9, 1 / 9), strict=True))
    config = {"train_domain_weights": {"web": 1, "code": 3, "books": 0}}
    (tmp_path / "doremi.json").write_text(json.dumps(config))
    words = blend("export", data / "manifest.json", "--weights", tmp_path / "doremi.json").split()
    assert [float(word) for word in words[::2]] == pytest.approx([0.25 * 2 / 3, 0.25 / 3, 0.75])


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
        (["{back}", "--format", "json"], "line 3 .* is at position 0, expected positions that rise"),
        (["{below}", "--format", "json"], "weights.jsonl, line 2 is damaged: position is -6"),
    ],
)
def test_refused(
    run: tuple[Path, list[Line], Blend], data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    lines = run[1]
    places = {"run": run[0], "data": data}
    places["fresh"] = write_run(tmp_path / "fresh", data, lines[:1], steps=0)
    places["lost"] = write_run(tmp_path / "lost", tmp_path / "nowhere", lines)
    back = {**lines[2], "position": 0, "segment": {**lines[2]["segment"], "start": 0}}
    places["back"] = write_run(tmp_path / "back", data, [lines[0], lines[1], back])
    places["below"] = write_run(tmp_path / "below", data, [lines[0], {**lines[1], "position": -6}])
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


def test_the_record_of_another_trainer(run: tuple[Path, list[Line], Blend], tmp_path: Path) -> None:
    """An adapter's folder, with weights.jsonl and mix.json, has the blends of the run with the same weights."""
    run_dir, folder = run[0], tmp_path / "megamix"
    folder.mkdir()
    shutil.copy(run_dir / "weights.jsonl", folder)
    config = RecordedRun.open(run_dir).config
    batches = config.train.model_dump(include={"steps", "global_batch", "micro_batch", "seed"})
    sections = {**config.model_dump(mode="json", include={"data", "mixer"}), "train": batches}
    write_mix(folder, validate(MixConfig, sections, "mix.yaml"), STEPS)
    for options in (["megatron"], ["per-split-json"], ["doremi"], ["json", "--which", "realised"]):
        assert blend("export", folder, "--format", *options) == blend("export", run_dir, "--format", *options)
    for source, out in ((run_dir, tmp_path / "theirs"), (folder, tmp_path / "ours")):
        blend("export", source, "--stages", "3", "--out", out)
    assert (tmp_path / "ours" / "phases.json").read_text() == (tmp_path / "theirs" / "phases.json").read_text()
    (folder / "mix.json").write_text("{}")
    assert "mix.json cannot be read (KeyError: 'config')" in error_of("export", folder)


@pytest.mark.parametrize("options", [["--format", "per-split-json"], ["--stages", "2"]])
def test_says_what_validation_files_ask_for(
    run: tuple[Path, list[Line], Blend], tmp_path: Path, options: list[str]
) -> None:
    result = CliRunner().invoke(app, ["blend", "export", str(run[0]), *options, "--out", str(tmp_path / "out")])
    assert "Give Megatron --eval-iters above 0" in result.stderr
