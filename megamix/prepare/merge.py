"""Merge of parts into a data set: checks the parts of all jobs of a sharded `prepare`, and writes ``manifest.json``.

No token is copied: the manifest lists the files of the jobs in order. A single job ends in the same way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.data.tokens.indexed import IndexedTokens
from megamix.data.tokens.manifest import (
    TOKENIZER_FILE,
    DomainEntry,
    Manifest,
    SplitEntry,
    TokenizerEntry,
    ValidationEntry,
    joined_contents,
)
from megamix.data.tokens.tokenizer import LoadedTokenizer
from megamix.data.tokens.writer import IndexedWriter
from megamix.prepare.done_notes import PartNote, PrepareSettings, ShardNote, read_note, write_note
from megamix.prepare.output_folder import sole_writer, writing_to
from megamix.prepare.parts import SPLITS, Part, check_documents, split_entry
from megamix.prepare.shards import Shard

_COPIED_AT_ONCE = 4096  # documents


def shard_note_path(out: Path, shard: Shard) -> Path:
    """Path of the `ShardNote` of a finished job."""
    return out / f"shard{shard.suffix}.json"


def merge(out: str | Path) -> Manifest:
    """Merges the parts in the output folder of a sharded `prepare`.

    Returns:
        The manifest, as written.

    Raises:
        InputError: A job has not finished, jobs differ in options, tokenizer or input, files are missing, a domain has
            fewer than two documents, or a job is still writing.
    """
    out = Path(out)
    if not out.is_dir():
        raise InputError(f"{out} is no folder. Give the --out of the `megamix prepare --shard i/n` jobs.")
    with writing_to(out), sole_writer(out, Shard()):
        shards = _all_shards(out)
        notes = [_finished(out, shard) for shard in shards]
        first = notes[0]
        for shard, note in zip(shards, notes, strict=True):
            _check_same(out, shards[0], shard, first, note)
        domains = {name: [Part(out, name, shard) for shard in shards] for name in sorted(first.domains)}
        return assemble(out, domains, first.settings)


def _all_shards(out: Path) -> list[Shard]:
    """All jobs, finished or not, from the names of their files."""
    names = re.compile(r"(?:shard|prepare)-(\d{5})-of-(\d{5})\.(?:json|journal)")
    found = [names.fullmatch(path.name) for path in (*out.iterdir(), *out.glob("*/prepare-*"))]
    counts = sorted({int(match[2]) for match in found if match})
    if not counts:
        raise InputError(f"{out} holds no shards to merge. Run `megamix prepare ... --shard i/n` for every i first.")
    if len(counts) > 1:
        raise InputError(
            f"{out} holds shards of {' and of '.join(map(str, counts))} jobs. Remove those that are not wanted"
            f" (shard-*-of-{counts[0]:05}.json and */*-of-{counts[0]:05}*)."
        )
    return [Shard(number, counts[0]) for number in range(1, counts[0] + 1)]


def _finished(out: Path, shard: Shard) -> ShardNote:
    note = read_note(ShardNote, shard_note_path(out, shard))
    if note is None:
        missing = [
            str(Shard(number, shard.count))
            for number in range(shard.number, shard.count + 1)
            if not shard_note_path(out, Shard(number, shard.count)).is_file()
        ]
        raise InputError(
            f"{out}: shard {', '.join(missing or [str(shard)])} has not finished. Run `megamix prepare ... --shard"
            f" {shard}` to its end, then merge."
        )
    return note


def _check_same(out: Path, one: Shard, other: Shard, wanted: ShardNote, seen: ShardNote) -> None:
    options, others = wanted.settings.model_dump(), seen.settings.model_dump()
    for key, value in options.items():
        if others[key] != value:
            raise InputError(
                f"{out}: {key} is {value} in shard {one}, but {others[key]} in shard {other}. Run one of them again with"
                " the options of the other."
            )
    if wanted.domains != seen.domains:
        differ = ", ".join(sorted(set(wanted.domains) ^ set(seen.domains)))
        raise InputError(f"{out}: shards {one} and {other} do not have the same domains ({differ}). Run one again.")


def assemble(out: Path, domains: Mapping[str, Sequence[Part]], settings: PrepareSettings) -> Manifest:
    """Writes the manifest of finished parts, given by domain in the order of the jobs.

    Raises:
        InputError: See `merge`.
    """
    tokenizer = LoadedTokenizer(out / TOKENIZER_FILE, settings.eod_id)
    tokenizer.expect(settings.tokenizer_sha256)
    manifest = Manifest.build(
        out,
        tokenizer=TokenizerEntry.of(tokenizer),
        dtype=settings.dtype,
        validation_fraction=settings.validation_fraction,
        domains=[_domain(name, parts) for name, parts in domains.items()],
    )
    manifest.save()
    return manifest


def _domain(name: str, parts: Sequence[Part]) -> DomainEntry:
    notes = [_read(part) for part in parts]
    for part, note in zip(parts, notes, strict=True):
        changed = [path.path for path, other in zip(note.inputs, notes[0].inputs, strict=False) if path != other]
        if note.inputs != notes[0].inputs:
            which = changed[0] if changed else f"{len(notes[0].inputs)} and {len(note.inputs)} files"
            raise InputError(
                f"domain '{name}': shards {parts[0].shard} and {part.shard} were made from different text ({which})."
                " Run all of them again on the same files."
            )
    notes = with_both_splits(name, parts, notes)
    train_counts_V, validation_counts_V = np.sum([part.load_counts() for part in parts], axis=0)
    validation = _joined([note.validation for note in notes])
    return DomainEntry(
        name=name,
        train=_joined([note.train for note in notes]),
        validation=ValidationEntry(**dict(validation), unigram_nats=unigram_nats(train_counts_V, validation_counts_V)),
    )


def _read(part: Part) -> PartNote:
    note = part.read()
    if note is None:
        raise InputError(
            f"domain '{part.domain}': shard {part.shard} is not finished there, or its files are not those it wrote."
            f" Run `megamix prepare ... --shard {part.shard}` again."
        )
    return note


def _joined(splits: Sequence[SplitEntry]) -> SplitEntry:
    """The files of all jobs but the empty ones, which cannot be mapped into memory."""
    held = [split for split in splits if split.tokens]
    return SplitEntry(
        prefixes=tuple(split.prefixes[0] for split in held),
        tokens=sum(split.tokens for split in held),
        documents=sum(split.documents for split in held),
        max_token=max(split.max_token for split in held),
        sha256=tuple(split.sha256[0] for split in held),
        contents=joined_contents(held),
    )


def unigram_nats(train_counts_V: np.ndarray, validation_counts_V: np.ndarray) -> float:
    """Mean nats per validation token under token frequencies: add-one smoothed counts of the training tokens.

    Args:
        train_counts_V: Occurrences of each token in the training split, int64 [V].
        validation_counts_V: The same in the validation split, int64 [V].
    """
    log_probability_V = np.log(train_counts_V + 1.0) - np.log(float(train_counts_V.sum() + len(train_counts_V)))
    return float(-(validation_counts_V * log_probability_V).sum() / validation_counts_V.sum())


# A domain whose every document is in one split. ----------------------------------------------------------------------


def with_both_splits(name: str, parts: Sequence[Part], notes: list[PartNote]) -> list[PartNote]:
    """The notes, after moving the nearest document if chance left a split of the whole domain without tokens.

    Raises:
        InputError: there is no document to move.
    """
    train, held_out = sum(note.train.tokens for note in notes), sum(note.validation.tokens for note in notes)
    documents = sum(note.train.documents + note.validation.documents for note in notes)
    empty = sum(note.empty for note in notes)
    skipped = dict(sum((Counter(note.skipped) for note in notes), Counter[str]()))
    check_documents(name, documents, empty, skipped)
    if train and held_out:
        return notes
    if train:
        candidates = [(note.nearest_train, number) for number, note in enumerate(notes) if note.nearest_train]
        (_, document), number = min(candidates)
    else:
        candidates = [(note.nearest_validation, number) for number, note in enumerate(notes) if note.nearest_validation]
        if not candidates:
            raise InputError(f"domain '{name}': its {documents} documents give no tokens. Leave the domain out.")
        (_, document), number = max(candidates)
    moved = _move(parts[number], notes[number], document, source=0 if train else 1)
    left, got = (moved.train, moved.validation) if train else (moved.validation, moved.train)
    if not left.tokens and len(notes) == 1:
        check_documents(name, 1, empty, skipped)
    get_logger().info(
        "%s: chance left no document to %s; the one nearest to it, of %d tokens, goes there",
        name,
        "validate with" if train else "train on",
        got.tokens,
    )
    return [*notes[:number], moved, *notes[number + 1 :]]


def _move(part: Part, note: PartNote, document: int, source: int) -> PartNote:
    """Moves one document from a split, 0 or 1, to the other one, which is empty. A kill meanwhile leaves an unfinished
    part."""
    part.note_path.unlink()
    part.journal_path.unlink(missing_ok=True)
    prefixes = [part.out / part.prefix(split) for split in SPLITS]
    files = IndexedTokens(prefixes[source])
    starts = np.append(files.document_starts, files.num_tokens)
    counts = part.load_counts()
    without_tokens = IndexedTokens(prefixes[1 - source]).num_documents  # all that it has
    with (
        IndexedWriter(prefixes[source], files.dtype) as stay,
        IndexedWriter(prefixes[1 - source], files.dtype) as leave,
    ):
        for begin, end in ((0, document), (document + 1, files.num_documents)):
            for first in range(begin, end, _COPIED_AT_ONCE):
                last = min(first + _COPIED_AT_ONCE, end)
                stay.add_documents(files.tokens[starts[first] : starts[last]], np.diff(starts[first : last + 1]))
        tokens = np.asarray(files.tokens[starts[document] : starts[document + 1]])
        leave.add_document(tokens)
        leave.add_documents([], [0] * without_tokens)
    occurrences = np.bincount(tokens, minlength=counts.shape[1])
    counts[source] -= occurrences
    counts[1 - source] += occurrences
    part.save_counts(counts)
    writers = (stay, leave) if source == 0 else (leave, stay)
    splits = [split_entry(part.prefix(split), writer) for split, writer in zip(SPLITS, writers, strict=True)]
    moved = note.model_copy(
        update={"train": splits[0], "validation": splits[1], "nearest_train": None, "nearest_validation": None}
    )
    write_note(moved, part.note_path)
    return moved
