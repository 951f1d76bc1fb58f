"""Training a tiny model a few steps: through a Megatron engine, as a script of ranks, and in plain PyTorch.

    python megatron_scenarios.py FOLDER NAME...    one of two ranks; runs these scenarios, each into FOLDER/NAME

Legend: M micro-batches, B samples, S tokens, K domains.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_models import SEED, build, model_config, one_document_at_a_time, run

from megamix.data.loader import IGNORED_LABEL, Batch
from megamix.engines.config import TrainConfig
from megamix.engines.models.config import ModelConfig
from megamix.engines.step_loss import Objective

SEQ_LENGTH, NUM_DOMAINS, VALID, STEPS = 16, 3, 61, 4
LR = 1e-2
TRAIN = TrainConfig(steps=9, global_batch=8, micro_batch=2, lr=LR, clip=0.4, weight_decay=0.2, seed=SEED)
WEIGHTS = torch.tensor([0.5, 1.0, 1.75])


@dataclass(frozen=True)
class Scenario:
    """One way of training. Two legs: the second starts from the first's checkpoint, under an engine of its own.

    Attributes:
        positions: "": none; "any": random ones; "documents": they count in documents, to which attention keeps.
        packed: the layers take documents as Transformer Engine's do, computed by plain PyTorch.
    """

    model: str
    engine: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    positions: str = ""
    packed: bool = False
    resumed: dict[str, Any] | None = None

    @property
    def config(self) -> ModelConfig:
        return model_config(self.model, **{"num_layers": 4, **self.changes})


SCENARIOS: dict[str, Scenario] = {
    "neox tp2": Scenario("neox", {"tensor": 2}),
    "neox pp2 three layers": Scenario("neox", {"pipeline": 2}, {"num_layers": 3}),
    "llama tp2 to pp2": Scenario("llama", {"tensor": 2}, resumed={"pipeline": 2}),
    "parallel residual pp2": Scenario("neox-parallel", {"pipeline": 2}),
    "interleaved": Scenario("llama", {"pipeline": 2, "virtual_pipeline": 2}),
    "recomputed": Scenario("neox", {"pipeline": 2, "virtual_pipeline": 2, "activation_checkpointing": True}),
    "llama dp2": Scenario("llama", {"data": 2}),
    "bf16 dp2": Scenario("neox", {"data": 2, "precision": "bf16"}),
    "positions pp2": Scenario("neox", {"pipeline": 2}, positions="any"),
    "documents interleaved": Scenario("llama", {"pipeline": 2, "virtual_pipeline": 2}, positions="documents"),
    "documents recomputed": Scenario("llama", {"tensor": 2, "activation_checkpointing": True}, positions="documents"),
    "documents packed": Scenario(
        "llama", {"pipeline": 2, "activation_checkpointing": True}, positions="documents", packed=True
    ),
    "bf16 tp2": Scenario("llama", {"tensor": 2, "precision": "bf16"}),
    "dist pp2 to tp2": Scenario(
        "llama", {"pipeline": 2, "checkpoint_format": "dist"}, resumed={"tensor": 2, "checkpoint_format": "dist"}
    ),
    "dist vpp2 to dp2": Scenario(
        "neox",
        {"pipeline": 2, "virtual_pipeline": 2, "checkpoint_format": "dist"},
        resumed={"data": 2, "checkpoint_format": "layers"},
    ),
    "bf16 dist tp2 to pp2": Scenario(
        "neox",
        {"tensor": 2, "precision": "bf16", "checkpoint_format": "dist"},
        resumed={"pipeline": 2, "precision": "bf16"},
    ),
    "distributed optimizer dp2 to tp2": Scenario(
        "llama",
        {"data": 2, "distributed_optimizer": True, "checkpoint_format": "dist"},
        resumed={"tensor": 2, "distributed_optimizer": True, "checkpoint_format": "dist"},
    ),
    "bf16 distributed optimizer dp2 to pp2": Scenario(
        "neox",
        {"data": 2, "precision": "bf16", "distributed_optimizer": True, "checkpoint_format": "dist"},
        resumed={"pipeline": 2, "precision": "bf16", "distributed_optimizer": True, "checkpoint_format": "dist"},
    ),
    "dropout tp2": Scenario("neox", {"tensor": 2}, {"dropout": 0.3}),
    "dropout tp2 again": Scenario("neox", {"tensor": 2}, {"dropout": 0.3}, resumed={"tensor": 2}),
}

# What each of these shows, others show in another pair of things.
LONG = [
    "parallel residual pp2", "documents recomputed", "bf16 tp2", "dist vpp2 to dp2", "bf16 dist tp2 to pp2",
    "bf16 distributed optimizer dp2 to pp2",
]  # fmt: skip


def batch(step: int, data_rank: int, data_size: int, *, positions: str) -> Batch:
    """A rank's part of the global batch of a step; some labels are masked."""
    generator = torch.Generator().manual_seed(step)
    micro_batches = TRAIN.global_batch // (TRAIN.micro_batch * data_size)
    shape = (micro_batches, data_size, TRAIN.micro_batch)
    tokens = torch.randint(0, VALID, (*shape, SEQ_LENGTH + 1), generator=generator)
    domains = torch.randint(0, NUM_DOMAINS, shape, generator=generator, dtype=torch.int32)
    masked = torch.rand((*shape, SEQ_LENGTH), generator=generator) < 0.1
    places = torch.randint(0, SEQ_LENGTH, (*shape, SEQ_LENGTH), generator=generator)
    if positions == "documents":
        counted = torch.arange(SEQ_LENGTH)
        begins = (torch.rand(places.shape, generator=generator) < 0.3) | (counted == 0)
        places = counted - torch.where(begins, counted, 0).cummax(-1).values
    labels = tokens[..., 1:].masked_fill(masked, IGNORED_LABEL)
    domain_MDBS = domains[..., None].expand_as(labels)
    counted = np.bincount(domain_MDBS[~masked].numpy(), minlength=NUM_DOMAINS)

    def mine(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, data_rank].contiguous()

    return Batch(
        mine(tokens[..., :-1]), mine(labels), mine(domain_MDBS), counted, mine(places) if positions else None
    )  # fmt: skip


