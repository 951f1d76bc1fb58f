"""Cross-entropies of the benchmark, each as a function of logits and labels.

Every builder imports its package and raises ImportError if it is not installed. A loss is the mean over tokens; the
benchmark multiplies it by 1/8, as gradient accumulation does, so that the incoming gradient is not 1.

Shapes: N tokens, V logits a token, K domains.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megamix_kernels import DomainSums, domain_cross_entropy, linear_domain_cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

INCOMING = 0.125


def megamix(
    device: torch.device, *, implementation: str, promised: bool, num_domains: int = 22, **options: Any
) -> Loss:
    """This package's loss, with domain statistics; ``promised`` is mode A."""
    sums = DomainSums(num_domains, device)
    known: dict[int, tuple[Tensor, float]] = {}  # made once for each number of rows, not in the time of every run

    def loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        if len(labels_N) not in known:
            known[len(labels_N)] = labels_N % num_domains, float((labels_N != -100).sum())
        domain_N, num_counted = known[len(labels_N)]
        return domain_cross_entropy(
            logits_NV,
            labels_N,
            domain_N,
            num_domains,
            normaliser=num_counted,
            sums=sums,
            gradient_scale=INCOMING if promised else None,
            implementation=implementation,
            **options,
        ).loss

    return loss


def megamix_linear(device: torch.device, *, implementation: str = "auto") -> LinearLoss:
    """This package's loss from hidden states, with domain statistics and a promised gradient."""
    sums = DomainSums(22, device)
    known: dict[int, Tensor] = {}

    def loss(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
        if len(labels_N) not in known:
            known[len(labels_N)] = labels_N % 22
        return linear_domain_cross_entropy(
            *(hidden_NH, weight_VH, labels_N, known[len(labels_N)], 22),
            normaliser=float(len(labels_N)),
            sums=sums,
            gradient_scale=INCOMING,
            implementation=implementation,
        ).loss

    return loss


def torch_linear(device: torch.device) -> LinearLoss:
    return lambda hidden_NH, weight_VH, labels_N: F.cross_entropy((hidden_NH @ weight_VH.T).float(), labels_N)


def liger_linear(device: torch.device) -> LinearLoss:
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )

    return liger_fused_linear_cross_entropy


def liger_cute_linear(device: torch.device) -> LinearLoss:
    """One kernel for sm_90 and one for sm_100, which Liger does not choose between by itself."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy_sm90,
        )

        return liger_fused_linear_cross_entropy_sm90
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyFunction as Function,
    )

    return lambda hidden_NH, weight_VH, labels_N: Function.apply(hidden_NH, weight_VH, labels_N)[0]


def quack_linear(device: torch.device) -> LinearLoss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return chunked_linear_cross_entropy


def cut_linear(device: torch.device) -> LinearLoss:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    # Exact, without the filter that leaves small gradients out.
    return lambda hidden_NH, weight_VH, labels_N: linear_cross_entropy(hidden_NH, weight_VH, labels_N, filter_eps=None)


def torch_eager(device: torch.device) -> Loss:
    return F.cross_entropy


def torch_compiled(device: torch.device) -> Loss:
    return torch.compile(lambda logits_NV, labels_N: F.cross_entropy(logits_NV.float(), labels_N))


def liger(device: torch.device) -> Loss:
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_cross_entropy,
    )

    return liger_cross_entropy


def liger_cute(device: torch.device) -> Loss:
    from liger_kernel.ops.cutedsl.ops.cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerCrossEntropyFunction,
    )

    return lambda logits_NV, labels_N: LigerCrossEntropyFunction.apply(logits_NV, labels_N, None)[0]


def megatron(device: torch.device, *, fused: bool) -> Loss:
    """Megatron's losses take logits [S, B, V] and return one loss a token."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    _one_rank(device)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    group = parallel_state.get_tensor_model_parallel_group()

    def loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        logits, labels = logits_NV[:, None], labels_N[:, None]
        if fused:
            return fused_vocab_parallel_cross_entropy(logits, labels, group).mean()
        return vocab_parallel_cross_entropy(logits, labels).mean()

    return loss


def transformer_engine(device: torch.device) -> Loss:
    from transformer_engine.pytorch.cross_entropy import (  # pyright: ignore[reportMissingImports]
        parallel_cross_entropy,
    )

    # The function wants [B, S, V] and [B, S]; its further arguments have defaults.
    return lambda logits_NV, labels_N: parallel_cross_entropy(logits_NV[None], labels_N[None]).mean()


def quack(device: torch.device) -> Loss:
    from quack.cross_entropy import cross_entropy  # pyright: ignore[reportMissingImports]

    return lambda logits_NV, labels_N: cross_entropy(logits_NV, labels_N, inplace_backward=True)


def quack_at_once(device: torch.device) -> Loss:
    """The gradient in the forward pass. QuACK offers that without autograd, as gradients of each row's own loss, so
    the incoming gradient is multiplied in here, in a pass over the logits."""
    from quack.cross_entropy import cross_entropy_fwd  # pyright: ignore[reportMissingImports]

    return lambda logits_NV, labels_N: _AtOnce.apply(logits_NV, labels_N, cross_entropy_fwd)


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, compute: Callable[..., Any]) -> Tensor:
        loss_N, ctx.grad_NV = compute(logits_NV.detach(), labels_N, return_dx=True, inplace_backward=True)
        ctx.num_rows = len(loss_N)
        return loss_N.mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return ctx.grad_NV.mul_(grad_outputs[0] / ctx.num_rows), None, None


PEERS: dict[str, Callable[..., Loss]] = {
    "torch": torch_eager,
    "torch.compile": torch_compiled,
    "liger-kernel": liger,
    "liger-kernel cute": liger_cute,
    "megatron fused": lambda device: megatron(device, fused=True),
    "megatron unfused": lambda device: megatron(device, fused=False),
    "transformer-engine": transformer_engine,
    "quack": quack,
    "quack return_dx": quack_at_once,
}
LINEAR: dict[str, Callable[..., LinearLoss]] = {
    "megamix linear": megamix_linear,
    "torch": torch_linear,
    "liger-kernel": liger_linear,
    "liger-kernel cute": liger_cute_linear,
    "quack": quack_linear,
    "cut-cross-entropy": cut_linear,
}


def ours(device: torch.device) -> dict[str, Callable[..., Loss]]:
    """Builders of this package: both paths on a GPU, the PyTorch path alone on a CPU."""
    paths = ("triton", "torch") if device.type == "cuda" else ("torch",)
    made: dict[str, Callable[..., Loss]] = {}
    for path in paths:
        for mode in "AB":
            made[f"megamix {mode} ({path})"] = _maker(implementation=path, promised=mode == "A")
    return made


def _maker(**options: Any) -> Callable[..., Loss]:
    return lambda device: megamix(device, **options)


def _one_rank(device: torch.device) -> None:
    if not dist.is_initialized():
        folder = tempfile.mkdtemp()
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = f"file://{os.path.join(folder, 'rendezvous')}"
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
