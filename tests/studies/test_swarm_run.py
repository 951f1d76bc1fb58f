"""Running a swarm: members stopped, killed, failing and gone on with, and the tables of what they found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ENVIRONMENT, RUN_SECONDS
from processes import children, wait_for_step, wait_until_gone
from records import lines, record
from tiny_swarm import DOMAINS, swarm_config

from megamix.core.config_files import read_yaml
from megamix.core.errors import InputError
from megamix.core.files import shipped_folder
from megamix.studies.runs import members_of
from megamix.studies.swarm.collect import collect
from megamix.studies.swarm.config import MetricsConfig
from megamix.studies.swarm.fit.tables import read_table
from megamix.studies.swarm.tasks import swarm

Megamix = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., Path]
LONG = {"train": {"steps": 60}, "checkpoint": {"every": 20}, "evaluate": {"every": 30}}
"""Long enough to be stopped in the middle."""


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megamix", "swarm", "run", str(config), *overrides],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a swarm was run that nobody disturbed; see `test_nothing_is_lost`, which makes it."""
    return tmp_path_factory.mktemp("whole")


@pytest.mark.slow
def test_nothing_is_lost_when_members_are_stopped_killed_and_fail(
    megamix: Megamix, tiny_config: Write, tmp_path: Path, undisturbed: Path
) -> None:
    """TERM to the swarm, then KILL, then a member that cannot write; each time the same command goes on, and in the end
    all records are those of a swarm that nobody disturbed."""
    config = swarm_config(tiny_config, **LONG)
    elsewhere = f"run_dir={undisturbed / 'swarm'}"
    assert swarm(config, [elsewhere], "generate") == 0
    said = megamix("swarm", "run", config, elsewhere).stderr
    assert "none of 4 members done, 2 at a time" in said
    assert "4 of 4" in said

    run = tmp_path / "run"
    assert swarm(config, [], "generate") == 0
    in_the_way = run / "runs" / "0003"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    process = start(config)
    wait_for_step(run / "runs" / "0000", 5, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 75, said
    assert "of 4 members are done. The same command goes on." in said
    stopped = max(line["step"] for line in lines(run / "runs" / "0000" / "metrics.jsonl"))
    assert stopped < 60
    assert (run / "runs" / "0000" / "checkpoints" / f"step_{stopped}").is_dir()

    process = start(config)
    wait_for_step(run / "runs" / "0000", min(stopped + 10, 55), process)
    members = children(process.pid)
    assert len(members) == 2
    process.kill()
    process.communicate(timeout=RUN_SECONDS)
    wait_until_gone(members)
    assert not all(member.is_done for member in members_of(run / "members", [])[:3])

    said = megamix("swarm", "run", config, code=1).stderr
    assert "1 of 4 members failed, 3 are done" in said
    assert f"0003: cannot write to {in_the_way}" in said
    in_the_way.unlink()
    before = {name: os.stat(run / "runs" / name / "metrics.jsonl").st_mtime_ns for name in ("0000", "0001", "0002")}
    said = megamix("swarm", "run", config).stderr
    assert "3 of 4 members done" in said
    assert all(os.stat(run / "runs" / name / "metrics.jsonl").st_mtime_ns == at for name, at in before.items())
    for name in ("0000", "0001", "0002", "0003"):
        assert record(run / "runs" / name) == record(undisturbed / "swarm" / "runs" / name)
    # The tables are those of the records, and the same for both.
    for folder in (run, undisturbed / "swarm"):
        assert collect(folder / "members", []) == folder
    for name in ("ratios.csv", "metrics.csv"):
        assert (run / name).read_bytes() == (undisturbed / "swarm" / name).read_bytes()
    table = read_table(run / "ratios.csv", run / "metrics.csv")
    assert table.runs == ("0000", "0001", "0002", "0003")
    assert table.metrics == tuple(f"loss:{name}" for name in DOMAINS)
    for name, ratios, values in zip(table.runs, table.ratios_RK, table.values_RJ, strict=True):
        asked = read_yaml(run / "members" / f"{name}.yaml")["mixture"]
        assert dict(zip(table.domains, ratios.tolist(), strict=True)) == pytest.approx(asked, abs=1e-12)
        last = [line for line in lines(run / "runs" / name / "metrics.jsonl") if line["event"] == "evaluate"][-1]
        assert values.tolist() == [last["domain_loss"][domain] for domain in DOMAINS]


def test_tables_of_what_is_there(undisturbed: Path, tmp_path: Path) -> None:
    """Of a swarm without its last member: refused with its name, or the others; and results of a user's own."""
    folder = undisturbed / "swarm"
    if not folder.is_dir():
        pytest.skip("the swarm was not run")
    configs = tmp_path / "configs"
    configs.mkdir()
    for path in (folder / "members").glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        if path.stem == "0003":
            settings["train"]["steps"] = 300
        (configs / path.name).write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match=r"1 of the 4 runs .* not done: 0003 \(60 of 300 steps\).*--partial"):
        collect(configs, [])
    assert collect(configs, [], partial=True) == configs
    assert read_table(configs / "ratios.csv", configs / "metrics.csv").runs == ("0000", "0001", "0002")

    def write(results: Callable[[int], str], name: str) -> None:
        for number in range(3):
            (folder / "runs" / f"{number:04}" / name).write_text(results(number))

    wanted = MetricsConfig(validation=False, mean=True, file="results.json")
    with pytest.raises(InputError, match=r"cannot read .*0000/results.json"):
        collect(configs, [], wanted, partial=True)
    write(lambda number: json.dumps({"arc": 1.5 - number, "law": number}), "results.json")
    collect(configs, [], wanted, partial=True)
    table = read_table(configs / "ratios.csv", configs / "metrics.csv")
    assert table.metrics == ("loss", "arc", "law")
    assert table.values_RJ[:, 1:].tolist() == [[1.5, 0.0], [0.5, 1.0], [-0.5, 2.0]]
    losses = [line for line in lines(folder / "runs" / "0001" / "metrics.jsonl") if line["event"] == "evaluate"][-1]
    assert table.values_RJ[1, 0] == pytest.approx(sum(losses["domain_loss"].values()) / 3)
    write(lambda number: f"metric,value\narc,{number}\n", "results.csv")
    collect(configs, [], MetricsConfig(validation=False, file="results.csv"), partial=True)
    assert read_table(configs / "ratios.csv", configs / "metrics.csv").values_RJ.tolist() == [[0.0], [1.0], [2.0]]
    write(lambda number: '{"arc": 1}' if number else '{"arc": 1, "law": 2}', "results.json")
    with pytest.raises(InputError, match=r"0000 and 0001 do not have the same metrics: only one of them has law"):
        collect(configs, [], wanted, partial=True)
    write(lambda number: '{"arc": "high"}', "results.json")
    with pytest.raises(InputError, match=r"is no table of results"):
        collect(configs, [], wanted, partial=True)


