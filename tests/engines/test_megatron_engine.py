"""The megatron.core engine trains what plain PyTorch trains, in every layout of two ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SUPPORT
from megatron_scenarios import LONG, LR, SCENARIOS, SEQ_LENGTH, STEPS, TRAIN, Scenario, Trained, train_plainly
from ranks import run_ranks
from safetensors.torch import load_file
from tolerance import assert_alike, assert_alike_after_adam, rounding

pytest.importorskip("megatron.core")

SCRIPT = SUPPORT / "megatron_scenarios.py"
BF16 = [name for name, scenario in SCENARIOS.items() if "precision" in scenario.engine]
Folders = Callable[[str], Path]
EXACT = [name for name, scenario in SCENARIOS.items() if name not in BF16 and "dropout" not in scenario.changes]

# An embedding, four layers and a head; nine of ten labels count.
TOKENS = TRAIN.global_batch * SEQ_LENGTH
TOLERANCE = rounding(terms=TOKENS, layers=6, steps=STEPS)
OF_MEANS = rounding(terms=TOKENS, layers=6, steps=STEPS, mean_of=TOKENS)


def marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in names]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a scenario; one job of two ranks runs all, the slow ones another when one of them is asked for."""
    folder = tmp_path_factory.mktemp("megatron")

    def of(name: str) -> Path:
        if not (folder / name).is_dir():
            wanted = [other for other in SCENARIOS if (other in LONG) == (name in LONG)]
            run_ranks(SCRIPT, 2, folder, *wanted, cwd=folder)
        return folder / name

    return of


@pytest.fixture(scope="module")
def plain() -> Any:
    """Plain PyTorch's result of a scenario, whatever its layout."""
    known: dict[tuple[Any, ...], Trained] = {}

    def of(scenario: Scenario) -> Trained:
        key = (scenario.model, scenario.config.num_layers, scenario.positions)
        if key not in known:
            known[key] = train_plainly(scenario, STEPS)
        return known[key]

    return of


def result(trained: Folders, name: str) -> dict[str, Any]:
    return json.loads((trained(name) / "result.json").read_text(encoding="utf-8"))


def saved(trained: Folders, name: str) -> dict[str, torch.Tensor]:
    """Weights of the last checkpoint, which is in the common format."""
    folder = trained(name) / f"step_{STEPS}" / "layers"
    tensors = {key: tensor for path in folder.iterdir() for key, tensor in load_file(path).items()}
    return {key.removeprefix("weight/"): tensor for key, tensor in tensors.items() if key.startswith("weight/")}


def ranks_of(trained: Folders, name: str) -> list[dict[str, Any]]:
    return [torch.load(path, weights_only=False) for path in sorted(trained(name).glob("rank_*.pt"))]


@pytest.mark.parametrize("name", marked(EXACT))
def test_losses_norms_and_weights_are_those_of_plain_pytorch(trained: Folders, plain: Any, name: str) -> None:
    expected, found = plain(SCENARIOS[name]), result(trained, name)
    assert found["losses"] == pytest.approx(expected.losses, rel=OF_MEANS)
    assert found["grad_norms"] == pytest.approx(expected.grad_norms, rel=TOLERANCE)
    assert max(expected.grad_norms) > TRAIN.clip, "clipping is on"
    for rank in ranks_of(trained, name):
        token_losses, place = rank["token_losses"], rank["place"]
        assert (token_losses is not None) == place.has_loss
        if token_losses is not None:
            whole = expected.token_losses.view(-1, place.data_size, *expected.token_losses.shape[1:])
            assert_alike(token_losses, whole[:, place.data_rank], TOLERANCE)
    if "layers" in {path.name for path in (trained(name) / f"step_{STEPS}").iterdir()}:
        weights = saved(trained, name)
        assert weights.keys() == expected.weights.keys()
        for key, weight in weights.items():
            assert_alike_after_adam(weight, expected.weights[key], TOLERANCE, LR, key)


@pytest.mark.parametrize("name", marked(EXACT))
def test_evaluation_sums_the_token_losses(trained: Folders, plain: Any, name: str) -> None:
    from megamix_kernels import DomainSums

    ranks = ranks_of(trained, name)
    found = DomainSums.from_buffer(ranks[0]["sums"])
    assert float(found.nats.sum()) == pytest.approx(float(plain(SCENARIOS[name]).token_losses.sum()), rel=OF_MEANS)


