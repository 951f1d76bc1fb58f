"""The record of a run of many domains: arrays beside the lines, read back as they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_runs import BATCH, write_config

from megamix.analysis.live_run import LiveRun
from megamix.core.errors import InputError
from megamix.data.blend.blend import Blend
from megamix.data.sampler import Sampler, Slice
from megamix.mixing.exchange import MixReport
from megamix.mixing.mixers import DomainStats
from megamix.training.records.ledger import Ledger, segment_of
from megamix.training.records.run_record import IntervalLog, RunRecord
from megamix.training.records.wide_lines import CHAIN, MOST_IN_TEXT, WideLine, WideReader, WideWriter
from megamix.training.step_clock import StepTimes


def record(run_dir: Path, num_domains: int, steps: int, resumed: int | None = None) -> list[dict[str, Any]]:
    """Records a run; returns what every change was, as the lists that a line of few domains has."""
    names = tuple(f"d{index}" for index in range(num_domains))
    sampler = Sampler(Blend([50] * num_domains, np.ones(num_domains), 7), Slice(BATCH, BATCH))
    rng, expected = np.random.default_rng(3), []
    writer = RunRecord(run_dir, names, resumed)
    if resumed is None:
        writer.announce(0, [(0, sampler.segment_at(0))], {"is_warmup": False})
    scores = [None] * num_domains
    for step in range(steps):
        dealt = sampler.deal()
        sampler.set_weights(rng.dirichlet(np.ones(num_domains)), step + 1)
        segment = sampler.segment_at(step + 1)
        tokens = np.bincount(dealt.all_domain, minlength=num_domains)
        scores = [0.5 if seen else score for seen, score in zip(tokens.tolist(), scores, strict=True)]
        stats = DomainStats(nats=tokens * 1.5, tokens=tokens)
        if resumed is not None and step < resumed:
            continue
        mixer = {"is_warmup": False, "perdomain_scores": scores, "exploration_rate": 0.25}
        writer.step(MixReport(step, stats, step + 1, (step + 1) * BATCH, segment, mixer, True))
        expected.append({**segment.to_json(), "tokens": tokens.tolist(), "scores": scores, "step": step + 1})
    writer.close()
    return expected


def check(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, wanted in zip(lines, expected, strict=True):
        assert segment_of(line).to_json() == {key: wanted[key] for key in ("start", "weights", "deficits", "counts")}
        assert list(line["statistics"]["tokens"]) == wanted["tokens"]
        scores = [None if score is None or np.isnan(score) else score for score in line["perdomain_scores"]]
        assert scores == wanted["scores"]
        assert line["exploration_rate"] == 0.25
        assert "statistics" in line
        assert "loss_slope" not in line
        assert line.get("loss_slope") is None


@pytest.mark.parametrize("num_domains", [MOST_IN_TEXT, MOST_IN_TEXT + 1])
def test_a_ledger_is_read_back_bit_for_bit(tmp_path: Path, num_domains: int) -> None:
    """More changes than a chain of differences is long."""
    expected = record(tmp_path, num_domains, CHAIN + 10)
    ledger = Ledger.read(tmp_path / "weights.jsonl", 7, "low_discrepancy")
    assert ledger is not None
    check(ledger.lines[1:], expected)
    assert np.array_equal(ledger.weights[1:], np.array([line["weights"] for line in expected]))
    assert ledger.names == tuple(f"d{index}" for index in range(num_domains))
    in_text = json.loads((tmp_path / "weights.jsonl").read_text().splitlines()[-1])
    is_wide = num_domains > MOST_IN_TEXT
    assert (tmp_path / "weights.bin").exists() == is_wide
    assert ("domain_names" in in_text) != is_wide


def test_counts_and_scores_are_stored_as_differences(tmp_path: Path) -> None:
    """A change of 8 samples of 1,000 domains: weights and deficits whole, the rest in a few bytes."""
    record(tmp_path, 1000, 20)
    before = (tmp_path / "weights.bin").stat().st_size
    record(tmp_path / "more", 1000, 30)
    change = ((tmp_path / "more" / "weights.bin").stat().st_size - before) / 10
    assert 2 * 8 * 1000 < change < 2 * 8 * 1000 + 1500


def test_a_resume_goes_on_in_both_files(tmp_path: Path) -> None:
    expected = record(tmp_path, 300, 12)
    record(tmp_path, 300, 12, resumed=8)
    ledger = Ledger.read(tmp_path / "weights.jsonl", 7, "low_discrepancy")
    assert ledger is not None
    check(ledger.lines[1:], expected)


@pytest.mark.parametrize("left", [0.0, 0.3, 0.6, 0.8])
def test_lost_arrays_are_never_others(tmp_path: Path, left: float) -> None:
    """Resumed after its arrays were lost in part: each line is read as it was written, or refused."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        record(run, 300, 12)
    path = cut / "weights.bin"
    if left:
        path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    else:
        path.unlink()
    for run in (whole, cut):
        record(run, 300, 20, resumed=10)
    lines = [json.loads(line) for line in (cut / "weights.jsonl").read_text().splitlines()]
    reader, wanted = WideReader(path), WideReader(whole / "weights.bin")
    refused = 0
    for line, other in zip(lines, (whole / "weights.jsonl").read_text().splitlines(), strict=True):
        places = json.loads(other)["arrays"]
        for key, at in line["arrays"].items():
            is_names = key == "domain_names"
            try:
                found: Any = reader.names(at) if is_names else reader.array(at, 300)
            except InputError:
                refused += 1
                assert line["step"] <= 10
                continue
            same = wanted.names(places[key]) if is_names else wanted.array(places[key], 300)
            assert found == same if is_names else np.array_equal(found, same, equal_nan=True)
    assert refused > 0


