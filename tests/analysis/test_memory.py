"""The memory formulas against the parameters and saved tensors of real layers, and against their sources."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ENVIRONMENT, RUN_SECONDS

from megamix.analysis.memory import StageMemory, activation_bytes, checkpoint_bytes, estimate_memory, layer_parameters
from megamix.engines.config import DeepSpeedConfig, MegatronConfig
from megamix.engines.models.config import ModelConfig
from megamix.engines.models.documents import DocumentMasks
from megamix.engines.models.layers import Decoder, Embedding, Head

SEQ = 32
NEOX = ModelConfig(architecture="neox", hidden_size=64, num_layers=3, num_heads=4, ffn_size=192, vocab_size=320)
PARALLEL = NEOX.model_copy(update={"parallel_residual": True})
LLAMA = ModelConfig(
    architecture="llama", hidden_size=64, num_layers=5, num_heads=4, num_key_value_heads=2, ffn_size=160, vocab_size=448
)
TIED = LLAMA.model_copy(update={"tie_word_embeddings": True})


def real_parameters(model: ModelConfig) -> list[int]:
    """Counted on the layers themselves, without memory for them."""
    with torch.device("meta"):
        layers: list[torch.nn.Module] = [Embedding(model, 0, 1)]
        layers += [Decoder(model, index + 1, 1, SEQ) for index in range(model.num_layers)]
        layers.append(Head(model, model.num_layers + 1, 1))
    return [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]


@pytest.mark.parametrize("model", [NEOX, LLAMA, TIED], ids=["neox", "llama", "tied"])
def test_parameters_are_those_of_the_real_layers(model: ModelConfig) -> None:
    assert layer_parameters(model) == real_parameters(model)
    assert model.num_parameters() == sum(real_parameters(model))
    assert checkpoint_bytes(model) == 12 * sum(real_parameters(model))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [NEOX, PARALLEL, LLAMA], ids=["neox", "parallel", "llama"])
def test_activations_are_what_autograd_keeps(model: ModelConfig, precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layer = Decoder(model, 1, 1, SEQ).to(dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            # The tensor too, so that its address is not given to another one.
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.randn(2, SEQ, model.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / (2 * SEQ)
    # Rotary tables and the statistics of norms are left out of the formula.
    assert activation_bytes(model, DeepSpeedConfig(precision=precision), SEQ) == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masks_of_documents_are_kept_once_for_all_layers(precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    positions, real = torch.arange(SEQ).repeat(2, 1) % 9, []
    for masks in (None, DocumentMasks()):
        layers = [Decoder(LLAMA, index, 1, SEQ, masks).to(dtype) for index in (1, 2)]
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        hidden = torch.randn(2, SEQ, LLAMA.hidden_size, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layers[1](layers[0]((hidden, positions)))
        real.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    engine = DeepSpeedConfig(precision=precision)
    without, within = (estimate(LLAMA, engine, micro_batch=2, within_documents=given) for given in (False, True))
    # Grouped keys and values are copied for every head where attention takes a mask.
    copies = 2 * 2 * 2 * SEQ * LLAMA.hidden_size // 2 * dtype.itemsize
    assert within[0].activations - without[0].activations == 2 * SEQ * SEQ * dtype.itemsize
    assert real[1] - real[0] == pytest.approx(2 * SEQ * SEQ * dtype.itemsize + copies, rel=0.03)


def estimate(model: ModelConfig, engine: DeepSpeedConfig | MegatronConfig, **changes: int) -> list[StageMemory]:
    shape = {"seq_length": SEQ, "micro_batch": 1, "num_micro_batches": 1, "data_size": 1, **changes}
    return estimate_memory(model, engine, **shape)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_hold_the_whole_model(stages: int) -> None:
    memory = estimate(NEOX, DeepSpeedConfig(pipeline=stages), micro_batch=4, num_micro_batches=4, data_size=2)
    real = real_parameters(NEOX)
    assert [layer for stage in memory for layer in layers_of(stage)] == list(range(len(real)))
    for stage in memory:
        count = sum(real[layer] for layer in layers_of(stage))
        assert stage.parameters == count
        assert (stage.weights, stage.gradients) == (4 * count, 4 * count)
        # Moments and master weights, spread over two ranks.
        assert stage.optimizer == 12 * count // 2
    assert [stage.logits > 0 for stage in memory] == [False] * (stages - 1) + [True]
    assert memory[-1].logits == 2 * 4 * 4 * SEQ * 320
    assert sum(stage.parameters for stage in memory) == NEOX.num_parameters()


def layers_of(stage: StageMemory) -> list[int]:
    return [layer for first, last in stage.chunks for layer in range(first, last + 1)]


def test_the_first_stage_holds_most_micro_batches() -> None:
    model = NEOX.model_copy(update={"num_layers": 8, "vocab_size": 64})

    def activations(stages: int, micro_batches: int, **engine: Any) -> list[int]:
        config = DeepSpeedConfig(pipeline=stages, **engine)
        return [stage.activations for stage in estimate(model, config, num_micro_batches=micro_batches)]

    layer, hidden = SEQ * activation_bytes(NEOX, DeepSpeedConfig(), SEQ), SEQ * 4 * 64
    assert activations(2, 8) == [2 * (4 * layer + hidden), 4 * layer + hidden]
    assert activations(2, 1) == [4 * layer + hidden, 4 * layer + hidden]
    assert activations(1, 8, activation_checkpointing=True) == [9 * hidden + layer]


def test_half_precision_and_zero_0() -> None:
    count = NEOX.num_parameters()
    for precision in ("bf16", "fp16"):
        half = estimate(NEOX, DeepSpeedConfig(precision=precision), data_size=4)[0]
        assert (half.weights, half.gradients, half.optimizer) == (2 * count, 6 * count, 3 * count)
    assert estimate(NEOX, DeepSpeedConfig(zero=0), data_size=4)[0].optimizer == 8 * count


def test_zero_2_and_3_spread_gradients_and_weights() -> None:
    """Rajbhandari et al., 2020 (arXiv 1910.02054), figure 1: of 2 + 2 + 12 bytes in half precision for weights,
    gradients and optimizer state, stage 2 leaves 2 + 14 / D and stage 3 16 / D; here gradients are fp32."""
    count, largest = NEOX.num_parameters(), sorted(real_parameters(NEOX))[-2:]
    for precision, size in (("fp32", 4), ("bf16", 2)):
        two = estimate(NEOX, DeepSpeedConfig(zero=2, precision=precision), data_size=4)[0]
        three = estimate(NEOX, DeepSpeedConfig(zero=3, precision=precision), data_size=4)[0]
        assert two.optimizer == three.optimizer == 12 * count // 4
        # The sum of a step, as much again in passing, and a bucket of a micro-batch's.
        assert two.gradients == three.gradients == 8 * count // 4 + 4 * count
        assert two.weights == size * count
        assert three.weights == size * (count // 4 + sum(largest))
    # 5 10^8 gradients at most wait for their reduction.
    wide = NEOX.model_copy(update={"hidden_size": 8192, "ffn_size": 32768})
    huge = estimate(wide, DeepSpeedConfig(zero=2, precision="bf16"), data_size=8)[0]
    assert huge.gradients == wide.num_parameters() + 2 * 10**9


def test_a_tied_matrix_has_one_optimizer_state_under_deepspeed() -> None:
    matrix = TIED.vocabulary * TIED.hidden_size
    (whole,) = estimate(TIED, DeepSpeedConfig())
    assert whole.parameters == sum(real_parameters(TIED))
    first, last = estimate(TIED, DeepSpeedConfig(pipeline=2))
    assert first.parameters + last.parameters == whole.parameters
    assert first.weights + last.weights == whole.weights + 4 * matrix
    assert first.gradients + last.gradients == whole.gradients + 4 * matrix
    assert first.optimizer + last.optimizer == whole.optimizer


def test_the_linear_form_holds_the_logits_of_a_chunk_and_the_gradients() -> None:
    """A micro-batch that is one chunk, and one of 8: the most rows (a multiple of 128) with 2^28 logits at most."""
    tokens = 4 * SEQ
    one = estimate(NEOX, DeepSpeedConfig(pipeline=2), micro_batch=4)
    assert one[0].linear == 0
    assert one[1].linear == 2 * 4 * tokens * 320 + 4 * tokens * 64 + 4 * 320 * 64
    assert one[1].total_linear - one[1].total == 4 * tokens * 64 + 4 * 320 * 64

    wide = NEOX.model_copy(update={"vocab_size": 128256})
    shape = {"seq_length": 4096, "micro_batch": 4}
    chunks = estimate(wide, DeepSpeedConfig(precision="bf16"), **shape)[0]
    assert chunks.linear == 2 * 2 * 2048 * 128256 + 2 * 16384 * 64 + 4 * 128256 * 64
    assert chunks.logits == 2 * 2 * 16384 * 128256
    # Of half of the vocabulary twice as many rows, rounded down: 2^28 // 64128 = 4186. Its gradient has a buffer.
    halves = estimate(wide, MegatronConfig(name="megatron", tensor=2, precision="bf16"), **shape)[0]
    assert halves.linear == 2 * 2 * 4096 * 64128 + 2 * 16384 * 64


# Megatron


def real_shards(model: ModelConfig, tensor: int) -> list[int]:
    """Parameters of each layer on one tensor-parallel rank, by the maps that divide the real ones."""
    from megamix.engines.megatron.names import parameter_maps

    with torch.device("meta"):
        layers = [Embedding(model, 0, 1), *(Decoder(model, n + 1, 1, SEQ) for n in range(model.num_layers))]
        layers.append(Head(model, model.num_layers + 1, 1))
    counts = []
    for layer in layers:
        whole = {layer.hugging_face_names()[name]: parameter for name, parameter in layer.named_parameters()}
        maps = parameter_maps(model, layer.index, fused_norms=False)
        joined = [(entry, entry.join([whole[name] for name in entry.sources])) for entry in maps]
        assert sum(len(entry.sources) for entry in maps) == len(whole)
        counts.append(sum(entry.shard(parameter, 0, tensor).numel() for entry, parameter in joined))
    return counts


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("model", [NEOX, LLAMA, TIED], ids=["neox", "llama", "tied"])
def test_shards_are_those_of_the_real_layers(model: ModelConfig, tensor: int) -> None:
    assert layer_parameters(model, tensor) == real_shards(model, tensor)
    engine = MegatronConfig(name="megatron", pipeline=3, tensor=tensor)
    memory = estimate(model, engine, micro_batch=4)
    for stage in memory:
        copied = model.vocabulary * model.hidden_size // tensor if model is TIED and stage is memory[-1] else 0
        assert stage.parameters == sum(real_shards(model, tensor)[layer] for layer in layers_of(stage)) + copied
    assert memory[-1].logits == 2 * 4 * 4 * SEQ * model.vocabulary // tensor


@pytest.mark.parametrize(
    ("options", "per_parameter"),
    [
        # Megatron Core's developer guide, "Distributed Optimizer", for d = 8 ranks (data 4 x context 2).
        ({"precision": "bf16"}, 18.0),
        ({"precision": "bf16", "distributed_optimizer": True}, 6 + 12 / 8),
        ({"precision": "fp32"}, 16.0),
        ({"precision": "fp32", "distributed_optimizer": True}, 8 + 8 / 8),
    ],
)
def test_bytes_per_parameter_are_those_of_the_guide(options: dict[str, Any], per_parameter: float) -> None:
    stage = estimate(NEOX, MegatronConfig(name="megatron", context=2, **options), data_size=4)[0]
    held = stage.weights + stage.gradients + stage.optimizer
    assert held / NEOX.num_parameters() == pytest.approx(per_parameter, rel=1e-5)


def test_activations_of_an_interleaved_pipeline() -> None:
    """Narayanan et al., 2021, section 2.2: with v chunks a stage the first one holds 1 + (p - 1) / (p v) times what it
    would hold with one."""
    model = NEOX.model_copy(update={"num_layers": 16})
    sizes = {}
    for chunks in (1, 2, 4):
        engine = MegatronConfig(name="megatron", pipeline=4, virtual_pipeline=chunks, activation_checkpointing=False)
        # A vocabulary that costs nothing, so that every chunk has as many layers.
        memory = estimate(model.model_copy(update={"vocab_size": 1}), engine, num_micro_batches=16)
        assert sorted(layer for stage in memory for layer in layers_of(stage)) == list(range(18))
        assert all(len(stage.chunks) == chunks for stage in memory)
        sizes[chunks] = memory[0].activations
        held = sizes[chunks] / (SEQ * (activation_bytes(model, engine, SEQ) * (4 // chunks) + 4 * 64))
        assert held == round(4 * chunks * (1 + 3 / (4 * chunks)) if chunks > 1 else 4)


def test_tensor_context_and_sequence_divide_the_activations() -> None:
    """32 H + the rest of Korthikanti et al. (2022), table 2: a layer of width H keeps 34 H bytes per token in fp16 with
    F = 4 H, of which 2 H are dropout's masks; 10 H of the 34 stay whole under tensor parallelism."""
    model = NEOX.model_copy(update={"ffn_size": 256, "dropout": 0.1})

    def bytes_per_hidden(**options: Any) -> float:
        return activation_bytes(model, MegatronConfig(name="megatron", precision="bf16", **options), SEQ) / 64

    assert bytes_per_hidden() == 34
    assert bytes_per_hidden(tensor=2) == 10 + 24 / 2
    assert bytes_per_hidden(tensor=2, sequence_parallel=True) == 34 / 2
    whole, halves = (
        estimate(model, MegatronConfig(name="megatron", context=context), num_micro_batches=1)[0] for context in (1, 2)
    )
    assert (halves.activations, halves.logits) == (whole.activations // 2, whole.logits // 2)


LOCAL_LAYERS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from megamix.engines.config import MegatronConfig
from megamix.engines.models.config import ModelConfig
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
from megamix.engines.megatron.cpu import cpu_stand_ins
from megamix.engines.megatron.model import build_chunks, transformer_config
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
length, engine = int(sys.argv[2]), MegatronConfig(name="megatron")
with cpu_stand_ins():
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    for text in sys.argv[3:]:
        model = ModelConfig.model_validate_json(text)
        chunk = build_chunks(engine, model, transformer_config(engine, model, length), length, linear=False)[0]
        layer = chunk.decoder.layers[0]
        own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        kept = {}
        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor
        hidden = torch.randn(length, 2, model.hidden_size, requires_grad=True)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(hidden, attention_mask=mask, rotary_pos_emb=chunk.rotary_pos_emb(length))
        parameters = sum(parameter.numel() for parameter in chunk.parameters())
        print("result", parameters, sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / (2 * length))
"""


def test_activations_of_megatrons_own_layers_are_what_autograd_keeps(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    models = [NEOX, PARALLEL, LLAMA]
    command = [
        sys.executable,
        "-c",
        LOCAL_LAYERS,
        str(tmp_path / "store"),
        "128",
        *(m.model_dump_json() for m in models),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    results = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("result")]
    for model, (parameters, real) in zip(models, results, strict=True):
        assert int(parameters) == model.num_parameters()
        formula = activation_bytes(model, MegatronConfig(name="megatron"), 128, local_layers=True)
        # Rotary tables, the causal mask and the statistics of norms are left out of the formula.
        assert formula == pytest.approx(float(real), rel=0.05)
