"""All pipeline layers as one module, for ZeRO 2 and 3, which DeepSpeed's pipeline refuses.

Its output is the loss of a micro-batch, so that the weights that the loss takes are there while it runs: ZeRO 3 gathers
a layer's weights for its forward and its backward pass alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megamix.engines.deepspeed.division import UndividedLoss
from megamix.engines.models.config import ModelConfig
from megamix.engines.models.documents import DocumentMasks
from megamix.engines.models.layers import Decoder, Embedding, Flow, Head, PipelineLayer, tie_ends


class WholeModule(nn.Module):
    """Embedding, decoder layers and head on one rank, with the interface of `MixPipelineModule`.

    Args:
        linear: whether the loss takes the factors of the logits.
        checkpoint_layers: whether decoder layers are computed again in the backward pass.
        within_documents: whether attention stays within documents; the input then has positions.

    Attributes:
        tied: None: embedding and output projection are one parameter where they are one matrix.
    """

    tied: None = None

    def __init__(
        self,
        model: ModelConfig,
        *,
        seed: int,
        seq_length: int,
        loss: UndividedLoss,
        linear: bool,
        checkpoint_layers: bool,
        within_documents: bool,
    ) -> None:
        super().__init__()
        last = model.num_layers + 1
        masks = DocumentMasks() if within_documents else None
        decoders = [Decoder(model, index, seed, seq_length, masks) for index in range(1, last)]
        self.layers = nn.ModuleList([Embedding(model, 0, seed), *decoders, Head(model, last, seed, not linear)])
        self._loss = loss
        self._checkpoint_layers = checkpoint_layers

    def forward(self, inputs: Flow, targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Returns the loss of a micro-batch; arguments as those of the first layer and of `StepLoss`."""
        flow: Any = inputs
        for layer in self.layers:
            recomputes = self._checkpoint_layers and self.training and isinstance(layer, Decoder)
            flow = checkpoint(layer, flow, use_reentrant=False) if recomputes else layer(flow)
        return self._loss(flow, targets)

    def tie(self) -> None:
        """Makes embedding and output projection one matrix."""
        tie_ends(self.own_layers())

    def own_layers(self) -> list[PipelineLayer]:
        return [layer for layer in self.layers if isinstance(layer, PipelineLayer)]

    def own_layer(self, index: int) -> PipelineLayer:
        layer = self.layers[index]
        assert isinstance(layer, PipelineLayer)
        return layer


def train_passes(engine: Any, micro_batches: Iterator[Any], number: int) -> None:
    """Takes a step: the sum of the gradients of ``number`` micro-batches (input, targets), and the optimizer's step.

    Args:
        engine: DeepSpeed's, of a `WholeModule`.
        number: what DeepSpeed divides each loss by before the backward pass, as its pipeline does.
    """
    engine.train()
    for index, (inputs, targets) in enumerate(micro_batches, 1):
        engine.set_gradient_accumulation_boundary(index == number)
        engine.backward(engine(inputs, targets))
    engine.step()


@torch.no_grad()
def evaluation_passes(engine: Any, micro_batches: Iterator[Any]) -> None:
    """Hands micro-batches (input, targets) to the loss."""
    engine.eval()
    for inputs, targets in micro_batches:
        engine(inputs, targets)
