"""The run on the console: what it is, how it goes on, and what to look at when it is over. Rank 0 only.

A line of progress renews itself on a terminal and is a line of the log elsewhere. It names the weights that moved since
the one before.

Legend: K domains.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megamix.core.log import get_logger, show_status
from megamix.core.text import gib, listed, number, plural
from megamix.data.batches import Batches
from megamix.mixing.exchange import MixReport
from megamix.training.mixture import mixture_of
from megamix.training.objective import objective_name
from megamix.training.plan import Plan

_MOST_NAMES = 3
_MOVED = 0.005
_UNITS = ((10**9, "B"), (10**6, "M"))

PEAK_BF16 = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 149.7e12,
}
"""Dense bf16 operations per second by the makers' data sheets; the first name that a device's name contains counts."""


class Console:
    """What rank 0 says of a run.

    Args:
        device: of this rank.
        weights: float64 [K], in force at the first step.
    """

    def __init__(self, plan: Plan, device: torch.device, weights: NDArray[np.float64]) -> None:
        self._plan = plan
        self._device = device
        self._log = get_logger()
        self._shown = self._weights = weights
        self._first: tuple[int, float | None] | None = None
        self._last: tuple[int, float | None] | None = None

    def begin(self, step: int) -> None:
        """Says what runs, from ``step`` on."""
        plan, config = self._plan, self._plan.config
        model, train = plan.model, config.train
        batches = config.batches
        parts = {
            "run": f"{config.run_dir}, step {step:,} of {train.steps:,}",
            "model": f"{model.architecture}, {model.num_layers} layers of {model.hidden_size}: "
            f"{_short(model.num_parameters())} parameters",
            "data": f"{plural(len(plan.domains), 'domain')}, {_short(sum(d.num_tokens for d in plan.domains))} tokens; "
            f"steps of {batches.describe(step)} x {config.data.seq_length}{_step_tokens(batches, step)}, "
            f"{_short(batches.tokens(train.steps))} in all",
            "mixture": f"{mixture_of(config.mixture).label()}: {self._largest(self._weights)}",
            "rule": _rule(config.mixer),
            "objective": objective_name(config.objective)
            + (f", without {listed(plan.unevaluated)} (no validation text)" if plan.unevaluated else ""),
            "schedule": train.learning_rate.describe(),
            "layout": f"{config.engine.name}, {_layout(config.engine)}, {plural(plan.world_size, 'rank')}, {config.engine.precision}",
        }
        for name, text in parts.items():
            self._log.info("%-9s %s", name, text)

    def weights(self, report: MixReport) -> None:
        """Takes note of the weights that follow from a step."""
        self._weights = report.segment.weights

    def progress(self, line: Mapping[str, Any]) -> None:
        """Shows a ``train`` line of metrics.jsonl."""
        step, steps = line["step"], self._plan.config.train.steps
        parts = [
            f"loss {line['loss']:.4f}",
            f"lr {line['lr']:.2e}",
            f"{line['tokens_per_second']:,.0f} tokens/s",
            f"{line['step_seconds']:.2f} s/step",
            gib(line["memory_bytes"]),
        ]
        if self._last is not None and self._last[1] is not None:
            parts.insert(1, f"objective {self._last[1]:.4f}")
        if line.get("flop_utilisation") is not None:
            parts.append(f"{line['flop_utilisation']:.1%} of peak")
        # As fast, by tokens, as the last steps: later ones may be larger.
        batches = self._plan.config.batches
        steps_left = (batches.tokens(steps) - batches.tokens(step)) / batches.tokens_of(step - 1)
        left = round(steps_left * line["step_seconds"])
        parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        text = f"step {step}/{steps}: {', '.join(parts)}{self._moved()}"
        if not sys.stderr.isatty():
            self._log.info("%s", text)
            return
        bar = ("#" * (24 * step // steps)).ljust(24, "-")
        show_status(f"[{bar}] {text}", is_last=step == steps)

    def evaluation(self, step: int, line: Mapping[str, Any]) -> None:
        """Shows an ``evaluate`` line of metrics.jsonl."""
        self._last = step, line["objective_loss"]
        self._first = self._first or self._last
        self._log.info(
            "step %d: validation loss %s (objective %s), mean over domains %s, worst %s",
            step, number(line["objective_loss"]), objective_name(self._plan.config.objective),
            number(line["macro_loss"]), line["worst_domain"],
        )  # fmt: skip

    def end(self, step: int) -> None:
        """Says how far the run came, and what to look at."""
        config = self._plan.config
        if self._first is not None and self._last is not None:
            seen = dict([self._first, self._last])  # one, of a resumed run that was evaluated once more
            came = ", ".join(f"{number(loss)} at step {each}" for each, loss in seen.items())
            self._log.info("objective loss %s; weights now %s", came, self._largest(self._weights))
        if step < config.train.steps:
            self._log.info("stopped at step %d of %d; the same command goes on", step, config.train.steps)
        self._log.info("to look at it: megamix inspect %s, megamix report %s", config.run_dir, config.run_dir)

    def machine(self, tokens_per_second: float) -> dict[str, float | None]:
        """``memory_bytes``, the most that this rank has used (of its device, or of its host where it computes there),
        and ``flop_utilisation``, the share of the devices' peak that the model's operations make up; None where that
        is not known. Neither waits for the device."""
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self._device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"memory_bytes": memory, "flop_utilisation": self._utilisation(tokens_per_second)}

    def _utilisation(self, tokens_per_second: float) -> float | None:
        plan = self._plan
        if self._device.type != "cuda" or plan.config.engine.precision != "bf16":
            return None
        name = torch.cuda.get_device_name(self._device)
        peak = next((peak for device, peak in PEAK_BF16.items() if device in name), None)
        if peak is None:
            return None
        # Forward and twice that backward; an operation is a multiplication or an addition.
        operations = 6 * sum(plan.model.layer_costs(plan.config.data.seq_length))
        return operations * tokens_per_second / (peak * plan.world_size)

    def _largest(self, weights: NDArray[np.float64]) -> str:
        order = np.argsort(-weights, kind="stable").tolist()
        return listed((f"{self._plan.domain_names[k]} {weights[k]:.3f}" for k in order), _MOST_NAMES)

    def _moved(self) -> str:
        """The weights that moved most since the last line; nothing where none moved."""
        by = self._weights - self._shown
        moved = [k for k in np.argsort(-np.abs(by), kind="stable").tolist() if abs(by[k]) >= _MOVED]
        texts = [f"{self._plan.domain_names[k]} {self._shown[k]:.3f} -> {self._weights[k]:.3f}" for k in moved]
        self._shown = self._weights
        return f"; weights: {listed(texts, _MOST_NAMES)}" if texts else ""


def _step_tokens(batches: Batches, step: int) -> str:
    """``= 8,192 tokens``, where all steps from ``step`` on are equal."""
    return f" = {batches.tokens_of(step):,} tokens" if batches.sizes[-1][0] <= step else " tokens"


def _short(count: int) -> str:
    """``1.35 B``, ``410.2 M``, ``12,345``."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:,}"


def _rule(mixer: Any) -> str:
    """Name and preset of a mixer, and when it acts."""
    parts = [str(mixer.name)]
    parts += [
        f"{key} {getattr(mixer, key)}" for key in ("preset", "warmup_steps", "update_every") if hasattr(mixer, key)
    ]
    return ", ".join(parts)


def _layout(engine: Any) -> str:
    """The ways in which the model is spread; those of one rank are left out."""
    kinds = ("tensor", "pipeline", "context", "data")
    sizes = [f"{kind} {getattr(engine, kind)}" for kind in kinds if (getattr(engine, kind, 1) or 1) > 1]
    return " x ".join(sizes) or "one rank a copy"
