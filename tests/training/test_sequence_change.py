"""Another sequence length on resume: what is read, told from the tokens themselves.

Every token of the data set here says which domain and which place of its stream it is from, and every label must be the
token that follows its own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import job
from legs import leave
from records import lines

from megamix.analysis.inspect import inspect_sample
from megamix.analysis.replay import replay
from megamix.analysis.series import recorded_tokens
from megamix.core.config import validate
from megamix.core.errors import InputError, ResumeRefused
from megamix.data.batches import Batches
from megamix.data.loader import Batch
from megamix.data.sampler import Sampler
from megamix.data.tokens.manifest import DomainEntry, Manifest, SplitEntry, TokenizerEntry, ValidationEntry
from megamix.data.tokens.tokenizer import train_tokenizer
from megamix.data.tokens.writer import IndexedWriter
from megamix.mixing.steering.journal import append_command
from megamix.training.checkpoints import resume
from megamix.training.checkpoints.fingerprints import fingerprints
from megamix.training.checkpoints.resume import Resumed, check_starts_anew, resume_from
from megamix.training.checkpoints.state import RunState
from megamix.training.config import RunConfig
from megamix.training.data_loop import MixedData
from megamix.training.plan import Plan, make_plan
from megamix.training.records.recorded_run import RecordedRun
from megamix.training.records.run_record import RunRecord
from megamix_kernels import DomainSums

Begun = Callable[[RunConfig], RunConfig]
NAMES, TOKENS = ("web", "code", "books"), (701, 404, 150)
BASE = 1000  # token id = BASE * domain + place
BATCH, OLD = 4, 16


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequence") / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer([" ".join(f"word{number}" for number in range(50))] * 3, 300)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    entries = []
    for domain, (name, size) in enumerate(zip(NAMES, TOKENS, strict=True)):
        (folder / name).mkdir()
        splits: dict[str, SplitEntry] = {}
        for split, number in (("train", size), ("validation", 210)):
            with IndexedWriter(folder / name / split, "uint16") as writer:
                place = 0
                while place < number:
                    length = min(number - place, int(rng.integers(3, 40)))
                    writer.add_document(BASE * domain + np.arange(place, place + length))
                    place += length
            splits[split] = SplitEntry.of(f"{name}/{split}", writer.close())
        validation = ValidationEntry(**dict(splits["validation"]), unigram_nats=5.0)
        entries.append(DomainEntry(name=name, train=splits["train"], validation=validation))
    entry = TokenizerEntry(
        file="tokenizer.json", sha256=hashlib.sha256(tokenizer).hexdigest(), vocab_size=3 * BASE, eod_id=0
    )
    Manifest.build(folder, tokenizer=entry, dtype="uint16", validation_fraction=0.02, domains=entries).save()
    return folder / "manifest.json"


def plan_of(
    manifest: Path,
    length: int,
    accepted: tuple[str, ...] = ("sequence",),
    *,
    begun: Begun | None = None,
    **sections: Any,
) -> Plan:
    content = {
        "run_dir": "run",
        "data": {"manifest": str(manifest), "seq_length": length, **sections.pop("data", {})},
        "model": {"architecture": "neox", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 16},
        "mixture": "uniform",
        "mixer": {"name": "odm", "preset": "official", "warmup_steps": 1},
        "shadow": [{"name": "odm", "preset": "paper", "warmup_steps": 1}],
        "checkpoint": {"accept_changed": list(accepted)},
        "train": {
            "steps": 30, "global_batch": BATCH, "micro_batch": 2, "lr": 1e-3, "seed": 7, **sections.pop("train", {}),
        },
        **sections,
    }  # fmt: skip
    return make_plan(validate(RunConfig, content, "test"), 1, begun=begun)


def resumed(state: RunState, plan: Plan) -> Resumed:
    return resume_from(state, plan, Path("run/checkpoints/step_N"), fingerprints(plan))


class Run:
    """A run of one rank without a model, in parts; keeps what was read."""

    def __init__(self, folder: Path, check_labels: bool = True) -> None:
        self.folder, self.check_labels = folder, check_labels
        self.batches: list[Batch] = []
        self.state: RunState | None = None
        self.tokens: list[np.ndarray] = []  # a row a sample
        self.weights: list[list[float]] = []

    def go(self, plan: Plan, steps: int) -> Plan:
        found = None if self.state is None else resumed(self.state, plan)
        plan = plan if found is None else found.adopted(plan)
        data = MixedData(
            plan, data_rank=0, reads_data=True, device=torch.device("cpu"), resumed=found, journal_dir=self.folder
        )
        record = RunRecord(self.folder, plan.domain_names, None if found is None else found.step)
        data.announce(record)
        for _ in range(steps):
            batch, _ = data.next_batch()
            assert batch is not None
            assert batch.samples is not None
            assert batch.samples.position == plan.config.batches.position(data.step)
            tokens, labels = (each.reshape(-1, each.shape[-1]).numpy() for each in (batch.tokens, batch.labels))
            assert not self.check_labels or (labels == tokens + 1).all(), "a label is the token that follows"
            domain = batch.domains.reshape(tokens.shape).numpy()
            assert (domain == tokens // BASE).all()
            self.batches.append(batch)
            counted = np.bincount(domain.ravel(), minlength=data.sampler.num_domains)
            assert not self.check_labels or batch.domain_tokens.tolist() == counted.tolist()
            self.tokens += list(tokens)
            self.weights.append(data.sampler.weights_at(data.step).tolist())
            rng = np.random.default_rng(data.step)
            drawn = torch.from_numpy(rng.choice(len(self.weights[-1]), 64, p=self.weights[-1]))
            losses = torch.from_numpy(rng.uniform(1, 6, 64)).float()
            data.submit(DomainSums(len(self.weights[-1])).add(drawn, losses).buffer)
        self.state = leave(data, record, plan, self.folder)
        return plan


def check_epochs(rows: list[np.ndarray], old: int, samples_before: int) -> None:
    """Of every domain, from its tokens alone: the epoch that it was in is read to its end, each token once, but for
    less than one sample; then comes a whole epoch of the new length, each token once."""
    for domain, size in enumerate(TOKENS):
        labels = size - 1
        own = [row - BASE * domain for row in rows[:samples_before] if row[0] // BASE == domain]
        after = [row - BASE * domain for row in rows[samples_before:] if row[0] // BASE == domain]
        if not after:
            continue
        epoch = labels // old
        seen = Counter(np.concatenate([[], *own[len(own) // epoch * epoch :]]).astype(int).tolist())
        assert not seen or max(seen.values()) == 1
        new = after[0].size
        begun = bool(seen)
        whole = labels if begun else labels // new * new
        while after and len(seen) < whole:
            row = after.pop(0)
            fresh = sum(token not in seen for token in row.tolist())
            # All new, but in the sample that ends the epoch.
            assert fresh == min(new, whole - len(seen))
            seen.update(row.tolist())
        assert max(seen.values()) <= 2
        assert sum(seen.values()) - len(seen) < new
        if after:
            assert sorted(seen) == list(range(whole))
        following = Counter(np.concatenate([[], *after[: labels // new]]).astype(int).tolist())
        assert not following or max(following.values()) == 1


@pytest.mark.parametrize(
    ("new", "at", "domains"),
    [(32, 7, None), (8, 9, None), (24, 5, None), (100, 13, None), (7, 4, ["web"]), (40, 12, ["web"]), (5, 12, ["web"])],
)
def test_nothing_is_lost_and_less_than_a_sample_a_domain_is_read_twice(
    manifest: Path, tmp_path: Path, new: int, at: int, domains: list[str] | None
) -> None:
    """Up and down, of whole multiples and not, of one domain, and in second epochs; resumed once more under way, once
    as if killed before it had saved, and on two ranks."""
    data, one = {"domains": domains}, {} if domains is None else {"mixer": {"name": "static"}, "shadow": []}
    with job(tmp_path):
        run = Run(tmp_path)
        run.go(plan_of(manifest, OLD, data=data, **one), at)
        saved = run.state
        run.go(plan_of(manifest, new, data=data, **one), 3)
        first, weights = run.tokens[:], run.weights[:]
        run.state, run.tokens, run.weights = saved, run.tokens[: at * BATCH], run.weights[:at]
        plan = run.go(plan_of(manifest, new, data=data, **one), 3)
        assert run.weights == weights
        assert np.concatenate(run.tokens).tolist() == np.concatenate(first).tolist()
        after = run.state
        assert after is not None
        assert plan.config.batches == Batches(((0, BATCH),), new, ((OLD, at),))
        plan = run.go(plan_of(manifest, new, (), data=data, **one), 12)
        assert plan.config.batches == Batches(((0, BATCH),), new, ((OLD, at),))
    check_epochs(run.tokens, OLD, at * BATCH)
    # The samples of two ranks are those of one.
    ranks = [Sampler.from_state_dict(after.sampler, replace(plan.share(0), data_rank=r, data_size=2)) for r in (0, 1)]
    reader = plan.reader(plan.domains, rests=ranks[0].rests)
    dealt = [rank.deal() for rank in ranks]
    read = np.concatenate([reader.read(each.domain.ravel(), each.sample.ravel())[:, :-1] for each in dealt])
    place = (at + 3) * BATCH
    joint = np.diff(read) != 1  # `read` has the next piece's token there
    assert read.tolist() == [row.tolist() for row in run.tokens[place : place + BATCH]]
    assert joint.any() or new <= OLD or plan.num_samples.size == 1
    # The record says where the tokens of a position come from.
    for position in (at * BATCH - 1, at * BATCH, at * BATCH + 5, len(run.tokens) - 1):
        text = str(inspect_sample(tmp_path, position).parts[0])
        row = run.tokens[position]
        assert f"domain      {NAMES[row[0] // BASE]} " in text
        told = [line.split()[1:4:2] for line in text.splitlines() if line.startswith("tokens ")]
        assert [token for begin, end in told for token in range(int(begin), int(end))] == (row % BASE).tolist()
    recorded = RecordedRun.open(tmp_path)
    counted = Counter(int(token) // BASE for row in run.tokens for token in row)
    assert recorded.tokens == sum(row.size for row in run.tokens)
    # Weights are announced for the step after the last.
    assert recorded_tokens(recorded) - recorded.tokens == (BATCH * new if domains is None else 0)
    assert recorded.tokens_read() == {name: counted[domain] for domain, name in enumerate(plan.domain_names)}
    if domains is None:
        used = [line["domain_weights"] for line in lines(tmp_path / "weights.jsonl")]
        replayed = replay(tmp_path, [], tmp_path / "replayed")
        assert replayed.mixers[0].distance == 0
        assert len({tuple(each) for each in used}) > 3, "the weights must move"


def test_lengths_one_after_the_other_are_parts_of_one_epoch(manifest: Path, tmp_path: Path) -> None:
    """16, 24, 40 and 16 again within the first epoch of the largest domain: no token twice until it ends."""
    lengths, rows = [(16, 2), (24, 2), (40, 1), (16, 30)], []
    with job(tmp_path):
        run = Run(tmp_path)
        alone = {"data": {"domains": ["web"]}, "mixer": {"name": "static"}, "shadow": [], "train": {"steps": 60}}
        for length, steps in lengths:
            plan = run.go(plan_of(manifest, length, **{**alone, "data": {"domains": ["web"]}}), steps)
        rows = run.tokens
    assert plan.config.data.past_lengths == ((16, 2), (24, 4), (40, 5))
    labels, seen, used = TOKENS[0] - 1, Counter[int](), 0
    while len(seen) < labels:
        row, used = rows[used].tolist(), used + 1
        assert sum(token not in seen for token in row) == min(len(row), labels - len(seen))
        seen.update(row)
    assert sum(seen.values()) - labels < 16
    epoch = Counter(np.concatenate(rows[used : used + labels // 16]).tolist())
    assert (len(epoch), max(epoch.values())) == (labels // 16 * 16, 1)
    assert RecordedRun.open(tmp_path).tokens == sum(row.size for row in rows)


@pytest.mark.parametrize("mask", [False, True])
def test_attention_within_documents_ends_where_a_sample_is_joined(manifest: Path, tmp_path: Path, mask: bool) -> None:
    """Positions count from the start of the document or of the piece, and the labels left out of the loss are the first
    tokens of documents, against the lengths of documents in the index files."""
    data = {"attention": "document", "eod_mask_loss": mask}
    with job(tmp_path):
        run = Run(tmp_path, check_labels=False)
        run.go(plan_of(manifest, OLD, data=data), 6)
        run.batches.clear()
        plan = run.go(plan_of(manifest, 40, data=data), 4)
    starts = set()
    for domain, stream in enumerate(plan.domains):
        starts |= {int(start) + BASE * domain for start in stream.files[0].document_starts}
    joined = 0
    for batch in run.batches:
        assert batch.positions is not None
        counted = np.zeros(3, np.int64)
        every = (each.reshape(-1, 40).tolist() for each in (batch.tokens, batch.labels, batch.positions))
        for tokens, labels, positions in zip(*every, strict=True):
            begin = 0
            for place, token in enumerate(tokens):
                if place and token != tokens[place - 1] + 1:
                    joined += 1
                    begin = place
                if token in starts:
                    begin = place
                assert positions[place] == place - begin
                left_out = mask and token + 1 in starts
                assert labels[place] == (-100 if left_out else token + 1)
                counted[token // BASE] += not left_out
        assert batch.domain_tokens.tolist() == counted.tolist()
    assert joined > 5


def test_what_cannot_be_is_refused_and_the_rest_is_said(manifest: Path, tmp_path: Path) -> None:
    with job(tmp_path):
        run = Run(tmp_path)
        run.go(plan_of(manifest, OLD), 3)
    state = run.state
    assert state is not None
    with pytest.raises(
        ResumeRefused, match=r"another sequence: seq_length was 16, now 32.*add checkpoint.accept_changed=\[sequence\]"
    ):
        resumed(state, plan_of(manifest, 32, ()))
    fewer = {
        "data": {"domains": ["web", "code"]},
        "checkpoint": {"accept_changed": ["sequence"], "domains": {"remove": ["books"]}},
    }
    with pytest.raises(
        InputError, match=r"data\.seq_length changes from 16 to 32 and the domains or their data change, too"
    ):
        resumed(state, plan_of(manifest, 32, **fewer))
    with pytest.raises(InputError, match="fewer than one sample of seq_length 200"):
        plan_of(manifest, 200)
    lengths = [{"seq_length": 8, "until_step": 2}]
    with pytest.raises(InputError, match=r"data\.seq_length_before is what a resume with another data\.seq_length"):
        check_starts_anew(plan_of(manifest, OLD, data={"seq_length_before": lengths}).config)
    # What lies before the checkpoint is what it was, whatever the config says of it.
    same = plan_of(manifest, OLD, (), data={"seq_length_before": lengths})
    assert resumed(state, same).changed == ()
    assert resumed(state, same).adopted(same).config.batches == Batches(((0, BATCH),), OLD)
    # The same tokens: half of the steps that are left.
    found = resumed(state, plan_of(manifest, 32, ("sequence", "train")))
    said = found.said_changes(found.adopted(plan_of(manifest, 32)).config)
    assert said is not None
    assert said.startswith(
        "another sequence length from step 4 on: 27 steps of 4 samples of 32 tokens are left, before 27 steps of 4 samples of "
        f"16 tokens; the run ends after {3 * 64 + 27 * 128:,} tokens, before after {30 * 64:,} (as near as can be with "
        "train.steps=16); every domain goes on where it stands in tokens"
    )
    # As checkpoints were before: one length, in the part of the order.
    assert state.fingerprints["order"]["seq_length"] == OLD
    assert "past_lengths" not in state.fingerprints["batch"]


def test_stages_and_bounds_count_what_the_run_has_had(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps of 64 tokens and 10 of 32 are 1,600 tokens and pass a stage at 1,400, which 30 of 32, the config alone,
    never reach; and 30 steps of 2 x 64 tokens alone are more than two epochs, 10 of them are not."""
    last = {"from_tokens": 1400, "weights": {"web": 0.6, "code": 0.2, "books": 0.2}}
    sections = {"mixer": {"name": "static"}, "shadow": []}
    staged = {**sections, "mixture": {"stages": [{"from_tokens": 0, "weights": "uniform"}, last]}}
    with job(tmp_path):
        run = Run(tmp_path)
        run.go(plan_of(manifest, OLD, **staged), 20)
        assert run.state is not None
        with pytest.raises(InputError, match="stage 2 starts at 1400 tokens, but the last of 30 steps begins at 928"):
            plan_of(manifest, 8, **staged)
        monkeypatch.setattr(resume, "find_checkpoint", lambda config: tmp_path)
        monkeypatch.setattr(resume, "read_state", lambda path: run.state)
        plan = run.go(plan_of(manifest, 8, begun=resume.begun, **staged), 10)
    assert plan.config.batches.tokens(30) == 1600
    assert run.weights[23] == pytest.approx([1 / 3] * 3)
    assert run.weights[24] == pytest.approx([0.6, 0.2, 0.2])
    plans = {"mixture": "natural", **sections}
    (folder := tmp_path / "bounded").mkdir()
    with job(folder):
        run = Run(folder)
        run.go(bounded(manifest, OLD, **plans), 20)
        with pytest.raises(InputError, match="max_epochs"):
            bounded(manifest, 64, **plans)
        plan = run.go(bounded(manifest, 64, begun=resume.begun, **plans), 10)
    assert plan.config.batches.tokens(30) == 20 * 32 + 10 * 128


