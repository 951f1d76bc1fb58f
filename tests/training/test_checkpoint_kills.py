"""kill -9 while a checkpoint is written, renamed or removed: there is always a whole one, and it is not an older one
than it need be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from commands import ENVIRONMENT, RUN_SECONDS, SUPPORT
from forked import run_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("killed")
    for name in ("a", "b"):
        (folder / name).mkdir()
    here = SUPPORT
    (done,) = run_processes(
        [here / "checkpoint_killed.py", folder], [ENVIRONMENT], cwd=here, seconds=RUN_SECONDS, separate=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found "))[6:])


def test_killed_at_every_step_of_two_checkpoints(found: dict[str, Any]) -> None:
    """The new step 6 takes the place of one of an earlier course (106); step 8 then pushes out step 4 (104)."""
    steps = found["steps"]
    assert not any(each["failed"] for each in steps)
    assert [each["killed"] for each in steps] == [True] * (len(steps) - 1) + [False]
    # What can be loaded, newest first, as the two checkpoints proceed; each is seen, and none is ever damaged.
    course = [[106, 104], [6, 104], [8, 6, 104], [8, 6]]
    places = [course.index(each["whole"]) for each in steps]
    assert places == sorted(places)
    assert set(places) == {0, 1, 2, 3}
    for each, place in zip(steps, places, strict=True):
        assert each["mended"] == each["whole"]
        assert each["left"] == sorted(f"step_{held % 100}" for held in course[place])
    assert len(steps) > 40
    names = {each["newest"] for each in steps}
    assert names >= {"step_6", "step_8"}
    assert names & {"step_6.partial", "step_6.before"}  # killed while neither had the name


def test_killed_at_random_moments(found: dict[str, Any]) -> None:
    kills = found["random"]
    assert len(kills) >= 20
    assert all(each["killed"] and each["whole"] for each in kills)
    steps = [each["step"] for each in kills]
    assert steps == sorted(steps)
    assert steps[-1] > 3
    assert any(each["under_way"] for each in kills)  # else no kill has met a checkpoint in writing
