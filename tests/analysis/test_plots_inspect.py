"""The run table, the plots and `inspect`, on runs recorded by the trainer's own classes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from recorded_runs import BATCH, NAMES, SEQ, STEPS, TRAIN_TOKENS, evaluation, write_config, write_data, write_run

from megamix.analysis import inspect, plots
from megamix.analysis.labels import spread
from megamix.analysis.summary import RunTable, run_table
from megamix.core.errors import InputError
from megamix.core.text import Report, Table
from megamix.data.sampler import Sampler
from megamix.data.tokens.manifest import Manifest
from megamix.engines.base import ParameterState
from megamix.engines.models.layers import Decoder, Embedding, Head
from megamix.training.checkpoints.fingerprints import fingerprints
from megamix.training.checkpoints.saving import CheckpointWriter
from megamix.training.config import CheckpointConfig
from megamix.training.plan import make_plan
from megamix.training.records.recorded_run import RecordedRun


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pile"
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    return run_dir, write_run(run_dir, data)


def table_of(run_dir: Path) -> RunTable:
    return run_table(RecordedRun.open(run_dir))


# The table. ----------------------------------------------------------------------------------------------------------


def test_shares_and_epochs_are_those_of_the_sampler(run: tuple[Path, list[list[int]]]) -> None:
    run_dir, counts = run
    table = table_of(run_dir)
    taken = np.array(counts[STEPS])
    assert table.steps == STEPS
    assert table.tokens == STEPS * BATCH * SEQ
    assert [row.realised_share for row in table.rows] == (taken / taken.sum()).tolist()
    windows = (np.array(TRAIN_TOKENS) - 1) // SEQ
    assert [row.epochs for row in table.rows] == (taken / windows).tolist()
    assert [row.natural_share for row in table.rows] == pytest.approx((np.array(TRAIN_TOKENS) / 4500).tolist())


def test_losses_means_and_the_unigram_mark(run: tuple[Path, list[list[int]]]) -> None:
    table = table_of(run[0])
    first, last = evaluation(0), evaluation(STEPS)
    assert [row.last_loss for row in table.rows] == list(last["domain_loss"].values())
    assert table.macro("first_loss") == pytest.approx(first["macro_loss"])
    assert table.macro("last_loss") == pytest.approx(last["macro_loss"])
    assert table.fall == pytest.approx(1 - last["macro_loss"] / first["macro_loss"])
    shares = np.array(TRAIN_TOKENS) / 4500
    assert table.by_objective("last_loss") == pytest.approx(table.by_natural_share("last_loss"))
    assert "The objective loss (natural) went from 6.000 to " in table.report().text()
    assert table.by_natural_share("last_loss") == pytest.approx(
        float(shares @ np.array(list(last["domain_loss"].values())))
    )
    # web ends at 4.0, c_$1$ at 2.0 and _books at 5.5; the unigram model has 5.0.
    assert [row.beats_unigram for row in table.rows] == [True, True, False]
    assert "does not beat a unigram model on: _books." in table.report().text()


def test_without_the_data_set_the_rest_is_there(data: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", data)
    path = tmp_path / "run" / "config.resolved.yaml"
    path.write_text(path.read_text().replace(str(data), str(tmp_path / "gone")))
    table = table_of(tmp_path / "run")
    assert all(row.epochs is None and row.natural_share is None for row in table.rows)
    assert sum(row.realised_share or 0 for row in table.rows) == pytest.approx(1)
    assert "unknown here" in table.report().text()
    assert all(path.is_file() for path in plots.plot_run([tmp_path / "run"]))


def test_relative_paths_start_where_the_run_was_started(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "runs" / "demo", data, recorded_as=Path("runs/demo"))
    (tmp_path / "pile").symlink_to(data)
    path = tmp_path / "runs" / "demo" / "config.resolved.yaml"
    path.write_text(path.read_text().replace(str(data), "pile"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert table_of(Path("../runs/demo")).rows[0].natural_share is not None


def test_a_run_in_progress(data: Path, tmp_path: Path) -> None:
    counts = write_run(tmp_path / "run", data, steps=20)
    table = table_of(tmp_path / "run")
    assert (table.steps, table.total_steps) == (20, STEPS)
    windows = (np.array(TRAIN_TOKENS) - 1) // SEQ
    assert [row.epochs for row in table.rows] == (np.array(counts[20]) / windows).tolist()


def test_tables_draw_plainly_and_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    report = Report(["[b]head[/b]", Table(("domain", "n"), [("a[i]", "1"), ("mean", "10")], footer=1)])
    report.show()
    rule = "------  --"
    assert capsys.readouterr().out == f"[b]head[/b]\n\ndomain   n\n{rule}\na[i]     1\n{rule}\nmean    10\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    report.show()
    drawn = capsys.readouterr().out
    assert "[b]head[/b]" in drawn
    assert "a[i]" in drawn


# What is wrong with a run. -------------------------------------------------------------------------------------------


def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere is not a run: there is no such directory"):
        plots.plot_run([tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"it has no config\.resolved\.yaml"):
        table_of(tmp_path)


def test_a_run_without_a_line(data: Path, tmp_path: Path) -> None:
    write_config(tmp_path, data)
    with pytest.raises(InputError, match="has recorded nothing yet"):
        plots.plot_run([tmp_path])
    assert "recorded nothing yet" in inspect.inspect_path(tmp_path).text()


@pytest.mark.parametrize("file", ["weights.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("damage", ["{not json", "[]", '{"step": 3}'])
def test_a_damaged_line_is_named(data: Path, tmp_path: Path, file: str, damage: str) -> None:
    write_run(tmp_path, data, steps=20)
    lines = (tmp_path / file).read_text().splitlines(keepends=True)
    lines[2] = damage + "\n"
    (tmp_path / file).write_text("".join(lines))
    with pytest.raises(InputError, match=rf"{file}, line 3 is damaged"):
        plots.plot_run([tmp_path])


def test_a_line_still_being_written_is_left_out(data: Path, tmp_path: Path) -> None:
    write_run(tmp_path, data)
    before = table_of(tmp_path)
    for file in ("weights.jsonl", "metrics.jsonl"):
        with (tmp_path / file).open("a") as record:
            record.write('{"step": 99, "posi')
    assert table_of(tmp_path) == before


# Plots. --------------------------------------------------------------------------------------------------------------


OF_ONE = ("weights", "weights_stacked", "loss", "proportions", "epochs")


def size_of(png: Path) -> tuple[int, int]:
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_plots_of_one_run(data: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", data)
    written = plots.plot_run([tmp_path / "run"])
    assert written == [tmp_path / "run" / "plots" / f"{name}.png" for name in OF_ONE]
    assert all(size_of(path)[0] > 1000 for path in written)
    assert sorted(path.stem for path in (tmp_path / "run" / "plots").iterdir()) == sorted(OF_ONE)


def test_plots_of_several_runs(data: Path, tmp_path: Path) -> None:
    for name in ("a/run", "b/run"):
        write_run(tmp_path / name, data)
    written = plots.plot_run([tmp_path / "a/run", tmp_path / "b/run"], tmp_path / "out")
    names = [str(path.relative_to(tmp_path / "out")) for path in written]
    of_each = [f"{run}/{name}.png" for run in ("a-run", "b-run") for name in OF_ONE]
    assert names == [*of_each, "comparison.png", "comparison_epochs.png"]
    assert all(size_of(path)[0] > 1000 for path in written)


def test_weights_are_drawn_as_steps_where_they_take_effect(run: tuple[Path, list[list[int]]]) -> None:
    record = RecordedRun.open(run[0])
    line = plots.weights_figure(record).axes[0].get_lines()[0]
    x, y = (np.asarray(values) for values in line.get_data())
    assert line.get_drawstyle() == "steps-post"
    # The change of the last step would act after the run; the axis ends with the run.
    positions = [item["position"] for item in record.ledger.lines[:-1]]
    assert x.tolist() == [position * SEQ for position in [*positions, STEPS * BATCH]]
    assert y[:-1].tolist() == [item["domain_weights"][0] for item in record.ledger.lines[:-1]]


def test_a_folder_that_cannot_be_written(run: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        plots.plot_run([run[0]], tmp_path / "file")


def test_labels_keep_their_distance_order_and_bounds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        wanted = np.sort(rng.uniform(0, 100, int(rng.integers(1, 22))))
        placed = spread(wanted, 11.0, 0.0, 300.0)
        assert np.all(np.diff(placed) >= 11.0 - 1e-9)
        assert placed[0] >= -1e-9
        assert placed[-1] <= 300.0 + 1e-9
    assert spread(np.array([10.0, 50.0]), 11.0, 0.0, 100.0).tolist() == [10.0, 50.0]
    assert np.allclose(np.diff(spread(np.zeros(11), 20.0, 0.0, 100.0)), 10.0)


# inspect. ------------------------------------------------------------------------------------------------------------


def test_a_data_set(data: Path) -> None:
    for path in (data, data / "manifest.json"):
        text = inspect.inspect_path(path, text=True, seq_length=SEQ).text()
        assert "data set of 3 domains with 4,500 training tokens" in text
        assert Manifest.load(data).fingerprint in text
        assert f"samples of {SEQ}" in text
        assert "\n\nc_$1$: " in text


def test_a_token_file(data: Path) -> None:
    for path in (data / "web" / "train", data / "web" / "train.bin", data / "web" / "train.idx"):
        text = inspect.inspect_path(path, text=True).text()
        assert "3,000, stored as uint16" in text


def test_a_run(run: tuple[Path, list[list[int]]]) -> None:
    text = inspect.inspect_path(run[0]).text()
    assert "first is a run, finished." in text
    assert f"{STEPS} of {STEPS}" in text
    assert "checkpoints none" in text
    assert "mean over domains" in text
    assert f", {STEPS // 5} changes of weights" in text


def test_an_update_that_keeps_the_weights_is_no_change(run: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    shutil.copytree(run[0], tmp_path / "run")
    path = tmp_path / "run" / "weights.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["domain_weights"] = lines[1]["domain_weights"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert f", {STEPS // 5 - 1} changes of weights" in inspect.inspect_path(tmp_path / "run").text()


def test_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is nothing at .*Give a data set"):
        inspect.inspect_path(tmp_path / "nothing")
    with pytest.raises(InputError, match="is nothing that megamix makes"):
        inspect.inspect_path(tmp_path)
    (tmp_path / "mixture.json").write_text('{"weights": {"web": 1.0}}')
    with pytest.raises(InputError, match="To see it: megamix swarm explain"):
        inspect.inspect_path(tmp_path)


def test_a_sample_is_the_one_that_was_trained(run: tuple[Path, list[list[int]]]) -> None:
    run_dir, counts = run
    record = RecordedRun.open(run_dir)
    plan = make_plan(record.config)
    sampler = Sampler(plan.blend(), plan.share(0))
    changes = {line["effective_step"]: line["domain_weights"] for line in record.ledger.lines}
    decode = plan.manifest.load_tokenizer().decode
    for step in range(STEPS):
        if step in changes:
            sampler.set_weights(changes[step], step)
        dealt = sampler.deal()
        assert sampler.counts_at(step + 1).tolist() == counts[step + 1]
        if step % 13 == 0:
            domain, sample = int(dealt.domain.ravel()[3]), int(dealt.sample.ravel()[3])
            text = inspect.inspect_sample(run_dir, step * BATCH + 3).text()
            assert f"domain      {NAMES[domain]} " in text
            assert f"sample      {sample} of {plan.num_samples[domain]}, " in text
            assert decode(plan.domains[domain].window(sample, SEQ)[:-1].tolist()) in text
    with pytest.raises(InputError, match="the run has samples 0 to 319"):
        inspect.inspect_sample(run_dir, STEPS * BATCH)


def save_checkpoint(run_dir: Path, step: int) -> Path:
    """Writes one with the trainer's own function, on a job of one rank."""
    plan = make_plan(RecordedRun.open(run_dir).config)
    blend = plan.blend()
    blend.take(step * BATCH)
    sizes = [Embedding(plan.model, 0, 1), Decoder(plan.model, 1, 1, SEQ), Head(plan.model, 2, 1)]

    def layer_state(layer: int) -> Any:
        for name, parameter in sizes[layer].named_parameters():
            weight = parameter.detach()
            yield name, ParameterState(weight, torch.zeros_like(weight), torch.zeros_like(weight))

    place = SimpleNamespace(data_rank=0, is_first_copy=True)
    engine: Any = SimpleNamespace(layers=lambda: [0, 1, 2], layer_state=layer_state, place=place)
    state = {"fingerprints": fingerprints(plan), "sampler": Sampler(blend, plan.share(0)).state_dict(step), "seed": 7}
    state |= {"manifest": str(plan.config.data.manifest), "mixer": {}}
    store = run_dir / "store"
    dist.init_process_group("gloo", init_method=f"file://{store.absolute()}", rank=0, world_size=1)
    try:
        with CheckpointWriter(run_dir / "checkpoints", engine, CheckpointConfig(), dist.group.WORLD) as writer:
            writer.save(step, state)
        return run_dir / "checkpoints" / f"step_{step}"
    finally:
        dist.destroy_process_group()


def test_a_checkpoint(data: Path, tmp_path: Path) -> None:
    write_run(tmp_path, data)
    path = save_checkpoint(tmp_path, 10)
    text = inspect.inspect_path(path).text()
    plan = make_plan(RecordedRun.open(tmp_path).config)
    assert "is a complete checkpoint" in text
    assert f"{plan.model.num_parameters():,} parameters" in text
    assert "step        10, 80 samples taken" in text
    assert f"data        {data}" in text
    assert "checkpoints step_10\n" in inspect.inspect_path(tmp_path).text()

    layer = path / "layers" / "00001.safetensors"
    content = bytearray(layer.read_bytes())
    content[-1] ^= 1
    layer.write_bytes(content)
    assert "cannot be used: layers/00001.safetensors has SHA-256" in inspect.inspect_path(path).text()
    layer.write_bytes(content[:-1])
    assert "cannot be used: layers/00001.safetensors has" in inspect.inspect_path(path).text()
    assert "step_10 (damaged: layers/00001" in inspect.inspect_path(tmp_path).text()
    listing = json.loads((path / "checkpoint.json").read_text())
    assert listing["step"] == 10
    path = path.rename(path.with_name("step_10.partial"))
    assert "was not finished" in inspect.inspect_path(path).text()
