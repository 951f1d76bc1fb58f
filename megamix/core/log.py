"""The project's logger, plain lines to standard error from rank 0, and a line on a terminal that renews itself."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, TextIO

_FORMAT = "%(asctime)s %(message)s"
_CLEAR_LINE = "\r\x1b[K"
_status_shown = False


def rank() -> int:
    """Rank of this process, from torchrun's or Slurm's environment; 0 outside a job."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def get_logger(name: str = "megamix") -> logging.Logger:
    """The project's logger: INFO from rank 0, WARNING from the others (marked with their rank)."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        handler = _StatusAwareHandler(sys.stderr)
        prefix = "" if rank() == 0 else f"[rank {rank()}] "
        handler.setFormatter(
            logging.Formatter(_FORMAT.replace("%(message)s", prefix + "%(message)s"), datefmt="%H:%M:%S")
        )
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
        logger.propagate = False
    return logger


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # takes no type before Python 3.11


class _StatusAwareHandler(_StreamHandler):
    """Clears the progress line before a log line takes its place."""

    def emit(self, record: logging.LogRecord) -> None:
        if _status_shown:
            self.stream.write(_CLEAR_LINE)
        super().emit(record)


def show_status(text: str, *, is_last: bool) -> None:
    """Writes a line to a terminal; the next one, or a log line, takes its place unless it is the last."""
    global _status_shown
    sys.stderr.write(_CLEAR_LINE + text + ("\n" if is_last else ""))
    sys.stderr.flush()
    _status_shown = not is_last
