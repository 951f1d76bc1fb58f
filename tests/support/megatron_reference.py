"""The run of `test_adapters_megatron` in one process and in plain PyTorch around the same megatron.core model, without
adapter, schedule and kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron_loop import make_model

from megamix.data.blend.blend import Blend
from megamix.data.tokens.manifest import Manifest
from megamix.mixing.mixers import DomainStats, make_mixer
from megamix.training.plan import domain_key


class Windows:
    """Samples of one split of every domain, and which of their labels begin a document."""

    def __init__(self, manifest: Manifest, split: Any, seq_length: int) -> None:
        self.domains = [manifest.open_domain(name, split) for name in manifest.domain_names]
        self.seq_length = seq_length

    def sizes(self) -> list[int]:
        return [domain.num_windows(self.seq_length) for domain in self.domains]

    def read(self, domain_B: np.ndarray, sample_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [B, S + 1] and which labels count, bool [B, S]: none that begins a document."""
        windows, counted = [], []
        for d, s in zip(domain_B.tolist(), sample_B.tolist(), strict=True):
            windows.append(self.domains[d].window(s, self.seq_length).astype(np.int64))
            counted.append(np.ones(self.seq_length + 1, bool))
            counted[-1][self.domains[d].document_starts(np.array([s]), self.seq_length)[1]] = False
        return torch.from_numpy(np.stack(windows)), torch.from_numpy(np.stack(counted)[:, 1:])


def losses(model: Any, window_BT: torch.Tensor) -> torch.Tensor:
    """Token losses, fp32 [B, S]."""
    tokens_BS = window_BT[:, :-1]
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    logits_BSV = model(tokens_BS, positions_BS, None)
    return F.cross_entropy(logits_BSV.transpose(1, 2), window_BT[:, 1:], reduction="none")


def train(config: dict[str, Any], args: SimpleNamespace) -> dict[str, Any]:
    """The run, in a process with Megatron's groups of one rank.

    Returns:
        ``record`` as the stand-in has it; per step the domains and first tokens of the ``samples`` and the ``weights``
        they were drawn with; the mixer's ``last`` weights.
    """
    manifest = Manifest.load(config["data"]["manifest"])
    names, batch = manifest.domain_names, args.global_batch_size
    train, valid = (Windows(manifest, split, args.seq_length) for split in ("train", "validation"))
    keys = [domain_key(name) for name in names]
    blend = Blend(train.sizes(), manifest.natural_weights(), args.seed, domain_keys=keys)
    mixer = make_mixer(config["mixer"], names, manifest.natural_weights())
    model = make_model(args)[0].module
    record: list[dict[str, Any]] = []
    samples, weights = [], []
    for step in range(args.train_iters):
        drawn_with = blend.weights
        weights.append(drawn_with.tolist())
        domain_B, sample_B = blend.take(batch)
        window_BT, counted_BS = train.read(domain_B, sample_B)
        samples.append([domain_B.tolist(), window_BT[:, :4].tolist()])
        loss_BS = losses(model, window_BT) * counted_BS
        loss = loss_BS.sum() / counted_BS.sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= args.lr * gradient
        record.append({"iteration": step + 1, "lm loss": loss.item()})
        nats = np.bincount(domain_B, loss_BS.detach().double().sum(1).numpy(), len(names))
        tokens = np.bincount(domain_B, counted_BS.sum(1).numpy(), len(names)).astype(np.int64)
        new = mixer.update(DomainStats(nats, tokens, weights=drawn_with), step + 1)
        blend.set_weights(new, at=(step + 2) * batch)  # a weight_lag of 1
        if (step + 1) % args.eval_interval == 0:
            record.append({"evaluated": step + 1, **evaluate(model, valid, names, keys, args, len(record))})
    return {"record": record, "samples": samples, "weights": weights, "last": mixer.weights}


def evaluate(model: Any, valid: Windows, names: list[str], keys: list[int], args: Any, lines: int) -> dict[str, float]:
    """Of all domains alike; each evaluation goes on where the one before has stopped."""
    blend = Blend(valid.sizes(), np.ones(len(names)), args.seed, domain_keys=keys)
    number = args.eval_iters * args.global_batch_size
    blend.take(number * (lines // (args.eval_interval + 1)))
    domain_B, sample_B = blend.take(number)
    window_BT, counted_BS = valid.read(domain_B, sample_B)
    with torch.no_grad():
        loss_BS = losses(model, window_BT) * counted_BS
    found = {"lm loss": float(loss_BS.sum() / counted_BS.sum())}
    for k, name in enumerate(names):
        mine_B = torch.from_numpy(domain_B == k)
        found[f"loss of {name}"] = float(loss_BS[mine_B].sum() / counted_BS[mine_B].sum())
    return found
