"""Document boundaries: from the index files into labels and positions, counted for the whole batch on every rank."""

from __future__ import annotations

import itertools
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import STDLIB
from ranks import run_ranks
from records import record, samples
from tolerance import rounding
from transformers import GPTNeoXForCausalLM

from megamix.data.blend.blend import Blend
from megamix.data.loader import IGNORED_LABEL, Batch, Loader, WindowReader
from megamix.data.sampler import Sampler, Slice
from megamix.data.tokens.manifest import Manifest
from megamix.data.tokens.stream import DomainTokens
from megamix.engines.config import TrainConfig
from megamix.engines.models.config import ModelConfig
from megamix.engines.models.layers import Decoder, Embedding, Head, hugging_face_config
from megamix.interop.evaluation.evaluate import evaluate
from megamix_kernels import DomainSums

SEQ = 16
VOCAB = 100
EOD = 0


def write(prefix: Path, documents: list[list[list[int]]]) -> Path:
    """A .bin / .idx pair of documents that are cut into sequences, as Megatron's sentence splitting writes them."""
    lengths = [len(sequence) for document in documents for sequence in document]
    ends = np.cumsum([0, *lengths])
    bounds = np.cumsum([0, *[len(document) for document in documents]])
    tokens = [token for document in documents for sequence in document for token in sequence]
    Path(f"{prefix}.bin").write_bytes(np.array(tokens, "<u2").tobytes())
    Path(f"{prefix}.idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(bounds))
        + np.array(lengths, "<i4").tobytes()
        + (2 * ends[:-1]).astype("<i8").tobytes()
        + bounds.astype("<i8").tobytes()
    )
    return prefix


def random_documents(rng: np.random.Generator, number: int, *, eod: bool) -> list[list[list[int]]]:
    """Documents of 1 to 30 tokens in one to three sequences; with ``eod``, EOD is the last token and no other.

    Without, ids say nothing about where documents end (EOD comes anywhere), and some documents are empty.
    """
    documents = []
    for _ in range(number):
        tokens = rng.integers(1 if eod else 0, VOCAB, rng.integers(0, 30)).tolist() + ([EOD] if eod else [])
        cuts = sorted(rng.integers(0, len(tokens) + 1, rng.integers(0, 3)).tolist())
        documents.append([tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)])
    return documents


def flags(documents: list[list[list[int]]]) -> list[bool]:
    """Whether each token is the first of its document, document by document."""
    lengths = [sum(map(len, document)) for document in documents]
    return [index == 0 for length in lengths for index in range(length)]


def test_starts_are_those_of_the_index(tmp_path: Path) -> None:
    """Of four files (one empty, one of a single token) and of ranges of their documents, at three window lengths: the
    shortest never holds a whole document, the longest spans all files. Ids, cuts and empty documents do not matter."""
    rng = np.random.default_rng(3)
    files = [random_documents(rng, number, eod=False) for number in (60, 0, 40)]
    files.insert(2, [[[], []], [[7]], []])
    prefixes = [write(tmp_path / str(number), documents) for number, documents in enumerate(files)]
    for ranges in ([(0, len(file)) for file in files], [(3, 50), (0, 0), (0, 1), (5, 40)]):
        domain = DomainTokens("web", prefixes, ranges=ranges)
        wanted = [flag for file, (first, end) in zip(files, ranges, strict=True) for flag in flags(file[first:end])]
        assert len(wanted) == domain.num_tokens
        for seq_length in (4, 64, domain.num_tokens - 1):
            index_n = rng.permutation(domain.num_windows(seq_length))
            row_m, token_m = domain.document_starts(index_n, seq_length)
            seen = np.zeros((index_n.size, seq_length + 1), int)
            np.add.at(seen, (row_m, token_m), 1)
            for row, index in enumerate(index_n.tolist()):
                assert seen[row].tolist() == wanted[index * seq_length : (index + 1) * seq_length + 1]
    assert [part.size for part in domain.document_starts(np.empty(0, np.int64), 4)] == [0, 0]


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[DomainTokens]:
    """Three domains, the last of two files, in which EOD is the last token of every document and nowhere else."""
    folder, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(5)
    found = []
    for name, files in (("web", [90]), ("code", [40]), ("mail", [10, 25])):
        prefixes = [
            write(folder / f"{name}{number}", random_documents(rng, documents, eod=True))
            for number, documents in enumerate(files)
        ]
        found.append(DomainTokens(name, prefixes))
    return found


