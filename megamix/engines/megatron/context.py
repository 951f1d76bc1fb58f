"""Parts of a sample under context parallelism.

A sample is cut into 2C parts and rank r of C has parts r and 2C - 1 - r: causal attention then costs all ranks the
same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def context_part(samples: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Returns the tokens of ``samples`` [..., S] on context-parallel rank ``rank`` of ``size``, [..., S / size]."""
    if size == 1:
        return samples
    parts = samples.chunk(2 * size, dim=-1)
    return torch.cat((parts[rank], parts[2 * size - 1 - rank]), dim=-1)


def join_parts(parts: list[torch.Tensor]) -> torch.Tensor:
    """Joins the parts of all ranks, given in rank order."""
    halves = [part.chunk(2, dim=-1) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim=-1)


def whole_samples(part: torch.Tensor, group: Any) -> torch.Tensor:
    """Returns the whole samples [..., S] from the parts on the ranks of ``group``; collective."""
    part = part.contiguous()
    if group.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part, group=group)
    return join_parts(parts)
