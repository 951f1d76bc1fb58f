"""DoReMi end to end through the command line: its steps with every kind of interruption, and both ways to apply the
weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import ENVIRONMENT, RUN_SECONDS, run_megamix
from records import largest_difference, record, samples
from safetensors.torch import load_file
from tolerance import rounding
from transformers import GPTNeoXForCausalLM

from megamix.core.config import load_config
from megamix.core.errors import InputError
from megamix.data.reference_losses import ReferenceLosses, read_progress
from megamix.engines.models.layers import hugging_face_config
from megamix.studies.doremi.tasks import swing_of
from megamix.training.config import RunConfig
from megamix.training.plan import Plan, make_plan
from megamix.training.reference.cache import cache_key, samples_read

STEPS, SEQ = 24, 32


@pytest.fixture(scope="module")
def run_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all steps have been taken, interrupted in the cache by a kill and in the proxy run by a stop."""
    folder = tmp_path_factory.mktemp("doremi")
    config = {
        "run_dir": str(folder / "run"),
        "data": {"manifest": str(data_dir), "seq_length": SEQ},
        "model": {"architecture": "neox", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64},
        "mixture": "natural",
        "train": {"steps": STEPS, "global_batch": 16, "micro_batch": 2, "lr": 5.0e-3, "warmup": 0.1},
        "evaluate": {"every": 0, "batches": 1},
        "checkpoint": {"every": 0},
        "log": {"every": 1, "samples": True},
        "doremi": {
            "reference": {"train": {"lr": 3.0e-3}},
            "proxy": {"mixer": {"smoothing": 0.01}},
            "target": {"train": {"steps": 2}},
        },
    }
    path = folder / "doremi.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    run("doremi", path, "--only", "reference")
    kill_in_the_cache(folder / "run")
    # The cache goes on, the proxy stops, and there are no weights yet.
    stopped = run("doremi", path, "doremi.proxy.train.stop_after=9", code=2)
    assert "proxy has taken 9 of its 24 steps" in stopped
    assert not (folder / "run" / "weights.json").exists()
    done = run("doremi", path)
    assert "cache: done" in done
    return folder / "run"


def run(*arguments: object, code: int = 0) -> str:
    """What ``megamix ARGUMENTS`` says on standard error."""
    return run_megamix(*arguments, code=code).stderr


def cache_command(run_dir: Path, out: Path) -> list[str]:
    source, proxy = str(run_dir / "reference"), str(run_dir / "proxy.yaml")
    return ["reference", source, "--out", str(out), "--for", proxy, "--save-every", "1024"]


