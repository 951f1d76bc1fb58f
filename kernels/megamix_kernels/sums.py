"""Loss sums per domain as integers, which do not depend on the order of addition.

Every token's loss is rounded once, to a multiple of 2**-24 nats, and added as an int64. The sums are then bitwise the
same for any order of rows and any split into micro-batches or over ranks, and an int64 all-reduce of
`DomainSums.buffer` is exact.

Shapes: N tokens, K domains, C columns of the buffer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megamix_kernels.checks import check_num_domains

NATS, TOKENS, EXCESS_NATS, NON_FINITE = range(4)
NUM_COLUMNS = 4

UNITS_PER_NAT = 2**24
MAX_TOKEN_NATS = 2**20


class DomainSums:
    """Running sums over the tokens of K domains, in one int64 buffer [K, C].

    Columns (module constants): ``NATS`` the sum of token losses and ``EXCESS_NATS`` the sum of max(loss - reference
    loss, 0), both in units of 2**-24 nats; ``TOKENS`` the number of tokens in these sums; ``NON_FINITE`` the number of
    excluded tokens.

    Rounding: a token's loss times 2**24, rounded half to even. That product is exact in fp32 (a power of two), so for
    an fp32 loss only parts below 2**-24 nats are lost: at most 2**-25 nats a token.

    Range: a token counts as non-finite when its loss (or its reference loss, where one is given) is NaN, infinite or
    greater in size than ``MAX_TOKEN_NATS`` = 2**20 nats, or when its domain id is out of range. The sums are exact
    while a domain's total stays below 2**39 (5.5e11) nats: 3e10 tokens at 16 nats each, far beyond one training step.
    Beyond, a total wraps to a negative one, which losses never have, and reads as NaN. Call `zero_` once a step.
    """

    def __init__(self, num_domains: int, device: torch.device | str | None = None) -> None:
        """Starts at zero.

        Args:
            num_domains: K, from 1 to 65536.
            device: device of the buffer and of the logits.

        Raises:
            TypeError: num_domains is not an int.
            ValueError: num_domains is out of range.
        """
        check_num_domains(num_domains)
        # A tensor made in inference mode could never be added to outside it.
        with torch.inference_mode(False):
            self.buffer = torch.zeros(num_domains, NUM_COLUMNS, dtype=torch.int64, device=device)

    @classmethod
    def from_buffer(cls, buffer: Tensor) -> DomainSums:
        """Wraps an int64 buffer [K, C] that holds sums, without copying it.

        Raises:
            TypeError: not an int64 tensor.
            ValueError: not [K, C], not contiguous, or K out of range.
        """
        if not isinstance(buffer, Tensor) or buffer.dtype != torch.int64:
            seen = buffer.dtype if isinstance(buffer, Tensor) else type(buffer).__name__
            raise TypeError(f"buffer must be an int64 tensor, got {seen}")
        if buffer.dim() != 2 or buffer.shape[1] != NUM_COLUMNS or not buffer.is_contiguous():
            layout = f"shape {list(buffer.shape)}, strides {list(buffer.stride())}"
            raise ValueError(f"buffer must be contiguous with shape [num_domains, {NUM_COLUMNS}], got {layout}")
        check_num_domains(buffer.shape[0])
        sums = cls.__new__(cls)
        sums.buffer = buffer
        return sums

    @property
    def num_domains(self) -> int:
        """K, the number of domains."""
        return self.buffer.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the buffer."""
        return self.buffer.device

    @property
    def nats(self) -> Tensor:
        """Sum of token losses in nats, float64 [K]; NaN where it has wrapped."""
        return self._in_nats(NATS)

    @property
    def tokens(self) -> Tensor:
        """Number of tokens summed, int64 [K]."""
        return self.buffer[:, TOKENS].clone()

    @property
    def excess_nats(self) -> Tensor:
        """Sum of max(loss - reference loss, 0) in nats, float64 [K]; zero where no reference was given, NaN where it
        has wrapped."""
        return self._in_nats(EXCESS_NATS)

    @property
    def non_finite(self) -> Tensor:
        """Number of tokens excluded from the sums, int64 [K]."""
        return self.buffer[:, NON_FINITE].clone()

    def _in_nats(self, column: int) -> Tensor:
        # Rounding makes a loss near 0 negative by far less than this one nat a token.
        wrapped_K = self.buffer[:, column] < -UNITS_PER_NAT * self.buffer[:, TOKENS]
        return torch.where(wrapped_K, math.nan, self.buffer[:, column].to(torch.float64) / UNITS_PER_NAT)

    @torch.no_grad()
    def add(
        self,
        domain_N: Tensor,
        loss_N: Tensor,
        *,
        counted_N: Tensor | None = None,
        reference_loss_N: Tensor | None = None,
    ) -> DomainSums:
        """Adds tokens in place, without a host synchronisation.

        Args:
            domain_N: domain ids, any integer dtype. A counted token with an id outside [0, K) counts as non-finite of
                the nearest valid domain, since an error would wait for the device.
            loss_N: token losses in nats, fp32 or float64.
            counted_N: bool; False ignores a token. None counts all.
            reference_loss_N: the reference model's token losses in nats, any floating dtype.

        Returns:
            This object.
        """
        row_N = domain_N.to(torch.int64)
        inside_N = (row_N >= 0) & (row_N < self.num_domains)
        row_N = row_N.clamp(0, self.num_domains - 1)
        # Comparisons with NaN are false, so both tests catch NaN too.
        good_N = inside_N & (loss_N.abs() <= MAX_TOKEN_NATS)
        if reference_loss_N is not None:
            reference_loss_N = reference_loss_N.to(loss_N.dtype)
            good_N &= reference_loss_N.abs() <= MAX_TOKEN_NATS
        counted_N = torch.ones_like(good_N) if counted_N is None else counted_N
        bad_N = counted_N & ~good_N
        good_N = counted_N & good_N

        nats_N = _fixed_point(loss_N, good_N)
        if reference_loss_N is None:
            excess_N = torch.zeros_like(nats_N)
        else:
            excess_N = _fixed_point((loss_N - reference_loss_N).clamp(min=0), good_N)
        columns = [nats_N] * NUM_COLUMNS
        columns[TOKENS], columns[EXCESS_NATS], columns[NON_FINITE] = good_N.long(), excess_N, bad_N.long()
        self.buffer.index_add_(0, row_N, torch.stack(columns, dim=1))
        return self

    def check_fits(self, num_domains: int, device: torch.device) -> None:
        """Raises ValueError unless the sums have this number of domains and this device."""
        if self.num_domains != num_domains or self.device != device:
            seen = f"{self.num_domains} domains on {self.device}"
            raise ValueError(f"sums are for {seen}; wanted {num_domains} domains on {device}, like logits_NV")

    def zero_(self) -> DomainSums:
        """Sets all sums to zero in place and returns this object."""
        self.buffer.zero_()
        return self

    def __repr__(self) -> str:
        return f"DomainSums(num_domains={self.num_domains}, device='{self.device}')"


def _fixed_point(nats_N: Tensor, good_N: Tensor) -> Tensor:
    """Returns nats as int64 multiples of 2**-24, rounded half to even; zero where not good."""
    return torch.where(good_N, nats_N, 0.0).mul(UNITS_PER_NAT).round().to(torch.int64)
