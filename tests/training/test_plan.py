"""The plan of a run: mixtures, what cannot work refused with its numbers, and how max_epochs bounds the weights."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import job

from megamix.core.errors import InputError
from megamix.data.loader import Batch
from megamix.data.tokens.manifest import DomainEntry, Manifest, SplitEntry, TokenizerEntry, ValidationEntry
from megamix.data.tokens.writer import IndexedWriter
from megamix.engines.base import Place
from megamix.training.config import RunConfig
from megamix.training.evaluate import Validation
from megamix.training.plan import domain_key, make_plan

SEQ = 16
VOCAB = 300
WINDOWS = {"web": 300, "code": 60, "mail": 20, "wiki": 120}
NAMES = list(WINDOWS)


def build(
    folder: Path,
    windows: dict[str, int],
    validation_tokens: int = 5 * SEQ + 1,
    without: tuple[str, ...] = (),
    divided: tuple[str, ...] = (),
    single: tuple[str, ...] = (),
) -> Path:
    """A data set with ``windows`` training samples of `SEQ` tokens a domain (0: a token too few for one).

    Args:
        without: domains whose validation text is a token too short for a sample.
        divided: domains whose training text is two documents; that of the others is one.
        single: domains whose validation text is one document; that of the others is two.
    """
    rng, entries = np.random.default_rng(0), []
    for name, number in windows.items():
        splits = []
        held_out = SEQ if name in without else validation_tokens
        for split, tokens in (("train", number * SEQ + (1 if number else SEQ)), ("validation", held_out)):
            with IndexedWriter(folder / f"{name}-{split}", "uint16") as writer:
                is_one = name not in divided if split == "train" else name in single
                ends = [tokens] if is_one else [3, tokens]
                writer.add_documents(rng.integers(0, VOCAB, tokens), np.diff(ends, prepend=0))
            splits.append(SplitEntry.of(f"{name}-{split}", writer.close()))
        validation = ValidationEntry(**dict(splits[1]), unigram_nats=5.0)
        entries.append(DomainEntry(name=name, train=splits[0], validation=validation))
    (folder / "tokenizer.json").write_bytes(b"tokenizer")
    sha256 = hashlib.sha256(b"tokenizer").hexdigest()
    tokenizer = TokenizerEntry(file="tokenizer.json", sha256=sha256, vocab_size=VOCAB, eod_id=0)
    return Manifest.build(folder, tokenizer=tokenizer, dtype="uint16", validation_fraction=0.1, domains=entries).save()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("data"), WINDOWS)


def config(manifest: Path, steps: int = 10, **changes: Any) -> RunConfig:
    """A small run; ``changes`` are ``section={key: value}`` or top-level keys."""
    content: dict[str, Any] = {
        "run_dir": "run",
        "data": {"manifest": manifest, "seq_length": SEQ},
        "model": {"preset": "neox-2m"},
        "train": {"steps": steps, "global_batch": 8, "micro_batch": 2, "lr": 1e-3},
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value} if key in ("data", "model", "train") else value
    return RunConfig.model_validate(content)


def test_mixtures(manifest: Path) -> None:
    tokens = np.array([number * SEQ + 1 for number in WINDOWS.values()])
    plan = make_plan(config(manifest))
    assert plan.num_samples.tolist() == list(WINDOWS.values())
    assert np.allclose(plan.policy.initial_weights, tokens / tokens.sum(), rtol=0, atol=1e-15)
    assert make_plan(config(manifest, mixture="uniform")).policy.initial_weights.tolist() == [0.25] * 4
    given = make_plan(config(manifest, mixture={"wiki": 1, "code": 3, "mail": 0, "web": 4})).policy.initial_weights
    assert given.tolist() == [0.5, 0.375, 0.0, 0.125]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"web": 1, "code": 1, "mail": 1}, "no weight for wiki"),
        ({"web": 1, "code": 1, "mail": 1, "wikis": 1}, "no domain 'wikis'. Did you mean 'wiki'"),
        ({"web": 1, "code": math.nan, "mail": 1, "wiki": 1}, "weight of domain 'code' is nan"),
        ({"web": 1, "code": 1, "mail": -0.5, "wiki": 1}, r"weight of domain 'mail' is -0\.5"),
        ({"web": 0, "code": 0, "mail": 0, "wiki": 0}, "weights of all 4 domains"),
    ],
)
def test_bad_mixtures(manifest: Path, mixture: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(config(manifest, mixture=mixture))


def test_layouts_that_do_not_fit(manifest: Path) -> None:
    layers = make_plan(config(manifest)).model.num_layers
    assert make_plan(config(manifest, engine={"pipeline": layers})).data_size == 1
    with pytest.raises(InputError, match=rf"pipeline is {layers + 1}, but the model has {layers} decoder layers"):
        make_plan(config(manifest, engine={"pipeline": layers + 1}))
    with pytest.raises(InputError, match=r"global_batch 8 .* 3 data-parallel ranks .* micro-batches of 2 \(= 6\)"):
        make_plan(config(manifest, engine={"data": 3}))
    assert make_plan(config(manifest), world_size=4).data_size == 4
    with pytest.raises(InputError, match="pipeline 2 x data any makes a multiple of 2 ranks, and this job has 3"):
        make_plan(config(manifest, engine={"pipeline": 2}), world_size=3)


def test_vocabulary(manifest: Path) -> None:
    assert make_plan(config(manifest)).model.vocab_size == 320
    assert make_plan(config(manifest, model={"vocab_size": VOCAB})).vocab_size == VOCAB
    with pytest.raises(InputError, match="vocab_size is 299, but the tokenizer of the data has 300"):
        make_plan(config(manifest, model={"vocab_size": 299}))


def test_domain_smaller_than_a_window(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=r"domain 'mail' has 16 training tokens, fewer .* seq_length 16 needs \(17\)"):
        make_plan(config(build(tmp_path / "a", {"web": 5, "mail": 0})))
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match=r"domain 'web' has 16 validation tokens, fewer .* seq_length 16"):
        make_plan(config(build(tmp_path / "b", {"web": 5, "mail": 5}, validation_tokens=SEQ)))
    (tmp_path / "c").mkdir()
    assert make_plan(config(build(tmp_path / "c", {"web": 1}, SEQ + 1))).num_samples.tolist() == [1]


def test_max_epochs_that_cannot_be_met(manifest: Path) -> None:
    """500 samples twice are 1000: 125 steps of 8 fit, 126 do not."""
    make_plan(config(manifest, steps=125, data={"max_epochs": 2}))
    with pytest.raises(InputError, match=r"max_epochs 2 allows 1000 samples of the 4 domains .* asks for 1008"):
        make_plan(config(manifest, steps=126, data={"max_epochs": 2}))


def test_max_epochs_caps_the_initial_weights(manifest: Path) -> None:
    """Uniform over 400 samples wants 100 of each: mail (2 x 20) is capped, the others keep their ratios."""
    plan = make_plan(config(manifest, steps=50, mixture="uniform", data={"max_epochs": 2}))
    assert np.allclose(plan.policy.initial_weights, [0.3, 0.3, 0.1, 0.3], rtol=0, atol=1e-12)
    assert np.allclose(plan.epochs, [0.4, 2.0, 2.0, 1.0], rtol=0, atol=1e-9)
    assert make_plan(config(manifest, steps=50, mixture="uniform")).policy.initial_weights.tolist() == [0.25] * 4


def test_warning_of_many_epochs(manifest: Path) -> None:
    plan = make_plan(config(manifest, steps=50, mixture="uniform"))
    assert [line.split(":")[0] for line in plan.warnings()] == ["domain 'mail'"]
    assert "reads it 5.0 times" in plan.warnings()[0]
    assert make_plan(config(manifest, steps=50)).warnings() == []


def test_warning_of_a_floor_under_a_domain_that_the_mixture_leaves_out(manifest: Path) -> None:
    mixture = {"web": 0.5, "code": 0.5, "mail": 0.0, "wiki": 0.0}
    plan = make_plan(config(manifest, mixture=mixture, data={"min_weight": {"mail": 0.1}}))
    (told,) = [line for line in plan.warnings() if "leaves a domain out" in line]
    assert told.startswith("domain 'mail': weight 0 in the mixture")
    assert "data.min_weight gives it 0.1" in told
    assert plan.policy.left_out == ("wiki",)


def test_attention_within_documents_needs_documents(tmp_path: Path, manifest: Path) -> None:
    data = {"attention": "document"}
    with pytest.raises(InputError, match=r"document, but the index files of .* know one document for every domain"):
        make_plan(config(manifest, data=data))
    divided = build(tmp_path, WINDOWS, divided=("web", "code", "wiki"))
    found = [said for said in make_plan(config(divided, data=data)).warnings() if "one document" in said]
    assert len(found) == 1
    assert "one document each of mail" in found[0]
    assert make_plan(config(manifest)).warnings() == []
    context = config(divided, data=data, engine={"name": "megatron", "context": 2, "transformer_engine": "on"})
    with pytest.raises(InputError, match=r"engine\.context is 2, .* data\.attention is document"):
        make_plan(context)


def test_constrain_at_later_positions(manifest: Path) -> None:
    """The cap is what is left of a domain over what is left of the run; without max_epochs there is none."""
    plan = make_plan(config(manifest, steps=50, data={"max_epochs": 1}))
    counts = np.array([60, 50, 20, 70])
    result = plan.policy.allowed(np.array([0.1, 0.4, 0.4, 0.1]), counts, 200)
    assert np.allclose(result, [0.7, 0.05, 0.0, 0.25], rtol=0, atol=1e-12)
    unchanged = np.array([0.8, 0.05, 0.0, 0.15])
    assert plan.policy.allowed(unchanged, counts, 200).tolist() == unchanged.tolist()
    # Past the end, what the whole run allows: the samples of each domain over the 400 of the run.
    end = plan.policy.allowed(np.array([0.1, 0.4, 0.4, 0.1]), np.array([250, 60, 20, 70]), 400)
    assert np.allclose(end, [0.5, 0.15, 0.05, 0.3], rtol=0, atol=1e-12)
    assert make_plan(config(manifest, steps=50)).policy.allowed(end, counts, 200).tolist() == end.tolist()


def test_domain_order_does_not_depend_on_the_other_domains(tmp_path: Path, manifest: Path) -> None:
    """A domain keeps its order of samples when another is added before it: its key comes from its name."""
    more = build(tmp_path, {"books": 40, **WINDOWS})
    orders = []
    for path in (manifest, more):
        plan = make_plan(config(path, mixture="uniform"))
        domain, sample = plan.blend().take(1500)
        orders.append({name: sample[domain == k][:200].tolist() for k, name in enumerate(plan.domain_names)})
    assert {name: orders[1][name] for name in NAMES} == orders[0]
    assert len({domain_key(name) for name in [*NAMES, "web ", "Web", "ewb"]}) == len(NAMES) + 3


class Losses:
    """An engine whose loss is 1 nat a token for the first domain that is evaluated, 2 for the next, and so on."""

    place = Place(0, 1, 0, 1, 0, 1, torch.device("cpu"))
    micro_batch_multiple = 1

    def token_losses(self, batch: Batch, num_micro_batches: int) -> torch.Tensor:
        return (batch.domains + 1).float()


def test_domains_judged_by_one_document(tmp_path: Path) -> None:
    """Without a standard error: said, where the objective counts them."""
    (tmp_path / "data").mkdir()
    manifest = build(tmp_path / "data", WINDOWS, single=("code", "wiki"), without=("wiki",))
    told = [line for line in make_plan(config(manifest)).warnings() if "one document" in line]
    assert told == [
        "validation text of one document: code (81 tokens). Such a loss has no standard error, and so the objective loss has none. "
        "Hold out more documents (prepare --validation)."
    ]
    apart = make_plan(config(manifest, objective={"web": 1, "code": 0, "mail": 3, "wiki": 2}))
    assert not any("one document" in line for line in apart.warnings())


def test_domains_without_validation_text_are_trained_on_and_not_evaluated(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    manifest = build(tmp_path / "data", WINDOWS, without=("code", "wiki"))
    plan = make_plan(config(manifest, objective={"web": 1, "code": 4, "mail": 3, "wiki": 2}))
    told = [line for line in plan.warnings() if "validation text" in line]
    assert told == [
        "no sample of validation text (seq_length 16 needs 17 tokens): code, wiki. Trained on, not evaluated; the objective loss "
        "is of the other domains."
    ]
    assert plan.objective_weights.tolist() == [0.1, 0.4, 0.3, 0.2], "a mixer follows the objective as it was given"
    with job(tmp_path):
        line = Validation(plan, Losses()).run(Losses())  # type: ignore[arg-type]
    assert line["domain_loss"] == {"web": 1.0, "mail": 2.0}
    assert line["objective"] == pytest.approx({"web": 0.25, "mail": 0.75}, rel=1e-15)
    assert line["objective_loss"] == pytest.approx(1.75, rel=1e-12)
    assert line["macro_loss"] == 1.5
    assert line["micro_loss"] == pytest.approx((1 * 4801 + 2 * 321) / (4801 + 321), rel=1e-12)
    with pytest.raises(InputError, match=r"objective gives weight to code, wiki alone, of which there is no sample"):
        make_plan(config(manifest, objective={"web": 0, "code": 1, "mail": 0, "wiki": 1}))
