"""Micro-batches for stateful loaders, under torchdata's where it is installed, against the loop in plain PyTorch of the
Trainer's test; the two ranks run the page's own loop.

As a script this is one rank: ``test_stateful.py CONFIG FOLDER``.
"""

from __future__ import annotations

import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from readme_code import readme_code
from test_hugging_face_trainer import (
    BATCH,
    MIXER,
    OF_MEANS,
    RATE,
    STEPS,
    TOLERANCE,
    make_model,
    mix_config,
    plain_loop,
)
from tolerance import assert_alike
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from megamix.core.errors import InputError, MegamixError, ResumeRefused
from megamix.data.tokens.manifest import Manifest
from megamix.interop.trainers.host import coded_labels, decoded_labels
from megamix.interop.trainers.stateful import MixBatches
from megamix.mixing.steering.journal import append_command, read_answers


class Loader(DataLoader[Any]):
    """A loader with the data set's state in its own, as torchdata's."""

    def state_dict(self) -> dict[str, Any]:
        return {"data": self.dataset.state_dict()}  # pyright: ignore[reportAttributeAccessIssue]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.load_state_dict(state["data"])  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(params=["torch", "torchdata"])
def loader_class(request: pytest.FixtureRequest) -> Any:
    if request.param == "torch":
        return Loader
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader


