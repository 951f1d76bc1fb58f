"""Models: function, names and shapes of transformers, and initial weights that do not depend on the split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import SEED, SEQ_LENGTH, TINY, build, model_config, one_document_at_a_time, run, shake
from tolerance import assert_alike, rounding
from torch import nn
from transformers import GPTNeoXForCausalLM, LlamaForCausalLM

from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.core.files import shipped_folder
from megamix.engines.models import ModelConfig
from megamix.engines.models.config import preset
from megamix.engines.models.documents import DocumentMasks, attended, document_ends
from megamix.engines.models.layers import Decoder, Embedding, Head, PipelineLayer, hugging_face_config

ARCHITECTURES = ["neox", "llama"]
# The widest sum of a tiny model has 56 terms; an embedding, three layers and a head.
FORWARD = rounding(terms=56, layers=5)
PRESETS = sorted(path.stem for path in (shipped_folder("configs") / "models").glob("*.yaml"))


def upstream_model(config: ModelConfig, attention: str = "sdpa") -> nn.Module:
    upstream: Any = hugging_face_config(config, SEQ_LENGTH)
    upstream._attn_implementation = attention
    return (GPTNeoXForCausalLM if config.architecture == "neox" else LlamaForCausalLM)(upstream).eval()


def hugging_face_state(layers: list[PipelineLayer]) -> dict[str, torch.Tensor]:
    """All parameters under their Hugging Face names; a name given twice is an error."""
    state: dict[str, torch.Tensor] = {}
    for layer in layers:
        names = layer.hugging_face_names()
        parameters = dict(layer.named_parameters())
        assert names.keys() == parameters.keys()
        for name, upstream_name in names.items():
            assert upstream_name not in state
            state[upstream_name] = parameters[name].detach()
    return state


def load(upstream: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    """Loads into transformers' model; returns its parameters by the names of transformers 5 (4 has another one)."""
    parameters = {name.replace("embed_out.", "lm_head."): value for name, value in upstream.named_parameters()}
    assert {name: value.shape for name, value in state.items()} == {name: v.shape for name, v in parameters.items()}
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)
    return parameters