def kill_in_the_cache(run_dir: Path) -> None:
    """SIGKILL to the command (its rank ends with it) once a safe point past the start is on disk."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megamix", *cache_command(run_dir, run_dir / "cache")], env=ENVIRONMENT
    )
    progress, deadline = run_dir / "cache" / "progress.json", time.monotonic() + RUN_SECONDS
    while not (progress.is_file() and json.loads(progress.read_bytes())["done"]):
        assert process.poll() is None, "the cache was done before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run_dir / "cache" / "reference.json").exists()


@pytest.mark.slow
def test_a_cache_that_is_asked_to_stop(run_dir: Path, tmp_path: Path) -> None:
    """USR1 to the command while it computes whole domains: exit code 75, what was computed is kept although no safe
    point was due."""
    out = tmp_path / "cache"
    command = [sys.executable, "-m", "megamix", "reference", str(run_dir / "reference"), "--out", str(out)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    rows, deadline = out / "code.f16", time.monotonic() + RUN_SECONDS
    while not (rows.is_file() and any(rows.read_bytes())):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 75, said
    done = json.loads((out / "progress.json").read_bytes())["done"]
    info = read_progress(out)[0]
    total = sum(domain.computed for domain in info.domains.values())
    assert 0 < done < total
    assert f"holds the losses of {done} of {total} samples. The same command goes on" in said
    here = np.fromfile(rows, "<f2").reshape(-1, SEQ)
    assert here[: min(done, len(here))].all(), "in the order of samples, without a hole"


def plan_of(path: Path) -> Plan:
    return make_plan(load_config(RunConfig, path), verify=False)


def test_the_cache_holds_the_models_losses(run_dir: Path, tmp_path: Path) -> None:
    """Of every tenth sample, by transformers' own model from the reference run's checkpoint; and a cache that was
    killed and went on has the bytes of one that was not."""
    run(*cache_command(run_dir, tmp_path / "cache"))
    for path in sorted(path for path in (run_dir / "cache").iterdir() if path.name != "lock"):
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes(), path.name
    plan = plan_of(run_dir / "proxy.yaml")
    cache, selection = ReferenceLosses(run_dir / "cache", cache_key(plan)), samples_read(plan)
    domain_n, sample_n = selection.at(np.arange(0, selection.total, 10))
    rows = np.empty((domain_n.size, SEQ), np.float32)
    for row, domain, sample in zip(rows, domain_n.tolist(), sample_n.tolist(), strict=True):
        cache.read_window(domain, sample, row)
    windows = [plan.domains[d].window(s, SEQ) for d, s in zip(domain_n.tolist(), sample_n.tolist(), strict=True)]
    tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
    logits = reference_model(run_dir, plan)(tokens[:, :-1]).logits[..., : plan.vocab_size]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    assert set(domain_n.tolist()) == {0, 1, 2, 3}
    # Rounded to float16.
    near = rounding(terms=64, layers=4) * float(loss.max())
    np.testing.assert_allclose(rows, loss.detach().numpy(), rtol=2**-11, atol=near)
    assert np.ptp(rows) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--for", "PROXY", "data.seq_length=16"],
            r"--for .*proxy.yaml: its data is not the reference run's, seq_length",
        ),
        (["model.hidden_size=64"], "a model with hidden_size 32, the config says 64"),
        (
            [],
            r"are of 100 samples of domain 'code' that were chosen for another run, asked for are \d+\. Choose another",
        ),
        (
            ["data.domains=[topics]"],
            "are of the domains code, packages, tables, topics, asked for are topics",
        ),
    ],
)
def test_bad_input_of_the_cache(run_dir: Path, arguments: list[str], message: str) -> None:
    """What is refused before ranks are started; the same command again finds all done."""
    command = ["reference", str(run_dir / "reference"), "--out", str(run_dir / "cache")]
    arguments = [str(run_dir / "proxy.yaml") if argument == "PROXY" else argument for argument in arguments]
    with pytest.raises(InputError, match=message):
        in_process(*command, *arguments)
    with pytest.raises(InputError, match=r"nowhere is no run with a complete checkpoint. Give the run_dir"):
        in_process("reference", str(run_dir / "nowhere"), "--out", str(run_dir / "cache"))
    assert in_process(*command, "--for", str(run_dir / "proxy.yaml")) == 0


def reference_model(run_dir: Path, plan: Plan) -> torch.nn.Module:
    upstream: Any = hugging_face_config(plan.model, SEQ)
    weights = {}
    for path in (run_dir / "reference" / "checkpoints" / f"step_{STEPS}" / "layers").iterdir():
        state = load_file(path)
        weights |= {key.removeprefix("weight/"): state[key] for key in state if key.startswith("weight/")}
    model = GPTNeoXForCausalLM(upstream)
    model.load_state_dict(weights)
    return model


def test_the_proxys_weights(run_dir: Path) -> None:
    """Its record is algorithm 1 on the scores it shows, domains are sampled uniformly all the time, alpha has moved to
    the domain that stayed worst, and weights.json is the mean, which the target is trained with."""
    weights = record(run_dir / "proxy")[1]
    assert [line["step"] for line in weights] == list(range(STEPS + 1))
    alphas = np.array([line["loss_weights"] for line in weights])
    scores = np.array([line["perdomain_scores"] for line in weights])
    np.testing.assert_allclose(alphas[0], 0.25)
    for before, score, after in zip(alphas, scores[1:], alphas[1:], strict=False):
        raised = before * np.exp(score)
        np.testing.assert_allclose(after, 0.99 * raised / raised.sum() + 0.01 / 4, rtol=1e-12)
    for line in weights:
        assert line["domain_weights"] == [0.25] * 4
    mean = alphas[1:].mean(axis=0)
    found = json.loads((run_dir / "weights.json").read_text())
    assert list(found) == weights[0]["domain_names"]
    np.testing.assert_allclose(list(found.values()), mean, rtol=1e-12)
    hardest = scores[1:].sum(axis=0).argmax()
    assert alphas[-1].argmax() == mean.argmax() == hardest
    assert alphas[-1][hardest] > 0.27
    target = record(run_dir / "target")[1][0]
    np.testing.assert_allclose(target["domain_weights"], mean, rtol=1e-12)


def test_excess_is_the_loss_above_the_reference(run_dir: Path) -> None:
    """The scores of the first step, from the losses of the samples that were read: the proxy's initial model is the
    reference's initial one, whose losses lie so far above the reference's that clipping changes little."""
    proxy = run_dir / "proxy"
    first = record(proxy)[1][1]
    plan = plan_of(run_dir / "proxy.yaml")
    cache = ReferenceLosses(run_dir / "cache", cache_key(plan))
    read, row = np.zeros((4, 2)), np.empty(SEQ, np.float32)
    for domain, sample in samples(proxy)[1]:
        cache.read_window(domain, sample, row)
        read[domain] += (row.sum(), row.size)
    own = np.array(first["statistics"]["nats"]) / first["statistics"]["tokens"]
    assert read[:, 1].tolist() == first["statistics"]["tokens"]
    difference = own - read[:, 0] / read[:, 1]
    assert (difference > 0.1).all()
    scores = np.array(first["perdomain_scores"])
    assert (scores >= difference - 1e-3).all()
    assert (scores < 2 * difference + 0.1).all()


def test_a_stopped_proxy_is_the_uninterrupted_one(run_dir: Path, tmp_path: Path) -> None:
    """To the last digit of every loss, weight and loss weight, and the same samples."""
    other = tmp_path / "proxy"
    run("train", run_dir / "proxy.yaml", f"run_dir={other}")
    assert largest_difference(run_dir / "proxy", other) == (0.0, 0.0)
    assert record(run_dir / "proxy")[1] == record(other)[1]
    assert samples(run_dir / "proxy") == samples(other)


def test_applied_to_the_sampling(run_dir: Path, tmp_path: Path) -> None:
    """Without a reference: the run's own loss drives the weights, and the blend follows them two steps late."""
    out = tmp_path / "sampling"
    mixer = "mixer={apply: sampling, reference: null}"
    run("train", run_dir / "proxy.yaml", mixer, f"run_dir={out}", "train.steps=12")
    metrics, weights = record(out)
    losses = [line["domain_loss"] for line in metrics if line["event"] == "train"]
    alphas = [np.full(4, 0.25)]
    for line, loss in zip(weights[1:], losses, strict=True):
        assert "loss_weights" not in line
        raised = alphas[-1] * np.exp(list(loss.values()))
        alphas.append(0.99 * raised / raised.sum() + 0.01 / 4)
        np.testing.assert_allclose(line["domain_weights"], alphas[-1], rtol=1e-9)
    given = np.array([sum(pair[0] == k for pair in samples(out)[step]) for step in range(3, 13) for k in range(4)])
    asked = np.array(alphas[1:11]) * 16
    assert np.abs(given.reshape(10, 4).cumsum(axis=0) - asked.cumsum(axis=0)).max() < 3
    assert np.ptp(alphas[-1]) > 0.1


