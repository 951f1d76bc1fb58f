"""Hugging Face's parameters become Megatron's and come back without a changed bit."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, model_config

from megamix.engines.megatron.context import context_part, join_parts
from megamix.engines.megatron.names import ParameterMap, parameter_maps

ARCHITECTURES = ["neox", "neox-parallel", "llama"]


def weights_of(architecture: str) -> dict[str, torch.Tensor]:
    """Each number once in the model, so that none can take another's place unseen."""
    layers = build(model_config(architecture, num_heads=4, num_key_value_heads=None, vocab_size=64))
    found, start = {}, 0
    for layer in layers:
        for name, parameter in layer.named_parameters():
            numbers = torch.arange(start, start + parameter.numel(), dtype=torch.float64)
            found[layer.hugging_face_names()[name]] = numbers.view_as(parameter)
            start += parameter.numel()
    return found


@pytest.mark.parametrize("fused_norms", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_whole_to_shards_and_back(architecture: str, size: int, fused_norms: bool) -> None:
    config = model_config(architecture, num_heads=4, num_key_value_heads=None, vocab_size=64)
    weights = weights_of(architecture)
    seen: set[str] = set()
    for layer in range(config.num_layers + 2):
        maps = parameter_maps(config, layer, fused_norms=fused_norms)
        assert len({entry.name for entry in maps}) == len(maps)
        for entry in maps:
            whole = entry.join([weights[name] for name in entry.sources])
            shards = [entry.shard(whole, rank, size) for rank in range(size)]
            gathered = entry.gather(shards)
            assert torch.equal(gathered, whole)
            for name, part in zip(entry.sources, entry.part(gathered), strict=True):
                assert torch.equal(part, weights[name]), name
                assert name not in seen
                seen.add(name)
            if entry.split != "whole":
                numbers = torch.cat([shard.flatten() for shard in shards])
                assert torch.equal(numbers.sort().values, whole.flatten().sort().values), "every number is on one rank"
    assert seen == weights.keys()


def test_query_key_and_value_stand_together_by_group() -> None:
    """4 query heads of 3 dimensions share 2 key/value heads: Megatron's rows are (q q k v) of each group."""
    entry = ParameterMap("", ("q", "k", "v"), "rows", query_heads=2, num_groups=2)
    query, key, value = torch.arange(12)[:, None], 100 + torch.arange(6)[:, None], 200 + torch.arange(6)[:, None]
    first = [0, 1, 2, 3, 4, 5, 100, 101, 102, 200, 201, 202]
    second = [6, 7, 8, 9, 10, 11, 103, 104, 105, 203, 204, 205]
    whole = entry.join([query, key, value])
    assert whole.flatten().tolist() == first + second
    assert entry.shard(whole, 1, 2).flatten().tolist() == second


def test_each_rank_has_its_part_of_gate_and_of_up() -> None:
    entry = ParameterMap("", ("gate", "up"), "both halves")
    whole = entry.join([torch.arange(4)[:, None], 10 + torch.arange(4)[:, None]])
    assert [entry.shard(whole, rank, 2).flatten().tolist() for rank in (0, 1)] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_context_parts_balance_causal_attention_and_join_again() -> None:
    samples = torch.arange(2 * 24).view(2, 24)
    assert torch.equal(context_part(samples, 0, 1), samples)
    parts = [context_part(samples, rank, 3) for rank in range(3)]
    assert parts[0][0].tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    assert parts[2][0].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert len({int(part[0].sum()) for part in parts}) == 1, "the same number of tokens to attend to"
    assert torch.equal(join_parts(parts), samples)