def random_tokens(config: ModelConfig, samples: int = 2, length: int = SEQ_LENGTH) -> torch.Tensor:
    return torch.randint(config.vocabulary, (samples, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("architecture", TINY)
def test_parameters_map_one_to_one_and_logits_are_those_of_transformers(architecture: str) -> None:
    """Same names and shapes (nothing missing, nothing left over), and the same logits as transformers' own model with
    both its attention implementations (eager masks explicitly, which proves causality and rotary another way)."""
    config = model_config(architecture)
    layers = build(config)
    shake(layers)
    state = hugging_face_state(layers)
    tokens = random_tokens(config)
    logits = run(layers, tokens)
    assert logits.shape == (*tokens.shape, config.vocabulary)
    for attention in ("sdpa", "eager"):
        upstream = upstream_model(config, attention)
        load(upstream, state)
        assert_alike(upstream(tokens).logits, logits, FORWARD)


@pytest.mark.parametrize("architecture", TINY)
def test_positions_reach_every_layer(architecture: str) -> None:
    """Logits and gradients with positions that begin again are those of transformers' model with these
    ``position_ids``, unlike those without; positions 0 to S - 1 change nothing, to the last bit."""
    config = model_config(architecture)
    layers = build(config)
    shake(layers)
    tokens = random_tokens(config)
    counted = torch.arange(SEQ_LENGTH).expand(tokens.shape)
    positions = torch.stack([counted[0] % 9, (counted[0] + 20).clamp(max=30) % 24])
    logits = run(layers, (tokens, positions))
    upstream = upstream_model(config)
    parameters = load(upstream, hugging_face_state(layers))
    # Without a mask of its own transformers takes positions that begin again for packed samples and parts them.
    wanted = upstream(tokens, attention_mask=torch.ones_like(tokens), position_ids=positions).logits
    assert_alike(logits, wanted, FORWARD)
    assert (logits - run(layers, tokens)).abs().max() > 1e-2
    torch.testing.assert_close(run(layers, (tokens, counted)), run(layers, tokens), rtol=0, atol=0)
    logits.square().mean().backward()
    wanted.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    for layer in layers:
        names = layer.hugging_face_names()
        for name, parameter in layer.named_parameters():
            # Down and up again, over the tokens of two samples.
            assert_alike(parameter.grad, gradients[names[name]], rounding(terms=56, layers=10))


# A document of one token, one that fills the sample, and parts at both ends.
POSITIONS = torch.stack([torch.tensor([*range(5), 0, *range(11), *range(7)]), torch.arange(SEQ_LENGTH)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("architecture", TINY)
def test_attention_within_documents(architecture: str, dtype: torch.dtype) -> None:
    """Logits and gradients of samples are those of their documents, each run through the layers by itself."""
    config = model_config(architecture)
    layers = [layer.to(dtype) for layer in build(config, masks=DocumentMasks())]
    alone = [layer.to(dtype) for layer in build(config)]
    shake(layers)
    shake(alone)
    tokens = random_tokens(config)
    logits, wanted = run(layers, (tokens, POSITIONS)), one_document_at_a_time(alone, tokens, POSITIONS)
    assert_alike(logits, wanted, rounding(dtype, terms=56, layers=5))
    assert (logits - run(alone, (tokens, POSITIONS))).abs().max() > 1e-2  # attention over the whole sample
    logits.square().mean().backward()
    wanted.square().mean().backward()
    for layer, other in zip(layers, alone, strict=True):
        for parameter, same in zip(layer.parameters(), other.parameters(), strict=True):
            assert_alike(parameter.grad, same.grad, rounding(dtype, terms=56, layers=10))


def test_masks_of_documents() -> None:
    """Token by token; a mask is made once for all layers of a micro-batch, and anew for the next one."""
    document = (POSITIONS == 0).cumsum(1)
    attends = attended(POSITIONS)
    for row, query, key in [(r, q, k) for r in range(2) for q in range(SEQ_LENGTH) for k in range(SEQ_LENGTH)]:
        assert attends[row, query, key] == (key <= query and document[row, key] == document[row, query])
    assert document_ends(POSITIONS).tolist() == [0, 5, 6, 17, SEQ_LENGTH, 2 * SEQ_LENGTH]
    masks, again = DocumentMasks(), POSITIONS.clone()
    mask = masks.of(POSITIONS, torch.float32)
    assert masks.of(POSITIONS, torch.float32) is mask
    assert torch.equal(mask[:, 0] == 0, attends)
    assert torch.equal(mask[:, 0].isneginf(), ~attends)
    assert masks.of(POSITIONS, torch.bfloat16).dtype == torch.bfloat16
    assert masks.of(again, torch.bfloat16) is not masks.of(POSITIONS, torch.bfloat16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_initial_weights_do_not_depend_on_what_else_is_built(architecture: str) -> None:
    """A stage that builds layer 2 alone gets the weights it has in the whole model, whatever drew random numbers
    before; other layers and other seeds give other weights."""
    config = model_config(architecture)
    whole = build(config)
    torch.rand(1000)
    parts = [Head(config, 4, SEED), Decoder(config, 2, SEED, 2 * SEQ_LENGTH), Embedding(config, 0, SEED)]
    for part, same in zip(parts, (whole[4], whole[2], whole[0]), strict=True):
        expected = dict(same.named_parameters())
        for name, value in part.named_parameters():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    matrices = [
        parameter
        for layer in (*whole, *build(config, seed=SEED + 1))
        for parameter in layer.parameters()
        if parameter.dim() == 2
    ]
    assert len({round(float(matrix.detach().flatten()[0]), 9) for matrix in matrices}) == len(matrices)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scale_of_the_initial_weights(architecture: str) -> None:
    """Norms 1, biases 0, matrices normal with init_std, and init_std / sqrt(2 num_layers) into the residual stream."""
    config = model_config(architecture, hidden_size=256, ffn_size=256, init_std=0.05)
    into_residual = 0
    for layer in build(config):
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1:
                wanted = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                assert torch.all(parameter == wanted), name
                continue
            ends_in_residual = name.endswith(
                ("attention.dense.weight", "dense_4h_to_h.weight", "o_proj.weight", "down_proj.weight")
            )
            into_residual += ends_in_residual
            std = 0.05 / math.sqrt(2 * config.num_layers) if ends_in_residual else 0.05
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name
    assert into_residual == 2 * config.num_layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rotary_stays_accurate_in_bf16(architecture: str) -> None:
    """After .bfloat16() the angles still come from fp32 frequencies: at position 3000 they are off by less than bf16's
    last digit, where rounded frequencies would be far off."""
    config = model_config(architecture, hidden_size=128)
    decoder = Decoder(config, 1, SEED, 4096).bfloat16()
    assert all(parameter.dtype == torch.bfloat16 for parameter in decoder.parameters())
    cos, sin = decoder._rotary_table(torch.zeros(1, 4096, config.hidden_size, dtype=torch.bfloat16))
    assert cos.dtype == torch.bfloat16
    pairs = config.rotary_size // 2
    frequencies = config.rotary_base ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.arange(4096, dtype=torch.float64)[:, None] * frequencies.repeat(2)
    torch.testing.assert_close(cos[0].double(), angles.cos(), rtol=0, atol=2**-8)
    torch.testing.assert_close(sin[0].double(), angles.sin(), rtol=0, atol=2**-8)
    rounded = torch.arange(4096, dtype=torch.float64)[:, None] * frequencies.repeat(2).bfloat16().double()
    assert (rounded.cos() - angles.cos()).abs().max() > 0.5  # the test would see it


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_after_an_evaluation_without_gradients(architecture: str) -> None:
    """State kept from a pass without gradients (of another length, or in inference mode) must not break a later
    backward pass."""
    config = model_config(architecture)
    layers = build(config)
    with torch.inference_mode():
        run(layers, random_tokens(config, length=SEQ_LENGTH))
    with torch.no_grad():
        run(layers, random_tokens(config, length=SEQ_LENGTH // 2))
        run(layers, random_tokens(config))
    with torch.inference_mode():
        run(layers, random_tokens(config, length=SEQ_LENGTH // 2))
    run(layers, random_tokens(config, length=SEQ_LENGTH // 2)).square().mean().backward()
    for layer in layers:
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", PRESETS)
def test_num_parameters_is_the_real_count(name: str) -> None:
    """Counted on the meta device, for every preset, in our layers and in transformers' model."""
    config = ModelConfig.model_validate({"preset": name}).with_vocabulary(50257)
    with torch.device("meta"):
        layers = build(config, seq_length=64)
        upstream = upstream_model(config)
    assert config.num_parameters() == sum(p.numel() for layer in layers for p in layer.parameters())
    assert config.num_parameters() == sum(p.numel() for p in upstream.parameters())


def _million(name: str) -> float:
    number = name.rsplit("-", 1)[1]
    return float(number[:-1]) * {"m": 1, "b": 1000}[number[-1]]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_in_their_name(name: str) -> None:
    """Within 20 % with the 50304 rows of the usual tokenizer; the 2 M presets are for a vocabulary of 1024."""
    config = ModelConfig.model_validate({"preset": name}).with_vocabulary(1024 if name.endswith("-2m") else 50257)
    assert config.vocabulary == (1024 if name.endswith("-2m") else 50304)
    assert config.num_parameters() / 1e6 == pytest.approx(_million(name), rel=0.2)


def test_presets_reach_from_2m_to_1b_in_both_architectures() -> None:
    for architecture in ARCHITECTURES:
        sizes = [_million(name) for name in PRESETS if name.startswith(architecture)]
        assert min(sizes) == 2
        assert max(sizes) == 1000
    assert {"neox-160m", "neox-410m", "neox-1b"} <= set(PRESETS)


def test_keys_beside_a_preset_win() -> None:
    config = ModelConfig.model_validate({"preset": "neox-2m", "num_layers": 3})
    assert (config.num_layers, config.hidden_size) == (3, preset("neox-2m")["hidden_size"])
    assert ModelConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(("name", "hint"), [("neox-3m", "Did you mean 'neox-2m'?"), ("../demo", "Known: llama-160m")])
def test_unknown_preset(name: str, hint: str) -> None:
    """The second is a file that exists, but not a preset."""
    with pytest.raises(InputError, match=f"model.preset: unknown '{name}'") as error:
        preset(name)
    assert hint in str(error.value)


@pytest.mark.parametrize(("ids", "rows"), [(1, 64), (64, 64), (65, 128), (4096, 4096), (50257, 50304)])
def test_vocabulary_is_rounded_up_to_64(ids: int, rows: int) -> None:
    config = ModelConfig(**{**TINY["neox"], "vocab_size": None})
    assert config.with_vocabulary(ids).vocabulary == rows


def test_given_vocabulary_is_kept_or_refused() -> None:
    config = model_config("neox", vocab_size=70)
    assert config.with_vocabulary(70).vocabulary == 70
    with pytest.raises(InputError, match=r"vocab_size is 70.* has 71 ids"):
        config.with_vocabulary(71)
    wider = ModelConfig(**{**TINY["neox"], "vocab_size": None, "token_ids": 130})
    assert (wider.with_vocabulary(70).vocabulary, wider.with_vocabulary(70).token_ids) == (192, 130)
    assert wider.with_vocabulary(130).token_ids is None, "those of the tokenizer"
    with pytest.raises(InputError, match="not known before the data"):
        _ = ModelConfig(**{**TINY["neox"], "vocab_size": None}).num_parameters()


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("neox", {"num_heads": 3}, "hidden_size 32 does not divide by num_heads 3"),
        ("llama", {"num_key_value_heads": 3}, "num_heads 4 does not divide by num_key_value_heads 3"),
        ("neox", {"num_key_value_heads": 2}, "num_key_value_heads is for architecture llama"),
        ("llama", {"dropout": 0.1}, "dropout is for architecture neox"),
        ("llama", {"parallel_residual": True}, "parallel_residual is for architecture neox"),
        ("llama", {"hidden_size": 20}, "hidden_size 20 / num_heads 4 = 5 dimensions"),
        ("neox", {"rotary_percent": 0.4}, "x rotary_percent 0.4 = 3 dimensions"),
        ("neox", {"rotary_percent": 0.1}, "x rotary_percent 0.1 = 0 dimensions"),
        ("neox", {"num_layers": 0}, "num_layers: Input should be greater than 0, got 0"),
        ("neox", {"ffn_size": -1}, "ffn_size: Input should be greater than 0, got -1"),
        ("neox", {"architecture": "gpt2"}, "architecture: Input should be 'neox' or 'llama', got 'gpt2'"),
    ],
)
def test_bad_dimensions(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        validate(ModelConfig, {**TINY[architecture], **changes}, "model")
    assert message in str(error.value)


def test_parallel_residual_is_another_function_of_the_same_parameters() -> None:
    sequential, parallel = model_config("neox"), model_config("neox-parallel")
    assert sequential.num_parameters() == parallel.num_parameters()
    tokens = random_tokens(sequential)
    difference = run(build(sequential), tokens) - run(build(parallel), tokens)
    assert difference.abs().max() > 1e-4


def test_identity_is_what_a_resume_compares() -> None:
    """Where dimensions come from does not count; a key that older checkpoints lack is there only where it says
    something."""
    spelt_out = ModelConfig.model_validate({"preset": "neox-2m"})
    assert spelt_out.identity() == spelt_out.model_copy(update={"preset": None}).identity()
    assert "parallel_residual" not in spelt_out.identity()
    assert {"tie_word_embeddings", "token_ids"}.isdisjoint(spelt_out.identity())
    assert model_config("llama-tied").identity() == {**model_config("llama").identity(), "tie_word_embeddings": True}
    assert model_config("neox-parallel").identity() == {**model_config("neox").identity(), "parallel_residual": True}


def test_dropout_reaches_the_layer() -> None:
    """Dropout changes the output in training and not in evaluation."""
    config = model_config("neox", dropout=0.5)
    layers = build(config)
    tokens = random_tokens(config)
    assert not torch.equal(run(layers, tokens), run(layers, tokens))
    for layer in layers:
        layer.eval()
    assert torch.equal(run(layers, tokens), run(layers, tokens))


def test_stages_share_the_work() -> None:
    """neox-2m on two stages, cut by DeepSpeed's own balancing: no stage has more than 65 % of the work. The
    embedding, a mere lookup, counts nothing."""
    from deepspeed.runtime.utils import partition_balanced

    config = ModelConfig.model_validate({"preset": "neox-2m"}).with_vocabulary(1024)
    costs = config.layer_costs(seq_length=256)
    assert len(costs) == config.num_layers + 2
    start, cut, end = partition_balanced(weights=costs, num_parts=2)
    assert (start, end) == (0, len(costs))
    assert max(sum(costs[:cut]), sum(costs[cut:])) / sum(costs) < 0.65
    assert costs[0] < min(costs[1:-1])
    assert costs[-1] == 192 * 1024
    half = len(costs) // 2
    assert sum(costs[half:]) > sum(costs[:half])


def test_layer_costs_are_the_multiply_adds() -> None:
    """Against PyTorch's count of the matrix products (2 operations each), attention counted over half the square
    because it is causal. The costs also count biases and norms, a per cent or two."""
    from torch.utils.flop_counter import FlopCounterMode

    config = model_config("llama", hidden_size=128, ffn_size=384, vocab_size=512)
    layers = build(config, seq_length=64)
    hidden: Any = random_tokens(config, samples=1, length=64)
    for layer, cost in zip(layers, config.layer_costs(64), strict=True):
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            hidden = layer(hidden)
        attention = 2 * 2 * 64 * 64 * 128 if isinstance(layer, Decoder) else 0
        wanted = counter.get_total_flops() - attention / 2
        assert 2 * 64 * cost == pytest.approx(wanted, rel=0.02)
