"""A world of thousands of data-parallel ranks, one after the other on this machine; run by hand.

    python tests/benchmarks/simulate_world.py
    python tests/benchmarks/simulate_world.py --ranks 64 --batch 1024 --domains 22

Everything is the code of a run: sampler, reader, mixer, bounds and record. ``--files`` token files are made and dealt
to the domains; then the run is jumped through, ``--jump`` steps at a time, with new weights at each landing, until
10^6 steps; and at the last position every rank of ``--ranks`` is started as after a restart, deals the step, and reads
its own samples. The sums of all ranks are added up as the all-reduce adds them. It is checked that the ranks' samples
are the global batch, and that the sums are its tokens to the last digit.

What a network does is not measured; `share` has the assumptions about it, and about the speed of a step.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megamix.core.text import Table, gib
from megamix.data.batches import Batches
from megamix.data.blend.blend import Blend
from megamix.data.loader import WindowReader
from megamix.data.sampler import Sampler, Slice
from megamix.data.tokens.mapped_files import TOKEN_FILES, MappedFiles
from megamix.data.tokens.stream import DomainTokens
from megamix.data.tokens.writer import IndexedWriter
from megamix.mixing.constraints import Constraints
from megamix.mixing.exchange import MixReport
from megamix.mixing.mixers import DomainStats, make_mixer
from megamix.mixing.weight_policy import Stages, WeightPolicy
from megamix.training.records.ledger import Ledger
from megamix.training.records.run_record import RunRecord
from megamix_kernels.sums import NUM_COLUMNS, TOKENS

VOCABULARY, SEED = 50_000, 1234
STARTS = 32
"""Ranks whose start is measured: looking at 2,500 files takes longer than all else."""


@dataclass(frozen=True)
class Job:
    """A model on a number of GPUs, and what is assumed of them.

    Attributes:
        flops: of a GPU, that a step reaches: 40 % of an H100's 989 TFLOP/s in bf16.
        latency: of a hop, in seconds; an all-reduce and a broadcast take 2 log2(ranks) and log2(ranks) of them.
        bandwidth: of a rank, in bytes per second; an all-reduce moves twice its bytes, a broadcast once.
    """

    name: str
    parameters: float
    gpus: int
    tokens: float
    flops: float = 0.4 * 989e12
    latency: float = 20e-6
    bandwidth: float = 25e9

    @property
    def step(self) -> float:
        """Seconds of a step: 6 FLOPs for a parameter and token."""
        return 6 * self.parameters * self.tokens / (self.gpus * self.flops)

    def network(self, num_domains: int) -> float:
        """Seconds of the all-reduce of sums and of the broadcast of weights, beside the step."""
        sums, weights = 8 * NUM_COLUMNS * (num_domains + 1), 8 * num_domains
        return 3 * math.log2(self.gpus) * self.latency + (2 * sums + weights) / self.bandwidth


JOBS = (Job("1 B on 64", 1e9, 64, 2**21), Job("70 B on 4,096", 70e9, 4096, 2**24))


def write_files(folder: Path, number: int, windows: int, seq_length: int) -> list[Path]:
    """Token files of equal size, of documents of 1,000 tokens."""
    rng = np.random.default_rng(0)
    prefixes = [folder / f"part_{index:05d}" for index in range(number)]
    for prefix in prefixes:
        left = windows * seq_length + 1
        with IndexedWriter(prefix, "uint16") as writer:
            while left:
                length = min(left, 1000)
                writer.add_document(rng.integers(1, VOCABULARY, length))
                left -= length
            writer.close()
    return prefixes


def memory() -> int:
    """Bytes of this process that are not files: what a rank pays for itself."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


