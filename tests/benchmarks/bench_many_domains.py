"""What many domains cost a step: mixing, dealing, the record; run by hand.

    python tests/benchmarks/bench_many_domains.py
    python tests/benchmarks/bench_many_domains.py --domains 1000 --steps 200 --profile

One rank with the real exchange (gloo, one process), bounds on epochs, and the mixer `doremi`, which gives every domain
another weight in every step (`odm` leaves them uniform for its first K ln K steps):

    mixing   sums handed in until the new weights are with the sampler: all-reduce, statistics, mixer, bounds, broadcast
    dealing  domains and samples of the next step, of ``--batch`` samples
    record   what rank 0's training thread writes of the step

Milliseconds: the median by the clock, and the least by the processor (all threads), which counts where other jobs run;
and the bytes that a change of weights and a step leave on disk.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megamix.core.text import Table
from megamix.data.batches import Batches
from megamix.data.blend.blend import Blend
from megamix.data.sampler import Sampler, Slice
from megamix.mixing.constraints import Constraints
from megamix.mixing.exchange import MixExchange, MixReport
from megamix.mixing.mixers import make_mixer
from megamix.mixing.weight_policy import Stages, WeightPolicy
from megamix.training.records.run_record import RunRecord
from megamix_kernels import DomainSums
from megamix_kernels.sums import NATS, TOKENS, UNITS_PER_NAT

SEQ_LENGTH = 2048


class Run:
    """A run of K domains without a model: losses are drawn at random for the samples dealt."""

    def __init__(self, num_domains: int, batch: int, steps: int, folder: Path) -> None:
        rng = np.random.default_rng(0)
        names = tuple(f"domain-{index:05d}" for index in range(num_domains))
        sizes = rng.integers(1_000, 1_000_000, num_domains)
        weights = sizes / sizes.sum()
        everything, nothing = np.ones(num_domains), np.zeros(num_domains)
        epochs = np.full(num_domains, 4.0)
        bounds = Constraints(names, sizes, 100_000 * batch, nothing, everything, epochs, "cap")
        policy = WeightPolicy(Stages((0,), weights[None]), bounds, Batches.equal(batch), 1)
        self.sampler = Sampler(Blend(sizes, weights, 1234), Slice(batch, batch))
        mixer = make_mixer({"name": "doremi", "apply": "sampling"}, names, weights)
        self._reports: list[MixReport] = []
        self._exchange = MixExchange(
            mixer, self.sampler, policy, first_step=0, loss_weights=None, has_reference=False,
            rewards_evaluation=False, judge=lambda *_: None, on_report=self._reports.append,
        )  # fmt: skip
        self._record = RunRecord(folder, names, None)
        self._folder, self._rng, self._loss, self._steps = folder, rng, rng.uniform(1.0, 6.0, num_domains), steps
        self._k = num_domains
        self.profile: cProfile.Profile | None = None

    def measure(self) -> tuple[dict[str, tuple[float, float]], int, int]:
        """Seconds by part (clock, processor), bytes of weights per change, and bytes of statistics per step."""
        times: dict[str, list[tuple[float, float]]] = {"mixing": [], "dealing": [], "record": []}
        for _ in range(2):
            self.sampler.deal()
        for step in range(self._steps):
            sums = self._sums()
            self._clock(times["mixing"], lambda at=step, sums=sums: self._mix(at, sums))
            self._clock(times["dealing"], self.sampler.deal)
            self._clock(times["record"], lambda: self._record.step(self._reports.pop(0)))
            self.sampler.forget_before(step)
        self._record.close()
        weights = sum(path.stat().st_size for path in self._folder.glob("weights*"))
        statistics = sum(path.stat().st_size for path in (self._folder / "statistics").iterdir())
        # The first steps fill caches.
        medians = {part: _middle(seconds[self._steps // 5 :]) for part, seconds in times.items()}
        return medians, weights // self._steps, statistics // self._steps

    def _mix(self, step: int, sums: torch.Tensor) -> None:
        if self.profile is not None:  # on this thread, where a profile sees it
            reduced = torch.cat([sums, sums.new_zeros(1, sums.shape[1])])
            self.profile.runcall(self._exchange._mix, step, reduced, dist.all_reduce(reduced, async_op=True))
            return
        self._exchange.submit(step, sums)
        self._exchange.settle(step + 1)

    def _sums(self) -> torch.Tensor:
        """int64 [K, C]: what the loss kernel leaves of a step."""
        domain = self._rng.integers(0, self._k, 512)
        sums = DomainSums(self._k)
        tokens = np.bincount(domain, minlength=self._k) * SEQ_LENGTH
        nats = self._loss * self._rng.normal(1.0, 0.02, self._k) * tokens
        sums.buffer[:, NATS] = torch.from_numpy((nats * UNITS_PER_NAT).round().astype(np.int64))
        sums.buffer[:, TOKENS] = torch.from_numpy(tokens)
        return sums.buffer

    @staticmethod
    def _clock(times: list[tuple[float, float]], action: Callable[[], object]) -> None:
        start, used = time.perf_counter(), time.process_time()
        action()
        times.append((time.perf_counter() - start, time.process_time() - used))


def _middle(times: list[tuple[float, float]]) -> tuple[float, float]:
    """The median by the clock, and the least by the processor: other jobs only ever add to it."""
    return float(np.median([clock for clock, _ in times])), min(used for _, used in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", type=int, nargs="+", default=[22, 1000, 4000, 40_000])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=512, help="samples of a step")
    parser.add_argument("--profile", action="store_true", help="where the time goes, of the mixing thread's functions")
    arguments = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows = []
    for number in arguments.domains:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(number, arguments.batch, arguments.steps, Path(folder))
            run.profile = cProfile.Profile() if arguments.profile else None
            times, change, statistics = run.measure()
            if run.profile is not None:
                pstats.Stats(run.profile).sort_stats("tottime").print_stats(25)
        rows.append(
            [
                f"{number:,}",
                *(f"{1000 * times[part][0]:.2f} / {1000 * times[part][1]:.2f}" for part in times),
                f"{change:,}",
                f"{statistics:,}",
            ]
        )
    print(Table(("domains", "mixing, ms", "dealing, ms", "record, ms", "bytes a change", "bytes a step"), rows).text())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
