"""The DistributedDataParallel loop of interop's page, run as it stands: against a loop in plain PyTorch, on one rank
and on two, and stopped and started again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from readme_code import readme_code
from tolerance import assert_alike, rounding

from megamix.data.blend.blend import Blend
from megamix.data.tokens.manifest import Manifest
from megamix.mixing.mixers import DomainStats, make_mixer

STEPS, BATCH, SEQ, RATE = 6, 8, 32, 5.0
# Two layers; a domain's loss is the sum over one sample or more, and weights follow it.
TOLERANCE = rounding(terms=BATCH * SEQ, layers=2, steps=STEPS)
OF_SUMS = rounding(terms=BATCH * SEQ, layers=2, steps=STEPS, mean_of=SEQ)

# What the page leaves to the reader, and a log of what passes by.
BEFORE = f"""\
import sys
import torch
import megamix.mixing
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_ddp_loop import make_model
steps, save_every, global_batch, seq_length, device = int(sys.argv[1]), 3, {BATCH}, {SEQ}, torch.device("cpu")
model = make_model()
optimizer = torch.optim.SGD(model.parameters(), lr={RATE})
log = []
class Logged(megamix.mixing.DomainStats):
    def __init__(self, nats, tokens):
        super().__init__(nats, tokens)
        log.append({{"nats": nats.tolist(), "tokens": tokens.tolist()}})
megamix.mixing.DomainStats = Logged
"""
AFTER = """
import json
record = {"log": log, "weights": blend.weights.tolist(), "position": blend.position, "mixer": mixer.state_dict()}
record["model"] = {name: value.tolist() for name, value in model.state_dict().items()}
Path(f"rank{rank}.json").write_text(json.dumps(record))
dist.destroy_process_group()
"""


def make_model() -> torch.nn.Module:
    """Next-token logits from the token alone; 512 is the vocabulary of the test data."""
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Embedding(512, 8), torch.nn.Linear(8, 512))


@pytest.fixture(scope="module")
def loop(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs the loop on some ranks in a folder of its own, or in one where it ran before; returns each rank's record."""
    code = readme_code("interop", "DistributedDataParallel")
    assert 'Manifest.load("data/mine")' in code

    def run(num_ranks: int, steps: int, folder: Path | None = None) -> tuple[list[dict[str, Any]], Path]:
        if folder is None:
            folder = tmp_path_factory.mktemp("loop")
            (folder / "data").mkdir()
            (folder / "data" / "mine").symlink_to(data_dir)
            (folder / "loop.py").write_text(BEFORE + code + AFTER, encoding="utf-8")
        run_ranks(folder / "loop.py", num_ranks, steps, cwd=folder)
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)], folder

    return run


@pytest.fixture(scope="module")
def two_ranks(loop: Any) -> list[dict[str, Any]]:
    return loop(2, STEPS)[0]


def plain_loop(data_dir: Path) -> tuple[list[np.ndarray], np.ndarray, torch.nn.Module]:
    """The same training in one process, with PyTorch's own cross-entropy over the whole batch; returns each step's nats
    per domain, the last weights and the model."""
    manifest = Manifest.load(data_dir)
    names = manifest.domain_names
    domains = [manifest.open_domain(name) for name in names]
    blend = Blend([domain.num_windows(SEQ) for domain in domains], manifest.natural_weights(), seed=1234)
    mixer = make_mixer({"name": "odm", "preset": "official"}, names, blend.weights)
    model, nats = make_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(1, STEPS + 1):
        domain_B, sample_B = blend.take(BATCH)
        windows = [domains[d].window(s, SEQ) for d, s in zip(domain_B.tolist(), sample_B.tolist(), strict=True)]
        window_BT = torch.from_numpy(np.stack(windows).astype(np.int64))
        loss_BS = F.cross_entropy(model(window_BT[:, :-1]).transpose(1, 2), window_BT[:, 1:], reduction="none")
        optimizer.zero_grad()
        loss_BS.mean().backward()
        optimizer.step()
        sums = np.bincount(domain_B, weights=loss_BS.detach().sum(1).double().numpy(), minlength=len(names))
        nats.append(sums)
        tokens = np.bincount(domain_B, minlength=len(names)) * SEQ
        blend.set_weights(mixer.update(DomainStats(nats=sums, tokens=tokens), step))
    return nats, blend.weights, model


def test_is_the_training_that_it_says(loop: Any, two_ranks: list[dict[str, Any]], data_dir: Path) -> None:
    """On one rank and on two: losses, weights and parameters of one process that has the whole batch in one piece."""
    nats, weights, model = plain_loop(data_dir)
    start = make_model().state_dict()
    tokens = [line["tokens"] for line in two_ranks[0]["log"]]
    for record in (*loop(1, STEPS)[0], *two_ranks):
        assert [line["tokens"] for line in record["log"]] == tokens
        seen = np.array([line["nats"] for line in record["log"]])
        np.testing.assert_allclose(seen, np.array(nats), rtol=OF_SUMS)
        np.testing.assert_allclose(record["weights"], weights, rtol=0, atol=OF_SUMS)
        assert record["position"] == STEPS * BATCH
        for name, value in model.state_dict().items():
            assert_alike(record["model"][name], value, TOLERANCE, start=start[name])
    assert np.abs(weights - Manifest.load(data_dir).natural_weights()).max() > 0.01, "the weights moved"
    assert nats[-1].sum() < 0.99 * nats[0].sum(), "the model learns"


def test_goes_on_where_it_stopped(loop: Any, two_ranks: list[dict[str, Any]]) -> None:
    """Stopped at half and started again, it is the uninterrupted loop to the last digit."""
    _, folder = loop(2, STEPS // 2)
    resumed, _ = loop(2, STEPS, folder)
    assert len(resumed[0]["log"]) == STEPS - STEPS // 2
    for before, after in zip(two_ranks, resumed, strict=True):
        assert after["log"] == before["log"][STEPS // 2 :]
        assert {**after, "log": None} == {**before, "log": None}
