"""The blend beside Megatron's in one process: a change of weights, the next batch, bytes, the time to a first batch.

    python -m pytest tests/benchmarks/bench_blend.py --benchmark-only

ends with a Markdown table of medians. It takes a minute, 3 GB of memory and 100 MB of disk, for Megatron's sake, and
needs megatron-core, which the dev extra has. The blend is that of the Pile's 22 domains.

A change of weights is, for us, `set_weights` and what it leaves to be done by the next `take`; for Megatron, the real
`BlendedDataset` built anew (over stand-ins for the 22 data sets, which it only asks for their length): that is what it
takes for its next sample to follow other weights. A batch is its domain and sample numbers, as arrays; ours are
shuffled within the domain already, Megatron's are not (its `GPTDataset` holds that order). Token files lie in the page
cache.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import struct
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamix.data import Blend
from megamix.data.blend.blend import Sampling
from megamix.data.blend.segment import Segment
from megamix.data.tokens.indexed import MAGIC
from megamix.data.tokens.stream import DomainTokens

blended = pytest.importorskip("megatron.core.datasets.blended_dataset", reason="megatron-core is in the dev extra")
builder = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_builder")
gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset")
megatron_utils = pytest.importorskip("megatron.core.datasets.utils")
logging.getLogger("megatron").setLevel(logging.ERROR)

# Token shares of the Pile under the tokenizer of GPT-NeoX.
PILE = np.array(
    [.1811, .1440, .1207, .1001, .0896, .0759, .0612, .0513, .0365, .0307, .0217,
     .0155, .0153, .0124, .0088, .0075, .0073, .0062, .0060, .0038, .0030, .0014]
)  # fmt: skip
NUM_FILES = 2500
SEQ = 128
VOCAB = 50_000
POSITIONS = {10**6: "10^6", 5 * 10**7: "5x10^7", 10**10: "10^10"}
NOTE = "not possible: 100 GB"  # int16 and int64 a sample

Table = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """{what: {who: median seconds, or bytes}}; printed when all is measured."""
    rows: Table = {}
    yield rows
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n\n| | megamix | Megatron | ratio |\n|---|---|---|---|")
        for what, of in rows.items():
            ours, theirs = of.get("megamix"), of.get("megatron", "")
            ratio = f"{theirs / ours:,.2g}" if isinstance(theirs, float) and isinstance(ours, float) else ""
            print(f"| {what} | {shown(what, ours)} | {shown(what, theirs)} | {ratio} |")


def shown(what: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")] if what.startswith("state") else []
    units = units or [(1, "s"), (1e-3, "ms"), (1e-6, "us")]
    scale, unit = next(((scale, unit) for scale, unit in units if value >= scale), units[-1])
    return f"{value / scale:.3g} {unit}"


def measured(
    table: Table,
    benchmark: Any,
    what: str,
    who: str,
    function: Callable[[Any], Any],
    setup: Callable[[], Any],
    rounds: int,
) -> None:
    """Calls ``function`` with what ``setup`` returns, and enters the median."""
    benchmark.group, benchmark.name = what, who
    benchmark.pedantic(function, setup=lambda: ((setup(),), {}), rounds=rounds, warmup_rounds=rounds // 10)
    if benchmark.stats is not None:  # with --benchmark-disable
        table.setdefault(what, {})[who] = float(benchmark.stats.stats.median)


def blend_at(position: int, sampling: Sampling = "low_discrepancy") -> Blend:
    """A blend that stands at ``position``, in a segment that began one batch before."""
    zeros = np.zeros(PILE.size)
    start = Segment(position - 480, PILE / PILE.sum(), zeros, zeros.astype(np.int64))
    blend = Blend.from_segment((PILE * 10**8).astype(np.int64), start, 1234, sampling=sampling)
    blend.take(480)
    return blend


def changed(number: int) -> np.ndarray:
    """The ``number``-th of a row of weights, each some percent from the Pile's."""
    return PILE * np.exp(0.1 * np.random.default_rng(number).standard_normal(PILE.size))


