"""What mixing costs a training step: with it and without, in turns, in one process group; run by hand.

    python tests/benchmarks/bench_step.py configs/demo.yaml --steps 200
    python tests/benchmarks/bench_step.py configs/demo_megatron.yaml --steps 200 --doremi train.micro_batch=2
    python tests/benchmarks/bench_step.py configs/demo.yaml --attention engine.pipeline=1 data.seq_length=1024
    torchrun --nproc-per-node 8 tests/benchmarks/bench_step.py configs/pile_1b_odm.yaml --steps 100 mixer.warmup_steps=0

Without: the engine's step on batches of a loader of its own, and nobody takes the statistics that the loss sums up all
the same. With: the statistics are reduced, the mixer makes new weights, all ranks receive them and sample with them.
With --doremi a DoReMi proxy's step is measured instead: a reference loss beside every label, and the mixer's weights on
the loss. With --attention mixing is on in both, and what is measured is attention within documents (with) against
attention over whole samples (without), by an engine each.

Blocks of ``--block`` steps alternate (without, with, with, without, ...); a block's time is that of its steps and of
what they leave to be done, divided by its steps. Neighbouring blocks make a pair. The table has the median over blocks
and the median of the pairs' ratios; "noise" is the same ratio among blocks without mixing alone, so a ratio within it
says nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megamix.core.config import load_config
from megamix.core.errors import MegamixError
from megamix.core.processes import num_cores
from megamix.core.text import Table, gib
from megamix.data.loader import Batch
from megamix.engines.base import Engine
from megamix.engines.choose import make_engine, start_distributed
from megamix.engines.step_loss import Objective
from megamix.training.config import RunConfig
from megamix.training.data_loop import MixedData
from megamix.training.job.local_ranks import job_world_size
from megamix.training.plan import Plan, make_plan

WARM_UP = 5
"""Steps of each kind before the clock starts."""
REFERENCE_LOSS = 3.0


class Steps:
    """Steps of one kind."""

    def __init__(self, plan: Plan, engine: Engine, *, mixing: bool, reference: bool) -> None:
        place = engine.place
        self._engine, self._mixing, self._reference = engine, mixing, reference
        self._data = MixedData(plan, data_rank=place.data_rank, reads_data=place.reads_data, device=place.device)
        self._lr = plan.config.train.lr / 10

    def run(self, number: int) -> float:
        """Takes ``number`` steps; returns the seconds of one."""
        started = time.perf_counter()
        for _ in range(number):
            self.step()
        if self._mixing:
            # What the last step leaves to be done would fall into the next block.
            self._data.settle()
            self._data.take_reports()
        if self._engine.place.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / number

    def step(self) -> None:
        """Takes one step, of which nothing is waited for that the step itself does not wait for."""
        batch = self._next_batch()
        objective = self._objective(batch)
        self._engine.train_step(batch, objective, self._lr, self._data.submit if self._mixing else _ignore)

    def close(self) -> None:
        self._data.close()

    def _next_batch(self) -> Batch | None:
        batch, _ = self._data.next_batch()
        if not self._mixing:
            self._data.loader.request()  # which `MixedData.submit` does otherwise
        if batch is None:
            return None
        if self._reference:
            losses = torch.full(batch.labels.shape, REFERENCE_LOSS, pin_memory=batch.labels.is_pinned())
            batch = replace(batch, reference=losses)
        device = self._engine.place.device
        return batch if device.type == "cpu" else batch.to(device)

    def _objective(self, batch: Batch | None) -> Objective:
        if self._mixing:
            return self._data.objective(batch)
        return Objective(1.0 if batch is None else float(batch.num_tokens))


def _ignore(_sums: torch.Tensor) -> None:
    """Takes the statistics of a step without mixing."""


@contextmanager
def started(config: RunConfig, world_size: int) -> Iterator[tuple[Plan, Engine]]:
    """The plan and the engine of a job in which this process is a rank."""
    start_distributed(config.engine)
    yield planned(config, world_size)
    dist.barrier()
    dist.destroy_process_group()


def planned(config: RunConfig, world_size: int) -> tuple[Plan, Engine]:
    """A plan and its engine."""
    plan = make_plan(config, world_size)
    options: dict[str, Any] = {"seq_length": config.data.seq_length, "num_domains": len(plan.domains)}
    options.update(vocab_size=plan.vocab_size, loss_implementation=config.loss.implementation)
    options.update(reset_position_ids=config.data.positions_restart, within_documents=config.data.within_documents)
    return plan, make_engine(config.engine, plan.model, config.train, **options)


def measure(kinds: Sequence[Steps], *, blocks: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a step in each block without and with, float64 [blocks] each."""
    for kind in kinds:
        kind.run(WARM_UP)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds: list[list[float]] = [[], []]
    for pair in range(blocks):
        for place in (0, 1) if pair % 2 == 0 else (1, 0):
            dist.barrier()
            seconds[place].append(kinds[place].run(block))
    for kind in kinds:
        kind.close()
    return np.array(seconds[0]), np.array(seconds[1])


