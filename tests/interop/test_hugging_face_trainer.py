"""The adapter for Hugging Face's Trainer, with transformers' own Trainer, against a loop in plain PyTorch.

As a script it is one rank: ``test_hugging_face_trainer.py CONFIG FOLDER``.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from ranks import torchrun
from tolerance import assert_alike, rounding
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from megamix.core.errors import InputError, MegamixError, ResumeRefused
from megamix.data.blend.blend import Blend
from megamix.data.tokens.manifest import Manifest
from megamix.interop.blend_files.export import export_blend
from megamix.interop.trainers.hugging_face import MixCallback
from megamix.mixing.mixers import DomainStats, make_mixer
from megamix.mixing.steering.journal import append_command, read_answers
from megamix.training.plan import domain_key
from megamix.training.steer.steer import Wishes, steer

STEPS, BATCH, SEQ, RATE = 6, 8, 32, 0.5
# An embedding, a layer and a head. A mean loss is over at least one sample, and weights follow such means.
TOLERANCE = rounding(terms=BATCH * SEQ, layers=3, steps=STEPS)
OF_MEANS = rounding(terms=BATCH * SEQ, layers=3, steps=STEPS, mean_of=SEQ)
MIXER = {"name": "odm", "preset": "official"}
# Before transformers 5 the Trainer always shuffles, which the data set passes over.
ORDERED = {"train_sampling_strategy": "sequential"} if hasattr(TrainingArguments, "train_sampling_strategy") else {}


def make_model(**changed: Any) -> LlamaForCausalLM:
    torch.manual_seed(5)
    sizes = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "intermediate_size": 32, "tie_word_embeddings": False, **changed}))


def make_args(folder: Path, **changed: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        **ORDERED,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_steps": 3,
        "seed": 1234,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**given, **changed})


class StopAfter(TrainerCallback):
    """Ends a run early, as a time limit would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def train(
    config: Path, args: TrainingArguments, *overrides: str, stop_after: int = STEPS, resume: bool | str = False
) -> tuple[Any, list[Any]]:
    """One call of the Trainer; returns it and the rows it trained on, [domain, first tokens], in the order read."""
    mix, model, rows = MixCallback(config, args, overrides), make_model(), []
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    constant = torch.optim.lr_scheduler.LambdaLR(sgd, lambda _: 1.0)

    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        if torch.is_grad_enabled():
            rows.extend([int(label.max()) // 512, (label[:4] % 512).tolist()] for label in labels)
        return mix.loss(outputs, labels, num_items_in_batch)

    trainer = Trainer(
        model, args, train_dataset=mix.dataset, data_collator=collate, compute_loss_func=loss,
        callbacks=[mix, StopAfter(stop_after)], optimizers=(sgd, constant), eval_dataset=mix.validation(3),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, rows


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(folder: Path) -> dict[int, list[float]]:
    """First step sampled with them -> weights."""
    lines = (folder / "megamix" / "weights.jsonl").read_text().splitlines()
    return {line["effective_step"]: line["domain_weights"] for line in map(json.loads, lines)}


def mix_config(data_dir: Path, folder: Path) -> Path:
    """Writes a config without the labels that begin a document, so that micro-batches differ in numbers of tokens."""
    path = folder / "mix.yaml"
    data = {"manifest": str(data_dir), "seq_length": SEQ, "eod_mask_loss": True}
    path.write_text(yaml.safe_dump({"data": data, "mixer": MIXER}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mix_config(data_dir, tmp_path_factory.mktemp("mix"))


def plain_loop(data_dir: Path, mixer_config: dict[str, Any]) -> dict[str, Any]:
    """The run in one process and one piece per step, with PyTorch's cross-entropy."""
    manifest = Manifest.load(data_dir)
    names = manifest.domain_names
    domains = [manifest.open_domain(name) for name in names]
    natural = manifest.natural_weights()
    sizes = [domain.num_windows(SEQ) for domain in domains]
    blend = Blend(sizes, natural, 1234, domain_keys=[domain_key(name) for name in names])
    mixer, model = make_mixer(mixer_config, names, natural), make_model()
    found: dict[str, Any] = {"losses": [], "rows": [], "weights": {}, "model": model}
    for step in range(STEPS):
        found["weights"][step] = drawn_with = blend.weights
        domain_B, sample_B = blend.take(BATCH)
        pairs = list(zip(domain_B.tolist(), sample_B.tolist(), strict=True))
        window_BT = torch.from_numpy(np.stack([domains[d].window(s, SEQ).astype(np.int64) for d, s in pairs]))
        counted_BS = torch.ones(BATCH, SEQ, dtype=torch.bool)
        for row, (d, s) in enumerate(pairs):
            starts = domains[d].document_starts(np.array([s]), SEQ)[1]
            counted_BS[row, torch.from_numpy(starts[starts > 0] - 1)] = False
        logits_BSV = model(input_ids=window_BT[:, :-1]).logits
        loss_BS = F.cross_entropy(logits_BSV.transpose(1, 2), window_BT[:, 1:], reduction="none") * counted_BS
        loss = loss_BS.sum() / counted_BS.sum()
        if mixer.loss_weights is not None:  # DoReMi's: alpha times the mean loss of each domain
            tokens_K = np.maximum(np.bincount(domain_B, counted_BS.sum(1).numpy(), len(names)), 1)
            factor_B = torch.from_numpy((mixer.loss_weights / tokens_K)[domain_B])
            loss = (loss_BS.sum(1) * factor_B).sum()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= RATE * parameter.grad
        found["losses"].append(loss.item())
        first = torch.where(counted_BS, window_BT[:, 1:], -100)[:, :4]
        found["rows"].append([[d, (row % 512).tolist()] for d, row in zip(domain_B.tolist(), first, strict=True)])
        nats = np.bincount(domain_B, loss_BS.detach().double().sum(1).numpy(), len(names))
        tokens = np.bincount(domain_B, counted_BS.sum(1).numpy(), len(names)).astype(np.int64)
        new = mixer.update(DomainStats(nats, tokens, weights=drawn_with), step + 1)
        blend.set_weights(new, at=(step + 2) * BATCH)  # a weight_lag of 1
    return {**found, "mixer": mixer}


@pytest.fixture(scope="module")
def reference(data_dir: Path) -> dict[str, Any]:
    found = plain_loop(data_dir, MIXER)
    assert np.abs(found["weights"][STEPS - 1] - found["weights"][0]).max() > 0.01, "the weights moved"
    return found


def check(seen: dict[str, Any], reference: dict[str, Any]) -> None:
    np.testing.assert_allclose(seen["losses"], reference["losses"], rtol=OF_MEANS)
    for step, row in reference["weights"].items():
        if step != 1:  # no step's losses decide on step 1: the initial weights go on
            np.testing.assert_allclose(seen["weights"][str(step)], row, rtol=0, atol=OF_MEANS)


def check_model(model: Any, reference: dict[str, Any]) -> None:
    start = make_model().state_dict()
    for name, value in reference["model"].state_dict().items():
        assert_alike(model.state_dict()[name], value, TOLERANCE, start=start[name])


def record(trainer: Trainer, rows: list[Any], folder: Path) -> dict[str, Any]:
    by_step = {str(step): row for step, row in weights(folder).items()}
    return {"losses": losses(trainer), "weights": by_step, "rows": rows}


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any], Path]:
    folder = tmp_path_factory.mktemp("whole")
    return (*train(config, make_args(folder)), folder)


def test_is_the_training_that_it_says(whole: tuple[Any, list[Any], Path], reference: dict[str, Any]) -> None:
    """Losses, samples, weights and parameters of four micro-batches a step are those of the batch in one piece."""
    trainer, rows, folder = whole
    check(record(trainer, rows, folder), reference)
    assert rows == [row for step in reference["rows"] for row in step]
    check_model(trainer.model, reference)
    assert not torch.distributed.is_initialized(), "the process group of one is gone"
    exported = json.loads(export_blend(folder / "megamix", "json").text)
    np.testing.assert_allclose(
        list(exported.values()), np.mean(list(reference["weights"].values()), axis=0), atol=OF_MEANS
    )


def test_goes_on_where_it_stopped(
    config: Path, whole: tuple[Any, list[Any], Path], reference: dict[str, Any], tmp_path: Path
) -> None:
    """From the Trainer's checkpoint at half: the uninterrupted run to the last digit."""
    _, first_rows = train(config, make_args(tmp_path), stop_after=3)
    resumed, rows = train(config, make_args(tmp_path), resume=True)
    assert first_rows + rows == whole[1]
    assert losses(resumed) == losses(whole[0])
    assert weights(tmp_path) == weights(whole[2])
    for name, value in whole[0].model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["MixCallback"]["attributes"]["mix"]["step"] == 3


def test_is_steered_from_the_folder_of_its_record(config: Path, data_dir: Path, tmp_path: Path) -> None:
    """A pin for a step to come, and one that is asked for while nobody trains: both hold, and outlive the stop."""
    first, second, *_ = Manifest.load(data_dir).domain_names
    folder = tmp_path / "megamix"
    folder.mkdir()
    append_command(folder, {"pin": {first: 0.7}, "at_step": 3})
    train(config, make_args(tmp_path), stop_after=3)
    said = list(steer(folder, Wishes(pin=[f"{second}=0.2"]), timeout=None))
    assert any(f"{second} " in line and "-> 0.2000" in line for line in said)
    train(config, make_args(tmp_path), resume=True)
    held = weights(tmp_path)
    assert held[2][0] != pytest.approx(0.7, abs=1e-6)
    assert [held[step][0] for step in (3, 4, 5, 6)] == pytest.approx([0.7] * 4, abs=1e-12)
    assert [held[step][1] for step in (5, 6)] == pytest.approx([0.2] * 2, abs=1e-12)
    assert [answer["outcome"] for answer in read_answers(folder)] == ["noticed", "applied", "applied"]


def test_weights_on_the_loss(config: Path, data_dir: Path, tmp_path: Path) -> None:
    """DoReMi's proxy without a reference: its weights scale the loss of each domain, a step after they are found."""
    mixer = {"name": "doremi", "eta": 0.1, "smoothing": 0.01}
    expected = plain_loop(data_dir, mixer)
    assert np.abs(expected["mixer"].loss_weights - expected["weights"][0]).max() > 0.01, "they moved"
    trainer, _ = train(config, make_args(tmp_path), f"mixer={json.dumps(mixer)}")
    np.testing.assert_allclose(losses(trainer), expected["losses"], rtol=OF_MEANS)
    check_model(trainer.model, expected)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["MixCallback"]["attributes"]["mix"]["mixer"]
    np.testing.assert_allclose(kept["alpha"], expected["mixer"].loss_weights, rtol=0, atol=OF_MEANS)


def test_a_longer_lag(config: Path, tmp_path: Path) -> None:
    """Also where two steps are read ahead a run that was stopped goes on as if it had not been."""
    lag = "data.weight_lag=2"
    trainer, rows = train(config, make_args(tmp_path / "whole"), lag)
    assert sorted(weights(tmp_path / "whole"))[:2] == [0, 3], "the losses of step 0 decide on step 3"
    _, first_rows = train(config, make_args(tmp_path / "parts"), lag, stop_after=3)
    resumed, last_rows = train(config, make_args(tmp_path / "parts"), lag, resume=True)
    assert first_rows + last_rows == rows
    assert losses(resumed) == losses(trainer)


@pytest.mark.slow
def test_two_ranks(config: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """The same run under torchrun and DistributedDataParallel, with and without the Trainer's own scaling by the
    ranks."""
    torchrun(Path(__file__), 2, config, tmp_path, cwd=tmp_path)
    for kind in ("average", "sum"):
        first, second = (json.loads((tmp_path / kind / f"rank{rank}.json").read_text()) for rank in range(2))
        check(first, reference)
        for step, expected in enumerate(reference["rows"]):
            mine = slice(4 * step, 4 * step + 4)
            assert first["rows"][mine] + second["rows"][mine] == expected
        model = make_model()
        model.load_state_dict(torch.load(tmp_path / kind / "model.pt"))
        check_model(model, reference)


def test_evaluates_every_domain(
    config: Path, data_dir: Path, whole: tuple[Any, list[Any], Path], tmp_path: Path
) -> None:
    """Validation in between disturbs nothing, and is each domain's own loss."""
    args = make_args(tmp_path, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=3)
    trainer, rows = train(config, args)
    assert (losses(trainer), rows) == (losses(whole[0]), whole[1])
    found = {key: value for line in trainer.state.log_history for key, value in line.items() if line["step"] == STEPS}
    manifest = Manifest.load(data_dir)
    for name in manifest.domain_names:
        domain = manifest.open_domain(name, "validation")
        window_BT = torch.from_numpy(np.stack([domain.window(s, SEQ).astype(np.int64) for s in range(3)]))
        label_BS = window_BT[:, 1:].clone()
        row_m, token_m = domain.document_starts(np.arange(3), SEQ)
        label_BS[row_m[token_m > 0], token_m[token_m > 0] - 1] = -100
        with torch.no_grad():
            logits_BSV = trainer.model(input_ids=window_BT[:, :-1]).logits
        expected = F.cross_entropy(logits_BSV.transpose(1, 2), label_BS).item()
        assert found[f"eval_{name}_loss"] == pytest.approx(expected, rel=rounding(terms=32, layers=3))


# Refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_steps": -1}, "max_steps is -1, expected the steps of the run"),
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy is 'random', expected 'sequential'")
        if ORDERED
        else ({"group_by_length": True}, "group_by_length is True, expected False"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers is 2, expected 0"),
        ({"ignore_data_skip": True}, "ignore_data_skip is True, expected False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, expected 0.0"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches is True"),
    ],
)
def test_arguments_that_do_not_fit(config: Path, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MixCallback(config, make_args(tmp_path, **changed))


def test_a_trainer_without_the_loss(config: Path, tmp_path: Path) -> None:
    """Noticed before the model's own loss takes a label with its domain for a token; checked in the first step."""
    args = make_args(tmp_path, save_strategy="no")
    mix = MixCallback(config, args)
    trainer = Trainer(make_model(), args, train_dataset=mix.dataset, callbacks=[mix])
    with pytest.raises(InputError, match=r"Trainer has no loss function. Give it compute_loss_func=mix\.loss"):
        trainer.train()
    mix.on_train_end(args, trainer.state, trainer.control)
    mix = MixCallback(config, args)
    trainer = Trainer(make_model(), args, train_dataset=mix.dataset, compute_loss_func=mix.loss, callbacks=[mix])
    trainer.train()
    token = torch.zeros(1, 2, dtype=torch.int64)
    assert trainer.model is not None
    assert trainer.model(input_ids=token, labels=token).loss is not None


def test_a_model_that_does_not_fit(config: Path, tmp_path: Path) -> None:
    args = make_args(tmp_path)
    mix = MixCallback(config, args, ["data.attention=document"])
    for model, message in (
        (make_model(vocab_size=256), "the model has 256 tokens, but the data's tokenizer knows 512 ids"),
        (make_model(max_position_embeddings=16), "data.seq_length is 32, but the model has 16 positions"),
        (
            make_model(sliding_window=16),
            r"attention ends after 16 tokens \(sliding_window\), fewer than data.seq_length 32",
        ),
        (make_model(attn_implementation="eager"), "attn_implementation is 'eager', expected 'sdpa'"),
    ):
        trainer = Trainer(model, args, train_dataset=mix.dataset, compute_loss_func=mix.loss, callbacks=[mix])
        with pytest.raises(InputError, match=message):
            trainer.train()


def test_attention_within_documents(config: Path, tmp_path: Path) -> None:
    """A sample's logits are those of its documents one at a time; with positions alone they are not."""
    model = make_model().double()

    def divided_sample(override: str) -> dict[str, torch.Tensor]:
        mix = MixCallback(config, make_args(tmp_path), ["data.seq_length=512", override])
        samples = [part[index] for part in mix.validation(3).values() for index in (0, 1)]
        return max(samples, key=lambda sample: int((sample["position_ids"] == 0).sum()))

    def logits(sample: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: value[None] for name, value in sample.items() if name != "labels"}
        return model(**inputs, use_cache=False).logits[0]

    sample = divided_sample("data.attention=document")
    starts = [*(sample["position_ids"] == 0).nonzero().flatten().tolist(), 512]
    parts = [sample["input_ids"][None, a:b] for a, b in itertools.pairwise(starts)]
    assert len(parts) > 1
    alone = torch.cat([model(part).logits[0] for part in parts])
    torch.testing.assert_close(logits(sample), alone)
    assert (logits(divided_sample("data.reset_position_ids=true")) - alone).abs().max() > 1e-3


def test_a_checkpoint_of_another_run(config: Path, whole: tuple[Any, list[Any], Path], tmp_path: Path) -> None:
    """Without the callback's state, or with that of a run with another seed."""
    checkpoint = whole[2] / "checkpoint-3"
    with pytest.raises(ResumeRefused, match="another order: seed was 1234, now 7"):
        train(config, make_args(tmp_path, seed=7), resume=str(checkpoint))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    kept = json.dumps(state)
    del state["stateful_callbacks"]["MixCallback"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ResumeRefused, match="was saved without this callback"):
        train(config, make_args(tmp_path), resume=str(checkpoint))
    (checkpoint / "trainer_state.json").write_text(kept)


def test_samples_out_of_turn(config: Path, tmp_path: Path) -> None:
    with pytest.raises(MegamixError, match="asked for before training"):
        MixCallback(config, make_args(tmp_path)).dataset[0]


def main() -> None:
    """One rank of a job of two."""
    config, folder = Path(sys.argv[1]), Path(sys.argv[2])
    half = {"gradient_accumulation_steps": 2, "ddp_backend": "gloo", "save_strategy": "no"}
    for kind in ("average", "sum"):
        args = make_args(folder / kind, average_tokens_across_devices=kind == "average", **half)
        trainer, rows = train(config, args)
        seen = record(trainer, rows, folder / kind)
        (folder / kind / f"rank{args.process_index}.json").write_text(json.dumps(seen))
        if args.process_index == 0:
            torch.save(trainer.model.state_dict(), folder / kind / "model.pt")


if __name__ == "__main__":
    main()
