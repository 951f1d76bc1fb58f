"""The progress of a run, in one line for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from megamix.core.log import get_logger, show_status


def show_progress(step: int, steps: int, line: Mapping[str, Any]) -> None:
    """Shows a ``train`` line of metrics.jsonl: in a line that renews itself on a terminal, as a log line elsewhere."""
    text = (
        f"step {step}/{steps}: loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s, "
        f"{line['step_seconds']:.2f} s/step"
    )
    if not sys.stderr.isatty():
        get_logger().info("%s", text)
        return
    left = round((steps - step) * line["step_seconds"])
    bar = ("#" * (24 * step // steps)).ljust(24, "-")
    show_status(f"[{bar}] {text}, {left // 60}:{left % 60:02d} left", is_last=step == steps)