def objective(step: int) -> Objective:
    return Objective(float(batch(step, 0, 1, positions="").num_tokens), WEIGHTS)


# --- the reference: one process, PyTorch's loss, optimizer and clipping ---


@dataclass
class Trained:
    """What training gave: mean loss and gradient norm of each step, final weights, token losses of one more batch."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, torch.Tensor]
    token_losses: torch.Tensor


def train_plainly(scenario: Scenario, steps: int) -> Trained:
    layers = build(scenario.config, SEED, SEQ_LENGTH)
    named = {
        layer.hugging_face_names()[name]: parameter for layer in layers for name, parameter in layer.named_parameters()
    }
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": TRAIN.weight_decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(TRAIN.beta1, TRAIN.beta2), eps=TRAIN.epsilon)
    losses, norms = [], []
    for step in range(steps):
        whole = batch(step, 0, 1, positions=scenario.positions)
        token_MBS = _plain_losses(layers, whole, scenario.positions)
        weight_MBS = WEIGHTS[whole.domains.long()]
        optimizer.zero_grad()
        (token_MBS * weight_MBS).sum().div(whole.num_tokens).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), TRAIN.clip)))
        optimizer.step()
        losses.append(float(token_MBS.detach().sum() / whole.num_tokens))
    with torch.no_grad():
        last = _plain_losses(layers, batch(steps, 0, 1, positions=scenario.positions), scenario.positions)
    return Trained(losses, norms, {name: parameter.detach() for name, parameter in named.items()}, last)


def _plain_losses(layers: list[Any], whole: Batch, kind: str) -> torch.Tensor:
    tokens, positions = whole.tokens.flatten(0, 1), None if whole.positions is None else whole.positions.flatten(0, 1)
    if positions is None:
        logits = run(layers, tokens)
    elif kind == "documents":
        logits = one_document_at_a_time(layers, tokens, positions)
    else:
        logits = run(layers, (tokens, positions))
    logits, labels = logits[..., :VALID], whole.labels.flatten(0, 1)
    loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none")
    return loss.view_as(whole.labels)


# --- the engine, as one rank of a job ---


def train_by_engine(scenario: Scenario, folder: Path) -> None:
    """Trains and leaves ``result.json``, the checkpoint and the token losses in ``folder``."""
    from megamix.training.checkpoints import saving
    from megamix.training.config import CheckpointConfig

    group, at_once = dist.new_group(backend="gloo"), CheckpointConfig(keep=1, asynchronous=False)
    engine = make(scenario, scenario.engine)
    initial = _own_weights(engine)
    counts = _count_calls(engine)
    result: dict[str, Any] = {"losses": [], "grad_norms": [], "calls": []}
    first_leg = STEPS if scenario.resumed is None else STEPS // 2
    for step in range(STEPS):
        if step == first_leg:
            saving.CheckpointWriter(folder / "leg", engine, at_once, group).save(step, {})
            engine = make(scenario, scenario.resumed or {})
            saving.load_engine(folder / "leg" / f"step_{step}", engine, step)
            counts = _count_calls(engine)
        result["calls"].append(_step(scenario, engine, step, counts, result))
    saving.CheckpointWriter(folder, engine, at_once, group).save(STEPS, {})
    shape_batch = batch(STEPS, engine.place.data_rank, engine.place.data_size, positions=scenario.positions)
    given = shape_batch if engine.place.reads_data else None
    micro_batches = shape_batch.tokens.shape[0]
    token_losses = engine.token_losses(given, micro_batches)
    sums = engine.evaluate(given, micro_batches).clone()
    dist.all_reduce(sums)
    torch.save(
        {
            "initial": initial,
            "final": _own_weights(engine),
            "token_losses": token_losses,
            "sums": sums,
            "place": engine.place,
        },
        folder / f"rank_{dist.get_rank()}.pt",
    )
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW with the interface of Transformer Engine's and Apex's FusedAdam: a group counts the steps of all in it."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **defaults: Any) -> None:
        assert adam_w_mode
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), rate = group["betas"], group["lr"]
            for parameter in group["params"]:
                state = self.state[parameter]
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                deviation = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                parameter.mul_(1 - rate * group["weight_decay"]).sub_(rate * mean / deviation)


@contextlib.contextmanager
def fused_adam() -> Iterator[None]:
    """Megatron as on a machine that has a fused Adam, without which its distributed optimizer does not resume."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    stand_ins = [
        (optimizer, "Adam", GroupStepAdam),
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distrib_optimizer, "Adam", GroupStepAdam),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, value in stand_ins:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


