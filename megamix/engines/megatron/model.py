"""The model as chunks of megatron.core's `GPTModel`, which compute the same function as
`megamix.engines.models.layers`.

Legend: B samples, S tokens, H hidden size, R rotary dimensions, V vocabulary, T tensor-parallel ranks.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # each module repeats that Transformer Engine and Apex are not installed
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer
    from megatron.core.utils import make_viewless_tensor

from megamix.engines.config import MegatronConfig
from megamix.engines.megatron.documents import take_masks
from megamix.engines.megatron.layout import stage_layers, uses_transformer_engine
from megamix.engines.models.config import ModelConfig
from megamix.engines.models.factors import OutputFactors


class ParallelResidualLayer(TransformerLayer):
    """Decoder layer whose feed-forward part reads the layer's input instead of the attention's output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_SBH = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        with_attention_SBH, context = self._forward_attention(*args, **kwargs)
        output_with_bias = self.mlp(self.pre_mlp_layernorm(hidden_SBH))
        with self.bias_dropout_add_exec_handler():
            add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
            output_SBH = add(output_with_bias, with_attention_SBH, self.hidden_dropout)
        # The pipeline frees tensors it has sent; a view would share their memory.
        return make_viewless_tensor(output_SBH, requires_grad=output_SBH.requires_grad, keep_graph=True), context


class SampleRotary(RotaryEmbedding):
    """Rotary angles by the token positions of the micro-batch, where they are not 0 to S - 1."""

    positions_BS: torch.Tensor | None = None

    # The parent's method is wrapped in a cache by integer arguments.
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns angles [S, 1, 1, R], or [S, B, 1, R] with positions."""
        if self.positions_BS is None:
            return super().forward(*args, **kwargs)
        self.inv_freq = self.inv_freq.to(self.positions_BS.device)
        angle_SBR = self.positions_BS.t().float()[..., None] * self.inv_freq
        return torch.cat((angle_SBR, angle_SBR), dim=-1)[:, :, None]


class GradientHeld(torch.autograd.Function):
    """Hands hidden states on, and to the weight's hook the news that ``main_grad`` holds the gradient already."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        ctx.weight_VH = weight_VH
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.weight_VH.grad_added_to_main_grad = True
        # Megatron's hook wants some gradient, and drops it; this one takes no memory, as autograd does not copy it.
        return grad_outputs[0], ctx.weight_VH.detach()


