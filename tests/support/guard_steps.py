"""Steps that must not be taken, as a script of two ranks: through an engine that leaves them out, and through one that
never sees them.

    python guard_steps.py FOLDER    runs every layout, into FOLDER/NAME_RANK.json

A token's embedding is so large, though finite, that the norm after it is NaN: a loss goes wrong in the samples with
that token. A gradient goes wrong while its losses are finite where the objective is divided by next to nothing. Where
a reference's loss is NaN, the sums leave the token out, and the gradient knows nothing of it.

Legend: M micro-batches, B samples, S tokens, K domains.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tiny_models import SEED, model_config

from megamix.data.loader import IGNORED_LABEL, Batch
from megamix.engines.base import Engine, ParameterState
from megamix.engines.choose import make_engine, start_distributed
from megamix.engines.config import DeepSpeedConfig, MegatronConfig, TrainConfig
from megamix.engines.step_loss import Objective
from megamix_kernels import DomainSums

SEQ_LENGTH, NUM_DOMAINS, VOCAB, POISON = 16, 3, 62, 61
EMBEDDING = "gpt_neox.embed_in.weight"
GOOD, BAD_LOSS, BAD_GRADIENT, BAD_REFERENCE = "good", "bad loss", "bad gradient", "bad reference"
# The first and the last, two in a row, and a good one after each kind.
STEPS = (BAD_LOSS, GOOD, BAD_GRADIENT, GOOD, BAD_LOSS, BAD_REFERENCE, GOOD, BAD_GRADIENT)


@dataclass(frozen=True)
class Layout:
    """A way of training.

    Attributes:
        tells: whether the engine knows of a bad gradient without being asked to look.
    """

    engine: dict[str, Any]
    train: dict[str, Any] = field(default_factory=dict)
    tells: bool = True


LAYOUTS = {
    "deepspeed dp2": Layout({"data": 2}),
    "deepspeed pp2": Layout({"pipeline": 2}),
    "deepspeed zero0 dp2": Layout({"data": 2, "zero": 0}, tells=False),
    "deepspeed zero0 pp2 unclipped": Layout({"pipeline": 2, "zero": 0}, {"clip": 0.0}, tells=False),
    "deepspeed zero2 dp2": Layout({"data": 2, "zero": 2}),
    # It takes the norm in float64.
    "deepspeed zero3 bf16 dp2": Layout({"data": 2, "zero": 3, "precision": "bf16"}, tells=False),
    "deepspeed bf16 dp2": Layout({"data": 2, "precision": "bf16"}),
    "deepspeed bf16 pp2": Layout({"pipeline": 2, "precision": "bf16"}),
    "megatron dp2": Layout({"name": "megatron", "data": 2}),
    "megatron pp2": Layout({"name": "megatron", "pipeline": 2}),
    "megatron tp2 unclipped": Layout({"name": "megatron", "tensor": 2}, {"clip": 0.0}),
    "megatron vpp2": Layout({"name": "megatron", "pipeline": 2, "virtual_pipeline": 2}),
    "megatron bf16 dp2": Layout({"name": "megatron", "data": 2, "precision": "bf16"}),
}


def make(layout: Layout, *, skip: bool) -> Engine:
    """The engine, with one embedding that makes NaN of whatever comes after it."""
    train = TrainConfig(
        **{"steps": 9, "global_batch": 8, "micro_batch": 2, "lr": 1e-2, "clip": 0.4, "weight_decay": 0.2, "seed": SEED}
        | layout.train
    )
    config = MegatronConfig if "name" in layout.engine else DeepSpeedConfig
    made = make_engine(
        config(**layout.engine),
        model_config("neox", num_layers=4, hidden_size=16, ffn_size=24, vocab_size=VOCAB),
        train,
        seq_length=SEQ_LENGTH,
        num_domains=NUM_DOMAINS,
        vocab_size=VOCAB,
        loss_implementation="auto",
        skip_non_finite=skip,
    )
    if 0 in made.layers():
        states = dict(made.layer_state(0))
        weight = states[EMBEDDING].weight.clone()
        weight[POISON] = torch.tensor([3e38, -3e38]).repeat(weight.shape[1] // 2)
        made.load_layer_state(0, {EMBEDDING: replace(states[EMBEDDING], weight=weight)})
    return made


def batch(step: int, data_rank: int, data_size: int) -> Batch:
    """A rank's part of a step; what is to be bad is so in sample 0 of the last micro-batch of the last rank, the loss
    from its middle on."""
    generator = torch.Generator().manual_seed(step)
    shape = (8 // (2 * data_size), data_size, 2)
    tokens = torch.randint(0, POISON, (*shape, SEQ_LENGTH + 1), generator=generator)
    domains = torch.randint(0, NUM_DOMAINS, shape, generator=generator, dtype=torch.int32)
    if STEPS[step] == BAD_LOSS:
        tokens[-1, -1, 0, SEQ_LENGTH // 2] = POISON
    labels, reference = tokens[..., 1:].clone(), torch.zeros(*shape, SEQ_LENGTH)
    if STEPS[step] == BAD_REFERENCE:
        reference[-1, -1, 0, 3] = torch.nan
    labels[0, 0, 0, 5], reference[0, 0, 0, 5] = IGNORED_LABEL, torch.nan  # which is nothing
    domain_MDBS = domains[..., None].expand(*shape, SEQ_LENGTH)
    counted = np.bincount(domain_MDBS.flatten().numpy(), minlength=NUM_DOMAINS)

    def mine(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, data_rank].contiguous()

    return Batch(mine(tokens[..., :-1]), mine(labels), mine(domain_MDBS), counted, reference=mine(reference))


def train(engine: Engine, kinds: Sequence[str]) -> dict[str, Any]:
    """Takes the steps of these kinds; says what the engine said of each."""
    found: dict[str, Any] = {"finite": {}, "bad": {}, "counts": {}, "norms": {}}
    place = engine.place
    for step, kind in enumerate(STEPS):
        if kind not in kinds:
            continue
        own = batch(step, place.data_rank, place.data_size)
        sums: list[torch.Tensor] = []
        # Divided by so little, gradients exceed fp32; the losses that are summed know nothing of it.
        objective = Objective(1e-37 if kind == BAD_GRADIENT else float(own.num_tokens))
        given = own if place.reads_data else None
        counts: list[torch.Tensor | None] = []

        def on_statistics(
            buffer: torch.Tensor, sums: list[torch.Tensor] = sums, counts: list[torch.Tensor | None] = counts
        ) -> None:
            sums.append(buffer.clone())
            counts.append(engine.non_finite_counts())

        found["finite"][step] = engine.train_step(given, objective, 1e-2, on_statistics)
        found["bad"][step] = DomainSums.from_buffer(sums[0]).non_finite.tolist()
        found["counts"][step] = None if counts[0] is None else counts[0].tolist()
        found["norms"][step] = engine.grad_norm()
    return found


def states(engine: Engine) -> dict[str, ParameterState]:
    """Every parameter that this rank holds a part of, with its moments; copies."""
    return {
        f"{layer} {name}": ParameterState(*(part.detach().clone() for part in (s.weight, s.exp_avg, s.exp_avg_sq)))
        for layer in engine.layers()
        for name, s in engine.layer_state(layer)
    }


def differing(first: Mapping[str, ParameterState], second: Mapping[str, ParameterState]) -> list[str]:
    """The parameters that are not the same to the last bit."""
    assert first.keys() == second.keys()
    parts = ("weight", "exp_avg", "exp_avg_sq")
    return [
        f"{part} {key}"
        for key in first
        for part in parts
        if not torch.equal(getattr(first[key], part), getattr(second[key], part))
    ]


def run(layout: Layout) -> dict[str, Any]:
    """What became of the steps; and the same steps without the bad ones, through an engine that does not look."""
    skipping, plain = make(layout, skip=True), make(layout, skip=False)
    initial = states(skipping)
    found: dict[str, Any] = {"skipping": train(skipping, (GOOD, BAD_LOSS, BAD_GRADIENT, BAD_REFERENCE))}
    found["plain"] = train(plain, (GOOD,))
    found["differing"] = differing(states(skipping), states(plain))
    found["trained"] = differing(initial, states(skipping))
    found["optimizer_steps"] = [skipping.optimizer_steps, plain.optimizer_steps]
    found["told"] = train(plain, (BAD_GRADIENT,))["finite"]
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    start_distributed(DeepSpeedConfig())  # it wants to be there from the start; Megatron takes what it finds
    for name, layout in LAYOUTS.items():
        found = run(layout)
        (folder / f"{name}_{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
