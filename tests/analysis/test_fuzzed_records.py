"""Records and configs of valid JSON or YAML and wrong content: every command shows them or refuses them with one error.

Each case changes one value of a good file by a seeded random choice. The long form (`pytest -m slow`) takes more of the
same cases.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from recorded_runs import BATCH, NAMES, STEPS, write_data, write_run

from megamix.analysis import follow
from megamix.analysis.compare import compare
from megamix.analysis.inspect import inspect_path, inspect_sample
from megamix.analysis.live_run import LiveRun
from megamix.analysis.plots import plot_run
from megamix.analysis.replay import replay
from megamix.analysis.report.page import report_page
from megamix.analysis.why import why
from megamix.core.config import load_config
from megamix.core.errors import MegamixError
from megamix.mixing.mixers import DomainStats
from megamix.mixing.steering.journal import ANSWERS, JOURNAL
from megamix.training.config import RunConfig
from megamix.training.records.mean_weights import WHICH, run_weights
from megamix.training.records.recorded_run import RecordedRun
from megamix.training.records.run_record import RunRecord
from megamix.training.records.step_statistics import StatisticsWriter
from megamix.training.steer.steer import Wishes, steer

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**70, 10**400, 0.5, -0.0, 1e308, -1e308, float("nan"), float("inf")),
    *("", "x", "1", "natural", "\0", "\ud800", "ä" * 300, [], [0], ["x"], [[]], [None] * 3, [1.0, 2.0, 3.0], {}, {"x": 1}, {"name": "x"}, DEEP),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree of lists and objects."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def changed(value: Any, choose: random.Random) -> Any:
    """The tree with one value replaced, left out or given twice."""
    path = choose.choice(list(places(value)))
    if not path:
        return choose.choice(VALUES)
    value = copy.deepcopy(value)
    owner: Any = value
    for key in path[:-1]:
        owner = owner[key]
    action = choose.randrange(5)
    if action == 0:
        del owner[path[-1]]
    elif action == 1 and isinstance(owner, list):
        owner.append(owner[path[-1]])
    else:
        owner[path[-1]] = choose.choice(VALUES)
    return value


def changed_lines(path: Path, choose: random.Random) -> None:
    """One line of a .jsonl file changed."""
    lines = path.read_text(encoding="utf-8").splitlines()
    index = choose.randrange(len(lines))
    lines[index] = json.dumps(changed(json.loads(lines[index]), choose))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def changed_header(path: Path, choose: random.Random) -> None:
    """The first line of a file of step statistics changed."""
    header, _, rows = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps(changed(json.loads(header), choose)).encode() + b"\n" + rows)


def changed_yaml(path: Path, choose: random.Random) -> None:
    data = changed(yaml.safe_load(path.read_text(encoding="utf-8")), choose)
    path.write_text(json.dumps(data), encoding="utf-8")  # JSON is YAML; a lone surrogate and deep lists pass


CHANGES: dict[str, Callable[[Path, random.Random], None]] = {
    "metrics.jsonl": changed_lines,
    "weights.jsonl": changed_lines,
    "events.jsonl": changed_lines,
    "statistics/from_000000001.bin": changed_header,
    "config.resolved.yaml": changed_yaml,
    JOURNAL: changed_lines,
    ANSWERS: changed_lines,
}


COMMAND = {"id": "1-a", "who": "me@here", "note": "too little"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose record has all that megamix reads back."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_data(folder / "data")
    run = folder / "run"
    write_run(run, folder / "data" / "manifest.json")
    config = yaml.safe_load((run / "config.resolved.yaml").read_text())
    config |= {"log": {"every": 5}, "objective": "uniform", "mixture": {"web": 0.5, "c_$1$": 0.3, "_books": 0.2}}
    config["shadow"] = [{"name": "static"}]
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    lines = [json.loads(line) for line in (run / "weights.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        line |= {"perdomain_scores": [0.5, None, 0.25], "loss_slope": [0.1, 0.2, 0.3], "exploration_rate": 0.5}
        line |= {"average_weights": line["domain_weights"], "loss_weights": line["domain_weights"]}
        line["steering"] = {"commands": [{**COMMAND, "what": "pin web=0.3"}], "pins": {"web": 0.3}, "ramp": [8, 100.0]}
        lines[index] = {**line, "left_out": []}
    (run / "weights.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / JOURNAL).write_text(json.dumps({**COMMAND, "time": 1.5, "pin": {"web": 0.3}, "ramp_tokens": 1600.0}) + "\n")
    answer = {
        "id": "1-a",
        "outcome": "applied",
        "step": 2,
        "effective_step": 3,
        "position": 24,
        "time": 2.0,
        "text": "",
    }
    (run / ANSWERS).write_text(json.dumps(answer) + "\n")
    writer = StatisticsWriter(run, NAMES, None)
    for step in range(1, STEPS + 1):
        writer.write(step, DomainStats(nats=np.full(3, 20.0), tokens=np.full(3, 4), excess_nats=np.ones(3)))
    writer.close()
    return run


def screen(path: Path) -> None:
    """What `inspect --follow` draws."""
    live = LiveRun(path)
    live.look()
    for ages in (True, False):
        follow._notes(live, ages=ages)
    follow._view(live, 40)
    with follow._log() as show:
        show(live)


def weights(path: Path) -> None:
    record = RecordedRun.open(path)
    for which in WHICH:
        run_weights(record, which)


def resume(path: Path) -> None:
    RunRecord(path, NAMES, 20).close()


def steered(path: Path) -> None:
    for wishes in (Wishes(set=["c_$1$=0.3"]), Wishes(undo=True)):
        list(steer(path, wishes, timeout=0.01))


QUICK: tuple[Callable[[Path], Any], ...] = (
    lambda path: str(inspect_path(path)),
    lambda path: inspect_sample(path, 3 * BATCH),
    screen,
    weights,
    lambda path: compare([path, path]),
    lambda path: report_page([RecordedRun.open(path)]),
    why,
    steered,
)
SLOW: tuple[Callable[[Path], Any], ...] = (
    lambda path: plot_run([path], path / "out"),
    lambda path: replay(path, [{"name": "odm", "preset": "official"}, {"name": "doremi"}], path / "out"),
    resume,
)


def test_the_unchanged_record_passes(run: Path, tmp_path: Path) -> None:
    """A refusal of every case would be no test: this one is shown."""
    shutil.copytree(run, tmp_path / "run")
    for read in (*QUICK[:4], *QUICK[5:], *SLOW):
        read(tmp_path / "run")


def check(run: Path, tmp_path: Path, name: str, seeds: range, readers: tuple[Callable[[Path], Any], ...]) -> None:
    refused = 0
    for seed in seeds:
        target = tmp_path / f"{seed}"
        shutil.copytree(run, target)
        CHANGES[name](target / name, random.Random(f"{name} {seed}"))
        for number, read in enumerate(readers):
            try:
                read(target)
            except MegamixError:
                refused += number == 0
            except Exception as error:
                raise AssertionError(
                    f"seed {seed}, reader {number}: {(target / name).read_bytes()[:3000]!r}"
                ) from error
        shutil.rmtree(target)
    assert refused > 0 or name in ("events.jsonl", "statistics/from_000000001.bin", JOURNAL, ANSWERS)


@pytest.mark.parametrize("name", CHANGES)
def test_one_changed_value(run: Path, tmp_path: Path, name: str) -> None:
    check(run, tmp_path, name, range(20), (why, steered) if name in (JOURNAL, ANSWERS) else QUICK)


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in (JOURNAL, ANSWERS)])
def test_one_changed_value_before_a_drawing_a_replay_and_a_resume(run: Path, tmp_path: Path, name: str) -> None:
    check(run, tmp_path, name, range(100, 102), SLOW)


@pytest.mark.parametrize("key", ["average_weights", "loss_weights"])
def test_a_mixers_own_weights_that_are_null(run: Path, tmp_path: Path, key: str) -> None:
    """Whether the key is there says which weights are the run's."""
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "weights.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps({**json.loads(lines[-1]), key: None}), ""]), encoding="utf-8")
    with pytest.raises(MegamixError, match=rf"weights\.jsonl.*{key} is null, expected a number"):
        weights(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_many_changed_values(run: Path, tmp_path: Path, name: str) -> None:
    check(run, tmp_path, name, range(1000, 2000), QUICK)
    check(run, tmp_path, name, range(2000, 2100), SLOW)


def check_configs(run: Path, tmp_path: Path, seeds: range) -> None:
    from megamix.analysis.doctor import doctor

    source = run / "config.resolved.yaml"
    for seed in seeds:
        path = tmp_path / "config.yaml"
        shutil.copy(source, path)
        choose = random.Random(seed)
        for _ in range(choose.choice((1, 1, 2))):
            changed_yaml(path, choose)
        try:
            config = load_config(RunConfig, path, [f"run_dir={tmp_path / 'new'}"])
            doctor(config, plan_only=True)
            doctor(config)
        except MegamixError:
            pass
        except Exception as error:
            raise AssertionError(f"seed {seed}: {path.read_text()[:3000]}") from error


def test_changed_configs(run: Path, tmp_path: Path) -> None:
    check_configs(run, tmp_path, range(60))


@pytest.mark.slow
def test_many_changed_configs(run: Path, tmp_path: Path) -> None:
    check_configs(run, tmp_path, range(1000, 5000))
