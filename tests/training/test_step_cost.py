"""What mixing adds to the training thread's step: one all-reduce that is not waited for, and nothing else."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

LAYOUTS: dict[str, dict[str, Any]] = {
    "deepspeed pp2": {"name": "deepspeed", "pipeline": 2},
    "deepspeed dp2": {"name": "deepspeed", "data": 2},
    "megatron pp2": {"name": "megatron", "pipeline": 2},
    "megatron tp2": {"name": "megatron", "tensor": 2},
    "megatron dp2": {"name": "megatron", "data": 2},
}
STEPS = 3


class CountOps(TorchDispatchMode):
    """Counts the collectives, and the reads of a tensor's value by the host, of the thread it is entered in."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d") or "_local_scalar_dense" in name or "is_pinned" in name:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _rank(data_dir: str, folder: str) -> None:
    """Some steps without the exchange, some with it, in each layout; writes what was counted."""
    from small_config import small

    from megamix.engines.choose import make_engine, start_distributed
    from megamix.mixing.exchange import MixExchange
    from megamix.training.data_loop import MixedData
    from megamix.training.plan import make_plan
    from megamix_kernels import DomainSums

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name, engine in LAYOUTS.items():
        config = small(
            f"data.manifest={data_dir}",
            f"engine={json.dumps(engine)}",
            "model={architecture: neox, hidden_size: 32, num_layers: 2, num_heads: 2, ffn_size: 64}",
            "mixer={name: odm, preset: official}",
        )
        if engine["name"] == "deepspeed":
            start_distributed(config.engine)
        plan = make_plan(config, 2)
        made = make_engine(
            config.engine, plan.model, config.train, seq_length=32, num_domains=len(plan.domains),
            vocab_size=plan.vocab_size, loss_implementation="torch",
        )  # fmt: skip
        place = made.place
        data = MixedData(plan, data_rank=place.data_rank, reads_data=place.reads_data, device=place.device)
        settled_by: list[str] = []
        settle = MixExchange.settle

        def watched(self: MixExchange, step: int, settle: Any = settle, by: list[str] = settled_by) -> None:
            by.append(threading.current_thread().name)
            settle(self, step)

        # DeepSpeed's first step also tells the next stage the shapes.
        for phase, mixing in (("first", False), ("off", False), ("on", True)):
            counted = Counter()
            for _ in range(STEPS):
                batch, _ = data.next_batch()
                objective = data.objective(batch)
                MixExchange.settle = watched
                with CountOps() as ops:
                    made.train_step(batch, objective, 1e-3, data.submit if mixing else lambda sums: None)
                MixExchange.settle = settle
                counted += ops.counts
                if not mixing:
                    data.submit(DomainSums(len(plan.domains), place.device).buffer)
            found[f"{name}, {phase}"] = counted
        found[f"{name}, waits"] = settled_by.count("MainThread")
        data.close()
    Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def counted(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("counts")
    run_ranks(Path(__file__), 2, data_dir, folder, cwd=folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_mixing_adds_one_all_reduce_and_no_wait(counted: list[dict[str, Any]], name: str) -> None:
    """On every rank: the same collectives, the same reads by the host, and one all-reduce a step more, which is not
    waited for."""
    for rank in counted:
        off, on = Counter(rank[f"{name}, off"]), Counter(rank[f"{name}, on"])
        assert on - off == Counter({"c10d.allreduce_.default": STEPS})
        assert off - on == Counter()
        assert rank[f"{name}, waits"] == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_count_sees_what_the_engines_do(counted: list[dict[str, Any]], name: str) -> None:
    """Else the test above could not fail."""
    seen = sum((Counter(rank[f"{name}, off"]) for rank in counted), Counter())
    assert any(op.startswith("c10d") for op in seen), seen
    assert any("_local_scalar_dense" in op for op in seen), seen


if __name__ == "__main__":
    _rank(*sys.argv[1:])
