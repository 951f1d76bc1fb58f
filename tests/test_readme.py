"""What the README shows works as it stands."""

from __future__ import annotations

from typing import Any

import torch
from commands import ROOT
from readme_code import readme_code


def test_the_pieces_in_a_trainer_of_ones_own() -> None:
    """The README's loop, run with a toy in place of the reader's model: the losses fall and the weights move."""
    code = readme_code("forward(domain, sample)")
    torch.manual_seed(0)
    logits = torch.zeros(2, 16, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    seen: list[list[int]] = []

    def forward(domain, sample):
        """Domain 0 always says 3, domain 1 anything: one can be learnt."""
        if logits.grad is not None:
            optimizer.step()
            optimizer.zero_grad()
        seen.append([int((domain == 0).sum()), int((domain == 1).sum())])
        domain, sample = torch.from_numpy(domain), torch.from_numpy(sample)
        labels = torch.where(domain == 0, torch.full_like(sample, 3), sample % 16)
        return logits[domain], labels, domain

    names: dict[str, Any] = {"forward": forward, "steps": 40}
    exec(code, names)
    weights = names["blend"].weights
    assert seen[0] == [336, 144], "the first batch follows the initial weights"
    assert weights[1] > 0.6, "perplexity draws ODM to the domain that cannot be learnt"
    assert names["blend"].position == 40 * 480


def test_names_its_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("make demo", "make test", "megamix prepare", "megamix doctor", "megamix inspect", "megamix plot"):
        assert command in text
