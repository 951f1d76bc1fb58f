"""Text to token files: ``prepare`` writes ``OUT/<domain>/{train,validation}.{bin,idx}`` and ``OUT/manifest.json``.

    files -> blocks of text (this process) -> tokens (worker processes) -> two writers and a journal (this process)

Blocks come back in the order they were sent, so the files do not depend on the number of workers. At intervals the
writers are flushed and the journal marks the place; a call after a kill truncates the files to the mark and continues.
A finished part of a domain leaves a note of its inputs and options; a later call with the same ones keeps the part.

Several jobs, on machines that share OUT, can divide the text of every domain (``shard``); `merge` then writes the
manifest. A single job merges at its end. The manifest is removed before any file that it names is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megamix.core.errors import InputError
from megamix.core.files import replace_file, sha256_of
from megamix.core.log import get_logger
from megamix.core.processes import num_cores
from megamix.core.text import plural
from megamix.data.tokens.indexed import pick_dtype
from megamix.data.tokens.manifest import FILE_NAME, TOKENIZER_FILE, Manifest
from megamix.data.tokens.tokenizer import (
    LoadedTokenizer,
    TokenizerSpec,
    fetch_tokenizer,
    given_tokenizer,
    train_tokenizer,
)
from megamix.prepare.blocks import TEXT_KEY, Block
from megamix.prepare.documents import find_inputs
from megamix.prepare.done_notes import (
    PartNote,
    PrepareSettings,
    ShardNote,
    TokenizerNote,
    input_files,
    read_note,
    write_note,
)
from megamix.prepare.encoders import EncodeJob, Encoders
from megamix.prepare.journal import Mark
from megamix.prepare.merge import assemble, shard_note_path, with_both_splits
from megamix.prepare.output_folder import sole_writer, writing_to
from megamix.prepare.parts import Part, PartWriter, skipped_text
from megamix.prepare.pieces import BLOCK_BYTES, pieces_of, read_piece
from megamix.prepare.progress import PrepareProgress
from megamix.prepare.samples import sample_texts
from megamix.prepare.shards import Shard, Share, divide
from megamix.prepare.storage import InputPath
from megamix.prepare.text_keys import TextKeys

NOTE_FILE = "prepare.json"
JOURNAL_BYTES = 64 << 20
_TRAINING_BYTES = 4 << 20  # text of each domain that a tokenizer is trained on


def prepare(
    inputs: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str = "train:4096",
    validation_fraction: float = 0.02,
    workers: int | None = None,
    seed: int = 1234,
    text_key: str | Sequence[str] = TEXT_KEY,
    text_files: Sequence[str] = (),
    eod: str | None = None,
    keep_empty: bool = False,
    skip_bad: bool = False,
    shard: str | None = None,
    tokenizer_only: bool = False,
    progress: bool = True,
    block_bytes: int = BLOCK_BYTES,
    journal_bytes: int = JOURNAL_BYTES,
) -> Manifest | None:
    """Tokenises text into one pair of token files per domain and split. Called again, it continues where it stopped.

    Args:
        inputs: See `find_inputs`.
        out: Output folder. The bytes of everything in it depend on the inputs and options, not on ``workers``.
        tokenizer: ``train:SIZE`` (trained on up to 4 MiB of each domain), the path of a tokenizer.json, or ``hf:NAME``.
        validation_fraction: Share of the documents of each domain to hold out, 0 to 0.5. Every domain has at least one
            document in each split; at 0 exactly one is held out, which is logged.
        workers: Tokenising processes; None for one per core, 1 to work inside this process.
        seed: Chooses the documents to hold out, whatever the number of jobs or workers.
        text_key: The key of the text in a JSON line, the column of a table; several, as ``KEY`` for all domains and
            ``DOMAIN=KEY`` for one.
        text_files: Patterns of names of files that are read, too, each one document.
        eod: The tokenizer's end-of-document token, where it has an unusual name.
        keep_empty: Keep documents without text as Megatron-LM's preprocess_data does: one of white space gets its
            tokens, an empty one none. Otherwise they are left out, and counted in the log.
        skip_bad: Pass over lines, rows and .txt files that are no documents, count them in the log, and name each in
            ``OUT/<domain>/skipped.jsonl``. Otherwise the first ends the call. A damaged file does so in any case.
        shard: ``i/n``: do the i-th of n parts of the work, for `merge`. A tokenizer of ``train:`` or ``hf:`` must be
            made first, with ``tokenizer_only``, so that all jobs use the same one.
        tokenizer_only: Only make ``OUT/tokenizer.json``.
        progress: Show throughput and remaining time: a bar on a terminal, else log lines.
        block_bytes: Text per task of a worker.
        journal_bytes: Tokens between two marks of the journal, in bytes: the most that a kill can cost.

    Returns:
        The manifest, as written; None for one shard of several or for the tokenizer alone.

    Raises:
        InputError: A bad option, damaged input, a domain with fewer than two documents, an output folder that cannot be
            written or that another `prepare` is writing to, or a shard without a tokenizer.
        RankFailed: A worker process died.
    """
    spec = _check_options(tokenizer, validation_fraction, workers)
    job = Shard() if shard is None else Shard.parse(shard)
    out = Path(out)
    domains = find_inputs(inputs, out, text_files)
    keys = TextKeys.parse(text_key, domains)
    if not validation_fraction and not tokenizer_only:
        get_logger().warning("--validation 0: one document of every domain is held out all the same, to evaluate on")
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        with sole_writer(out, job):
            loaded = _provide_tokenizer(spec, domains, out, keys, text_files, eod, job)
            if loaded.random is not None:
                get_logger().warning(
                    "the tokenizer cuts text at random (%s): switched off here, so that the same text gives the same tokens",
                    loaded.random,
                )
            if tokenizer_only:
                return None
            settings = PrepareSettings(
                seed=seed,
                validation_fraction=validation_fraction,
                text_key=str(keys),
                text_files=tuple(text_files),
                tokenizer_sha256=loaded.sha256,
                eod_id=loaded.eod_id,
                dtype=pick_dtype(loaded.vocab_size).name,
                block_bytes=block_bytes,
                keep_empty=keep_empty,
                skip_bad=skip_bad,
            )
            if job.count > 1:
                shard_note_path(out, job).unlink(missing_ok=True)
            work = _Work(out, job, settings, keys, loaded.vocab_size, journal_bytes)
            work.run(domains, workers or num_cores(), progress)
            if job.count > 1:
                write_note(ShardNote(settings=settings, domains=tuple(domains)), shard_note_path(out, job))
                return None
            return assemble(out, {name: [Part(out, name, job)] for name in domains}, settings)


def _check_options(tokenizer: str, validation_fraction: float, workers: int | None) -> TokenizerSpec:
    if not 0 <= validation_fraction <= 0.5:
        raise InputError(f"validation fraction {validation_fraction}: expected 0 to 0.5, for example 0.02.")
    if workers is not None and workers < 1:
        raise InputError(f"workers {workers}: expected at least 1, or none given for one per core.")
    return TokenizerSpec.parse(tokenizer)


# The tokenizer. ------------------------------------------------------------------------------------------------------


def _provide_tokenizer(
    spec: TokenizerSpec,
    domains: Mapping[str, Sequence[InputPath]],
    out: Path,
    keys: TextKeys,
    text_files: Sequence[str],
    eod: str | None,
    shard: Shard,
) -> LoadedTokenizer:
    """Opens ``out/tokenizer.json``, made first unless it is there from the same inputs and options."""
    path, note_path = out / TOKENIZER_FILE, out / NOTE_FILE
    if spec.kind == "file":
        data, given = given_tokenizer(spec, eod)
        _put_tokenizer(path, data, shard)
        return LoadedTokenizer(path, given.eod_id)
    inputs = tuple(map(input_files, domains.values())) if spec.kind == "train" else ()
    made_from = {
        "spec": repr(spec),
        "eod": eod,
        "text_key": str(keys),
        "text_files": tuple(text_files),
        "inputs": inputs,
    }
    note = read_note(TokenizerNote, note_path)
    if note is not None and path.is_file():
        same = all(getattr(note, key) == value for key, value in made_from.items())
        if same and sha256_of(path) == note.sha256:
            return LoadedTokenizer(path, note.eod_id)
    if shard.count > 1:
        raise InputError(
            f"shard {shard}: {path} is not there, or was made from other text or options, and the shards must all use"
            " the same. Make it first, once: the same command with --tokenizer-only instead of --shard."
        )
    name: str | None = None
    if spec.kind == "train":
        get_logger().info("training a tokenizer of %d entries on %d domains", spec.vocab_size, len(domains))
        texts = (
            text
            for name, paths in domains.items()
            for text in sample_texts(paths, num_bytes=_TRAINING_BYTES, text_key=keys.of(name), text_files=text_files)
        )
        data = train_tokenizer(texts, spec.vocab_size)
    else:
        data, name = fetch_tokenizer(spec.path)
    _put_tokenizer(path, data, shard)
    loaded = LoadedTokenizer(path, eod if eod is not None else name)
    write_note(TokenizerNote(**made_from, sha256=loaded.sha256, eod_id=loaded.eod_id), note_path)
    return loaded


def _put_tokenizer(path: Path, data: bytes, shard: Shard) -> None:
    if not path.is_file() or path.read_bytes() != data:
        if shard.count > 1 and path.is_file():
            raise InputError(
                f"shard {shard}: {path} is another tokenizer than the one given, and other shards may be using it."
                " Give the same one, or choose another folder."
            )
        (path.parent / FILE_NAME).unlink(missing_ok=True)
        # Shards that begin together write separate copies; all are equal, so the last rename may win.
        copy = path.with_name(f"tokenizer{shard.suffix}.json")
        replace_file(copy, data)
        copy.replace(path)


# Domains. ------------------------------------------------------------------------------------------------------------


class _Work:
    """One job's parts of all domains."""

    def __init__(
        self, out: Path, shard: Shard, settings: PrepareSettings, keys: TextKeys, vocab_size: int, journal_bytes: int
    ) -> None:
        self._out, self._shard, self._settings, self._keys = out, shard, settings, keys
        self._vocab_size, self._journal_bytes = vocab_size, journal_bytes

    def run(self, domains: Mapping[str, Sequence[InputPath]], num_workers: int, progress: bool) -> None:
        """Makes every part that is missing."""
        shares = {name: self._shares(name, paths) for name, paths in domains.items()}
        sizes = {name: sum(share.num_bytes for share in held) for name, held in shares.items()}
        with Encoders(num_workers) as encoders, PrepareProgress(sizes, progress) as shown:
            for name, paths in domains.items():
                part, inputs = Part(self._out, name, self._shard), input_files(paths)
                note = part.read()
                if note is not None and (note.settings, note.inputs) == (self._settings, inputs):
                    part.journal_path.unlink(missing_ok=True)
                    shown.finish(name, "unchanged, kept")
                    continue
                part.folder.mkdir(exist_ok=True)
                writer = PartWriter(part, self._settings, inputs, shares[name], self._vocab_size, self._journal_bytes)
                note = self._write(writer, name, shares[name], encoders, shown)
                if self._shard.count == 1:
                    (note,) = with_both_splits(name, [part], [note])
                shown.finish(name, _outcome(part, note))

    def _shares(self, name: str, paths: Sequence[InputPath]) -> list[Share]:
        given = (self._keys.of(name), self._settings.text_files)
        pieces = [piece for file, path in enumerate(paths) for piece in pieces_of(path, file, *given)]
        return divide(pieces, self._shard)

    def _write(
        self, writer: PartWriter, name: str, shares: Sequence[Share], encoders: Encoders, shown: PrepareProgress
    ) -> PartNote:
        job = EncodeJob.of(self._settings, self._out / TOKENIZER_FILE, name, self._keys.of(name))
        with writer:
            shown.begin(name, writer.mark.file_bytes)
            for encoded in encoders.encode(job, self._blocks(name, shares, writer.mark)):
                writer.add(encoded)
                shown.add(
                    name,
                    num_bytes=encoded.file_bytes,
                    text_bytes=encoded.text_bytes,
                    tokens=len(encoded.train.tokens) + len(encoded.validation.tokens),
                )
            return writer.close()

    def _blocks(self, name: str, shares: Sequence[Share], mark: Mark) -> Iterator[Block]:
        """The blocks after a mark."""
        for number in range(mark.share, len(shares)):
            yield from read_piece(
                shares[number].piece,
                number,
                text_key=self._keys.of(name),
                block_bytes=self._settings.block_bytes,
                first=mark.block if number == mark.share else 0,
                wanted=shares[number].wants,
            )


def _outcome(part: Part, note: PartNote) -> str:
    """A finished part, in words."""
    said = f"{note.train.tokens:,} + {note.validation.tokens:,} tokens"
    if note.empty:
        said += f", {plural(note.empty, 'document')} without text left out (--keep-empty keeps them)"
    if note.skipped:
        said += f", {skipped_text(note.skipped)}: see {part.skipped_path}"
    return said