class Length:
    """What `BlendedDataset` asks of its data sets."""

    index_split = megatron_utils.Split.train
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012

    def __len__(self) -> int:
        return 10**12


def megatron_blend(weights: np.ndarray, size: int) -> Any:
    config = types.SimpleNamespace(path_to_cache=None, defer_npy_index_mmap=False, mid_level_dataset_surplus=0.005)
    return blended.BlendedDataset([Length() for _ in weights], weights.tolist(), size, config)


@pytest.mark.parametrize("position", POSITIONS)
def test_change_of_weights(table: Table, benchmark: Any, position: int) -> None:
    blend, numbers = blend_at(position), iter(range(10**6))

    def setup() -> np.ndarray:
        blend.take(480)
        blend.forget_before(blend.position)
        return changed(next(numbers))

    def change(weights: np.ndarray) -> None:
        blend.set_weights(weights)
        blend._order_of(blend.segment_at(blend.position))  # what would be left to the next take

    measured(table, benchmark, f"change of weights at {POSITIONS[position]} samples", "megamix", change, setup, 1000)


@pytest.mark.parametrize("position", list(POSITIONS)[:2])
def test_change_of_weights_megatron(table: Table, benchmark: Any, position: int) -> None:
    what, numbers = f"change of weights at {POSITIONS[position]} samples", iter(range(100))
    rounds = 5 if position <= 10**6 else 3
    measured(
        table, benchmark, what, "megatron",
        lambda weights: megatron_blend(weights, position), lambda: changed(next(numbers)), rounds,
    )  # fmt: skip
    table[f"change of weights at {POSITIONS[10**10]} samples"]["megatron"] = NOTE


@pytest.mark.parametrize("number", [480, 8192])
@pytest.mark.parametrize("after", ["", " after a change of weights"])
def test_next_batch(table: Table, benchmark: Any, number: int, after: str) -> None:
    blend, numbers = blend_at(5 * 10**7), iter(range(10**6))

    def setup() -> None:
        if after:
            blend.set_weights(changed(next(numbers)))
            blend._order_of(blend.segment_at(blend.position))
            blend.forget_before(blend.position)

    measured(table, benchmark, f"next batch of {number}{after}", "megamix", lambda _: blend.take(number), setup, 1000)


@pytest.mark.parametrize("number", [480, 8192])
@pytest.mark.parametrize("way", ["", ", sample by sample"])
def test_next_batch_megatron(table: Table, benchmark: Any, number: int, way: str) -> None:
    """Copied from the arrays at once; and as `BlendedDataset.__getitem__` reads them."""
    theirs, starts = megatron_blend(PILE, 10**6), iter(range(0, 10**6, 8192))

    def batch(start: int) -> Any:
        if not way:
            part = slice(start, start + number)
            return theirs.dataset_index[part].copy(), theirs.dataset_sample_index[part].copy()
        return [(theirs.dataset_index[idx], theirs.dataset_sample_index[idx]) for idx in range(start, start + number)]

    measured(table, benchmark, f"next batch of {number}{way}", "megatron", batch, lambda: next(starts), 100)
    if way:
        table[f"next batch of {number}{way}"]["megamix"] = table[f"next batch of {number}"].get("megamix")


def test_independent_draws(table: Table, benchmark: Any) -> None:
    blend = blend_at(5 * 10**7, "iid")
    what = "next batch of 480, drawn independently"
    measured(table, benchmark, what, "megamix", lambda _: blend.take(480), lambda: None, 1000)


def test_independent_draws_far_away(table: Table, benchmark: Any) -> None:
    """What lies beyond all that was read has to be counted up to."""
    what = "10^7 positions counted, drawn independently"
    measured(
        table, benchmark, what, "megamix",
        lambda blend: blend.counts_at(blend.position + 10**7), lambda: blend_at(10**6, "iid"), 10,
    )  # fmt: skip