@pytest.mark.parametrize("key", ["loss_weights", "domain_weights"])
def test_how_much_weights_swing(tmp_path: Path, key: str) -> None:
    """From step to step, by hand: half the sum of absolute changes is 0.1, 0.3 and 0.2; other domains do not count."""
    assert swing_of(tmp_path) == 0.0
    rows = [[0.5, 0.5, 0.0], [0.6, 0.4, 0.0], [0.3, 0.4, 0.3], [0.3, 0.6, 0.1]]
    empty = {"start": 0, "counts": [0] * 3, "deficits": [0.0] * 3}
    one = {"start": 0, "counts": [0], "deficits": [0.0]}
    lines = [{"step": 0, "position": 0, "domain_names": ["z"], "domain_weights": [1.0], "segment": one}]
    lines += [
        {
            "step": 1,
            "position": 1,
            "domain_names": ["a", "b", "c"],
            "domain_weights": [1 / 3] * 3,
            "segment": empty,
            key: row,
        }
        for row in rows
    ]
    (tmp_path / "weights.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert swing_of(tmp_path) == pytest.approx(0.2)


def in_process(*arguments: str) -> int:
    """The exit code of ``megamix ARGUMENTS`` where it starts no ranks."""
    from megamix.cli import app

    return app(arguments, standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doremi.rounds=0"], "doremi: rounds"),
        (["doremi.proxi={}"], r"Did you mean 'proxy'"),
        (["doremi.proxy.train.step=3"], r"proxy run.*step.*Did you mean"),
        (["doremi.reference.data.seq_length=16"], "the proxy run: its data is not the reference run's, seq_length"),
        (["doremi.proxy.mixer={name: odm}"], r"proxy run's mixer is {'name': 'odm'}, expected"),
        (["doremi.target.mixture=natural"], r"doremi\.target\.mixture cannot be set"),
        (["doremi.reference.mixer={name: odm}"], r"doremi\.reference\.mixer cannot be set"),
        (["doremi.proxy.run_dir=elsewhere"], r"doremi\.proxy\.run_dir cannot be set"),
        (["--only", "target"], r"doremi.target is null"),
        (["--only", "cache", "doremi.proxy.mixer.reference=null"], "there is no task cache"),
        (["--only", "weights"], r"run/proxy has taken 0 of its 12 steps"),
        (["--only", "cache"], r"run/reference has taken 0 of its 12 steps"),
    ],
)
def test_bad_input(tiny_config: Callable[..., Path], arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        in_process("doremi", str(tiny_config()), *arguments)


def test_under_torchrun(tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="take the tasks one by one"):
        in_process("doremi", str(tiny_config()))


def test_rounds(tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that end at once and find w1, w2, w3: each round's reference run has the result of the one before as its
    mixture, and the round that changes nothing by more than the tolerance is the last of five."""
    found = {
        "proxy": {"code": 0.4, "packages": 0.3, "tables": 0.2, "topics": 0.1},
        "round_2/proxy": {"code": 0.45, "packages": 0.25, "tables": 0.2, "topics": 0.1},
        "round_3/proxy": {"code": 0.4505, "packages": 0.2495, "tables": 0.2, "topics": 0.1},
    }
    out, taken = tmp_path / "run", []

    def finished(config: RunConfig) -> SimpleNamespace:
        weights = found.get(str(config.run_dir.relative_to(out)), {})
        return SimpleNamespace(mixer={"domains": list(weights), "average_weights": list(weights.values())})

    def step(path: Path, *rest: object) -> int:
        taken.append(str(path.relative_to(out)))
        return 0

    monkeypatch.setattr("megamix.studies.doremi.tasks._finished", finished)
    monkeypatch.setattr("megamix.studies.runs.train", step)
    monkeypatch.setattr("megamix.studies.doremi.tasks.reference", step)
    assert in_process("doremi", str(tiny_config()), "doremi.rounds=5", "doremi.target={}") == 0
    steps = ["reference.yaml", "reference", "proxy.yaml"]
    assert taken == [*steps, *(f"round_{n}/{step}" for n in (2, 3) for step in steps), "target.yaml"]
    assert load_config(RunConfig, out / "reference.yaml").mixture == "natural"
    assert load_config(RunConfig, out / "round_2" / "reference.yaml").mixture == found["proxy"]
    assert load_config(RunConfig, out / "round_3" / "reference.yaml").mixture == found["round_2/proxy"]
    proxy = load_config(RunConfig, out / "round_3" / "proxy.yaml")
    assert (proxy.mixture, proxy.mixer.name) == ("uniform", "doremi")
    assert proxy.mixer.model_dump()["reference"] == out / "round_3" / "cache"
    assert json.loads((out / "weights.json").read_text()) == found["round_3/proxy"]
    np.testing.assert_allclose(
        plan_of(out / "target.yaml").policy.initial_weights, list(found["round_3/proxy"].values())
    )
    taken.clear()
    for only in ("target", "proxy"):
        assert in_process("doremi", str(tiny_config()), "doremi.rounds=5", "doremi.target={}", "--only", only) == 0
    assert taken == ["target.yaml", "round_3/proxy.yaml"]
    taken.clear()
    assert in_process("doremi", str(tiny_config()), "doremi.rounds=1") == 0
    assert taken == steps
    assert json.loads((out / "weights.json").read_text()) == found["proxy"]
