"""The project's logger, which writes plain lines to standard error from rank 0, and the progress line of a run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

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


class _StatusAwareHandler(logging.StreamHandler[TextIO]):
    """Clears the progress line before a log line takes its place."""

    def emit(self, record: logging.LogRecord) -> None:
        if _status_shown:
            self.stream.write(_CLEAR_LINE)
        super().emit(record)


def show_progress(step: int, steps: int, line: Mapping[str, Any]) -> None:
    """Shows a ``train`` line of metrics.jsonl: in a line that renews itself on a terminal, as a log line elsewhere."""
    global _status_shown
    text = (
        f"step {step}/{steps}: loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s, "
        f"{line['step_seconds']:.2f} s/step"
    )
    if not sys.stderr.isatty():
        get_logger().info("%s", text)
        return
    left = round((steps - step) * line["step_seconds"])
    done = 24 * step // steps
    bar = "#" * done + "-" * (24 - done)
    sys.stderr.write(
        f"{_CLEAR_LINE}[{bar}] {text}, {left // 60}:{left % 60:02d} left" + ("\n" if step == steps else "")
    )
    sys.stderr.flush()
    _status_shown = step < steps
