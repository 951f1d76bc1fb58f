"""One run, killed 100 times, in every phase of its life and whoever of it dies, ends as if nobody had disturbed it.

A tool: ``pytest -m slow -s tests/training/test_hundred_kills.py`` prints its seed and kills; MEGAMIX_KILLS and
MEGAMIX_SEED set other ones, MEGAMIX_RUN_SECONDS a longer wait on a busy machine. The next start follows at once, while
threads of killed ranks still hold the lock.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from disturbed import PHASES, Disturbed, assert_no_sample_lost_or_doubled, assert_same

KILLS = int(os.environ.get("MEGAMIX_KILLS", "100"))
SEED = int(os.environ.get("MEGAMIX_SEED", random.randrange(10**6)))
STEPS = 4 * KILLS
# Of a rank alone: its own faults, too.
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)


@pytest.mark.slow
def test_a_run_that_is_killed_a_hundred_times(
    megamix: Callable[..., subprocess.CompletedProcess[str]],
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    data_dir: Path,
) -> None:
    def write(name: str) -> Path:
        path = tiny_config(
            run_dir=str(tmp_path / name),
            engine={"pipeline": 2},
            train={"steps": STEPS},
            checkpoint={"every": 5},
            evaluate={"every": 10, "batches": 1},
        )
        return path.rename(tmp_path / f"{name}.yaml")

    chance = random.Random(SEED)
    plan = list(itertools.islice(itertools.cycle(itertools.product(PHASES, ("rank", "starter", "all"))), KILLS))
    chance.shuffle(plan)
    print(f"seed {SEED}")
    megamix("train", write("whole"))
    disturbed = Disturbed(write("killed"), tmp_path / "killed", chance, is_patient=False)
    for moment, victim in plan:
        number = chance.choice(SIGNALS) if victim == "rank" else signal.SIGKILL
        assert disturbed.kill_once(moment, victim, number), f"the run was done before: {disturbed.kills}, seed {SEED}"
        print(len(disturbed.kills), disturbed.kills[-1], flush=True)
    assert len(disturbed.kills) == KILLS
    disturbed.finish()
    disturbed.nobody_is_left()
    print(Counter(kill.split()[2] for kill in disturbed.kills))
    assert_same(disturbed.run, tmp_path / "whole", STEPS, (SEED, disturbed.kills))
    assert_no_sample_lost_or_doubled(disturbed.run, STEPS, 8, data_dir, 64)
