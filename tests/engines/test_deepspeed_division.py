"""Where releases of DeepSpeed divide by the micro-batches, by stand-ins that have what the releases have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megamix.engines.deepspeed.division import divides_loss

HOOK = {"_backward_prologue_per_tensor": lambda gradient: gradient / 4}


@pytest.mark.parametrize(
    ("release", "parts", "divided"),
    [("0.16.9", {}, True), ("0.18.9", {**HOOK, "_scale_wrt_gas": True}, False), ("0.19.8", HOOK, True)],
)
def test_who_divides_by_the_micro_batches(release: str, parts: dict[str, object], divided: bool) -> None:
    """Nobody divides the gradients of outputs, which differ from stage to stage."""
    engine = SimpleNamespace(**parts)
    assert divides_loss(engine) == divided
    if parts:
        assert engine._backward_prologue_per_tensor(1.0) == 1.0
