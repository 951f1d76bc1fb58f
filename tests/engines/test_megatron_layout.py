"""Layouts that Megatron refuses before any process group exists, and the split of layers into stages."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny_models import model_config

from megamix.core.errors import InputError
from megamix.engines.config import MegatronConfig
from megamix.engines.megatron import layout
from megamix.engines.megatron.layout import (
    check_megatron_layout,
    check_megatron_machine,
    stage_layers,
    uses_transformer_engine,
)


def check(
    engine: dict[str, Any],
    *,
    model: dict[str, Any] | None = None,
    architecture: str = "llama",
    seq_length: int = 64,
    micro_batches: int = 4,
    vocab_size: int | None = 64,
) -> None:
    config = MegatronConfig(name="megatron", **engine)
    check_megatron_layout(
        config, model_config(architecture, **{"num_layers": 4, **(model or {})}), seq_length, micro_batches, vocab_size
    )
    check_megatron_machine(config)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with or without a GPU and packages."""

    def make(*, cuda: bool, packages: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(layout, "_installed", lambda package: package in packages)

    return make


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"tensor": 3}, {}, r"engine\.tensor 3 does not divide model\.num_heads: 4 = 1 x 3 \+ 1"),
    ({"tensor": 4}, {}, r"engine\.tensor 4 does not divide model\.num_key_value_heads: 2 = 0 x 4 \+ 2"),
    ({"tensor": 2}, {"model": {"ffn_size": 55}}, r"divide model\.ffn_size: 55 = 27 x 2 \+ 1"),
    ({"tensor": 2}, {"vocab_size": 61}, r"the vocabulary .*: 61 = 30 x 2 \+ 1"),
    ({"pipeline": 5}, {}, r"pipeline 5 x virtual_pipeline 1 = 5 chunks, but the model has 4 decoder layers"),
    ({"pipeline": 2, "virtual_pipeline": 3}, {}, r"2 x virtual_pipeline 3 = 6 chunks, but the model has 4"),
    ({"virtual_pipeline": 2}, {}, r"virtual_pipeline is 2 and engine\.pipeline is 1"),
    ({"pipeline": 2, "virtual_pipeline": 2}, {"micro_batches": 3}, r"groups of engine\.pipeline 2, but .* has 3"),
    ({"context": 3}, {}, r"2 x 3 = 6 parts, but data\.seq_length is 64 = 10 x 6 \+ 4"),
    ({"context": 2}, {}, r"engine\.context is 2, but megatron\.core's own attention wants whole samples"),
    ({"sequence_parallel": True}, {}, r"engine\.tensor is 1"),
    (
        {"sequence_parallel": True, "tensor": 2},
        {"seq_length": 63},
        r"the 63 tokens .* engine\.tensor 2, which leaves 1",
    ),
    ({"sequence_parallel": True, "tensor": 2}, {}, r"needs the norms of Transformer Engine or Apex"),
    ({"transformer_engine": "on"}, {}, r"transformer_engine is on, but there is no GPU here"),
    (
        {"distributed_optimizer": True, "checkpoint_format": "dist"},
        {},
        r"needs a GPU and the Adam of Transformer Engine or Apex",
    ),
    ({"gradient_accumulation_fusion": True}, {}, r"needs the kernel of Transformer Engine or Apex"),
]


@pytest.mark.parametrize(("engine", "options", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_refused_on_a_cpu_with_the_arithmetic(
    machine: Any, engine: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    machine(cuda=False)
    with pytest.raises(InputError, match=message):
        check(engine, **options)


def test_accepted_on_a_cpu(machine: Any) -> None:
    machine(cuda=False)
    for engine in (
        {},
        {"tensor": 2, "pipeline": 3},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"pipeline": 4, "data": 3, "precision": "bf16", "activation_checkpointing": True},
        {"checkpoint_format": "dist"},
    ):
        check(engine)
    check({"tensor": 2}, vocab_size=None)  # not known before the data is


def test_transformer_engine_on_a_gpu_allows_the_rest(machine: Any) -> None:
    machine(cuda=True, packages=("transformer_engine",))
    check({"context": 2, "tensor": 2, "sequence_parallel": True, "gradient_accumulation_fusion": True})
    check({"distributed_optimizer": True, "checkpoint_format": "dist"})
    with pytest.raises(InputError, match=r"Set engine\.checkpoint_format to dist"):
        check({"distributed_optimizer": True})
    with pytest.raises(InputError, match="only Transformer Engine's can divide them"):
        check({"context": 2, "transformer_engine": "off"})
    machine(cuda=True)
    with pytest.raises(InputError, match="no package transformer_engine here"):
        check({"transformer_engine": "on"})


def test_auto_takes_transformer_engine_on_a_gpu_only(machine: Any) -> None:
    auto = MegatronConfig(name="megatron")
    machine(cuda=True, packages=("transformer_engine",))
    assert uses_transformer_engine(auto)
    assert not uses_transformer_engine(MegatronConfig(name="megatron", transformer_engine="off"))
    machine(cuda=False, packages=("transformer_engine",))
    assert not uses_transformer_engine(auto)
    machine(cuda=True)
    assert not uses_transformer_engine(auto)


@pytest.mark.parametrize("vocabulary", [64, 640, 6400])
@pytest.mark.parametrize("num_layers", [4, 7, 9])
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4])
def test_stages_have_the_least_work_in_the_busiest(vocabulary: int, num_layers: int, num_chunks: int) -> None:
    """Against every way of cutting the layers."""
    model = model_config("llama", num_layers=num_layers, vocab_size=vocabulary)
    costs = model.layer_costs(64)

    def busiest(sizes: tuple[int, ...]) -> int:
        work = [size * costs[1] for size in sizes]
        return max([*work[:-1], work[-1] + costs[-1]])

    sizes = tuple(stage_layers(model, num_chunks, 64))
    ways = [way for way in itertools.product(range(1, num_layers + 1), repeat=num_chunks) if sum(way) == num_layers]
    assert sizes in ways
    assert busiest(sizes) == min(map(busiest, ways))
