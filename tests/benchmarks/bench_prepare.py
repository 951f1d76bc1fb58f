"""`megamix prepare` beside Megatron-LM's own preprocessing, same tokenizer, text and number of workers.

    python tests/benchmarks/bench_prepare.py                          # text of the installed Python packages, 100 MB
    python tests/benchmarks/bench_prepare.py --workers 8 --text a.jsonl b.jsonl.zst --megabytes 500

The other side is written after ``tools/preprocess_data.py`` of Megatron-LM (``Encoder.encode``, ``Partition.
process_json_file``) with ``--append-eod``: a `multiprocessing.Pool` whose ``imap`` hands out lines 32 at a time, a
worker that parses a line and tokenises its text, and `IndexedDatasetBuilder.add_document` for each in the parent. What
differs: no sentence splitting (its default), no ``--partitions`` (one pool, as by default), and the tokenizer is opened
without Megatron's global arguments, in two variants: ``transformers``, which is what its HuggingFaceTokenizer calls,
and ``tokenizers`` without that layer.

Also measured: how fast the parent of `prepare` alone takes in results, with no tokenising behind them, which bounds the
number of workers that it can keep busy. Times are from the call to the finished files, worker start-up included.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import pickle
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from megamix.data.tokens.indexed import IndexedTokens, pick_dtype
from megamix.data.tokens.tokenizer import END_OF_DOCUMENT, LoadedTokenizer, train_tokenizer
from megamix.prepare.encoders import EncodeJob, Encoders
from megamix.prepare.pieces import iter_documents
from megamix.prepare.pipeline import prepare


def own_text() -> Iterator[str]:
    """Sources and descriptions of the installed packages and of the standard library."""
    for folder in (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"]):
        for pattern in ("*.dist-info/METADATA", "**/*.py", "**/*.md"):
            for path in sorted(Path(folder).glob(pattern)):
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                if text.strip():
                    yield text


def build_corpus(files: Sequence[str], num_bytes: int, out: Path) -> int:
    """Writes documents as JSON lines, all over again where there are too few. Returns the bytes of their text."""
    found: list[tuple[str, int]] = []
    size = 0
    for text in (text for file in files for text in iter_documents(file)) if files else own_text():
        found.append((json.dumps({"text": text}, ensure_ascii=False) + "\n", len(text.encode("utf-8"))))
        size += found[-1][1]
        if size >= num_bytes:
            break
    written = 0
    with open(out, "w", encoding="utf-8") as file:
        while written < num_bytes:
            for line, text_bytes in found:
                file.write(line)
                written += text_bytes
    return written


# Megatron-LM's recipe. -----------------------------------------------------------------------------------------------

_encode: Callable[[str], list[int]]
_eod: int


def start_worker(path: str, layer: str) -> None:
    global _encode, _eod
    if layer == "transformers":
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_file=path, eos_token=END_OF_DOCUMENT)
        _encode, _eod = lambda text: fast(text).input_ids, fast.get_vocab()[END_OF_DOCUMENT]
    else:
        from tokenizers import Tokenizer

        raw = Tokenizer.from_file(path)
        _encode, _eod = lambda text: raw.encode(text).ids, raw.get_vocab()[END_OF_DOCUMENT]


def encode_line(line: str) -> tuple[list[int], list[int], int]:
    ids = list(_encode(json.loads(line)["text"]))
    lengths = [len(ids)] if ids else []
    if ids:
        ids.append(_eod)
        lengths[-1] += 1
    return ids, lengths, len(line)


def recipe(corpus: Path, out: Path, tokenizer: Path, workers: int, layer: str) -> int:
    with warnings.catch_warnings(action="ignore"):
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    dtype = pick_dtype(LoadedTokenizer(tokenizer).vocab_size).type
    builder = IndexedDatasetBuilder(str(out) + ".bin", dtype=dtype)
    with (
        open(corpus, encoding="utf-8") as lines,
        multiprocessing.Pool(workers, initializer=start_worker, initargs=(str(tokenizer), layer)) as pool,
    ):
        for ids, lengths, _ in pool.imap(encode_line, lines, 32):
            builder.add_document(ids, lengths)  # pyright: ignore[reportArgumentType] - upstream passes a list, too
    builder.finalize(str(out) + ".idx")
    return IndexedTokens(out).num_tokens


# megamix. ------------------------------------------------------------------------------------------------------------


def ours(corpus: Path, out: Path, tokenizer: Path, workers: int) -> int:
    manifest = prepare([f"text={corpus}"], out, tokenizer=str(tokenizer), workers=workers, progress=False)
    assert manifest is not None
    (domain,) = manifest.domains
    return domain.train.tokens + domain.validation.tokens


def parent_alone(corpus: Path, out: Path, tokenizer: Path) -> tuple[float, float]:
    """Seconds and bytes of text that the parent takes to unpickle and write results that are there already."""
    made: list[tuple[bytes, int]] = []
    encode = Encoders.encode

    def keep(self: Encoders, job: EncodeJob, blocks: Any) -> Iterator[Any]:
        for encoded in encode(self, job, blocks):
            made.append((pickle.dumps(encoded), encoded.text_bytes))
            yield encoded

    def replay(self: Encoders, job: EncodeJob, blocks: Any) -> Iterator[Any]:
        for number in range(400):
            yield replace(pickle.loads(made[number % len(made)][0]), position=(0, number))

    options = {"tokenizer": str(tokenizer), "workers": 1, "progress": False}
    try:
        Encoders.encode = keep
        prepare([f"text={corpus}"], out / "once", **options)
        Encoders.encode = replay
        begun = time.perf_counter()
        prepare([f"text={corpus}"], out / "again", **options)
        seconds = time.perf_counter() - begun
    finally:
        Encoders.encode = encode
    return seconds, sum(made[number % len(made)][1] for number in range(400))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", nargs="*", default=[], help="files as megamix prepare reads them")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; default: 32000 entries, trained on the text")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "text.jsonl"
        num_bytes = build_corpus(given.text, int(given.megabytes * 1e6), corpus)
        tokenizer = given.tokenizer or folder / "tokenizer.json"
        if given.tokenizer is None:
            texts = (text for number, text in enumerate(iter_documents(corpus)) if number % 10 == 0)
            tokenizer.write_bytes(train_tokenizer(texts, 32000))
        print(f"{num_bytes / 1e6:.1f} MB of text, {given.workers} workers, {given.repeats} times in turn", flush=True)
        sides: dict[str, Callable[[Path], int]] = {
            "megamix prepare": lambda out: ours(corpus, out, tokenizer, given.workers),
            **{
                f"recipe, {layer}": functools.partial(
                    lambda out, layer: recipe(corpus, out, tokenizer, given.workers, layer), layer=layer
                )
                for layer in ("transformers", "tokenizers")
            },
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        tokens: dict[str, int] = {}
        for repeat in range(given.repeats):
            for number, (side, run) in enumerate(sides.items()):
                begun = time.perf_counter()
                tokens[side] = run(folder / f"{repeat}-{number}")
                seconds[side].append(time.perf_counter() - begun)
                print(f"  {side}: {seconds[side][-1]:.1f} s", file=sys.stderr, flush=True)
        if len(set(tokens.values())) > 1:
            sys.exit(f"the sides made different numbers of tokens: {tokens}")
        ours_s = statistics.median(seconds["megamix prepare"])
        print(f"{'':24}{'MB/s':>8}{'tokens/s':>12}{'megamix is':>12}")
        for side, times in seconds.items():
            median = statistics.median(times)
            rates = f"{num_bytes / median / 1e6:8.2f}{tokens[side] / median:12,.0f}"
            print(f"{side:24}{rates}{median / ours_s:11.2f}x")
        taken, text_bytes = parent_alone(corpus, folder / "parent", tokenizer)
        print(f"the parent alone: {text_bytes / taken / 1e6:.0f} MB/s of text")


if __name__ == "__main__":
    main()