def batches(domains: list[DomainTokens], steps: int, data_size: int, mask: bool, reset: bool) -> list[list[Batch]]:
    """The batches of every data-parallel rank."""
    result = []
    for rank in range(data_size):
        blend = Blend([domain.num_windows(SEQ) for domain in domains], [0.5, 0.2, 0.3], seed=1)
        reader = WindowReader(domains, SEQ, VOCAB, eod_mask_loss=mask, reset_position_ids=reset)
        loader = Loader(Sampler(blend, Slice(12, 2, rank, data_size)), reader, pin_memory=False)
        for _ in range(steps):
            loader.request()
        found = [loader.get()[0] for _ in range(steps)]
        result.append([batch for batch in found if batch is not None])
        loader.close()
    return result


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_labels_and_positions(domains: list[DomainTokens], mask: bool, reset: bool) -> None:
    """Against a walk over every row's token ids; each rank's counts per domain are those of what all
    ranks read."""
    masked = 0
    for per_rank in zip(*batches(domains, 6, 2, mask, reset), strict=True):
        counted = [0, 0, 0]
        for batch in per_rank:
            assert batch.samples is not None
            assert (batch.positions is None) == (not reset)
            for at in np.ndindex(batch.samples.domain.shape):
                number, sample = int(batch.samples.domain[at]), int(batch.samples.sample[at])
                domain = domains[number]
                window = domain.read(sample * SEQ, SEQ + 1).tolist()
                positions, labels, position = [], [], 0
                for token, label in itertools.pairwise(window):
                    positions.append(position)
                    labels.append(IGNORED_LABEL if mask and token == EOD else label)
                    position = 0 if token == EOD else position + 1
                assert batch.tokens[at].tolist() == window[:-1]
                assert batch.labels[at].tolist() == labels
                if batch.positions is not None:
                    assert batch.positions.dtype == torch.int64
                    assert batch.positions[at].tolist() == positions
                counted[number] += sum(label != IGNORED_LABEL for label in labels)
        assert [batch.domain_tokens.tolist() for batch in per_rank] == [counted, counted]
        masked += 12 * SEQ - sum(counted)
    assert (masked > 0) == mask


def test_masks_and_positions_are_megatrons(domains: list[DomainTokens]) -> None:
    gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    for batch in batches(domains, 4, 1, True, True)[0]:
        assert batch.positions is not None
        rows = [tensor.flatten(0, 1) for tensor in (batch.tokens, batch.labels, batch.positions)]
        for tokens, labels, positions in zip(*rows, strict=True):
            _, loss_mask, position_ids = gpt_dataset._get_ltor_masks_and_position_ids(
                tokens, EOD, True, False, True, False
            )
            torch.testing.assert_close((labels != IGNORED_LABEL).float(), loss_mask)
            torch.testing.assert_close(positions, position_ids)


def test_a_batch_moves_with_its_positions(domains: list[DomainTokens]) -> None:
    moved = batches(domains, 1, 1, True, True)[0][0].to(torch.device("meta"))
    assert moved.positions is not None
    tensors = (moved.tokens, moved.labels, moved.domains, moved.positions)
    assert {str(tensor.device) for tensor in tensors} == {"meta"}
    assert moved.samples is not None


LAYOUTS = {
    "data": {"data": 2},
    "stages": {"pipeline": 2},
    "recomputed": {"pipeline": 2, "activation_checkpointing": True},
}
# Initial weights large enough for attention to matter to the loss.
MODEL = ModelConfig(
    architecture="neox", hidden_size=32, num_layers=3, num_heads=2, ffn_size=48, vocab_size=VOCAB, init_std=0.3
)
TRAIN = TrainConfig(steps=2, global_batch=4, micro_batch=1, lr=0.01)


