"""Manifest for existing token files, without a copy of the tokens where their layout allows it.

    blend or NAME=PREFIX,...  ->  files by domain and split  ->  one pass: hashes, counts  ->  manifest.json

Files of other projects get an index, or are copied, before that (`megamix.interop.token_files`).

Validation data are the files of a blend's valid list, or by Megatron's ``--split`` a range of documents of every file.
Megatron cuts a file between sequences. Here the cut moves to the end of the document, so that no document is in two
splits. The test share of ``--split`` is not used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamix.core.errors import InputError
from megamix.core.files import replace_file, replace_json, writing
from megamix.core.text import Report, Table
from megamix.data.domain_names import check_domain_name
from megamix.data.tokens.indexed import IndexedTokens, bin_path
from megamix.data.tokens.manifest import (
    FILE_NAME,
    TOKENIZER_FILE,
    DomainEntry,
    Manifest,
    SplitEntry,
    TokenizerEntry,
    ValidationEntry,
)
from megamix.data.tokens.tokenizer import given_tokenizer
from megamix.interop.blend_files.scan import FileJob, FileScan, scan_files
from megamix.interop.token_files.sources import Sources
from megamix.interop.token_files.take_in import DocumentsEnd, take_in
from megamix.mixing.megatron_blend import DEFAULT_SPLIT, split_bounds, validation_share
from megamix.prepare.merge import unigram_nats

MIXTURE_FILE = "mixture.json"
_SAMPLED_DOCUMENTS = 100


@dataclass(frozen=True)
class Adopted:
    """Adopted data set.

    Attributes:
        weights: content of mixture.json: weights by domain, with sum 1.
        endings: by domain, (documents sampled, number of them that end with the end-of-document token).
        taken_in: what was done with files that are not Megatron's, in words.
    """

    manifest: Manifest
    weights: dict[str, float]
    endings: dict[str, tuple[int, int]]
    taken_in: str | None = None

    def report(self) -> Report:
        """Table of the domains, and the next command."""
        columns = ("domain", "files", "documents", "tokens", "weight", "validation documents", "validation tokens")
        rows = []
        for entry in self.manifest.domains:
            row = [entry.name, str(len({*entry.train.prefixes, *entry.validation.prefixes}))]
            row += [f"{entry.train.documents:,}", f"{entry.train.tokens:,}", f"{self.weights[entry.name]:.6g}"]
            rows.append([*row, f"{entry.validation.documents:,}", f"{entry.validation.tokens:,}"])
        folder, split = self.manifest.folder, self.manifest.split
        end = f"Validation is held out by --split {split}." if split else "Validation is the blend's valid list."
        notes = [f"{end} Train with data.manifest={folder} mixture.file={folder / MIXTURE_FILE}."]
        notes = [self.taken_in, *notes] if self.taken_in else notes
        for name, (looked, ended) in self.endings.items():
            if ended < looked:
                notes.append(
                    f"Domain '{name}': {looked - ended} of {looked} documents looked at do not end with token"
                    f" {self.manifest.tokenizer.eod_id}, the tokenizer's end of document. Was --append-eod left out, or"
                    " is it another token (--eod)? Documents are told apart by the index all the same, but a model does not"
                    " learn to write that token."
                )
        return Report([Table(columns, rows), "\n".join(notes)])


@dataclass(frozen=True)
class _Part:
    """Documents [first, end) of a file, for one split; ``whole`` if the file has no others."""

    file: IndexedTokens
    first: int
    end: int
    whole: bool


@dataclass(frozen=True)
class _Domain:
    name: str
    train: tuple[_Part, ...]
    validation: tuple[_Part, ...]

    def files(self) -> list[IndexedTokens]:
        """Distinct files."""
        return list({id(part.file): part.file for part in (*self.train, *self.validation)}.values())


def adopt(
    sources: Sources,
    out: Path,
    *,
    tokenizer: str | Path,
    eod: str | None = None,
    split: str | None = None,
    dtype: str | None = None,
    documents: DocumentsEnd = "token",
    workers: int | None = None,
    progress: bool = True,
) -> Adopted:
    """Writes manifest.json, tokenizer.json and mixture.json into ``out``; for other projects' files indexes or copies.

    Args:
        sources: Megatron prefixes, or what `take_in` makes prefixes of.
        tokenizer: the tokenizer of the files; see `TokenizerSpec`.
        eod: end-of-document token; None looks for the usual names.
        split: Megatron's ``--split``, by default Megatron's default; None where ``sources`` has validation files.
        dtype: type of the ids in files that do not say it; None: by the vocabulary.
        documents: where those of tables and MDS shards end.
        workers: files read at a time; None: one for each core, at most 8.

    Raises:
        InputError: damaged or missing files, token ids of another tokenizer, a split that does not fit or leaves a
            domain without training or validation tokens, or an ``out`` that holds a data set.
    """
    if sources.valid is None:
        split = split or DEFAULT_SPLIT
        split_bounds(split, 1)  # raises before any file is opened
    elif split is not None:
        raise InputError(f"--split {split} is given, but the blend has validation files of its own. Leave --split out.")
    for name, prefixes in sources.train.items():
        check_domain_name(name, prefixes[0])  # before the pass over the tokens
    out = Path(out)
    if (out / FILE_NAME).exists():
        raise InputError(
            f"{out} already holds a data set. Remove {out / FILE_NAME}, or choose another folder for --out."
        )
    data, loaded = given_tokenizer(str(tokenizer), eod)
    with writing(f"to {out}", "Choose another --out."):
        taken = take_in(sources, out, loaded, dtype=dtype, documents=documents, progress=progress)
    sources = taken.sources
    domains = [_open(name, sources, split) for name in sources.train]
    scans = _scan(domains, loaded.vocab_size, workers or min(8, os.cpu_count() or 1), progress)
    entries = [_entry(domain, scans, out) for domain in domains]
    held = sum(entry.validation.documents for entry in entries)
    total = held + sum(entry.train.documents for entry in entries)
    manifest = Manifest.build(
        out,
        tokenizer=TokenizerEntry.of(loaded),
        dtype=np.result_type(*(file.dtype for domain in domains for file in domain.files())).name,
        validation_fraction=held / total if split is None else validation_share(split),
        split=split,
        domains=entries,
    )
    weights = _weights(manifest, sources.weights)
    with writing(f"to {out}", "Choose another --out."):
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / TOKENIZER_FILE, data)
        replace_json(out / MIXTURE_FILE, weights)
        manifest.save()
    return Adopted(
        manifest, weights, {domain.name: _endings(domain, loaded.eod_id) for domain in domains}, taken.line()
    )


def _weights(manifest: Manifest, weights: Mapping[str, float] | None) -> dict[str, float]:
    names = manifest.domain_names
    values = manifest.natural_weights() if weights is None else np.array([weights[name] for name in names])
    return dict(zip(names, (values / values.sum()).tolist(), strict=True))


def _open(name: str, sources: Sources, split: str | None) -> _Domain:
    train = [_open_file(name, prefix) for prefix in sources.train[name]]
    if sources.valid is not None:
        validation = [_open_file(name, prefix) for prefix in sources.valid[name]]
        whole = [tuple(_Part(file, 0, file.num_documents, True) for file in files) for files in (train, validation)]
        return _Domain(name, whole[0], whole[1])
    assert split is not None
    train_parts, validation_parts = [], []
    for file in train:
        ends = [file.document_from(sequence) for sequence in split_bounds(split, file.num_sequences)]
        train_parts.append(_Part(file, 0, ends[0], False))
        validation_parts.append(_Part(file, ends[0], ends[1], False))
    return _Domain(name, tuple(train_parts), tuple(validation_parts))


def _open_file(name: str, prefix: str) -> IndexedTokens:
    try:
        file = IndexedTokens(prefix)
    except InputError as error:
        raise InputError(f"domain '{name}': {error}") from error
    if file.dtype.kind not in "iu":
        raise InputError(
            f"domain '{name}': {prefix} stores {file.dtype.name}, expected integers (Megatron writes uint16 or int32)."
            " Check the prefix."
        )
    return file


def _scan(domains: Sequence[_Domain], vocab_size: int, workers: int, progress: bool) -> dict[int, FileScan]:
    """Scan of every file, by id(file), with the parts of `_parts_of`."""
    jobs = [
        FileJob(domain.name, file, tuple(_tokens_of(part) for part in _parts_of(domain, file)))
        for domain in domains
        for file in domain.files()
    ]
    scans = scan_files(jobs, vocab_size, workers, progress=progress)
    return {id(job.file): scan for job, scan in zip(jobs, scans, strict=True)}


def _parts_of(domain: _Domain, file: IndexedTokens) -> list[_Part]:
    """Parts of a file, first for training, then for validation."""
    return [part for part in (*domain.train, *domain.validation) if part.file is file]


def _tokens_of(part: _Part) -> tuple[int, int]:
    start, end = part.file.starts_of(np.array([part.first, part.end])).tolist()
    return start, end


def _entry(domain: _Domain, scans: Mapping[int, FileScan], out: Path) -> DomainEntry:
    totals = []
    for parts in (domain.train, domain.validation):
        counts = [scans[id(part.file)].counts_PV[_parts_of(domain, part.file).index(part)] for part in parts]
        totals.append(np.sum(counts, axis=0))
    for split, other, total_V in (("train", "validation", totals[0]), ("validation", "train", totals[1])):
        if not total_V.any():
            documents = sum(file.num_documents for file in domain.files())
            raise InputError(
                f"domain '{domain.name}' has no {split} tokens: its {len(domain.files())} files hold {documents} documents,"
                f" and {other} gets all that are used. Change --split, or give files with more documents."
            )
    train, validation = (
        _split_fields(parts, total_V, scans, out)
        for parts, total_V in zip((domain.train, domain.validation), totals, strict=True)
    )
    nats = unigram_nats(totals[0], totals[1])
    return DomainEntry(
        name=domain.name,
        train=SplitEntry.model_validate(train),
        validation=ValidationEntry.model_validate({**validation, "unigram_nats": nats}),
    )


def _split_fields(
    parts: Sequence[_Part], total_V: np.ndarray, scans: Mapping[int, FileScan], out: Path
) -> dict[str, object]:
    used = [part for part in parts if part.end > part.first]
    whole = all(part.whole for part in used)
    return {
        "prefixes": tuple(_written(part.file.prefix, out) for part in used),
        "tokens": int(total_V.sum()),
        "documents": sum(part.end - part.first for part in used),
        "max_token": int(np.flatnonzero(total_V)[-1]),
        "sha256": tuple(scans[id(part.file)].sha256 for part in used),
        "contents": tuple(scans[id(part.file)].contents for part in used),
        "ranges": None if whole else tuple((part.first, part.end) for part in used),
    }


def _written(prefix: Path, out: Path) -> str:
    """Path for the manifest: relative to ``out`` for a file in it, so that the folder can move; else absolute."""
    here, folder = prefix.resolve(), out.resolve()
    return str(here.relative_to(folder)) if here.is_relative_to(folder) else os.path.abspath(prefix)


def _endings(domain: _Domain, eod_id: int) -> tuple[int, int]:
    """Number of documents sampled from every file, and number of them that end with ``eod_id``."""
    looked = ended = 0
    for file in domain.files():
        number = min(file.num_documents, _SAMPLED_DOCUMENTS)
        documents = np.linspace(0, file.num_documents - 1, number).astype(np.int64)
        starts, ends = file.starts_of(documents), file.starts_of(documents + 1)
        size = file.dtype.itemsize
        # Not through the memory map: each token would map a page of up to 2 MiB.
        with open(bin_path(file.prefix), "rb") as data:
            last = [os.pread(data.fileno(), size, int(end - 1) * size) for end in ends[ends > starts]]
        looked += len(last)
        ended += int((np.frombuffer(b"".join(last), file.dtype) == eod_id).sum())
    return looked, ended
