"""The progress of a run for people: a line that renews itself on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys

import pytest

from megamix.core.log import get_logger
from megamix.training.records.progress_line import show_progress

LINE = {"loss": 2.34567, "tokens_per_second": 12345.6, "step_seconds": 1.5}
TEXT = "loss 2.3457, 12,346 tokens/s, 1.50 s/step"


def test_on_a_terminal_each_line_and_each_log_line_takes_the_place_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger = get_logger("megamix.test_progress_line")  # its handler writes to the captured standard error
    show_progress(50, 100, LINE)
    logger.warning("saved")
    show_progress(100, 100, LINE)
    logger.warning("done")
    clear = "\r\x1b[K"
    halfway, saved, last = capsys.readouterr().err.split(clear)[1:]
    assert halfway == f"[{'#' * 12}{'-' * 12}] step 50/100: {TEXT}, 1:15 left"
    assert saved.endswith("saved\n")
    last, done = last.splitlines()
    assert last == f"[{'#' * 24}] step 100/100: {TEXT}, 0:00 left"
    assert done.endswith("done")


def test_elsewhere_it_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    with caplog.at_level(logging.INFO, "megamix"):
        show_progress(1, 10, LINE)
    assert f"step 1/10: {TEXT}" in caplog.text
    assert "\x1b" not in capsys.readouterr().err