def random_batch(with_positions: bool, data_rank: int, data_size: int) -> Batch:
    """A rank's part of 4 samples in micro-batches of 1, of documents of 3 to 15 tokens."""
    rng = np.random.default_rng(8)
    tokens = torch.from_numpy(rng.integers(0, VOCAB, (4, 1, SEQ)))
    labels = torch.from_numpy(rng.integers(0, VOCAB, (4, 1, SEQ)))
    labels[torch.from_numpy(rng.random(labels.shape) < 0.2)] = IGNORED_LABEL
    positions = torch.arange(SEQ).repeat(4, 1, 1) % torch.from_numpy(rng.integers(3, SEQ, (4, 1, 1)))
    mine = slice(data_rank * 4 // data_size, (data_rank + 1) * 4 // data_size)
    domains = torch.from_numpy(rng.integers(0, 2, tokens.shape)).int()
    counted = torch.bincount(domains[labels != IGNORED_LABEL], minlength=2).numpy()
    chosen = positions[mine] if with_positions else None
    return Batch(tokens[mine], labels[mine], domains[mine], counted, chosen)


# Positions count in the sample; in documents; and attention stays within these, too.
KINDS = ("sample", "positions", "documents")


def engine_job(result: str) -> None:
    """One of two ranks: each layout, with each kind of attention, is evaluated, takes two steps and is evaluated."""
    import torch.distributed as dist

    from megamix.engines.config import DeepSpeedConfig
    from megamix.engines.deepspeed.engine import DeepSpeedEngine, start_distributed
    from megamix.engines.step_loss import Objective

    torch.set_num_threads(1)
    start_distributed()
    nats = {}
    for (name, layout), kind in itertools.product(LAYOUTS.items(), KINDS):
        engine = DeepSpeedEngine(
            DeepSpeedConfig(**layout),
            MODEL,
            TRAIN,
            seq_length=SEQ,
            num_domains=2,
            vocab_size=VOCAB,
            loss_implementation="torch",
            within_documents=kind == "documents",
        )
        batch = random_batch(kind != "sample", engine.place.data_rank, engine.place.data_size)
        found = []
        for step in range(4):
            if step in (1, 2):
                engine.train_step(
                    batch, Objective(float(batch.num_tokens)), TRAIN.lr, lambda sums, to=found: to.append(sums.clone())
                )
            else:
                found.append(engine.evaluate(batch, len(batch.tokens)).clone())
        total = torch.stack(found)
        dist.all_reduce(total)
        nats[name, kind] = torch.stack([DomainSums.from_buffer(part).nats for part in total])
    if dist.get_rank() == 0:
        torch.save(nats, result)
    dist.destroy_process_group()


def test_positions_pass_from_stage_to_stage(tmp_path: Path) -> None:
    """The loss per domain before, in and after two optimizer steps is the same in every layout; before them it is that
    of transformers' own model with these position ids, or of one document at a time; and these matter to it."""
    run_ranks(Path(__file__), 2, tmp_path / "nats.pt", cwd=tmp_path)
    nats = torch.load(tmp_path / "nats.pt")
    for kind in KINDS:
        whole = nats["data", kind]
        assert whole.shape == (4, 2)
        assert whole[3].sum() < whole[0].sum() - 1
        for name in ("stages", "recomputed"):
            # Sums over some 26 tokens; an embedding, three layers and a head.
            tolerance = rounding(terms=4 * SEQ, layers=5, steps=2, mean_of=26)
            torch.testing.assert_close(nats[name, kind], whole, rtol=tolerance, atol=0)
        wanted = reference_nats(random_batch(kind != "sample", 0, 1), kind)
        torch.testing.assert_close(whole[0], wanted, rtol=rounding(terms=48, layers=5), atol=0)
    for kind, other in itertools.combinations(KINDS, 2):
        assert (nats["data", kind] / nats["data", other] - 1).abs().min() > 1e-4, (kind, other)


def reference_nats(batch: Batch, kind: str) -> torch.Tensor:
    """float64 [2]: the loss of the initial model summed over the counted labels of each domain, by transformers."""
    layers = [
        Embedding(MODEL, 0, TRAIN.seed),
        *[Decoder(MODEL, number, TRAIN.seed, SEQ) for number in (1, 2, 3)],
        Head(MODEL, 4, TRAIN.seed),
    ]
    upstream: Any = hugging_face_config(MODEL, SEQ)
    model = GPTNeoXForCausalLM(upstream).double()
    names = [(layer.hugging_face_names(), dict(layer.named_parameters())) for layer in layers]
    model.load_state_dict({names[name]: value for names, values in names for name, value in values.items()})
    tokens, labels, domains = (part.flatten(0, 1) for part in (batch.tokens, batch.labels, batch.domains))
    positions = None if batch.positions is None else batch.positions.flatten(0, 1)
    # Without a mask of its own transformers takes positions that begin again for packed samples and parts them.
    logits = model(tokens, attention_mask=torch.ones_like(tokens), position_ids=positions).logits
    if kind == "documents":
        assert positions is not None
        lengths = [(row == 0).nonzero().flatten().diff(append=torch.tensor([SEQ])).tolist() for row in positions]
        parts = [part for row, length in zip(tokens, lengths, strict=True) for part in row.split(length)]
        logits = torch.cat([model(part[None]).logits[0] for part in parts]).view_as(logits)
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").detach()
    return torch.stack([loss[domains == domain].sum() for domain in (0, 1)])


@pytest.fixture
def short_documents(tmp_path: Path) -> Path:
    """A prepared data set of two domains, whose documents are single lines of Python and of prose."""
    from megamix.prepare.pipeline import prepare

    prose = (STDLIB / "pydoc_data" / "topics.py").read_text(encoding="utf-8").splitlines()[:3000]
    code = [line for path in sorted(STDLIB.glob("*.py"))[:8] for line in path.read_text(encoding="utf-8").splitlines()]
    text = tmp_path / "text"
    text.mkdir()
    for name, documents in (("prose", prose), ("code", code)):
        lines = [json.dumps({"text": document}) + "\n" for document in documents if document.strip()]
        (text / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    prepare([str(text)], tmp_path / "data", tokenizer="train:512", validation_fraction=0.1, workers=1, progress=False)
    return tmp_path / "data"


def test_options_of_a_run(
    tiny_config: Callable[..., Path], short_documents: Path, megamix: Callable[..., object], tmp_path: Path
) -> None:
    """Attention within documents and a mask on two stages, then only the mask on one: every step counts exactly the
    labels that do not follow an end of document; attention changes the losses of training and of validation, and these
    are what `megamix evaluate` finds."""
    config = tiny_config(
        data={"manifest": str(short_documents), "seq_length": 32, "eod_mask_loss": True},
        model={"init_std": 0.3},
        mixer={"name": "static"},
        train={"steps": 3},
        evaluate={"every": 0, "batches": 4},
    )
    both, mask = tmp_path / "both", tmp_path / "mask"
    megamix("train", config, f"run_dir={both}", "data.attention=document", "engine.pipeline=2")
    megamix("train", config, f"run_dir={mask}")
    manifest = Manifest.load(short_documents)
    streams = [manifest.open_domain(name) for name in manifest.domain_names]
    counts = []
    for pairs in samples(mask).values():
        inputs = [streams[domain].window(sample, 32)[:-1] for domain, sample in pairs]
        counts.append(sum(int((tokens != manifest.tokenizer.eod_id).sum()) for tokens in inputs))
    assert max(counts) < 8 * 32
    for run in (both, mask):
        metrics = [line for line in record(run)[0] if line["event"] == "train"]
        assert [sum(line["domain_tokens"].values()) for line in metrics] == counts
    for line, twin in zip(record(both)[0], record(mask)[0], strict=True):
        for name, loss in line["domain_loss"].items():
            assert abs(loss - twin["domain_loss"][name]) > 1e-3
    assert evaluate(both).line["domain_loss"] == pytest.approx(record(both)[0][-1]["domain_loss"], abs=2e-5)


if __name__ == "__main__":
    engine_job(sys.argv[1])