def test_a_ramp_of_steering_that_is_yet_to_begin_keeps_its_tokens(manifest: Path, tmp_path: Path) -> None:
    """384 tokens from step 9 on, announced at length 16: three steps of 128 tokens at length 32, not six."""
    sections: dict[str, Any] = {"mixer": {"name": "static"}, "shadow": []}
    with job(tmp_path):
        run = Run(tmp_path)
        append_command(tmp_path, {"set": {"web": 0.6}, "ramp_tokens": 384, "at_step": 8})
        run.go(plan_of(manifest, OLD, data={"weight_lag": 3}, **sections), 6)
        run.go(plan_of(manifest, 32, data={"weight_lag": 3}, **sections), 8)
    done = [(weights[0] - 1 / 3) / (0.6 - 1 / 3) for weights in run.weights[8:]]
    # The weight of step 10 was announced before, for 64 tokens of the ramp.
    assert done == pytest.approx([0, 64 / 384, 256 / 384, 1, 1, 1], abs=1e-12)


def bounded(manifest: Path, length: int, **sections: Any) -> Plan:
    return plan_of(manifest, length, data={"max_epochs": 2.0}, train={"global_batch": 2}, **sections)


def test_bounds_and_rates_follow_the_tokens_of_both_lengths(manifest: Path, tmp_path: Path) -> None:
    """After a third of its tokens at length 16, books, bounded by one epoch, may give what is left of it, to the last
    token, and its weight is bounded anew by that; the learning rate over tokens has gone as far as they have."""
    sections: dict[str, Any] = {
        "mixture": {"web": 0.6, "code": 0.2, "books": 0.2}, "mixer": {"name": "static"}, "shadow": [],
        "data": {"max_epochs": {"books": 1.0}},
        "train": {"steps": 14, "schedule_over": "tokens", "schedule": "linear", "warmup": 0.0, "min_lr": 0.0},
    }  # fmt: skip
    again = {**sections, "data": dict(sections["data"]), "train": dict(sections["train"])}
    with job(tmp_path):
        run = Run(tmp_path)
        run.go(plan_of(manifest, OLD, **sections), 4)
        state = run.state
        assert state is not None
        given = state.sampler["blend"]["counts"][2]
        plan = run.go(plan_of(manifest, 24, **again), 10)
    left = -(-(TOKENS[2] - 1 - given * OLD) // 24)
    weight = run.weights[4][2]
    assert run.weights[0][2] == pytest.approx((TOKENS[2] - 1) // OLD / (14 * BATCH), rel=1e-12)
    assert weight == pytest.approx(min(0.2, left / (10 * BATCH)), rel=1e-12)
    books = [row - 2 * BASE for row in run.tokens if row[0] >= 2 * BASE]
    assert abs(len(books) - given - left) <= 1
    assert max(Counter(np.concatenate(books).tolist()).values()) <= 2
    assert sum(row.size for row in books) - len(set(np.concatenate(books).tolist())) < 24
    train, batches = plan.config.train, plan.config.batches
    total, gone = batches.tokens(13), 4 * BATCH * OLD + 3 * BATCH * 24
    assert train.lr_at(7, batches) == pytest.approx(1e-3 * (1 - gone / total), rel=1e-12)
    planned = plan.policy.planned_samples.sum() * 24
    assert planned == pytest.approx(batches.tokens(14))
