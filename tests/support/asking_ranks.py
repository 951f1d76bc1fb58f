"""A rank of `jobs.run_job` that is asked to stop in a given step, on one rank of the job; it ends as a stopped one."""

from __future__ import annotations

import json
import os
import sys

from jobs import run_rank

from megamix.core.errors import Preempted
from megamix.training import trainer

if __name__ == "__main__":
    asked, real = int(os.environ["ASK_STEP"]), trainer.Trainer._requests

    def requests(self: trainer.Trainer) -> trainer.Requests:
        trainer.asked_to_stop = lambda: self.step == asked and os.environ["RANK"] == os.environ["ASK_RANK"]
        return real(self)

    trainer.Trainer._requests = requests
    try:
        run_rank(json.loads(sys.argv[1]))
    except Preempted:
        sys.exit(0)
    sys.exit("the run was not stopped")
