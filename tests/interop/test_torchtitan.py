"""The adapter for torchtitan, in a stand-in for its trainer, against the loop in plain PyTorch of the Trainer's test.

`titan_stand_in` says what the stand-in is; torchtitan itself needs packages that the tests do without. Where it is
installed, one test has its own base classes. As a script this is one rank: ``test_torchtitan.py CONFIG FOLDER STEPS
KIND``.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_hugging_face_trainer import (
    BATCH,
    MIXER,
    OF_MEANS,
    RATE,
    SEQ,
    STEPS,
    make_model,
    mix_config,
    plain_loop,
)
from titan_stand_in import TitanLoop, installed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from megamix.core.errors import InputError, MegamixError, ResumeRefused
from megamix.interop import trainers


@pytest.fixture(scope="module")
def config(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mix_config(data_dir, tmp_path_factory.mktemp("mix"))


@pytest.fixture(scope="module")
def reference(data_dir: Path) -> dict[str, Any]:
    return plain_loop(data_dir, MIXER)


@pytest.fixture
def one_rank() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    yield
    dist.destroy_process_group()


def loop(
    config: Path, folder: Path, *, data_size: int = 1, rank: int = 0, classes: Any = installed, **given: Any
) -> TitanLoop:
    """A trainer over this data: micro-batches of two samples. ``classes``: context with torchtitan's base classes."""
    with classes():
        from megamix.interop.trainers.torchtitan import MixDataLoader, MixLoss
    options = {"mix": str(config), "steps": STEPS, "global_batch_size": BATCH, "seed": 1234, "record": str(folder)}
    data = MixDataLoader.Config(**{**options, **given})
    torch.manual_seed(5)
    return TitanLoop(make_model(), data, MixLoss.Config(), data_size, rank, batch=(BATCH, 2), seq_len=SEQ, lr=RATE)


def weights(folder: Path) -> dict[int, list[float]]:
    lines = [json.loads(line) for line in (folder / "weights.jsonl").read_text().splitlines()]
    return {line["effective_step"]: line["domain_weights"] for line in lines}


def check_weights(folder: Path, reference: dict[str, Any]) -> None:
    for step, row in reference["weights"].items():
        if step != 1:  # no step's losses decide on step 1
            np.testing.assert_allclose(weights(folder)[step], row, rtol=0, atol=OF_MEANS)


