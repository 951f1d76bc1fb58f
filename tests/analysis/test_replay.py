"""``megamix replay``: a run's own mixer gives its own weights, others what they would have asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from records import lines
from studied_runs import BATCH, NAMES, OWN, SHADOWS, STEPS, studied_runs
from typer.testing import CliRunner

from megamix.analysis.replay import Replay, replay
from megamix.cli import app
from megamix.core.errors import InputError
from megamix.data.tokens.manifest import Manifest
from megamix.interop.blend_files.export import export_blend
from megamix.mixing.mixers import DomainStats
from megamix.training.records.step_statistics import StatisticsWriter, read_statistics


@pytest.fixture(scope="module")
def runs(data_dir: Path) -> Path:
    return studied_runs(data_dir)


@pytest.fixture(scope="module")
def replayed(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Replay, Path]:
    out = tmp_path_factory.mktemp("replay") / "out"
    return replay(runs / "plain", SHADOWS, out), out


def at_every_sample(path: Path) -> np.ndarray:
    """float64 [samples, K]: the weights in effect."""
    rows = lines(path)
    weights = np.empty((STEPS * BATCH, len(rows[0]["domain_names"])))
    for line in rows:
        weights[line["position"] :] = line["domain_weights"]
    return weights


def test_own_mixer_gives_own_weights(runs: Path, replayed: tuple[Replay, Path]) -> None:
    """Line by line and bit for bit, with constraints, stages and what is announced ahead."""
    _, out = replayed
    assert lines(out / "odm-official.jsonl") == lines(runs / "plain" / "weights.jsonl")


def test_a_domain_that_is_in_no_evaluation_is_in_the_objective_of_a_rule(
    runs: Path, replayed: tuple[Replay, Path], tmp_path: Path
) -> None:
    """As one without validation text is: the record has the objective of the others alone."""
    run = shutil.copytree(runs / "plain", tmp_path / "plain", ignore=shutil.ignore_patterns("checkpoints"))
    rows = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    for row in rows:
        if row["event"] == "evaluate":
            del row["domain_loss"]["code"]
            del row["objective"]["code"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    replay(run, SHADOWS, tmp_path / "out")
    for name in NAMES:
        assert lines(tmp_path / "out" / f"{name}.jsonl") == lines(replayed[1] / f"{name}.jsonl")


def test_others_are_what_shadows_were(runs: Path, replayed: tuple[Replay, Path]) -> None:
    """Of a run without shadows: what they wrote beside the same run."""
    _, out = replayed
    for name in NAMES:
        assert lines(out / f"{name}.jsonl") == lines(runs / "shadowed" / "shadow" / f"{name}.jsonl")


def test_table(runs: Path, replayed: tuple[Replay, Path]) -> None:
    found, out = replayed
    assert [one.name for one in found.mixers] == NAMES
    used = at_every_sample(runs / "plain" / "weights.jsonl")
    assert list(found.used.mean.values()) == pytest.approx(used.mean(axis=0).tolist(), abs=1e-12)
    paper, doremi, own = found.mixers
    weights = at_every_sample(out / "odm-paper.jsonl")
    assert list(paper.mean.values()) == pytest.approx(weights.mean(axis=0).tolist(), abs=1e-12)
    assert paper.distance == pytest.approx(np.abs(weights - used).sum(axis=1).mean() / 2, abs=1e-12)
    assert paper.distance > 0.001
    assert own.distance == found.used.distance == 0
    last = lines(out / "doremi.jsonl")[-1]
    assert list(doremi.mean.values()) == last["average_weights"]
    assert list(doremi.final.values()) == last["domain_weights"]
    shown = found.report().text()
    assert f"{paper.distance:.4f}" in shown
    assert f"{paper.mean['code']:.4f}" in shown


def test_result_is_a_blend(data_dir: Path, replayed: tuple[Replay, Path]) -> None:
    found, out = replayed
    blend = export_blend(data_dir, "megatron", weights=out / "odm-paper.mean.json").text.split()
    weights = [float(weight) for weight in blend[::2]]
    # One file a domain, in the order of the manifest.
    expected = [found.mixers[0].mean[name] for name in Manifest.load(data_dir).domain_names]
    assert weights == pytest.approx(expected, rel=1e-6)
    assert (out / "odm-paper.png").read_bytes().startswith(b"\x89PNG")


def test_command(runs: Path, tmp_path: Path) -> None:
    """Without --mixer the run's own, into RUN/replay."""
    run = tmp_path / "run"
    shutil.copytree(runs / "plain", run)
    done = CliRunner().invoke(app, ["replay", str(run)])
    assert done.exit_code == 0, done.output
    assert "distance from used" in done.output
    assert lines(run / "replay" / "odm-official.jsonl") == lines(run / "weights.jsonl")


def test_what_cannot_be_replayed(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "plain", run)
    for mixer, message in (
        ({"name": "odm", "preset": "papr"}, "Did you mean 'paper'"),
        ({}, "needs the key 'name'"),
        ({"name": "doremi", "reference": "cache"}, "was trained without reference losses"),
        ({"name": "odm", "reward_from": "evaluation"}, "the losses of evaluations are not on record"),
    ):
        with pytest.raises(InputError, match=message):
            replay(run, [mixer], tmp_path / "out")
    config, weights = run / "config.resolved.yaml", run / "weights.jsonl"
    config.write_text(config.read_text().replace("manifest: ", "manifest: /nowhere"))
    with pytest.raises(InputError, match="its stages can only be worked out with the data set"):
        replay(run, [OWN])
    changed = {**lines(weights)[-1], "change": {"parts": ["mixture"], "domains": None}, "timestamp": ""}
    weights.write_text(weights.read_text() + json.dumps(changed) + "\n")
    with pytest.raises(InputError, match=r"was changed on resume after step 12 \(mixture\)"):
        replay(run, [OWN])
    shutil.rmtree(run / "statistics")
    weights.write_bytes((runs / "plain" / "weights.jsonl").read_bytes())
    with pytest.raises(InputError, match="has no sums of its steps"):
        replay(run, [OWN])