def report(plan: Plan, without: np.ndarray, with_mixing: np.ndarray, what: str) -> str:
    """The table, and the ratio with its noise.

    Args:
        what: says what it is with.
    """
    config = plan.config
    tokens = config.train.global_batch * config.data.seq_length
    rows = [
        (name, f"{np.median(seconds) * 1e3:.3f}", f"{tokens / np.median(seconds):,.0f}")
        for name, seconds in (("without", without), (f"with{what}", with_mixing))
    ]
    table = Table((f"{config.engine.name}, {plan.world_size} ranks", "ms per step", "tokens per second"), rows)
    ratios = with_mixing / without
    noise = without[1:] / without[:-1]
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    spread = np.percentile(noise, (25, 50, 75))
    lines = [
        table.text(),
        f"ratio {middle:.4f} (quartiles {low:.4f} to {high:.4f}, {ratios.size} pairs)",
        f"noise {spread[1]:.4f} (quartiles {spread[0]:.4f} to {spread[2]:.4f})",
    ]
    if torch.cuda.is_available():
        lines.append(f"peak memory of rank 0: {gib(torch.cuda.max_memory_allocated())}")
    return "\n".join(lines)


def start_ranks(config: RunConfig) -> None:
    """Becomes torchrun, which starts this script once per rank."""
    ranks = config.engine.world_size()
    threads = config.engine.threads or (1 if torch.cuda.is_available() else max(1, num_cores() // ranks))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *sys.argv]
    os.execv(sys.executable, [sys.executable, *command])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=200, help="steps of each kind")
    parser.add_argument("--block", type=int, default=5, help="steps of one kind in a row")
    parser.add_argument("--doremi", action="store_true", help="measure a DoReMi proxy's step")
    parser.add_argument("--attention", action="store_true", help="measure attention within documents")
    arguments = parser.parse_intermixed_args()
    blocks = max(2, arguments.steps // arguments.block)
    overrides = [*arguments.overrides, f"train.steps={2 * (WARM_UP + blocks * arguments.block)}"]
    if arguments.doremi:
        overrides.append("mixer={name: doremi}")
    other = load_config(RunConfig, arguments.config, [*overrides, "data.attention=document"])
    config = load_config(RunConfig, arguments.config, overrides)
    world_size = job_world_size()
    if world_size is None:
        start_ranks(config)
    with started(config, world_size) as (plan, engine):
        if arguments.attention:
            parts = ((plan, engine), planned(other, world_size))
            kinds = [Steps(*part, mixing=True, reference=False) for part in parts]
        else:
            kinds = [Steps(plan, engine, mixing=on, reference=on and arguments.doremi) for on in (False, True)]
        seconds = measure(kinds, blocks=blocks, block=arguments.block)
        if dist.get_rank() == 0:
            what = " (DoReMi proxy)" if arguments.doremi else " (attention)" if arguments.attention else ""
            print(report(plan, *seconds, what))


if __name__ == "__main__":
    try:
        main()
    except MegamixError as error:
        sys.exit(str(error))
