"""Text to token files: ``prepare`` writes ``OUT/<domain>/{train,validation}.{bin,idx}`` and ``OUT/manifest.json``.

    files -> blocks of lines (this process) -> tokens (worker processes) -> split, two writers (this process)

Blocks come back in the order they were sent, so the files do not depend on the number of workers. A finished domain
leaves ``OUT/<domain>/prepare.json``, which says what it was made from; a later call keeps what was made from the same.
The manifest comes last, and goes before anything it names is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from megamix.data.documents import TEXT_KEY, find_inputs, read_blocks, sample_texts
from megamix.data.indexed import IndexedTokens, IndexedWriter, pick_dtype
from megamix.data.manifest import (
    FILE_NAME,
    DomainEntry,
    Manifest,
    SplitEntry,
    TokenizerEntry,
    ValidationEntry,
)
from megamix.data.records import (
    DomainRecord,
    PrepareSettings,
    TokenizerRecord,
    input_files,
    read_record,
    write_record,
)
from megamix.data.tokenizer import (
    Encoded,
    EncodeJob,
    Encoders,
    LoadedTokenizer,
    TokenizerSpec,
    fetch_tokenizer,
    train_tokenizer,
)
from megamix.errors import InputError
from megamix.files import replace_file
from megamix.log import get_logger

TOKENIZER_FILE = "tokenizer.json"
RECORD_FILE = "prepare.json"
_TRAINING_BYTES = 4 << 20  # text of each domain that a tokenizer is trained on
_LOG_EVERY_S = 30.0
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR}


def prepare(
    inputs: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str = "train:4096",
    validation_fraction: float = 0.02,
    workers: int | None = None,
    seed: int = 1234,
    text_key: str = TEXT_KEY,
    eod: str | None = None,
    progress: bool = True,
) -> Manifest:
    """Tokenises text into one pair of token files per domain and split. Call it again to go on after any interruption.

    Args:
        inputs: See `find_inputs`.
        out: Output folder. The bytes of everything in it depend on the inputs and options, not on ``workers``.
        tokenizer: ``train:SIZE`` (trained on up to 4 MiB of each domain), the path of a tokenizer.json, or ``hf:NAME``.
        validation_fraction: Share of the documents of each domain to hold out, 0 to 0.5. Every domain has at least one
            document in each split; at 0 exactly one is held out.
        workers: Tokenising processes; None for one per core, 1 to work inside this process (on as many threads
            as `tokenizers` takes).
        seed: Chooses the documents that are held out.
        text_key: The key of the text in a JSON line.
        eod: The tokenizer's end-of-document token, where it has an unusual name.
        progress: Show rate and remaining time: a bar on a terminal, else log lines.

    Returns:
        The manifest, as written.

    Raises:
        InputError: A bad option, damaged input, a domain with fewer than two documents, or an output folder that cannot
            be written or that another `prepare` is writing to.
        RankFailed: A worker process died.
    """
    spec = _check_options(tokenizer, validation_fraction, workers)
    domains = find_inputs(inputs)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _sole_writer(out):
            loaded = _provide_tokenizer(spec, domains, out, text_key, eod)
            settings = PrepareSettings(
                seed=seed,
                validation_fraction=validation_fraction,
                text_key=text_key,
                tokenizer_sha256=loaded.sha256,
                eod_id=loaded.eod_id,
                dtype=pick_dtype(loaded.vocab_size).name,
            )
            entries = _prepare_domains(domains, out, settings, loaded.vocab_size, workers or _num_cores(), progress)
            manifest = Manifest.build(
                out,
                tokenizer=TokenizerEntry(
                    file=TOKENIZER_FILE, sha256=loaded.sha256, vocab_size=loaded.vocab_size, eod_id=loaded.eod_id
                ),
                dtype=settings.dtype,
                validation_fraction=validation_fraction,
                domains=entries,
            )
            manifest.save()
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise InputError(
            f"cannot write to {out}: {error.strerror} ({error.filename or 'while writing'}). Make room, or choose"
            " another output folder; finished domains are kept."
        ) from error
    return manifest


def _check_options(tokenizer: str, validation_fraction: float, workers: int | None) -> TokenizerSpec:
    if not 0 <= validation_fraction <= 0.5:
        raise InputError(f"validation fraction {validation_fraction}: expected 0 to 0.5, for example 0.02.")
    if workers is not None and workers < 1:
        raise InputError(f"workers {workers}: expected at least 1, or none given for one per core.")
    return TokenizerSpec.parse(tokenizer)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """Keeps a second `prepare` out of the folder; the lock goes with the process, however that ends."""
    with open(out / ".prepare.lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another prepare is writing to {out}. Wait for it, or choose another folder.") from error
        except OSError:  # a file system without locks
            get_logger().info("%s cannot be locked: see that only one prepare writes to it", out)
        yield


# The tokenizer. ------------------------------------------------------------------------------------------------------


def _provide_tokenizer(
    spec: TokenizerSpec, domains: Mapping[str, Sequence[Path]], out: Path, text_key: str, eod: str | None
) -> LoadedTokenizer:
    """Sees that ``out/tokenizer.json`` is the one asked for, made no more than once, and opens it."""
    path, record_path = out / TOKENIZER_FILE, out / RECORD_FILE
    if spec.kind == "file":
        given = LoadedTokenizer(spec.path, eod)
        _put_tokenizer(path, Path(spec.path).read_bytes())
        return LoadedTokenizer(path, given.eod_id)
    inputs = tuple(map(input_files, domains.values())) if spec.kind == "train" else ()
    made_from = {"spec": repr(spec), "eod": eod, "text_key": text_key, "inputs": inputs}
    record = read_record(TokenizerRecord, record_path)
    if record is not None and path.is_file():
        same = all(getattr(record, key) == value for key, value in made_from.items())
        if same and hashlib.sha256(path.read_bytes()).hexdigest() == record.sha256:
            return LoadedTokenizer(path, record.eod_id)
    name: str | None = None
    if spec.kind == "train":
        get_logger().info("training a tokenizer of %d entries on %d domains", spec.vocab_size, len(domains))
        texts = (
            text
            for paths in domains.values()
            for text in sample_texts(paths, num_bytes=_TRAINING_BYTES, text_key=text_key)
        )
        data = train_tokenizer(texts, spec.vocab_size)
    else:
        data, name = fetch_tokenizer(spec.path)
    _put_tokenizer(path, data)
    loaded = LoadedTokenizer(path, eod if eod is not None else name)
    write_record(TokenizerRecord(**made_from, sha256=loaded.sha256, eod_id=loaded.eod_id), record_path)
    return loaded


def _put_tokenizer(path: Path, data: bytes) -> None:
    if not path.is_file() or path.read_bytes() != data:
        (path.parent / FILE_NAME).unlink(missing_ok=True)
        replace_file(path, data)


# Domains. ------------------------------------------------------------------------------------------------------------


def _prepare_domains(
    domains: Mapping[str, Sequence[Path]],
    out: Path,
    settings: PrepareSettings,
    vocab_size: int,
    num_workers: int,
    progress: bool,
) -> list[DomainEntry]:
    entries: list[DomainEntry] = []
    job = EncodeJob(
        str(out / TOKENIZER_FILE), settings.tokenizer_sha256, settings.eod_id, settings.dtype, settings.text_key
    )
    sizes = {name: sum(path.stat().st_size for path in paths) for name, paths in domains.items()}
    with Encoders(num_workers, job) as encoders, _Progress(sizes, progress) as shown:
        for name, paths in domains.items():
            inputs = input_files(paths)
            record_path = out / name / RECORD_FILE
            record = read_record(DomainRecord, record_path)
            if record and (record.settings, record.inputs) == (settings, inputs) and _intact(out, record.entry):
                entries.append(record.entry)
                shown.finish(name, "unchanged, kept")
                continue
            (out / FILE_NAME).unlink(missing_ok=True)
            record_path.parent.mkdir(exist_ok=True)
            record_path.unlink(missing_ok=True)
            entry = _write_domain(name, paths, out, settings, vocab_size, encoders, shown)
            write_record(DomainRecord(settings=settings, inputs=inputs, entry=entry), record_path)
            entries.append(entry)
            shown.finish(name, f"{entry.train.tokens:,} + {entry.validation.tokens:,} tokens")
    return entries


def _intact(out: Path, entry: DomainEntry) -> bool:
    """Whether the files of a finished domain are still there, with the sizes they had."""
    try:
        return all(
            IndexedTokens(out / prefix, verify=False).num_tokens == split.tokens
            for split in (entry.train, entry.validation)
            for prefix in split.prefixes
        )
    except InputError:
        return False


def _write_domain(
    name: str,
    paths: Sequence[Path],
    out: Path,
    settings: PrepareSettings,
    vocab_size: int,
    encoders: Encoders,
    shown: _Progress,
) -> DomainEntry:
    held_out = HeldOut(name, settings.seed, settings.validation_fraction)
    while True:
        shown.begin(name)
        with (
            _SplitWriter(out, f"{name}/train", settings.dtype, vocab_size) as train,
            _SplitWriter(out, f"{name}/validation", settings.dtype, vocab_size) as validation,
        ):
            for encoded in encoders.encode(block for path in paths for block in read_blocks(path)):
                mask = held_out.take(len(encoded.lengths))
                train.add(encoded, ~mask)
                validation.add(encoded, mask)
                shown.advance(name, encoded.file_bytes)
            if held_out.balanced():
                return DomainEntry(
                    name=name,
                    train=train.close(),
                    validation=ValidationEntry(
                        **dict(validation.close()), unigram_nats=unigram_nats(train.counts, validation.counts)
                    ),
                )


class HeldOut:
    """Decides document by document, in order, which go to validation: a keyed hash of the number, nothing else.

    Where that would leave a split of the whole domain empty, the document nearest to the limit changes sides; this is
    known at the end only, so the (small) domain is then gone through a second time.
    """

    def __init__(self, name: str, seed: int, fraction: float) -> None:
        self._name = name
        self._key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
        self._limit = np.uint64(fraction * 2.0**64)
        # With a fraction of 0 no hash is below the limit, and a second pass over a large domain would be a waste.
        self._forced: dict[int, bool] = {0: True} if fraction == 0 else {}
        self._reset()

    def _reset(self) -> None:
        self._num_documents = self._num_held_out = 0
        self._lowest, self._highest = (2**64, -1), (-1, -1)  # (hash, document)

    def take(self, num: int) -> np.ndarray:
        """Whether each of the next ``num`` documents is held out, bool [num]."""
        first = self._num_documents
        hashes = _mix(self._key, first, num)
        mask = hashes < self._limit
        for document, side in self._forced.items():
            if first <= document < first + num:
                mask[document - first] = side
        if num:
            low, high = int(hashes.argmin()), int(hashes.argmax())
            self._lowest = min(self._lowest, (int(hashes[low]), first + low))
            self._highest = max(self._highest, (int(hashes[high]), first + high))
        self._num_documents += num
        self._num_held_out += int(mask.sum())
        return mask

    def balanced(self) -> bool:
        """To ask after the last document: True where both splits have one. Otherwise a second pass will have.

        Raises:
            InputError: The domain has fewer than two documents.
        """
        if self._num_documents < 2:
            raise InputError(
                f"domain '{self._name}' has {self._num_documents} non-empty documents, expected at least 2: one to"
                " train on, one to validate with. Split its text: one document a line of .jsonl, or more .txt files."
            )
        if 0 < self._num_held_out < self._num_documents:
            return True
        self._forced = {self._highest[1]: False} if self._num_held_out else {self._lowest[1]: True}
        self._reset()
        return False


def _mix(key: int, first: int, num: int) -> np.ndarray:
    """Hashes of the documents from ``first`` on, uint64 [num]: splitmix64 (Steele et al. 2014) started at ``key``."""
    z = np.arange(first + 1, first + num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class _SplitWriter:
    """One split of a domain: its token files and its token counts. Nothing appears unless it is closed."""

    def __init__(self, out: Path, prefix: str, dtype: str, vocab_size: int) -> None:
        self._prefix = prefix
        self._writer = IndexedWriter(out / prefix, dtype)
        self.counts = np.zeros(vocab_size, dtype=np.int64)

    def add(self, encoded: Encoded, mask: np.ndarray) -> None:
        """Appends the documents that ``mask`` [documents] picks."""
        tokens = encoded.tokens[np.repeat(mask, encoded.lengths)]
        self._writer.add_documents(tokens, encoded.lengths[mask])
        self.counts += np.bincount(tokens, minlength=len(self.counts))

    def close(self) -> SplitEntry:
        """Puts the files in place."""
        written = self._writer.close()
        return SplitEntry(
            prefixes=(self._prefix,),
            tokens=written.tokens,
            documents=written.documents,
            max_token=written.max_token,
            sha256=(written.sha256,),
        )

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.abort()  # of no effect after close


def unigram_nats(train_counts_V: np.ndarray, validation_counts_V: np.ndarray) -> float:
    """Mean nats per validation token under token frequencies: add-one smoothed counts of the training tokens.

    Args:
        train_counts_V: Occurrences of each token in the training split, int64 [V].
        validation_counts_V: The same in the validation split, int64 [V].
    """
    log_probability_V = np.log(train_counts_V + 1.0) - np.log(float(train_counts_V.sum() + len(train_counts_V)))
    return float(-(validation_counts_V * log_probability_V).sum() / validation_counts_V.sum())


class _Progress:
    """How far the work is, in bytes of input: a bar on a terminal, else a log line per domain and every half minute."""

    def __init__(self, sizes: Mapping[str, int], enabled: bool) -> None:
        self._sizes, self._enabled = sizes, enabled
        self._num_finished = self._base = self._done = self._kept = 0
        self._start = self._spoke = time.monotonic()
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Bar(
            *columns, TimeRemainingColumn(), console=console, disable=not enabled or not console.is_terminal
        )
        self._task = self._bar.add_task("prepare", total=sum(sizes.values()))
        self._log = enabled and not console.is_terminal

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        """A domain begins, or begins again."""
        self._done = self._base
        self._bar.update(self._task, completed=self._done, description=name)

    def advance(self, name: str, num_bytes: int) -> None:
        """So many more bytes of the input are done."""
        self._done += num_bytes
        self._bar.update(self._task, completed=self._done)
        if self._log and time.monotonic() - self._spoke > _LOG_EVERY_S:
            self._say(f"{name}: {(self._done - self._base) / 1e6:.1f} of {self._sizes[name] / 1e6:.1f} MB")

    def finish(self, name: str, outcome: str) -> None:
        """A domain is done."""
        self._num_finished += 1
        if self._done == self._base:
            self._kept += self._sizes[name]
        self._base += self._sizes[name]
        self._done = self._base
        self._bar.update(self._task, completed=self._done)
        if self._log:
            self._say(f"{name}: {outcome}")

    def _say(self, what: str) -> None:
        self._spoke = time.monotonic()
        rate = (self._done - self._kept) / max(self._spoke - self._start, 1e-6)
        left = sum(self._sizes.values()) - self._done
        pace = f", {rate / 1e6:.1f} MB/s, about {left / rate:.0f} s left" if rate and left > 0 else ""
        get_logger().info("%s; %d of %d domains%s", what, self._num_finished, len(self._sizes), pace)
