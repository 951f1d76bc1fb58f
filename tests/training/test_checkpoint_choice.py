"""Which checkpoint a run continues from: the newest whose hashes hold, the same on all ranks, and why not a newer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FILES, flip, job, write
from checkpoint_ranks import run

from megamix.core.config import load_config
from megamix.training.checkpoints.fingerprints import fingerprints
from megamix.training.config import RunConfig
from megamix.training.plan import make_plan

LAYER = "layers/00001.safetensors"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(folder: Path, *, finished: bool) -> None:
    """As a kill leaves it between the two renames; or one that cannot be: the new one is not whole. The one that is not
    to be taken is damaged where only the other's files are read."""
    (folder / "step_6").rename(folder / "step_6.before")
    shutil.copytree(folder / "step_6.before", folder / "step_6.partial")
    if finished:
        cut(folder / "step_6.before" / LAYER)
    else:
        (folder / "step_6.partial" / "checkpoint.json").unlink()


def misname(folder: Path) -> None:
    shutil.copytree(folder / "step_4", folder / "step_99999")


# Name -> (what is done to a folder with the checkpoints 2, 4 and 6, what all ranks then have).
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "whole": (lambda folder: None, "step_6 of step 6"),
    "none": (lambda folder: [shutil.rmtree(path) for path in folder.iterdir()], "None"),
    "unfinished": (lambda folder: (folder / "step_6").rename(folder / "step_6.partial"), "step_4 of step 4"),
    "new one without its name": (lambda folder: swap(folder, finished=True), "step_6 of step 6"),
    "old one without its name": (lambda folder: swap(folder, finished=False), "step_6 of step 6"),
    **{f"flipped {name[-16:]}": (lambda folder, name=name: flip(folder / "step_6" / name), "step_4 of step 4")
       for name in ("checkpoint.json", *FILES)},
    "cut": (lambda folder: cut(folder / "step_6" / LAYER), "step_4 of step 4"),
    "a copy under another name": (misname, "step_6 of step 6"),
    "gone": (lambda folder: (folder / "step_6" / LAYER).unlink(), "step_4 of step 4"),
    "two damaged": (lambda folder: [flip(folder / f"step_{step}" / LAYER) for step in (4, 6)], "step_2 of step 2"),
    "all damaged": (
        lambda folder: [(flip if step < 6 else cut)(folder / f"step_{step}" / LAYER) for step in (2, 4, 6)],
        "ResumeRefused: every checkpoint in {folder} is damaged (step_6: layers/00001.safetensors has ",
    ),
}  # fmt: skip


@pytest.fixture
def choose(tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes a run directory with the checkpoints 2, 4 and 6 for every case, does to it what it says, and gives what
    both ranks of one job have: {case: (what, the files that each has read)}."""

    def choose(cases: dict[str, Callable[[Path], Any]], **changed: Any) -> dict[str, tuple[str, list[list[str]]]]:
        config = tiny_config()
        plan = make_plan(load_config(RunConfig, config, ["engine={pipeline: 1, data: 2}"]), 2, verify=False)
        whole = tmp_path / "whole" / "checkpoints"
        with job(tmp_path) as group:
            sampler = {"blend": plan.blend().state_dict()}
            state = {"fingerprints": {**fingerprints(plan), **changed}, "sampler": sampler, "manifest": "here"}
            write(whole, [2, 4, 6], group, state=state)
        scenarios = tmp_path / "scenarios"
        for name, act in cases.items():
            act(Path(shutil.copytree(whole, scenarios / name / "checkpoints")))
        ranks = run("choose", config, scenarios)
        assert [code for code, _ in ranks] == [0, 0]
        (_, first), (_, second) = ranks
        assert {name: has for name, (has, _) in first.items()} == {name: has for name, (has, _) in second.items()}
        return {name: (has, [read, second[name][1]]) for name, (has, read) in first.items()}

    return choose


def test_the_newest_whole_one_is_taken_by_all(choose: Callable[..., Any], tmp_path: Path) -> None:
    found = choose({name: act for name, (act, _) in CASES.items()})
    for name, (_, expected) in CASES.items():
        folder = tmp_path / "scenarios" / name / "checkpoints"
        has, _ = found[name]
        assert has.startswith(expected.format(folder=folder)), (name, has)
        assert not [path.name for path in folder.iterdir() if "." in path.name], name
    has, _ = found["all damaged"]
    for step, what in {6: "bytes, expected", 4: "SHA-256", 2: "SHA-256"}.items():
        assert f"step_{step}: {LAYER} has" in has
        assert what in has
    assert "Put back a copy of one, or choose another run_dir" in has


def test_every_file_is_read_by_one_rank(choose: Callable[..., Any]) -> None:
    """Of the checkpoint that is taken: each weight file by one of the two, and not all by the same."""
    (_, read) = choose({"whole": lambda folder: None})["whole"]
    names = [sorted(Path(path).name for path in rank if path.endswith(".safetensors")) for rank in read]
    assert sorted(names[0] + names[1]) == [Path(name).name for name in FILES if "layers" in name]
    assert all(names)


def test_a_given_path_is_taken_or_refused(choose: Callable[..., Any], tmp_path: Path) -> None:
    def give(step: int, act: Callable[[Path], Any]) -> Callable[[Path], None]:
        def do(folder: Path) -> None:
            act(folder / f"step_{step}")
            (folder.parent / "overrides").write_text(f"checkpoint.resume={folder / f'step_{step}'}")

        return do

    found = choose(
        {
            "older": give(4, lambda path: None),
            "flipped": give(4, lambda path: flip(path / LAYER)),
            "listing": give(4, lambda path: flip(path / "checkpoint.json")),
            "absent": give(5, lambda path: None),
            "never": lambda folder: (folder.parent / "overrides").write_text("checkpoint.resume=never"),
        }
    )
    assert found["older"][0] == "step_4 of step 4"
    for name, part in {"flipped": f"{LAYER} has SHA-256", "listing": "checkpoint.json cannot be used"}.items():
        path = tmp_path / "scenarios" / name / "checkpoints" / "step_4"
        assert found[name][0].startswith(f"ResumeRefused: the checkpoint {path} is damaged: {part}"), found[name][0]
        assert "checkpoint.resume=PATH" in found[name][0]
    assert "step_5 is no complete checkpoint" in found["absent"][0]
    assert "checkpoint.resume is never" in found["never"][0]


def test_a_checkpoint_of_another_run_is_refused(choose: Callable[..., Any]) -> None:
    """Copied into the folder it is the newest, and whole; the run does not go on from it, nor past it."""
    other = {"model": {"hidden_size": 4096}}
    (has, _) = choose({"copied": lambda folder: None}, **other)["copied"]
    assert has.startswith("ResumeRefused: the checkpoint ")
    assert "step_6 was made with another model" in has
    assert "start a new run_dir" in has


def test_a_file_that_another_machine_has_not_seen_yet(choose: Callable[..., Any]) -> None:
    """Two seconds late, it is waited for; then the same checkpoint is taken as without."""

    def hide(folder: Path) -> None:
        layer, hidden = folder / "step_6" / LAYER, folder.parent / "hidden"
        layer.rename(hidden)
        (folder.parent / "late").write_text(f"sleep 2; mv '{hidden}' '{layer}'")  # run once the ranks are there

    (has, _) = choose({"late": hide})["late"]
    assert has == "step_6 of step 6"