class MixChunk(GPTModel):
    """Chunk of the model; the last one returns logits [S, B, V / T], or what `factors` takes.

    Args:
        linear: whether the loss takes the factors of the logits.
    """

    def __init__(
        self, config: TransformerConfig, rotary_base: float, rotary_percent: float, *, linear: bool, **options: Any
    ) -> None:
        rotary: dict[str, Any] = {"rotary_base": rotary_base, "rotary_percent": rotary_percent}
        super().__init__(config, position_embedding_type="rope", parallel_output=True, **rotary, **options)
        self.rotary_pos_emb: SampleRotary = SampleRotary(
            kv_channels=config.hidden_size // config.num_attention_heads,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
            **rotary,
        )
        if self.pre_process:
            self.embedding.embedding_dropout = torch.nn.Dropout(0.0)  # only the layers have dropout
        if self.post_process and linear:
            vars(self.output_layer)["forward"] = self._hidden_states

    def _hidden_states(self, hidden_SBH: torch.Tensor, **_options: Any) -> tuple[torch.Tensor, None]:
        """Replaces `ColumnParallelLinear.forward`: its collectives, which sum gradients over the ranks, without
        its product."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH, group=group), None
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden_SBH, group=group), None

    def factors(self, hidden_SBH: torch.Tensor) -> OutputFactors:
        """Returns the factors of the logits from the output of a chunk that does not multiply them; the loss adds to
        the weight's ``main_grad``."""
        tied = self.share_embeddings_and_output_weights
        weight_VH: Any = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        # Where this chunk's embedding uses the weight too, that part of the gradient comes to the hook as any other.
        if not (tied and self.pre_process):
            hidden_SBH = GradientHeld.apply(hidden_SBH, weight_VH)
        return OutputFactors(hidden_SBH, weight_VH.detach(), weight_VH.main_grad)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Returns the output at the end of a forward pass with labels; `StepLoss` computes the loss from it.

        A pass without labels would copy it to [B, S].
        """
        return logits


def transformer_config(engine: MegatronConfig, model: ModelConfig, seq_length: int) -> TransformerConfig:
    """Returns Megatron's config of the model in the engine's layout."""
    cuda = torch.cuda.is_available()
    llama = model.architecture == "llama"
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    interleaved = engine.virtual_pipeline > 1
    options: dict[str, Any] = {}
    if engine.pipeline > 1:
        options["pipeline_model_parallel_layout"] = _pipeline_layout(engine, model, seq_length)
    if engine.activation_checkpointing:
        options.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    options.update(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.key_value_heads,
        ffn_hidden_size=model.ffn_size,
        normalization="RMSNorm" if llama else "LayerNorm",
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=not llama,
        gated_linear_unit=llama,
        activation_func=F.silu if llama else F.gelu,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        attention_softmax_in_fp32=True,
        init_method_std=model.init_std,
        tensor_model_parallel_size=engine.tensor,
        pipeline_model_parallel_size=engine.pipeline,
        virtual_pipeline_model_parallel_size=engine.virtual_pipeline if interleaved else None,
        context_parallel_size=engine.context,
        sequence_parallel=engine.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=engine.precision == "bf16",
        gradient_accumulation_fusion=engine.gradient_accumulation_fusion,
        # The fused GELU is the tanh approximation; these models use the exact one.
        bias_activation_fusion=cuda and llama,
        bias_dropout_fusion=cuda,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        use_cpu_initialization=not cuda,
        batch_p2p_comm=cuda and not interleaved,
        overlap_p2p_comm=cuda and interleaved,
        transformer_impl="transformer_engine" if uses_transformer_engine(engine) else "local",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its own default
        return TransformerConfig(**options)


def _pipeline_layout(engine: MegatronConfig, model: ModelConfig, seq_length: int) -> list[list[str]]:
    sizes = stage_layers(model, engine.pipeline * engine.virtual_pipeline, seq_length)
    chunks = [["decoder"] * size for size in sizes]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def build_chunks(
    engine: MegatronConfig,
    model: ModelConfig,
    config: TransformerConfig,
    seq_length: int,
    *,
    linear: bool,
    masked: bool = False,
) -> list[MixChunk]:
    """Builds this rank's chunks, one unless the pipeline is interleaved; their weights are not set yet.

    Args:
        linear: whether the loss takes the factors of the logits.
        masked: whether attention takes masks.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    last = engine.pipeline * engine.virtual_pipeline - 1
    chunks = []
    for virtual in range(engine.virtual_pipeline):
        place = virtual * engine.pipeline + stage
        chunks.append(
            MixChunk(
                config,
                model.rotary_base,
                model.rotary_percent if model.architecture == "neox" else 1.0,
                linear=linear,
                transformer_layer_spec=_layer_spec(engine, model, masked),
                vocab_size=model.vocabulary,
                max_sequence_length=seq_length,
                pre_process=place == 0,
                post_process=place == last,
                share_embeddings_and_output_weights=model.tie_word_embeddings,
                pg_collection=groups,
                vp_stage=virtual if engine.virtual_pipeline > 1 else None,
            )
        )
    return chunks


def _layer_spec(engine: MegatronConfig, model: ModelConfig, masked: bool) -> ModuleSpec:
    if uses_transformer_engine(engine):
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        norm = "RMSNorm" if model.architecture == "llama" else None
        spec = get_gpt_layer_local_spec(normalization=norm)
    if model.parallel_residual:
        spec.module = ParallelResidualLayer
    if masked:
        take_masks(spec)
    return spec