def test_a_second_swarm_does_not_work_in_the_same_place(megamix: Megamix, tiny_config: Write, tmp_path: Path) -> None:
    from megamix.training.job.lock import RunLock

    config = swarm_config(tiny_config)
    assert swarm(config, [], "generate") == 0
    with RunLock(tmp_path / "run"):
        said = megamix("swarm", "run", config, code=2).stderr
    assert f"another job works in {tmp_path / 'run'}" in said


def test_asked_to_stop_no_other_member_begins_and_a_second_time_all_end(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A program that does not heed TERM takes the place of Python; three times as many members wait as run."""
    from megamix.studies.pool import run_members

    config = swarm_config(tiny_config, swarm={"generate": {"members": 8}})
    assert swarm(config, [], "generate") == 0
    deaf = tmp_path / "deaf"
    deaf.write_text("#!/bin/bash\ntrap '' TERM\necho begun\nwhile :; do sleep 0.1; done\n")
    deaf.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(deaf))
    logs = tmp_path / "logs"

    def ask_twice() -> None:
        for seen in (lambda: sum(path.stat().st_size > 0 for path in logs.glob("*.log")) == 2,
                     lambda: "(2) save and stop" in caplog.text):  # fmt: skip
            while not seen():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask_twice, daemon=True).start()
    assert run_members(members_of(tmp_path / "run" / "members", []), [], 2, logs) == 75
    assert "asked a second time" in caplog.text
    assert caplog.text.count(": stopped") == 2
    assert sorted(path.name for path in logs.iterdir() if path.stat().st_size) == ["0000.log", "0001.log"]


def test_members_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch, tiny_config: Write, tmp_path: Path) -> None:
    from megamix.studies.pool import _environment, default_at_once

    config = swarm_config(tiny_config, engine={"pipeline": 2})
    assert swarm(config, [], "generate") == 0
    member = members_of(tmp_path / "run" / "members", [])[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert default_at_once(member) == 2
    told: list[dict[str, Any]] = [_environment(member, slot, 2) for slot in range(2)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in told] == ["4,5", "6,7"]
    assert "RANK" not in told[0]  # it starts its two ranks


def test_members_have_the_numbers_that_the_shell_of_an_array_gives_them(tiny_config: Write, tmp_path: Path) -> None:
    config, folder = tiny_config(), tmp_path / "members"
    folder.mkdir()
    for name in (".0001.yaml", "0002.yaml", "A.yaml", "a.yaml", "\u00e9.yaml", "0001.yaml"):
        shutil.copy(config, folder / name)
        (folder / name).write_text(config.read_text().replace(str(tmp_path / "run"), str(tmp_path / name)))
    script = (shipped_folder("slurm") / "swarm.sbatch").read_text()
    assert 'members=("$folder"/*.yaml)' in script
    shell = 'folder=$1; LC_ALL=C; members=("$folder"/*.yaml); printf "%s\\n" "${members[@]}"'
    listed = subprocess.run(["bash", "-c", shell, "-", folder], capture_output=True, text=True, check=True).stdout
    assert [str(member.path) for member in members_of(folder, [])] == listed.splitlines()