def test_is_the_training_that_it_says(one_rank: None, config: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """Losses, samples and weights are those of the batch in one piece; from a checkpoint it goes on as if it had not
    stopped."""
    whole = loop(config, tmp_path / "whole")
    found = whole.train(STEPS)
    np.testing.assert_allclose(found, reference["losses"], rtol=OF_MEANS)
    assert whole.rows == [row for step in reference["rows"] for row in step]
    whole.dataloader.state_dict()
    whole.close()
    check_weights(tmp_path / "whole", reference)
    first = loop(config, tmp_path / "parts")
    first.train(3)
    state, model = first.dataloader.state_dict(), first.model
    first.close()
    second = loop(config, tmp_path / "parts")
    second.model = model
    second.dataloader.load_state_dict(state)
    assert second.train(3) == found[3:]
    second.dataloader.state_dict()
    second.close()
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_is_one_of_torchtitan_s_own_classes(
    one_rank: None, config: Path, reference: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses and weights with the real package's dataloader, loss and configs as bases (seen with 0.3.0)."""
    loss = pytest.importorskip("torchtitan.components.loss")
    data = pytest.importorskip("torchtitan.components.dataloader")
    monkeypatch.delitem(sys.modules, "megamix.interop.trainers.torchtitan", raising=False)
    monkeypatch.delattr(trainers, "torchtitan", raising=False)
    run = loop(config, tmp_path, classes=nullcontext)
    assert isinstance(run.loss_fn, loss.BaseLoss)
    assert isinstance(run.dataloader, data.BaseDataLoader)
    np.testing.assert_allclose(run.train(STEPS), reference["losses"], rtol=OF_MEANS)
    run.dataloader.state_dict()
    run.close()
    check_weights(tmp_path, reference)


def test_other_ranks_and_a_stage_without_a_loss(config: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """Two data-parallel ranks, then, from their checkpoint, two pipeline stages of which the second has the loss, and
    from the same one two ranks that share the columns of the logits."""
    run_ranks(Path(__file__), 2, config, tmp_path, 3, "data", cwd=tmp_path)
    run_ranks(Path(__file__), 2, config, tmp_path, 3, "tensor", cwd=tmp_path)
    shared = [json.loads((tmp_path / f"tensor{rank}.json").read_text()) for rank in range(2)]
    assert shared[0] == shared[1]
    assert shared[0]["rows"] == [row for step in reference["rows"][3:] for row in step]
    np.testing.assert_allclose(shared[0]["losses"], reference["losses"][3:], rtol=OF_MEANS)
    check_weights(tmp_path / "record", reference)
    run_ranks(Path(__file__), 2, config, tmp_path, 3, "pipeline", cwd=tmp_path)
    first, second = (json.loads((tmp_path / f"data{rank}.json").read_text()) for rank in range(2))
    np.testing.assert_allclose(np.add(first["losses"], second["losses"]), reference["losses"][:3], rtol=OF_MEANS)
    for step, expected in enumerate(reference["rows"][:3]):
        part = slice(4 * step, 4 * step + 4)
        assert first["rows"][part] + second["rows"][part] == expected
    stages = [json.loads((tmp_path / f"pipeline{rank}.json").read_text()) for rank in range(2)]
    assert stages[0]["rows"] == stages[1]["rows"] == [row for step in reference["rows"][3:] for row in step]
    np.testing.assert_allclose(stages[1]["losses"], reference["losses"][3:], rtol=OF_MEANS)
    check_weights(tmp_path / "record", reference)


def test_refusals(one_rank: None, config: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steps, batches and seed are torchtitan's here"):
        loop(config, tmp_path, overrides=("train.steps=5",))
    run = loop(config, tmp_path)
    run.train(1)
    state = json.loads(run.dataloader.state_dict()["mix"])
    with pytest.raises(InputError, match="logits are a Parameter; expected a tensor, or columns"):
        run.loss_fn(torch.nn.Parameter(torch.zeros(1)), torch.zeros(1))
    by_samples = DTensor.from_local(torch.zeros(2, 3, 4), DeviceMesh("cpu", [0]), (Shard(0),))
    with pytest.raises(InputError, match=r"DTensor of \(Shard\(dim=0\),\) and 4 columns"):
        run.loss_fn(by_samples, torch.zeros(1))
    run.close()
    other = loop(config, tmp_path, seed=7)
    with pytest.raises(ResumeRefused, match="another order: seed was 1234, now 7"):
        other.dataloader.load_state_dict({"mix": json.dumps(state)})
    with installed():
        from megamix.interop.trainers import torchtitan as adapter
    adapter._losses.clear()
    sizes = {"dp_world_size": 1, "dp_rank": 0, "seq_len": SEQ, "local_batch_size": 2}
    data = adapter.MixDataLoader.Config(mix=str(config), steps=STEPS, global_batch_size=BATCH)
    with pytest.raises(InputError, match=r"Give loss=MixLoss\.Config\(\)"):
        data.build(**sizes)
    adapter.MixLoss.Config().build()
    with pytest.raises(InputError, match=r"seq_len is 64, but data\.seq_length is 32"):
        data.build(**{**sizes, "seq_len": 64})


def test_a_step_of_another_length(one_rank: None, config: Path, tmp_path: Path) -> None:
    """A trainer whose steps have fewer micro-batches than the config says."""
    run = loop(config, tmp_path)
    batches = iter(run.dataloader)
    run.forward(*next(batches))
    for _ in range(3):
        next(batches)
    with pytest.raises(MegamixError, match="the losses of step 1 are not complete"):
        next(batches)
    run.close()


def main() -> None:
    config, folder, steps, kind = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    given = {"data_size": 2, "rank": rank} if kind == "data" else {"data_size": 1, "rank": 0}
    run = loop(config, folder / "record", **given)
    if kind == "tensor":
        run.columns, run.adds_up = DeviceMesh("cpu", range(2)), True
    if kind != "data":
        run.model.load_state_dict(torch.load(folder / "model.pt"))
        run.dataloader.load_state_dict(json.loads((folder / "state.json").read_text()))
    losses = run.train(steps, has_loss=kind != "pipeline" or rank == 1)
    state = run.dataloader.state_dict()
    run.close()
    (folder / f"{kind}{rank}.json").write_text(json.dumps({"losses": losses, "rows": run.rows}))
    if rank == 0 and kind == "data":
        (folder / "state.json").write_text(json.dumps(state))
        torch.save(run.model.state_dict(), folder / "model.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
