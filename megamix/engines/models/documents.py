"""Attention within documents, from the positions of tokens, which count from 0 in every document of a sample.

The token at place q of a sample and position p of its document attends to places q - p to q.

Legend: B samples, S tokens, D documents (parts of documents, where a sample begins or ends in one).
"""

from __future__ import annotations

import weakref

import torch


def attended(positions_BS: torch.Tensor) -> torch.Tensor:
    """Which tokens each token attends to, bool [B, S, S], from positions int64 [B, S]."""
    place_S = torch.arange(positions_BS.shape[1], device=positions_BS.device)
    first_BS = place_S - positions_BS
    return (place_S <= place_S[:, None]) & (place_S >= first_BS[:, :, None])


def document_ends(positions_BS: torch.Tensor) -> torch.Tensor:
    """Number of tokens before each document of all samples, and of all tokens, int32 [D + 1]; waits for the device."""
    start_D = (positions_BS.flatten() == 0).nonzero()[:, 0]
    return torch.cat((start_D, start_D.new_tensor([positions_BS.numel()]))).int()


class DocumentMasks:
    """Mask of the micro-batch that passes through the layers of a stage, made once for all of them."""

    def __init__(self) -> None:
        self._key: tuple[weakref.ref[torch.Tensor], torch.dtype] | None = None
        self._mask = torch.empty(0)

    def of(self, positions_BS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What attention adds to its scores, [B, 1, S, S] of ``dtype``: 0, or -inf for tokens of other documents and
        later ones. Not bool, of which every layer would keep a copy in ``dtype``."""
        # Every micro-batch has a tensor of its own for its positions, which nobody changes.
        if self._key is None or self._key[0]() is not positions_BS or self._key[1] != dtype:
            # A later pass may need gradients; see `Decoder`'s rotary table.
            with torch.inference_mode(False):
                attended_BSS = attended(positions_BS)
                mask_BSS = torch.zeros(attended_BSS.shape, dtype=dtype, device=positions_BS.device)
                self._mask = mask_BSS.masked_fill_(~attended_BSS, float("-inf"))[:, None]
            self._key = (weakref.ref(positions_BS), dtype)
        return self._mask
