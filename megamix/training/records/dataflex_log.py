"""``odm_weights.jsonl`` or ``doremi_weights.jsonl`` of a run: its updates in the form of DataFlex's logs.

The keys are those of DataFlex's documentation of its two mixers: fewer than in ``weights.jsonl``, and in a DoReMi run
``domain_weights`` are alpha, whatever this acts on.

Format: github.com/OpenDCAI/DataFlex, documentation of the mixers ``odm`` and ``doremi``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megamix.core.files import AppendFile, remove

_COMMON = ("step", "timestamp", "domain_names", "domain_weights")
_ODM = ("exploration_rate", "alpha", "warmup_steps", "is_warmup")
_REWARDS = ("cumulative_estimated_rewards", "estimated_rewards")
ODM_FILE, DOREMI_FILE = "odm_weights.jsonl", "doremi_weights.jsonl"


class DataflexLog:
    """Appends the lines of a run's ODM or DoReMi updates; nothing for other mixers.

    Args:
        open_file: opens a file of the run at its end, cut back to the step that the run goes on from.
        is_new: whether the run begins anew; files of one before it are deleted.
    """

    def __init__(self, run_dir: Path, open_file: Callable[[Path], AppendFile], *, is_new: bool) -> None:
        self._run_dir, self._open = run_dir, open_file
        self._files: dict[str, AppendFile] = {}
        for name in (ODM_FILE, DOREMI_FILE):
            if is_new:
                remove(run_dir / name)
            elif (run_dir / name).is_file():
                self._files[name] = open_file(run_dir / name)

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes the line for one of weights.jsonl that follows from a step."""
        for name, entry in ((ODM_FILE, odm_entry(line)), (DOREMI_FILE, doremi_entry(line))):
            if entry is not None:
                if name not in self._files:
                    self._files[name] = self._open(self._run_dir / name)
                self._files[name].write_line(entry)

    def sync(self) -> None:
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def odm_entry(line: Mapping[str, Any]) -> dict[str, Any] | None:
    """DataFlex's ODM entry of a line of weights.jsonl; None for one of another mixer."""
    rewards = next((key for key in _REWARDS if key in line), None)
    if rewards is None or not all(key in line for key in _ODM):
        return None
    return {key: line[key] for key in (*_COMMON, rewards, *_ODM)}


def doremi_entry(line: Mapping[str, Any]) -> dict[str, Any] | None:
    """DataFlex's DoReMi entry of a line of weights.jsonl; None for one of another mixer."""
    if "perdomain_scores" not in line:
        return None
    entry = {key: line[key] for key in (*_COMMON, "perdomain_scores")}
    return {**entry, "domain_weights": line.get("loss_weights", line["domain_weights"])}
