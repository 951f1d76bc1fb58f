"""A run of more domains than a picture can hold: the top movers are drawn, means are of all."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from recorded_runs import BATCH, SEQ, write_config

from megamix.analysis.inspect import inspect_path
from megamix.analysis.movers import MOST, PROMINENT, prominent, top_movers
from megamix.analysis.plots.figures import weights_figure
from megamix.analysis.plots.shares import proportions_figure
from megamix.analysis.report.page import report_page
from megamix.core.text import most_of
from megamix.data.blend.blend import Blend
from megamix.data.sampler import Sampler, Slice
from megamix.training.records.recorded_run import RecordedRun
from megamix.training.records.run_record import RunRecord

K = 300
NAMES = tuple(f"d{index:03d}" for index in range(K))
MOVERS = tuple(range(100, 100 + MOST))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """Weights that change a little for all, and much for 40 in the middle."""
    folder = tmp_path_factory.mktemp("many") / "run"
    write_config(folder, folder)
    config = folder / "config.resolved.yaml"
    config.write_text(config.read_text() + "objective: uniform\n")
    sampler = Sampler(Blend([50] * K, np.ones(K), 7), Slice(BATCH, BATCH))
    record = RunRecord(folder, NAMES, None)
    record.announce(0, [(0, sampler.segment_at(0))], {"is_warmup": False})
    for step in range(1, 6):
        sampler.deal()
        weights = np.ones(K) + 0.001 * step * (np.arange(K) % 2)
        weights[list(MOVERS)] += 0.1 * step
        sampler.set_weights(weights, step)
        record.announce(step, [(step, sampler.segment_at(step))], {"is_warmup": False})
        losses = {name: 5.0 - 0.01 * step + index / K for index, name in enumerate(NAMES)}
        line = {"step": step, "tokens": step * BATCH * SEQ, "domain_loss": losses}
        record.train({**line, "loss": 5.0, "tokens_per_second": 1.0})
        record.evaluate({**line, "macro_loss": float(np.mean(list(losses.values()))), "worst_domain": NAMES[-1]})
    record.close()
    return RecordedRun.open(folder)


def test_those_whose_weights_moved_most_are_drawn(run: RecordedRun) -> None:
    (drawn,) = top_movers([run])
    assert drawn.domain_names == tuple(NAMES[index] for index in MOVERS)
    assert run.domain_names == NAMES
    (same,) = top_movers([run], K)
    assert same is run
    texts = {text.get_text() for text in weights_figure(drawn).findobj() if hasattr(text, "get_text")}
    assert {NAMES[index] for index in MOVERS} <= texts
    assert "40 domains of 300: those whose weights moved most" in texts
    assert not {NAMES[0], NAMES[-1]} & texts
    assert proportions_figure(drawn) is not None


def test_the_page_stays_small_and_its_means_are_of_all(run: RecordedRun) -> None:
    page = report_page([run])
    assert "40 domains of 300: those whose weights moved most; means" in page
    assert len(page) < 400_000
    assert len(re.findall(r'<th scope="row"><i class="swatch', page)) == MOST
    assert len(re.findall(r'<path class="line d\d+ quiet"', page)) == MOST - PROMINENT
    assert len(re.findall(r'<span class="end ', page)) == 2 * PROMINENT  # stacked, and each
    assert page.count(" data-pick=") == MOST
    assert "12 of 40 domains, those whose weights moved most, have full colour" in page
    last = run.evaluations[-1]["macro_loss"]
    assert f'data-key="macro" data-value="{last!r}"' in page
    assert json.loads(page.split('id="data">')[1].split("</script>")[0])["mean:macro"]["y"][0][-1] == last


def test_the_prominent_are_those_whose_weights_moved_most_in_any_run(run: RecordedRun) -> None:
    assert prominent([run], MOST) == {NAMES[index] for index in MOVERS}
    drawn = top_movers([run])
    assert len(prominent(drawn)) == PROMINENT
    assert prominent(drawn) <= {NAMES[index] for index in MOVERS}


def test_inspect_shows_the_rows_that_moved_most(run: RecordedRun) -> None:
    text = str(inspect_path(run.run_dir))
    assert "and 240 more" in text
    assert all(NAMES[index] in text for index in MOVERS)


def test_rows_of_a_table() -> None:
    rows = [(str(number), "x") for number in range(6)]
    assert most_of(rows, range(6), 6) == rows
    assert most_of(rows, [5, 0, 4, 0, 3, 0], 3) == [("0", "x"), ("2", "x"), ("4", "x"), ("and 3 more", "")]
