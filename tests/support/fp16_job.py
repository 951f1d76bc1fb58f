"""`jobs`, with a loss scale that doubles every other step, so that it soon exceeds what fp16 can take.

python fp16_job.py RUNS    one rank
"""

from __future__ import annotations

import json
import sys

from jobs import run_rank

from megamix.engines import loss_scale

if __name__ == "__main__":
    loss_scale.STEPS_TO_DOUBLE = 2
    run_rank(json.loads(sys.argv[1]))
