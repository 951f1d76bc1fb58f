"""One of two or four ranks that train models with one matrix for embedding and output, in layouts of that many.

python tied_ranks.py FOLDER    leaves FOLDER/NAME/rank_R.pt and FOLDER/NAME/step_N of every scenario
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
import torch.distributed as dist
from megatron_scenarios import LR, NUM_DOMAINS, SEQ_LENGTH, STEPS, TRAIN, VALID, Scenario, batch, objective

from megamix.engines.choose import make_engine, start_distributed
from megamix.engines.config import DeepSpeedConfig, EngineConfig
from megamix.training.checkpoints import saving
from megamix.training.config import CheckpointConfig

TIED = {"tie_word_embeddings": True}
ENGINE: pydantic.TypeAdapter[EngineConfig] = pydantic.TypeAdapter(EngineConfig)


@dataclass(frozen=True)
class Layout:
    """How a model is trained: by one engine, or from the middle on by another that starts from its checkpoint."""

    engine: dict[str, Any]
    resumed: dict[str, Any] | None = None
    loss: str = "auto"
    model: str = "llama"

    @property
    def scenario(self) -> Scenario:
        """The model and its data."""
        return Scenario(self.model, {}, TIED)


def deepspeed(**layout: Any) -> dict[str, Any]:
    return {"name": "deepspeed", **layout}


def megatron(**layout: Any) -> dict[str, Any]:
    return {"name": "megatron", **layout}


BF16, FP16 = {"precision": "bf16"}, {"precision": "fp16"}
LAYOUTS: dict[int, dict[str, Layout]] = {
    2: {
        "deepspeed pp2": Layout(deepspeed(pipeline=2)),
        "deepspeed pp2 resumed": Layout(deepspeed(pipeline=2), deepspeed(pipeline=2)),
        "deepspeed without ZeRO to megatron tp2": Layout(
            deepspeed(pipeline=2, zero=0), megatron(tensor=2), model="neox"
        ),
        "megatron pp2 to deepspeed dp2, linear": Layout(megatron(pipeline=2), deepspeed(data=2), loss="linear"),
        "megatron tp2 to interleaved, linear": Layout(
            megatron(tensor=2), megatron(pipeline=2, virtual_pipeline=2), loss="linear"
        ),
        "deepspeed ZeRO 2 to 3, linear": Layout(deepspeed(data=2, zero=2), deepspeed(data=2, zero=3), loss="linear"),
        "megatron tp2 to deepspeed ZeRO 3": Layout(megatron(tensor=2), deepspeed(data=2, zero=3), model="neox"),
        "fp16 deepspeed pp2, linear": Layout(deepspeed(pipeline=2, **FP16), loss="linear"),
        "fp16 deepspeed ZeRO 3": Layout(deepspeed(data=2, zero=3, **FP16)),
        "bf16 deepspeed ZeRO 2, linear": Layout(deepspeed(data=2, zero=2, **BF16), loss="linear"),
        "bf16 deepspeed pp2, linear": Layout(deepspeed(pipeline=2, **BF16), loss="linear"),
    },
    4: {
        "deepspeed pp4, linear": Layout(deepspeed(pipeline=4), loss="linear"),
        "deepspeed pp2 dp2": Layout(deepspeed(pipeline=2, data=2)),
        "deepspeed pp2 dp2 resumed": Layout(deepspeed(pipeline=2, data=2), deepspeed(pipeline=2, data=2)),
        "deepspeed without ZeRO pp2 dp2 to megatron pp2 tp2": Layout(
            deepspeed(pipeline=2, data=2, zero=0), megatron(pipeline=2, tensor=2), model="neox"
        ),
        "megatron pp2 tp2": Layout(megatron(pipeline=2, tensor=2)),
        "megatron pp2 tp2 resumed": Layout(megatron(pipeline=2, tensor=2), megatron(pipeline=2, tensor=2)),
        "megatron interleaved to deepspeed dp4, linear": Layout(
            megatron(pipeline=2, virtual_pipeline=2, data=2), deepspeed(data=4), loss="linear"
        ),
        "megatron tp2 dp2 to pp4, linear": Layout(megatron(tensor=2, data=2), megatron(pipeline=4), loss="linear"),
        "megatron dist pp2 tp2 to tp2 dp2": Layout(
            megatron(pipeline=2, tensor=2, checkpoint_format="dist"), megatron(tensor=2, data=2)
        ),
        "megatron dist dp4 to pp2 dp2, linear": Layout(
            megatron(data=4, checkpoint_format="dist"), megatron(pipeline=2, data=2), loss="linear", model="neox"
        ),
        "bf16 deepspeed pp2 dp2": Layout(deepspeed(pipeline=2, data=2, **BF16)),
        "bf16 deepspeed pp2 dp2 resumed": Layout(
            deepspeed(pipeline=2, data=2, **BF16), deepspeed(pipeline=2, data=2, **BF16)
        ),
        "bf16 megatron pp2 tp2, linear": Layout(megatron(pipeline=2, tensor=2, **BF16), loss="linear"),
    },
}


def make(layout: Layout, engine: dict[str, Any]) -> Any:
    return make_engine(
        ENGINE.validate_python(engine),
        layout.scenario.config,
        TRAIN,
        seq_length=SEQ_LENGTH,
        num_domains=NUM_DOMAINS,
        vocab_size=VALID,
        loss_implementation=layout.loss,
    )


def train(layout: Layout, folder: Path, group: Any) -> None:
    at_once = CheckpointConfig(keep=1, asynchronous=False)
    engine = make(layout, layout.engine)
    losses, norms = [], []
    for step in range(STEPS):
        if step == STEPS // 2 and layout.resumed is not None:
            saving.CheckpointWriter(folder / "leg", engine, at_once, group).save(step, {})
            engine = make(layout, layout.resumed)
            saving.load_engine(folder / "leg" / f"step_{step}", engine, step)
        losses.append(_step(engine, step))
        norms.append(engine.grad_norm())
    saving.CheckpointWriter(folder, engine, at_once, group).save(STEPS, {})
    last = batch(STEPS, engine.place.data_rank, engine.place.data_size, positions="")
    token_losses = engine.token_losses(last if engine.place.reads_data else None, len(last.tokens))
    found = {"losses": losses, "grad_norms": norms, "token_losses": token_losses, "place": engine.place}
    torch.save({**found, "matrix": _matrix(engine)}, folder / f"rank_{dist.get_rank()}.pt")


def _step(engine: Any, step: int) -> float:
    from megamix_kernels import DomainSums

    own = batch(step, engine.place.data_rank, engine.place.data_size, positions="")
    sums: list[torch.Tensor] = []
    engine.train_step(
        own if engine.place.reads_data else None, objective(step), LR, lambda found: sums.append(found.clone())
    )
    dist.all_reduce(sums[0])
    found = DomainSums.from_buffer(sums[0])
    return float(found.nats.sum() / found.tokens.sum())


def _matrix(engine: Any) -> torch.Tensor | None:
    """What the ends of the pipeline compute with: the weights of the embedding, of the projection, or of both."""
    place = engine.place
    if place.stage not in (0, place.num_stages - 1):
        return None
    if hasattr(engine, "_module"):
        tied = engine._module.tied
        if tied is None:  # ZeRO 3 has a part of it on every rank
            return next(state.weight for _, state in engine.layer_state(0)).clone()
        return tied.weight.detach().clone()
    chunk = engine._chunks[0 if place.stage == 0 else -1]
    return chunk.shared_embedding_or_output_weight().detach().clone()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    start_distributed(DeepSpeedConfig())
    group = dist.new_group(backend="gloo")
    for name, layout in LAYOUTS[dist.get_world_size()].items():
        if dist.get_rank() == 0:
            (folder / name).mkdir()
        dist.barrier()
        train(layout, folder / name, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
