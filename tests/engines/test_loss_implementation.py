"""``loss.implementation`` in whole runs: the Triton kernel, interpreted, and the linear form train what plain torch
trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SUPPORT
from jobs import run_job
from records import largest_difference
from safetensors.torch import load_file
from tolerance import assert_alike, rounding

from megamix.core.errors import InputError
from megamix.engines import loss_form
from megamix.engines.config import MegatronConfig
from megamix.engines.models.config import ModelConfig
from megamix.engines.step_loss import StepLoss

Write = Callable[..., Path]
Run = Callable[..., Any]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernel itself")
def test_triton_without_a_gpu_is_refused_before_any_step(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    refused = megamix("train", tiny_config(loss={"implementation": "triton"}), code=2).stderr
    assert "loss.implementation: implementation 'triton' cannot be used: logits_NV is on cpu, wanted cuda" in refused
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_the_kernel_trains_what_torch_trains(tiny_config: Write, tmp_path: Path) -> None:
    """Two stages and two micro-batches, so that the promised gradient is not 1."""
    pytest.importorskip("triton")
    for name in ("triton", "torch"):
        config = tiny_config(
            run_dir=str(tmp_path / name),
            data={"seq_length": 8},
            engine={"pipeline": 2},
            mixer={"name": "odm", "preset": "official", "warmup_steps": 0},
            train={"steps": 2, "global_batch": 2, "micro_batch": 1},
            evaluate={"every": 0, "batches": 1},
            loss={"implementation": name},
        )
        run_job(2, [(config, ())], TRITON_INTERPRET="1" if name == "triton" else "0")
    loss, weight = largest_difference(tmp_path / "triton", tmp_path / "torch")
    limit = math.log(512) * rounding(terms=2 * 8, layers=4, steps=2)
    assert 0 < loss < limit  # not the same arithmetic
    assert weight < limit


def test_auto_takes_the_linear_form_on_gpus_that_the_logits_would_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(architecture="neox", hidden_size=32, num_layers=2, num_heads=2, ffn_size=64, vocab_size=1024)
    engine = MegatronConfig(name="megatron", tensor=2, context=2, precision="bf16")
    num_bytes = 2 * (4 * 64 // 2) * (1024 // 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)

    def takes(implementation: str, device: str, memory: int) -> bool:
        monkeypatch.setattr(loss_form, "smallest_memory", lambda _device: memory)
        shape = {"seq_length": 64, "micro_batch": 4, "device": torch.device(device)}
        return loss_form.takes_linear_form(implementation, model, engine, **shape)

    assert [takes("auto", "cuda", memory) for memory in (10 * num_bytes - 1, 10 * num_bytes)] == [True, False]
    assert not takes("auto", "cpu", 1)
    for device in ("cpu", "cuda"):
        assert takes("linear", device, 10**12)
        assert not takes("torch", device, 1)
        assert not takes("triton", device, 1)


def test_trainers_that_hand_logits_over_have_no_linear_form() -> None:
    with pytest.raises(InputError, match=r"loss\.implementation: .* one of auto, torch, triton; got 'linear'"):
        StepLoss(1, 8, torch.device("cpu"), "linear")


def test_megatrons_hook_gets_a_gradient_that_takes_no_memory() -> None:
    pytest.importorskip("megatron.core")
    from megamix.engines.megatron.model import GradientHeld

    hidden, weight_VH = torch.ones(3, 2, requires_grad=True), torch.nn.Parameter(torch.zeros(5, 2))
    seen: list[tuple[bool, bool]] = []
    node: Any = weight_VH.expand_as(weight_VH).grad_fn
    (accumulation, _) = node.next_functions[0]

    def hook(*_: object) -> None:
        assert weight_VH.grad is not None
        seen.append((vars(weight_VH)["grad_added_to_main_grad"], weight_VH.grad.data_ptr() == weight_VH.data_ptr()))
        weight_VH.grad = None

    accumulation.register_hook(hook)
    for _ in range(2):
        (GradientHeld.apply(hidden, weight_VH) * 3).sum().backward()
    assert seen == [(True, True)] * 2
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[6.0, 6.0]] * 3


SEQ, BATCH, STEPS = 20, 8, 3
LINEAR: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "deepspeed pp2": {"name": "deepspeed", "pipeline": 2},
        "megatron tp2": {"name": "megatron", "tensor": 2},
        "megatron tp2 bf16": {"name": "megatron", "tensor": 2, "precision": "bf16"},
    },
    4: {
        "deepspeed pp2 dp2": {"name": "deepspeed", "pipeline": 2, "data": 2},
        "megatron pp2 tp2": {"name": "megatron", "pipeline": 2, "tensor": 2},
        "megatron pp2 tp2 bf16": {"name": "megatron", "pipeline": 2, "tensor": 2, "precision": "bf16"},
    },
}


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    files = (run / "checkpoints" / f"step_{STEPS}" / "layers").iterdir()
    tensors = {key: tensor for path in files for key, tensor in load_file(path).items()}
    return {key: tensor for key, tensor in tensors.items() if key.startswith("weight/")}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_linear_form_trains_what_torch_trains(tiny_config: Write, tmp_path: Path, ranks: int) -> None:
    """Micro-batches of 40 tokens, whose logits exist for 16, 16 and 8 tokens at a time."""
    pytest.importorskip("megatron.core")
    runs = []
    for name, engine in LINEAR[ranks].items():
        for form in ("torch", "linear"):
            written = tiny_config(
                run_dir=str(tmp_path / f"{name} {form}"),
                data={"seq_length": SEQ},
                mixer={"name": "doremi", "reference": None, "eta": 0.3},
                # Adam's steps are then in proportion to gradients; else it enlarges the rounding of small ones.
                train={
                    "steps": STEPS, "global_batch": BATCH, "micro_batch": 2, "clip": 0.5, "lr": 3.0e-2, "epsilon": 1.0e-2,
                },
                evaluate={"every": 2, "batches": 2},
                checkpoint={"every": 0},
                loss={"implementation": form},
                engine=engine,
            )  # fmt: skip
            runs.append((written.rename(tmp_path / f"{name} {form}.yaml"), ()))
    run_job(ranks, runs, SUPPORT / "small_chunks.py")
    for name in LINEAR[ranks]:
        found, wanted = (tmp_path / f"{name} {form}" for form in ("linear", "torch"))
        is_bf16 = name.endswith("bf16")
        # In bf16 a gradient is rounded to 2^-8 of itself, once or twice.
        of_means = (
            torch.finfo(torch.bfloat16).eps / 8
            if is_bf16
            else rounding(terms=BATCH * SEQ, layers=4, steps=STEPS, mean_of=SEQ)
        )
        of_weights = torch.finfo(torch.bfloat16).eps if is_bf16 else rounding(terms=BATCH * SEQ, layers=4, steps=STEPS)
        assert max(largest_difference(found, wanted)) < math.log(512) * of_means
        weights, others = final_weights(found), final_weights(wanted)
        assert weights.keys() == others.keys()
        for key, tensor in weights.items():
            assert_alike(tensor, others[key], of_weights)
        # Not the same arithmetic.
        assert any(not torch.equal(weights[key], others[key]) for key in weights)
