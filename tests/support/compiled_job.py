"""`jobs`, with decoder layers compiled by a backend that only traces them, which takes no compiler and less time.

python compiled_job.py RUNS    one rank; leaves the number of graphs of each run in graphs.json beside the configs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from jobs import run_rank
from torch._dynamo.backends.debugging import aot_eager

from megamix.engines import compilation

graphs: list[int] = []


def backend(module: Any, inputs: Any, **_options: Any) -> Any:
    graphs[-1] += 1
    return aot_eager(module, inputs)


def begin(_number: int) -> None:
    torch._dynamo.reset()
    graphs.append(0)


if __name__ == "__main__":
    compilation.BACKEND = backend
    runs = json.loads(sys.argv[1])
    run_rank(runs, begin)
    (Path(runs[0][0]).parent / "graphs.json").write_text(json.dumps(graphs), encoding="utf-8")
