"""Pipeline layers as a DeepSpeed `PipelineModule`, split into stages of equal work."""

from __future__ import annotations

from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule

from megamix.engines.deepspeed.division import UndividedLoss
from megamix.engines.deepspeed.tied import TiedMatrix
from megamix.engines.models.config import ModelConfig
from megamix.engines.models.documents import DocumentMasks
from megamix.engines.models.layers import Decoder, Embedding, Head, PipelineLayer, tie_ends


class MixPipelineModule(PipelineModule):
    """Embedding, decoder layers and head; each rank builds only its stage's layers.

    Args:
        linear: whether the loss takes the factors of the logits.
        within_documents: whether attention stays within documents; the input then has positions.

    Attributes:
        tied: the matrix of embedding and output projection, where it is one and they are on two stages.
    """

    tied: TiedMatrix | None = None

    def __init__(
        self,
        model: ModelConfig,
        *,
        seed: int,
        seq_length: int,
        loss: UndividedLoss,
        linear: bool,
        topology: Any,
        checkpoint_layers: bool,
        within_documents: bool,
    ) -> None:
        self._model = model
        self._costs = model.layer_costs(seq_length)
        last = model.num_layers + 1
        masks = DocumentMasks() if within_documents else None
        super().__init__(
            layers=[
                LayerSpec(Embedding, model, 0, seed),
                *[LayerSpec(Decoder, model, index, seed, seq_length, masks) for index in range(1, last)],
                LayerSpec(Head, model, last, seed, not linear),
            ],
            topology=topology,
            loss_fn=loss,
            # "parameters" would weigh the embedding, a mere lookup, as much as the output projection.
            partition_method="parameters",
            activation_checkpoint_interval=1 if checkpoint_layers else 0,
            checkpointable_layers=["Decoder"] if checkpoint_layers else None,
        )

    def tie(self) -> None:
        """Makes embedding and output projection one matrix; every rank calls it, when weights have type and device."""
        layers = self.own_layers()
        first, last = layers[0], layers[-1]
        if self._grid.pipe_parallel_size == 1:
            tie_ends(layers)
            return
        size = (self._model.vocabulary, self._model.hidden_size)
        embedding = first if isinstance(first, Embedding) else None
        self.tied = TiedMatrix(self._grid, embedding, size, next(first.parameters()))
        if isinstance(last, Head):
            last.tie(self.tied)

    def get_tied_weights_and_groups(self) -> list[Any]:
        """Overrides the weights whose gradients DeepSpeed sums over stages after a step's last backward pass."""
        if self.tied is not None:
            self.tied.sum_gradients()
        return []

    def _count_layer_params(self) -> list[int]:
        """Overrides the numbers that DeepSpeed balances over stages: work per layer instead of parameters."""
        return self._costs

    def own_layers(self) -> list[PipelineLayer]:
        """Layers built on this rank."""
        return [layer for layer in self.forward_funcs if isinstance(layer, PipelineLayer)]

    def own_layer(self, index: int) -> PipelineLayer:
        return next(layer for layer in self.own_layers() if layer.index == index)
