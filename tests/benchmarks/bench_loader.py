"""How fast batches are built, and how long training waits for them; run by hand.

    python tests/benchmarks/bench_loader.py             # batches of 480 and 8192 samples from 22 domains
    python tests/benchmarks/bench_loader.py runs/demo   # the share of its time that a run waited for data

Token files lie in the page cache: what is measured is the work, not a disk. Numbers are the best of several.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megamix.data.loader import WindowReader
from megamix.data.tokens.stream import DomainTokens
from megamix.data.tokens.writer import IndexedWriter

NUM_DOMAINS = 22
DOMAIN_TOKENS = 6_000_000
MEAN_DOCUMENT = 600
VOCAB = 50_000
SECONDS = 2.0
OPTIONS = {
    "plain": {},
    "eod_mask_loss, reset_position_ids": {"eod_mask_loss": True, "reset_position_ids": True},
}


def write_domains(folder: Path) -> list[DomainTokens]:
    """Random tokens as uint16, in documents of 50 to twice the mean length."""
    rng = np.random.default_rng(0)
    for number in range(NUM_DOMAINS):
        lengths = rng.integers(50, 2 * MEAN_DOCUMENT - 50, DOMAIN_TOKENS // MEAN_DOCUMENT)
        with IndexedWriter(folder / str(number), "uint16") as writer:
            writer.add_documents(rng.integers(0, VOCAB, lengths.sum(), dtype=np.uint16), lengths)
    return [DomainTokens(str(number), [folder / str(number)]) for number in range(NUM_DOMAINS)]


def measure(domains: list[DomainTokens], num_samples: int, seq_length: int) -> None:
    """Prints the rate at which one rank builds batches of ``num_samples``, all of which it reads itself."""
    rng = np.random.default_rng(1)
    domain_n = rng.integers(0, NUM_DOMAINS, num_samples)
    sample_n = np.array([rng.integers(domains[domain].num_windows(seq_length)) for domain in domain_n])
    mine, shape = np.arange(num_samples), (num_samples // 8, 8)
    for name, options in OPTIONS.items():
        reader = WindowReader(domains, seq_length, VOCAB, **options)
        best, stop = np.inf, time.perf_counter() + SECONDS
        while time.perf_counter() < stop:
            started = time.perf_counter()
            reader.batch(domain_n, sample_n, mine, shape)
            best = min(best, time.perf_counter() - started)
        megabytes = num_samples * (seq_length + 1) * 2 / 1e6
        print(
            f"{num_samples:>8,} {seq_length:>6,} {best * 1e3:>10.1f} {num_samples / best:>12,.0f} "
            f"{megabytes / best:>9,.0f}  {name}"
        )


def waiting(run: Path) -> None:
    """Prints how much of its training steps a run spent waiting for data, the first logged interval left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["event"] == "train"][1:]
    waited, total = (sum(line[key] for line in train) for key in ("data_wait_seconds", "step_seconds"))
    print(f"{run}: {100 * waited / total:.3f} % of {total / len(train):.3f} s per step, {len(train)} intervals")


def main() -> None:
    if sys.argv[1:]:
        for run in sys.argv[1:]:
            waiting(Path(run))
        return
    print(f"{'samples':>8} {'tokens':>6} {'ms':>10} {'windows/s':>12} {'MB/s':>9}  options (MB as in the files)")
    with tempfile.TemporaryDirectory() as folder:
        domains = write_domains(Path(folder))
        for num_samples in (480, 8192):
            for seq_length in (1024, 4096):
                measure(domains, num_samples, seq_length)


if __name__ == "__main__":
    main()