def sums(step: int, excess: bool = False) -> DomainStats:
    return DomainStats([step + 0.1, 2.0 * step], [step, 3], [0.1, step] if excess else None)


def write(
    run: Path, resumed: int | None, steps: range, excess: bool = False, names: tuple[str, ...] = ("a", "b")
) -> None:
    writer = StatisticsWriter(run, names, resumed)
    for step in steps:
        writer.write(step, sums(step, excess))
    writer.close()


def test_statistics_are_cut_back_on_resume(tmp_path: Path) -> None:
    write(tmp_path, None, range(1, 8))
    (path,) = (tmp_path / "statistics").iterdir()
    whole = path.read_bytes()
    # A row that was cut off in writing does not count, whether it is read or written after.
    path.write_bytes(whole[:-3])
    assert read_statistics(tmp_path).num_steps == 6
    write(tmp_path, 6, range(7, 8))
    assert path.read_bytes() == whole
    write(tmp_path, 4, range(5, 8))
    assert path.read_bytes() == whole
    # With a reference from step 5 on, in a file of its own, dropped by a resume before it.
    write(tmp_path, 4, range(5, 9), excess=True)
    found = read_statistics(tmp_path)
    assert found.num_steps == 8
    assert found.excess_nats is None
    assert found.step(8, np.array([0.5, 0.5])).to_state() == {
        **sums(8).to_state(), "weights": [0.5, 0.5],
    }  # fmt: skip
    assert len(list((tmp_path / "statistics").iterdir())) == 2
    write(tmp_path, 3, range(4, 8))
    assert path.read_bytes() == whole
    assert len(list((tmp_path / "statistics").iterdir())) == 1
    write(tmp_path, None, range(1, 3), excess=True)
    excess = read_statistics(tmp_path).excess_nats
    assert excess is not None
    assert excess.tolist() == [[0.1, 1.0], [0.1, 2.0]]


MANY = tuple(f"d{index}" for index in range(1000))


def sparse_sums(step: int) -> DomainStats:
    """Of 5 of 1,000 domains; of none in step 3."""
    tokens = np.zeros(1000, np.int64)
    tokens[[0, 999, 7 * step, 400 + step, 500]] = [1, 2**40, 3, 4, 5] if step != 3 else 0
    nats = tokens * 0.1
    return DomainStats(nats, tokens, -nats if step % 2 else np.zeros(1000))


def write_sparse(run: Path, resumed: int | None, steps: range) -> None:
    writer = StatisticsWriter(run, MANY, resumed)
    for step in steps:
        writer.write(step, sparse_sums(step))
    writer.close()


def test_sums_of_many_domains_are_of_those_present(tmp_path: Path) -> None:
    """As they were, to the last bit, in a hundredth of the bytes, cut back on resume."""
    write_sparse(tmp_path, None, range(1, 11))
    found = read_statistics(tmp_path)
    assert found.num_steps == 10
    for step in range(1, 11):
        weights = np.full(1000, 0.001)
        given = sparse_sums(step)
        wanted = DomainStats(given.nats, given.tokens, given.excess_nats, weights)
        assert found.step(step, weights).to_state() == wanted.to_state()
    (path,) = (tmp_path / "statistics").iterdir()
    whole = path.read_bytes()
    head = len(whole.split(b"\n")[0]) + 1
    assert len(whole) - head == 8 * (10 + 9 * 5 * 4)
    for cut in (1, 8, 100, 168):
        path.write_bytes(whole[:-cut])
        assert read_statistics(tmp_path).num_steps == 9
        write_sparse(tmp_path, 9, range(10, 11))
        assert path.read_bytes() == whole
    write_sparse(tmp_path, 4, range(5, 11))
    assert path.read_bytes() == whole
    for place, wrong in ((head, 1001), (head, -1), (head + 8, 1000)):
        data = bytearray(whole)
        data[place : place + 8] = wrong.to_bytes(8, "little", signed=True)
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"from_000000001\.bin is damaged"):
            read_statistics(tmp_path)


def test_sums_of_all_of_many_domains_are_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of before rows were of the domains present."""
    from megamix.training.records import step_statistics

    monkeypatch.setattr(step_statistics, "MOST_IN_TEXT", 1000)
    write_sparse(tmp_path, None, range(1, 5))
    monkeypatch.undo()
    write_sparse(tmp_path, 4, range(5, 8))
    assert len(list((tmp_path / "statistics").iterdir())) == 2
    found = read_statistics(tmp_path)
    assert found.tokens.tolist() == [sparse_sums(step).tokens.tolist() for step in range(1, 8)]


def test_statistics_that_are_not_whole(tmp_path: Path) -> None:
    write(tmp_path, None, range(3, 5))
    with pytest.raises(InputError, match=r"begins with step 3, expected 1"):
        read_statistics(tmp_path)
    write(tmp_path, None, range(1, 3))
    write(tmp_path, 2, range(3, 5), names=("a", "c"))
    with pytest.raises(InputError, match="changed its domains before step 3"):
        read_statistics(tmp_path)
    (tmp_path / "statistics" / "from_000000001.bin").write_bytes(b"{}\n")
    with pytest.raises(InputError, match="is damaged"):
        read_statistics(tmp_path)