@pytest.mark.parametrize("name", marked(BF16))
def test_bf16_follows_fp32_with_masters_that_bf16_cannot_hold(trained: Folders, plain: Any, name: str) -> None:
    found = result(trained, name)
    assert found["losses"] == pytest.approx(plain(SCENARIOS[name]).losses, abs=0.02)
    if (trained(name) / f"step_{STEPS}" / "layers").is_dir():
        for key, weight in saved(trained, name).items():
            assert weight.dtype == torch.float32
            if weight.dim() == 2:
                assert not torch.equal(weight, weight.bfloat16().float()), key


def test_ranks_start_from_the_weights_that_every_engine_starts_from(trained: Folders) -> None:
    from tiny_models import SEED, build

    for name in ("neox tp2", "llama tp2 to pp2", "interleaved"):
        expected = {
            layer.hugging_face_names()[key]: parameter
            for layer in build(SCENARIOS[name].config, SEED, 16)
            for key, parameter in layer.named_parameters()
        }
        found: dict[str, torch.Tensor] = {}
        for rank in ranks_of(trained, name):
            for key, weight in rank["initial"].items():
                assert torch.equal(weight, expected[key]), key
            found.update(rank["initial"])
        assert found.keys() == expected.keys()


@pytest.mark.parametrize("name", marked(EXACT))
def test_sums_are_handed_over_after_the_last_forward_pass(trained: Folders, name: str) -> None:
    """A stage without the loss gives its zeros before it computes; the last one before its last backward pass."""
    scenario = SCENARIOS[name]
    engine = scenario.engine if scenario.resumed is None else scenario.resumed
    micro_batches = TRAIN.global_batch // (TRAIN.micro_batch * engine.get("data", 1))
    first_step = result(trained, name)["calls"][0 if scenario.resumed is None else STEPS // 2]
    ranks = ranks_of(trained, name)
    for (forward, backward), rank in zip(first_step, ranks, strict=True):
        if not rank["place"].has_loss:
            assert (forward, backward) == (0, 0)
        elif not engine.get("activation_checkpointing"):
            assert forward == micro_batches
            assert backward < micro_batches


def test_recomputing_goes_forward_twice(trained: Folders) -> None:
    """Between the sums of one step and of the next: all backward passes but those done, and as many more forward."""
    calls = {name: result(trained, name)["calls"] for name in ("interleaved", "recomputed")}
    last_rank = {name: [step[1] for step in found] for name, found in calls.items()}
    assert sum(last_rank["interleaved"][1]) == 8  # 4 micro-batches, forward and backward
    forward, backward = last_rank["recomputed"][1]
    assert (forward, backward) == (8, 4)


def test_dropout_is_a_function_of_the_step_and_alike_where_ranks_compute_the_same(trained: Folders, plain: Any) -> None:
    """The second run stops half-way and goes on in a new engine."""
    once, again = result(trained, "dropout tp2"), result(trained, "dropout tp2 again")
    assert once["losses"] == again["losses"]
    without = plain(SCENARIOS["neox tp2"]).losses
    assert once["losses"] != pytest.approx(without, abs=1e-3)
    first, second = (rank["final"] for rank in ranks_of(trained, "dropout tp2"))
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name  # norms and some biases are not divided: each rank has its own


def test_an_own_format_is_listed_and_only_this_engine_reads_it(trained: Folders) -> None:
    from megamix.core.errors import ResumeRefused
    from megamix.engines.base import Engine
    from megamix.training.checkpoints import saving
    from megamix.training.checkpoints.store import describe

    path = trained("dist pp2 to tp2") / f"step_{STEPS}"
    listing = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
    assert listing["holds"] == "megatron"
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert files == {*listing["files"], "checkpoint.json"}
    for name, entry in listing["files"].items():
        assert entry == describe(path / name, sync=False)

    class Other:
        """An engine that has no format of its own; it is not asked for anything."""

    other: Engine = Other()  # pyright: ignore[reportAssignmentType]
    with pytest.raises(ResumeRefused, match=r"written by engine megatron.*engine\.name=megatron"):
        saving.load_engine(path, other, STEPS)
