"""One way to say things: a logger that writes plain lines to standard error, and only from rank 0 unless asked."""

from __future__ import annotations

import logging
import os
import sys

_FORMAT = "%(asctime)s %(message)s"


def rank() -> int:
    """This process's rank in the job, from torchrun's or Slurm's environment; 0 outside of a job."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def get_logger(name: str = "megamix") -> logging.Logger:
    """The project's logger: INFO from rank 0, WARNING from the others (marked with their rank)."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        prefix = "" if rank() == 0 else f"[rank {rank()}] "
        handler.setFormatter(
            logging.Formatter(_FORMAT.replace("%(message)s", prefix + "%(message)s"), datefmt="%H:%M:%S")
        )
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
        logger.propagate = False
    return logger
