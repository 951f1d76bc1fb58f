"""A rank whose clock stands an hour earlier every time it is looked at, and days earlier when it starts again."""

from __future__ import annotations

import itertools
import json
import sys
import time

from jobs import run_rank

if __name__ == "__main__":
    start, looks = time.time(), itertools.count()
    time.time = lambda: start - 3600 * next(looks)
    run_rank(json.loads(sys.argv[1]))