class World:
    """One run, its first rank's mixing, and all ranks in turn."""

    def __init__(self, prefixes: list[Path], num_domains: int, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._k = options, num_domains
        self._prefixes = [prefixes[index::num_domains] for index in range(num_domains)]
        self._names = tuple(f"domain-{index:04d}" for index in range(num_domains))
        sizes = np.array([domain.num_windows(options.seq_length) for domain in self._open()])
        weights = sizes / sizes.sum()
        ones, zeros = np.ones(num_domains), np.zeros(num_domains)
        # Of a run of 10^6 steps every domain is read often; what its bounds cost does not depend on how often.
        bounds = Constraints(
            self._names, sizes, 2 * options.steps * options.batch, zeros, ones, np.full(num_domains, 1e12), "cap"
        )
        self._policy = WeightPolicy(Stages((0,), weights[None]), bounds, Batches.equal(options.batch), 1)
        self._mixer = make_mixer({"name": "odm", "preset": "official", "warmup_steps": 0}, self._names, weights)
        self.sampler = Sampler(Blend(sizes, weights, SEED), self._share(0))
        self._record, self._folder = RunRecord(folder, self._names, None), folder
        self._rng = np.random.default_rng(1)
        self.mixing: list[float] = []

    def _open(self) -> list[DomainTokens]:
        pairs = zip(self._names, self._prefixes, strict=True)
        return [DomainTokens(name, prefixes, verify=False) for name, prefixes in pairs]

    def _share(self, rank: int) -> Slice:
        return Slice(self._options.batch, self._options.batch // self._options.ranks, rank, self._options.ranks)

    def jump(self) -> float:
        """Jumps through the run, mixing at every landing; returns the median seconds of a jump with its deal."""
        times = []
        for step in range(0, self._options.steps, self._options.jump):
            start = time.perf_counter()
            self.sampler = Sampler.from_state_dict(self.sampler.state_dict(step), self._share(0))
            dealt = self.sampler.deal()
            times.append(time.perf_counter() - start)
            tokens = np.bincount(dealt.all_domain, minlength=self._k) * self._options.seq_length
            self._mix(step, tokens)
        self._record.close()
        return float(np.median(times))

    def _mix(self, step: int, tokens: np.ndarray) -> None:
        start = time.perf_counter()
        nats = tokens * (3.0 + self._rng.normal(0.0, 0.1, self._k))
        stats = DomainStats(nats=nats, tokens=tokens, weights=self.sampler.weights_at(step))
        effective = self._policy.effective_step(step)
        wanted = self._policy.wanted(self._mixer, stats, step)
        assert wanted is not None
        counts = self.sampler.counts_at(effective)
        self.sampler.set_weights(self._policy.allowed(wanted, counts, effective * self._options.batch), effective)
        self.mixing.append(time.perf_counter() - start)
        position, segment = effective * self._options.batch, self.sampler.segment_at(effective)
        self._record.step(MixReport(step, stats, effective, position, segment, self._mixer.record(), True))

    def ledger(self) -> tuple[int, int, float]:
        """Lines, bytes a line, and the seconds in which a position is found and dealt from the record alone."""
        path = self._folder / "weights.jsonl"
        ledger = Ledger.read(path, SEED, "low_discrepancy")
        assert ledger is not None
        size = sum(file.stat().st_size for file in self._folder.glob("weights.*"))
        start = time.perf_counter()
        sizes = self._policy.constraints.num_samples
        position = (self._options.steps - self._options.jump // 2) * self._options.batch
        blend = ledger.blend_at(position, sizes, range(self._k))
        found = blend.window(position, self._options.batch)
        seconds = time.perf_counter() - start
        wanted = self.sampler._blend.window(position, self._options.batch)
        assert all((one == other).all() for one, other in zip(found, wanted, strict=True))
        return len(ledger.lines), size // len(ledger.lines), seconds

    def ranks(self) -> dict[str, np.ndarray]:
        """Every rank after a restart at the last position: seconds to start, deal and read, bytes, files opened.

        The token files are opened anew for `STARTS` of the ranks; the others read from files that were closed again.
        """
        step = self._options.steps - 1
        state = self.sampler.state_dict(step + 1)
        found: dict[str, list[float]] = {key: [] for key in ("start", "deal", "read", "bytes", "files")}
        total, seen = torch.zeros(self._k + 1, NUM_COLUMNS, dtype=torch.int64), []
        TOKEN_FILES._kept.clear()
        reader: WindowReader | None = None
        for rank in range(self._options.ranks):
            before, start = memory(), time.perf_counter()
            sampler = Sampler.from_state_dict(state, self._share(rank))
            is_fresh = rank % max(1, self._options.ranks // STARTS) == 0
            if is_fresh:
                reader = WindowReader(self._open(), self._options.seq_length, VOCABULARY)
            assert reader is not None
            started = time.perf_counter()
            dealt = sampler.deal()
            dealt_at = time.perf_counter()
            mine = np.arange(self._options.batch)[sampler.share.samples]
            batch = reader.batch(dealt.all_domain, dealt.all_sample, mine, dealt.domain.shape)
            read = time.perf_counter()
            sums = torch.zeros(self._k + 1, NUM_COLUMNS, dtype=torch.int64)
            counted = torch.bincount(batch.domains.reshape(-1).long(), minlength=self._k)
            sums[: self._k, TOKENS] = counted
            total += sums  # as the all-reduce does
            seen.append(np.stack([dealt.domain.ravel(), dealt.sample.ravel()]))
            values = (started - start, dealt_at - started, read - dealt_at, memory() - before, len(TOKEN_FILES))
            for key, value in zip(found, values, strict=True):
                if is_fresh or key not in ("start", "bytes"):
                    found[key].append(value)
            TOKEN_FILES._kept.clear()
        assert (np.concatenate(seen, axis=1) == np.stack([dealt.all_domain, dealt.all_sample])).all()
        wanted = np.bincount(dealt.all_domain, minlength=self._k) * self._options.seq_length
        assert (total[: self._k, TOKENS].numpy() == wanted).all()
        return {key: np.array(values) for key, values in found.items()}


def measure(prefixes: list[Path], num_domains: int, options: argparse.Namespace) -> list[tuple[str, str]]:
    """(what, number) of one world."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(prefixes, num_domains, options, Path(folder))
        jump = world.jump()
        lines, size, found = world.ledger()
        ranks = world.ranks()
    mixing = float(np.median(world.mixing))

    def ms(values: np.ndarray) -> str:
        return f"{1000 * np.median(values):.2f} / {1000 * values.max():.1f}"

    rows = [
        ("steps jumped to, with new weights at each", f"{len(world.mixing):,} of {options.steps:,}"),
        ("a jump and the step dealt there, ms", f"{1000 * jump:.2f}"),
        ("start of a rank, ms (median / most)", ms(ranks["start"])),
        ("a step dealt on a rank, ms", ms(ranks["deal"])),
        ("its samples read, files not open yet, ms", ms(ranks["read"])),
        # Later ranks use what earlier ones have left.
        ("memory of a rank for data and blend", gib(float(ranks["bytes"].max()))),
        ("files a rank opened for the step (most)", f"{int(ranks['files'].max())}"),
        ("bytes reduced a step", f"{8 * NUM_COLUMNS * (num_domains + 1):,}"),
        ("bytes broadcast a step", f"{8 * num_domains:,}"),
        ("mixing on rank 0, ms", f"{1000 * mixing:.2f}"),
        ("ledger: lines, bytes a line", f"{lines:,}, {size:,}"),
        ("a position found and dealt from the ledger, ms", f"{1000 * found:.2f}"),
    ]
    for job in JOBS:
        beside = job.network(num_domains) + mixing
        rows.append((f"{job.name}: step, s (assumed)", f"{job.step:.2f}"))
        rows.append(
            (
                f"{job.name}: sums, mixing, weights, ms and % of the step",
                f"{1000 * beside:.2f}, {beside / job.step:.2%}",
            )
        )
        dealing = float(np.median(ranks["deal"]) + np.median(ranks["read"]))
        rows.append((f"{job.name}: dealing and reading, % of the step", f"{dealing / job.step:.2%}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4096, help="samples of a step")
    parser.add_argument("--domains", type=int, nargs="+", default=[22, 1000])
    parser.add_argument("--files", type=int, default=2500)
    parser.add_argument("--windows", type=int, default=4, help="samples of a file")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--jump", type=int, default=10_000)
    options = parser.parse_args()
    assert isinstance(TOKEN_FILES, MappedFiles)
    with tempfile.TemporaryDirectory() as folder:
        prefixes = write_files(Path(folder), options.files, options.windows, options.seq_length)
        found = [measure(prefixes, number, options) for number in options.domains]
    rows = [[found[0][index][0], *(one[index][1] for one in found)] for index in range(len(found[0]))]
    print(f"{options.ranks:,} data-parallel ranks, {options.files:,} files, steps of {options.batch:,} samples")
    print(Table(("", *(f"{number:,} domains" for number in options.domains)), rows).text())


if __name__ == "__main__":
    main()