@contextlib.contextmanager
def packed_attention() -> Iterator[None]:
    """Megatron with layers that take packed documents; attention sees each of them by itself."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megamix.engines.megatron import engine

    def forward(_: Any, *qkv: torch.Tensor, packed_seq_params: Any, **_options: Any) -> torch.Tensor:
        query, key, value = qkv[:3]  # [tokens, heads, dimensions]
        ends, found = packed_seq_params.cu_seqlens_q.tolist(), []
        assert packed_seq_params.max_seqlen_q == max(end - start for start, end in itertools.pairwise(ends))
        for start, end in itertools.pairwise(ends):
            parts = (part[start:end].transpose(0, 1) for part in (query, key, value))
            out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
            found.append(out.transpose(0, 1))
        return torch.cat(found)

    with (
        mock.patch.object(DotProductAttention, "forward", forward),
        mock.patch.object(engine, "packs_documents", return_value=True),
    ):
        yield


def make(scenario: Scenario, engine: dict[str, Any]) -> Any:
    from megamix.engines.config import MegatronConfig
    from megamix.engines.megatron.engine import MegatronEngine

    return MegatronEngine(
        MegatronConfig(name="megatron", **engine),
        scenario.config,
        TRAIN,
        seq_length=SEQ_LENGTH,
        num_domains=NUM_DOMAINS,
        vocab_size=VALID,
        loss_implementation="auto",
        reset_position_ids=bool(scenario.positions),
        within_documents=scenario.positions == "documents",
    )


def _step(
    scenario: Scenario, engine: Any, step: int, counts: Callable[[], list[int]], result: dict[str, Any]
) -> list[list[int]]:
    """One step; gives each rank's passes between the sums of the step before and its own."""
    from megamix_kernels import DomainSums

    place = engine.place
    own = batch(step, place.data_rank, place.data_size, positions=scenario.positions)
    sums, calls = [], []

    def on_statistics(buffer: torch.Tensor) -> None:
        sums.append(buffer.clone())
        calls.append(counts())

    engine.train_step(own if place.reads_data else None, objective(step), LR, on_statistics)
    assert len(sums) == 1, "the sums are handed over once"
    dist.all_reduce(sums[0])
    found = DomainSums.from_buffer(sums[0])
    assert found.tokens.tolist() == own.domain_tokens.tolist(), "each token is counted once"
    result["losses"].append(float(found.nats.sum() / found.tokens.sum()))
    result["grad_norms"].append(engine.grad_norm())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, calls[0])
    return gathered


def _count_calls(engine: Any) -> Callable[[], list[int]]:
    """A function that gives the forward and backward passes of this rank's last layer since it was last called."""
    counts = [0, 0]
    last = engine._chunks[-1].decoder.layers[-1]

    def forward(*_: Any) -> None:
        counts[0] += 1

    def backward(*_: Any) -> None:
        counts[1] += 1

    last.register_forward_hook(forward)
    # A backward hook of the module would make its output a view, which the pipeline does not take.
    next(last.parameters()).register_hook(backward)
    seen = [0, 0]

    def read() -> list[int]:
        new = [now - before for now, before in zip(counts, seen, strict=True)]
        seen[:] = counts
        return new

    return read


def _own_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The whole parameters of the layers on this rank; none where the distributed optimizer has them in pieces."""
    if engine._config.distributed_optimizer:
        return {}
    return {name: state.weight.clone() for layer in engine.layers() for name, state in engine.layer_state(layer)}


def main(folder: Path, names: list[str]) -> None:
    from megamix.engines.megatron.engine import start_distributed

    torch.set_num_threads(1)
    start_distributed()
    for name in names:
        scenario = SCENARIOS[name]
        if dist.get_rank() == 0:
            (folder / name).mkdir()
        dist.barrier()
        fused = "distributed_optimizer" in scenario.engine
        stand_in = fused_adam() if fused else packed_attention() if scenario.packed else contextlib.nullcontext()
        with stand_in:
            train_by_engine(scenario, folder / name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