@pytest.fixture(scope="module")
def config(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mix_config(data_dir, tmp_path_factory.mktemp("mix"))


@pytest.fixture(scope="module")
def reference(data_dir: Path) -> dict[str, Any]:
    return plain_loop(data_dir, MIXER)


def batches(config: Path, folder: Path | None = None, **given: Any) -> MixBatches:
    sizes = {"steps": STEPS, "global_batch": BATCH, "micro_batch": 2, "seed": 1234}
    return MixBatches(config, record=folder, **{**sizes, **given})


def train(mix: MixBatches, loader: Any, model: Any, steps: int) -> list[float]:
    """Losses of the next steps."""
    losses = [0.0]
    for number, (inputs, labels) in enumerate(loader, start=1):
        loss = mix.loss(model(input_ids=inputs["input"]).logits, labels)
        loss.backward()
        losses[-1] += loss.item()
        if number % mix.num_micro_batches == 0:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= RATE * parameter.grad
                    parameter.grad = None
            if len(losses) == steps:
                break
            losses.append(0.0)
    return losses


def weights(folder: Path) -> dict[int, list[float]]:
    lines = (folder / "weights.jsonl").read_text().splitlines()
    return {line["effective_step"]: line["domain_weights"] for line in map(json.loads, lines)}


def check_weights(folder: Path, reference: dict[str, Any]) -> None:
    for step, row in reference["weights"].items():
        if step != 1:  # no step's losses decide on step 1
            np.testing.assert_allclose(weights(folder)[step], row, rtol=0, atol=OF_MEANS)


def test_is_the_training_that_it_says(
    loader_class: Any, config: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    """Losses and weights are those of the batch in one piece; from a state, also one that was loaded and saved again
    before the first step, it goes on as if it had not stopped."""
    mix, model = batches(config, tmp_path / "whole"), make_model()
    found = train(mix, loader_class(mix, batch_size=None), model, STEPS)
    np.testing.assert_allclose(found, reference["losses"], rtol=OF_MEANS)
    mix.state_dict()
    mix.close()
    assert not dist.is_initialized(), "the process group of one is gone"
    check_weights(tmp_path / "whole", reference)
    first, model = batches(config, tmp_path / "parts"), make_model()
    loader = loader_class(first, batch_size=None)
    assert train(first, loader, model, 3) == found[:3]
    torch.save(loader.state_dict(), tmp_path / "loader.pt")
    first.close()
    for _ in range(2):
        again = batches(config, tmp_path / "parts")
        loader = loader_class(again, batch_size=None)
        loader.load_state_dict(torch.load(tmp_path / "loader.pt"))
        torch.save(loader.state_dict(), tmp_path / "loader.pt")
    assert train(again, loader, model, 3) == found[3:]
    again.state_dict()
    again.close()
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_is_steered_from_the_folder_of_its_record(config: Path, data_dir: Path, tmp_path: Path) -> None:
    """A pin that was asked for before the first step holds in every weight the mixer gives; after a stop, too."""
    names = list(Manifest.load(data_dir).domain_names)
    for folder, parts in ((tmp_path / "whole", [STEPS]), (tmp_path / "parts", [3, STEPS - 3])):
        folder.mkdir()
        append_command(folder, {"pin": {names[1]: 0.7}})
        model, state = make_model(), None
        for steps in parts:
            mix = batches(config, folder)
            loader = Loader(mix, batch_size=None)
            if state is not None:
                loader.load_state_dict(state)
            train(mix, loader, model, steps)
            state = loader.state_dict()
            mix.close()
    held = weights(tmp_path / "whole")
    assert weights(tmp_path / "parts") == held
    assert [row[1] for step, row in held.items() if step > 1] == pytest.approx([0.7] * (len(held) - 1), abs=1e-12)
    assert len(held) > 3
    assert {answer["outcome"] for answer in read_answers(tmp_path / "parts")} == {"applied"}


def test_the_loop_of_the_page(config: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """On two ranks under DistributedDataParallel."""
    run_ranks(Path(__file__), 2, config, tmp_path, cwd=tmp_path)
    check_weights(tmp_path / "out" / "megamix", reference)
    start, model = make_model().state_dict(), torch.load(tmp_path / "model.pt")
    for name, value in reference["model"].state_dict().items():
        assert_alike(model[name], value, TOLERANCE, start=start[name])
    mix = batches(config)
    mix.load_state_dict(json.loads((tmp_path / "state.json").read_text()))
    assert list(mix) == [], "the run is done, for one rank too"
    mix.close()


def test_positions(config: Path) -> None:
    """In the sample, or in the document; always there, as torchtitan makes its causal mask of them."""
    for is_reset, changed in ((False, {}), (True, {"reset_position_ids": True}), (True, {"attention": "document"})):
        # So many tokens that some document ends among them, whatever text this machine has.
        overrides = ["data.seq_length=512", *(f"data.{key}={value}" for key, value in changed.items())]
        mix = batches(config, overrides=overrides, global_batch=64, parts_documents="attention" in changed)
        positions = torch.cat([inputs["positions"] for inputs, _ in itertools.islice(mix, mix.num_micro_batches)])
        mix.close()
        rises = positions.diff(dim=1) == 1
        assert (positions[:, 0] == 0).all()
        assert rises.all() == (not is_reset)
        assert (rises | (positions[:, 1:] == 0)).all()


def test_attention_that_the_loop_does_not_have(config: Path) -> None:
    with pytest.raises(InputError, match=r"data\.attention is document, which is for the model of the training loop"):
        batches(config, overrides=["data.attention=document"])
    with pytest.raises(InputError, match=r"data\.attention is sample, but titan keeps attention within documents"):
        batches(config, overrides=["data.reset_position_ids=true"], parts_documents=True, host="titan")


def test_validation(config: Path) -> None:
    """Without gradients: the mean over the labels that count, or the sum divided by what is given."""
    mix = batches(config)
    labels = torch.tensor([[5, 512 + 7, -100]])  # domains 0 and 1
    with pytest.raises(MegamixError, match="before the first sample was read"):
        mix.loss(torch.zeros(1, 3, 600), labels)
    next(iter(mix))
    logits = torch.arange(3 * 600.0).view(1, 3, 600) / 600
    expected = -torch.log_softmax(logits[0, :2, :512].double(), 1)[[0, 1], [5, 7]].sum().item()
    with torch.no_grad():
        assert mix.loss(logits, labels).item() == pytest.approx(expected / 2, rel=1e-6)
        assert mix.loss(logits, labels, 4.0).item() == pytest.approx(expected / 4, rel=1e-6)
    mix.close()


def test_labels_of_many_domains() -> None:
    """Beyond 32 bits, in which the loader has domains."""
    labels, domains = torch.tensor([131071, 0, -100]), torch.tensor([39_999, 39_999, 39_999], dtype=torch.int32)
    label, domain = decoded_labels(coded_labels(labels, domains, 131_072), 131_072)
    assert (label.tolist(), domain.tolist()) == ([131071, 0, -100], [39_999, 39_999, 0])


def test_refusals(config: Path) -> None:
    mix = batches(config)
    with pytest.raises(InputError, match="Leave the loader's num_workers at 0"):
        next(iter(DataLoader(mix, batch_size=None, num_workers=1)))
    samples = iter(mix)
    for sample, done in ((next(samples), 0), (next(samples), 1)):
        with pytest.raises(MegamixError, match=f"in the middle of step 1, when {done} of its 4 losses were there"):
            mix.state_dict()
        mix.loss(torch.zeros(2, 32, 512, requires_grad=True), sample[1])
    next(samples), next(samples)
    with pytest.raises(MegamixError, match="the losses of step 1 are not complete"):
        next(samples)
    mix.close()
    with pytest.raises(MegamixError, match="the data is closed"):
        mix.state_dict()
    with pytest.raises(MegamixError, match="the data is closed"):
        next(iter(mix))
    for broken in ("{", "[]", "{}", '{"step": 3}'):
        with pytest.raises(ResumeRefused, match="holds no state of"):
            mix.load_state_dict({"mix": broken})
    with pytest.raises(InputError, match="steps, batches and seed are the training loop's here"):
        batches(config, overrides=["train.steps=3"])


def main() -> None:
    config, folder = Path(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=tokens).logits

    module = Logits()
    (folder / "mix.yaml").write_text(config.read_text()) if rank == 0 else None
    dist.barrier()
    code = readme_code("interop", "StatefulDataLoader")
    sizes = '"steps": 1000, "global_batch": 64, "micro_batch": 8'
    assert sizes in code
    for name in ("torchdata", "torchdata.stateful_dataloader"):
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules["torchdata.stateful_dataloader"])["StatefulDataLoader"] = Loader
    names: dict[str, Any] = {"rank": rank, "num_ranks": 2, "ddp": DistributedDataParallel(module), "state": None}
    names["optimizer"] = torch.optim.SGD(module.parameters(), lr=RATE)
    exec(code.replace(sizes, f'"steps": {STEPS}, "global_batch": {BATCH}, "micro_batch": 2'), names)
    if rank == 0:
        torch.save(module.model.state_dict(), folder / "model.pt")
        (folder / "state.json").write_text(json.dumps(names["state"]["data"]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