def test_bytes_of_state(table: Table, benchmark: Any) -> None:
    """Ours holds one segment and, as JSON, goes into every checkpoint; the time is that of writing it."""
    blend = blend_at(10**10)
    blend.set_weights(changed(0))
    blend.take(480)
    blend.forget_before(blend.position)
    measured(
        table, benchmark, "writing the state", "megamix", lambda _: json.dumps(blend.state_dict()), lambda: None, 200
    )
    theirs = megatron_blend(PILE, 10**6)
    each = float(theirs.dataset_index.itemsize + theirs.dataset_sample_index.itemsize)
    table["state in memory, run of 5x10^7 samples"] = {
        "megamix": float(len(pickle.dumps(blend))), "megatron": each * 5 * 10**7,
    }  # fmt: skip
    table["state in a checkpoint"] = {
        "megamix": float(len(json.dumps(blend.state_dict()))), "megatron": "the number of samples read",
    }  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """[22] prefixes: 2,500 token files in all, shared out by weight, each of 16 documents and some 20,000 tokens."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    number = np.maximum(1, np.floor(PILE * NUM_FILES)).astype(int)
    number[0] += NUM_FILES - number.sum()
    domains = []
    for domain, many in enumerate(number.tolist()):
        domains.append([folder / f"{domain:02d}_{part:04d}" for part in range(many)])
        for prefix in domains[-1]:
            lengths = rng.integers(1000, 1500, 16)
            pointers = np.append(0, lengths.cumsum()[:-1]) * 2
            head = MAGIC + struct.pack("<QBQQ", 1, 8, lengths.size, lengths.size + 1)
            body = lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + np.arange(17).tobytes()
            Path(f"{prefix}.idx").write_bytes(head + body)
            rng.integers(0, VOCAB, lengths.sum(), np.uint16).tofile(f"{prefix}.bin")
    return domains


FIRST_BATCH = f"first 480 samples from {NUM_FILES:,} files"


def test_first_batch(table: Table, benchmark: Any, files: list[list[Path]]) -> None:
    """Every index is checked on the way."""

    def first(_: None) -> np.ndarray:
        streams = [DomainTokens(str(number), prefixes) for number, prefixes in enumerate(files)]
        blend = Blend([stream.num_windows(SEQ) for stream in streams], PILE, 1234)
        domain, sample = blend.take(480)
        return np.stack(
            [streams[one].window(index, SEQ) for one, index in zip(domain.tolist(), sample.tolist(), strict=True)]
        )

    assert first(None).shape == (480, SEQ + 1)
    measured(table, benchmark, FIRST_BATCH, "megamix", first, lambda: None, 5)


def test_first_batch_megatron(table: Table, benchmark: Any, files: list[list[Path]]) -> None:
    """A run of 10**5 samples; nothing of it cached by an earlier round."""
    paths = [str(prefix) for prefixes in files for prefix in prefixes]
    weights = [weight / len(prefixes) for weight, prefixes in zip(PILE.tolist(), files, strict=True) for _ in prefixes]
    tokenizer = types.SimpleNamespace(eod=0, pad=None, vocab_size=VOCAB, unique_identifiers={"class": "stand-in"})

    def setup() -> Any:
        shutil.rmtree(files[0][0].parent / "cache", ignore_errors=True)
        return gpt.GPTDatasetConfig(
            random_seed=1234, sequence_length=SEQ, reset_position_ids=False, reset_attention_mask=False,
            eod_mask_loss=False, create_attention_mask=False, tokenizer=tokenizer, mid_level_dataset_surplus=0.05,
            blend=(paths, weights), split="100,0,0",
        )  # fmt: skip

    def first(config: Any) -> Any:
        build = builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, [10**5, 0, 0], lambda: True, config).build
        train = build()[0]
        return [train[number]["tokens"] for number in range(480)]

    measured(table, benchmark, FIRST_BATCH, "megatron", first, setup, 2)
