"""How long `megamix swarm fit` takes for a swarm of realistic size, all included.

    python tests/benchmarks/bench_swarm_fit.py              # 128 runs, 24 domains, 50 metrics: under 60 s on 2 cores
    python tests/benchmarks/bench_swarm_fit.py --runs 256 --domains 64 --regression gp

The swarm is drawn from a known law with noise. Counted is everything between the two CSV files and the written fit:
the fit from 8 starts, 5 folds from 8 starts for each of 5 ridges, 100 fits to resampled runs, and the plots. How far
the fit is from the true law at other mixtures is printed beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from synthetic import known_law, mixtures, swarm_of

from megamix.core.config import validate
from megamix.studies.swarm.fit.config import FitConfig
from megamix.studies.swarm.fit.fit import fit
from megamix.studies.swarm.fit.tables import write_metrics, write_ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=128)
    parser.add_argument("--domains", type=int, default=24)
    parser.add_argument("--metrics", type=int, default=50)
    parser.add_argument("--noise", type=float, default=0.02, help="standard deviation, in the metric's unit")
    parser.add_argument("--regression", default="log_linear", choices=["log_linear", "lightgbm", "gp"])
    given = parser.parse_args()
    law = known_law(given.domains, given.metrics)
    table = swarm_of(law, given.runs, noise=given.noise)
    config = validate(FitConfig, {"regression": given.regression}, "the command line")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_ratios(folder / "ratios.csv", table.runs, table.domains, table.ratios_RK)
        write_metrics(folder / "metrics.csv", table.runs, table.metrics, table.values_RJ)
        wall, processor = time.perf_counter(), time.process_time()
        fitted = fit(folder / "ratios.csv", folder / "metrics.csv", folder / "fit", config)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    x = mixtures(500, given.domains, seed=99)
    error = float(np.sqrt(np.mean((fitted.predict(x) - law.predict(x)) ** 2)))
    ranks = float(np.mean([one["spearman"] or 0.0 for one in fitted.cross_validation.values()]))
    print(
        f"{given.regression}: {given.runs} runs x {given.domains} domains x {given.metrics} metrics,"
        f" {fitted.details['folds']} folds, {len(fitted.boot_c_BJ)} resamples: {wall:.1f} s, {processor:.1f} s of"
        f" processor on {os.cpu_count()} cores; held-out rank correlation {ranks:.3f}, error at new mixtures {error:.4f}"
        f" (noise {given.noise:g})"
    )


if __name__ == "__main__":
    main()
