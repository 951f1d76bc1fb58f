"""A rank of `jobs` whose linear loss takes 16 rows at a time, so that tiny micro-batches make several chunks."""

import json
import sys

from jobs import run_rank

from megamix_kernels import linear

if __name__ == "__main__":
    linear.CHUNK_ELEMENTS, linear.CHUNK_MULTIPLE = 1, 16
    run_rank(json.loads(sys.argv[1]))
