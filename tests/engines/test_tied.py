"""One matrix for embedding and output projection: both engines train, in layouts of two and four ranks, what plain
PyTorch trains, in which it is one parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SUPPORT
from megatron_scenarios import LR, SEQ_LENGTH, STEPS, TRAIN, Trained, train_plainly
from ranks import run_ranks
from safetensors.torch import load_file
from tied_ranks import LAYOUTS, Layout
from tolerance import assert_alike, assert_alike_after_adam, rounding

pytest.importorskip("megatron.core")

ALL = {name: layout for layouts in LAYOUTS.values() for name, layout in layouts.items()}


def cases(wanted: Callable[[str], bool]) -> list[Any]:
    """Names of layouts; those of four ranks are slow."""
    marks = {2: (), 4: pytest.mark.slow}
    return [pytest.param(name, marks=marks[ranks]) for ranks in LAYOUTS for name in LAYOUTS[ranks] if wanted(name)]


# An embedding, four layers and a head.
TOKENS = TRAIN.global_batch * SEQ_LENGTH
TOLERANCE = rounding(terms=TOKENS, layers=6, steps=STEPS)
OF_MEANS = rounding(terms=TOKENS, layers=6, steps=STEPS, mean_of=TOKENS)


class Jobs:
    """A folder per layout, from one job of all layouts with that number of ranks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, name: str) -> Path:
        ranks = next(number for number, layouts in LAYOUTS.items() if name in layouts)
        folder = self._folder / str(ranks)
        if not folder.exists():
            folder.mkdir()
            run_ranks(SUPPORT / "tied_ranks.py", ranks, folder, cwd=folder)
        return folder / name

    def ranks(self, name: str) -> list[dict[str, Any]]:
        return [torch.load(path, weights_only=False) for path in sorted(self.of(name).glob("rank_*.pt"))]

    def saved(self, name: str) -> dict[str, torch.Tensor]:
        """Weights and moments of the last checkpoint."""
        folder = self.of(name) / f"step_{STEPS}" / "layers"
        return {key: tensor for path in folder.iterdir() for key, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def plain() -> Callable[[Layout], Trained]:
    known: dict[str, Trained] = {}

    def of(layout: Layout) -> Trained:
        if layout.model not in known:
            known[layout.model] = train_plainly(layout.scenario, STEPS)
        return known[layout.model]

    return of


@pytest.mark.parametrize("name", cases(lambda name: "16" not in name))
def test_losses_norms_and_weights_are_those_of_one_parameter(jobs: Jobs, plain: Any, name: str) -> None:
    """The norm, by which clipping scales, would be another if it counted the matrix twice, or if its two gradients were
    not summed, or summed twice."""
    expected = plain(ALL[name])
    for rank in jobs.ranks(name):
        assert rank["losses"] == pytest.approx(expected.losses, rel=OF_MEANS)
        assert rank["grad_norms"] == pytest.approx(expected.grad_norms, rel=TOLERANCE)
        token_losses, place = rank["token_losses"], rank["place"]
        if token_losses is not None:
            whole = expected.token_losses.view(-1, place.data_size, *expected.token_losses.shape[1:])
            assert_alike(token_losses, whole[:, place.data_rank], TOLERANCE)
    assert max(expected.grad_norms) > TRAIN.clip, "clipping is on"
    weights = {key.removeprefix("weight/"): value for key, value in jobs.saved(name).items() if "weight/" in key}
    assert weights.keys() == expected.weights.keys()
    assert not any(key.startswith("lm_head") for key in weights)
    for key, weight in weights.items():
        assert_alike_after_adam(weight, expected.weights[key], TOLERANCE, LR, key)


@pytest.mark.parametrize("name", cases(lambda name: "16" in name))
def test_half_precision_follows_fp32(jobs: Jobs, plain: Any, name: str) -> None:
    for rank in jobs.ranks(name):
        assert rank["losses"] == pytest.approx(plain(ALL[name]).losses, abs=0.02)
        assert rank["grad_norms"] == pytest.approx(plain(ALL[name]).grad_norms, rel=0.05)


@pytest.mark.parametrize("name", cases(lambda name: True))
def test_both_ends_compute_with_the_same_bits(jobs: Jobs, name: str) -> None:
    ranks = jobs.ranks(name)
    matrices: dict[int, list[torch.Tensor]] = {}
    for rank in ranks:
        if rank["matrix"] is not None:
            matrices.setdefault(rank["place"].tensor_rank, []).append(rank["matrix"])
    for first, *others in matrices.values():
        assert others or ranks[0]["place"].num_stages == 1
        for other in others:
            assert torch.equal(first, other)


@pytest.mark.parametrize("name", cases(lambda name: name.endswith("resumed")))
def test_stopped_and_resumed_is_the_uninterrupted_run(jobs: Jobs, name: str) -> None:
    """To the last bit, moments too."""
    whole, resumed = jobs.saved(name.removesuffix(" resumed")), jobs.saved(name)
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key