def test_a_run_that_begins_anew_drops_the_arrays_before(tmp_path: Path) -> None:
    record(tmp_path, 300, 12)
    size = (tmp_path / "weights.bin").stat().st_size
    record(tmp_path, 300, 12)
    assert (tmp_path / "weights.bin").stat().st_size == size


def test_follow_shows_it(tmp_path: Path) -> None:
    write_config(tmp_path, tmp_path)
    config = tmp_path / "config.resolved.yaml"
    config.write_text(config.read_text() + "log: {every: 5}\n")
    expected = record(tmp_path, 300, 3)
    run = LiveRun(tmp_path)
    run.look()
    assert run.weights is not None
    assert run.weights["domain_weights"].tolist() == expected[-1]["weights"]


def read_last(path: Path) -> None:
    ledger = Ledger.read(path, 7, "low_discrepancy")
    assert ledger is not None
    segment_of(ledger.lines[-1])


@pytest.mark.parametrize("what", ["missing", "cut", "elsewhere", "no arrays", "names"])
def test_damage_is_one_error(tmp_path: Path, what: str) -> None:
    record(tmp_path, 300, 3)
    side, path = tmp_path / "weights.bin", tmp_path / "weights.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if what == "missing":
        side.unlink()
    elif what == "cut":
        side.write_bytes(side.read_bytes()[:-4000])
    elif what == "elsewhere":
        lines[1]["arrays"]["domain_weights"] += 8
    elif what == "no arrays":
        del lines[1]["arrays"]["segment.counts"]
    else:
        lines[1]["arrays"]["domain_names"] = lines[1]["arrays"]["domain_weights"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        InputError, match=r"weights\.bin is damaged at byte|cannot read .*weights\.bin|line 2 is damaged"
    ):
        read_last(path)


def test_what_is_no_number_for_each_domain_stays_in_the_line(tmp_path: Path) -> None:
    """As the names of all domains under ``stalled``, or lists of lists."""
    writer = WideWriter(tmp_path / "a.jsonl")
    names = [f"d{index}" for index in range(300)]
    line = {"domain_names": names, "stalled": names, "pairs": [[0, 1]] * 300, "flags": [True] * 300, "few": [1, 2]}
    packed = writer.packed({**line, "whole": [1] * 300, "known": [None, 2.5] * 150})
    writer.close()
    assert packed["stalled"] == names
    assert packed["pairs"] == [[0, 1]] * 300
    assert packed["flags"] == [True] * 300
    assert packed["few"] == [1, 2]
    assert packed["arrays"].keys() == {"domain_names", "whole", "known"}
    known = WideReader(tmp_path / "a.bin").array(packed["arrays"]["known"], 300)
    assert np.isnan(known[::2]).all()
    assert (known[1::2] == 2.5).all()


def test_a_base_that_is_not_before_its_differences_is_refused(tmp_path: Path) -> None:
    """A loop of bases would never end."""
    writer = WideWriter(tmp_path / "a.jsonl")
    names, values = [f"d{index}" for index in range(300)], np.zeros(300)
    values[5:] = 1.0
    writer.packed({"domain_names": names, "x": values})
    values[7] = 2.0
    at = writer.packed({"domain_names": names, "x": values})["arrays"]["x"]
    writer.close()
    content = bytearray((tmp_path / "a.bin").read_bytes())
    assert WideReader(tmp_path / "a.bin").array(at, 300).tolist() == values.tolist()
    content[at + 16 : at + 24] = at.to_bytes(8, "little")
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(InputError, match="its base is byte"):
        WideReader(tmp_path / "a.bin").array(at, 300)
    with pytest.raises(KeyError):
        WideLine({}, WideReader(tmp_path / "a.bin"), {}, 300)["x"]


@pytest.mark.parametrize("num_domains", [MOST_IN_TEXT, MOST_IN_TEXT + 1])
def test_a_train_line_of_many_domains_names_those_that_were_seen(num_domains: int) -> None:
    names = tuple(f"d{index}" for index in range(num_domains))
    log, tokens = IntervalLog(names), np.zeros(num_domains, np.int64)
    tokens[[3, 250]] = 4, 2
    log.add_stats(DomainStats(nats=tokens * 2.0, tokens=tokens))
    line = log.line(1, 6, 0.1, None, StepTimes(1, 0.0, 0.0, 0.0, 0.0), 6)
    assert line is not None
    seen = {"d3": 2.0, "d250": 2.0}
    assert {name: loss for name, loss in line["domain_loss"].items() if loss is not None} == seen
    assert len(line["domain_loss"]) == (2 if num_domains > MOST_IN_TEXT else num_domains)
    assert line["loss"] == 2.0
