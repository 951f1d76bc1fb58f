"""Token files of other projects as Megatron's pairs of files, which `adopt` makes a data set of.

A flat file whose bytes Megatron's format takes as they are stays where it is: a link to it stands as .bin beside an
index that is made here. All others are copied, once, into the data set's folder. Called again after a kill, it keeps
what was finished.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from megamix.core.config import Config
from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.core.progress import ReadProgress
from megamix.core.text import gib, listed, plural
from megamix.data.domain_names import file_name
from megamix.data.tokens.indexed import IndexedTokens, bin_path, idx_path, pick_dtype
from megamix.data.tokens.tokenizer import LoadedTokenizer
from megamix.data.tokens.writer import IndexedWriter, write_index
from megamix.interop.token_files.documents import Cutter
from megamix.interop.token_files.flat import ENDINGS, FlatFile, open_flat
from megamix.interop.token_files.mds import INDEX, MdsFolder, is_mds, open_mds
from megamix.interop.token_files.sources import Sources
from megamix.interop.token_files.tables import ENDINGS as TABLES
from megamix.interop.token_files.tables import TokenTable
from megamix.prepare.done_notes import InputFile, input_files, read_note, write_note
from megamix.prepare.hub import saved_files

_MASK = re.compile(r"(labels?|loss)_mask")  # of OLMo's data for fine-tuning
_SPLITS = ("train", "val", "valid", "validation", "eval", "test")
_Foreign = FlatFile | MdsFolder | TokenTable
_EXPECTED = (
    "a Megatron prefix, a .npy, .ds or .bin file of token ids, a table with a column of them (.parquet, .arrow), or a folder"
    " of these or of MDS shards"
)
DocumentsEnd = Literal["token", "row"]
"""At the end-of-document token, or with each row of a table and each sample of MDS shards."""


class TakenNote(Config):
    """What a pair of files was made of."""

    source: InputFile
    eod_id: int
    """Token that ends documents."""
    dtype: str | None
    """The option ``--dtype``."""
    documents: DocumentsEnd = "token"
    """The option ``--documents``."""
    ends: int
    """Documents that end with that token, or by an index or a row."""
    copied: bool
    """Whether the tokens were copied."""


@dataclass
class TakenIn:
    """Pairs of files for all that was given.

    Attributes:
        sources: with prefixes alone.
        in_place: files used where they lie.
        converted: files and folders copied.
        num_bytes: bytes written for these.
    """

    sources: Sources
    in_place: int = 0
    converted: int = 0
    num_bytes: int = 0

    def line(self) -> str | None:
        """What was done, in words; None if there were only prefixes."""
        parts = []
        if self.in_place:
            parts.append(f"{plural(self.in_place, 'file')} of token ids used in place, by links")
        if self.converted:
            parts.append(f"{self.converted} converted ({gib(self.num_bytes)} written)")
        return f"{', '.join(parts)}." if parts else None


def take_in(
    sources: Sources,
    out: Path,
    tokenizer: LoadedTokenizer,
    *,
    dtype: str | None = None,
    documents: DocumentsEnd = "token",
    progress: bool = True,
) -> TakenIn:
    """Makes a Megatron prefix in ``out`` of everything in ``sources`` that is none.

    Args:
        dtype: type of ids that no file says; None: by the vocabulary.
        documents: where those of tables and MDS shards end.

    Raises:
        InputError: see `open_flat` and `open_mds`; or a domain in which no document has an end.
    """
    found = {
        split: {name: [one for path in paths for one in _find(name, path)] for name, paths in (domains or {}).items()}
        for split, domains in (("tokens", sources.train), ("validation", sources.valid))
    }
    opened = {
        (split, name): [one if isinstance(one, str) else _open(one, tokenizer, dtype) for one in held]
        for split, domains in found.items()
        for name, held in domains.items()
    }
    taken = TakenIn(sources)
    foreign = [one for held in opened.values() for one in held if not isinstance(one, str)]
    made: dict[str, dict[str, list[str]]] = {"tokens": {}, "validation": {}}
    with ReadProgress(sum(map(_num_bytes, foreign)), progress and bool(foreign)) as shown:
        for (split, name), held in opened.items():
            target = _Domain(name, out / file_name(name), split, tokenizer, dtype, documents, taken)
            made[split][name] = target.prefixes(held, shown)
    valid = None if sources.valid is None else made["validation"]
    taken.sources = replace(sources, train=made["tokens"], valid=valid)
    return taken


def _num_bytes(one: _Foreign) -> int:
    return one.num_tokens * one.dtype.itemsize if isinstance(one, FlatFile) else one.num_bytes


def _find(name: str, path: str) -> list[str | Path]:
    """The files and folders that a path stands for; a text for a prefix of Megatron's."""
    if any(sign in path for sign in "*?[") and not os.path.exists(path) and not idx_path(path).exists():
        matches = sorted({*glob.glob(path, recursive=True), *glob.glob(f"{path}.idx", recursive=True)})
        found = [one for match in matches for one in _find(name, match)]
        found = [one for one in found if isinstance(one, Path) or idx_path(one).exists()]
        if not found:
            raise InputError(f"domain '{name}': no file of token ids matches '{path}'. Expected {_EXPECTED}.")
        return list(dict.fromkeys(found))
    here = Path(path)
    if here.is_dir():
        found = _below(here)
        if not found:
            raise InputError(f"domain '{name}': the folder {path} holds no token ids. Expected {_EXPECTED}.")
        return found
    if here.is_file() and not idx_path(path).exists():
        if here.suffix.lower() in (".bin", ".idx") and _is_pair(here.with_suffix("")):
            return [str(here.with_suffix(""))]
        if here.suffix.lower() in (*ENDINGS, *TABLES):
            return [here]
    return [path]


def _is_pair(prefix: Path) -> bool:
    return idx_path(prefix).exists() and bin_path(prefix).exists()


def _below(folder: Path) -> list[str | Path]:
    """Folders of MDS shards, flat files, and prefixes of Megatron's pairs in a folder, sorted; a .bin alone is a flat
    file only where it is named."""
    if is_mds(folder):
        return [folder]
    if (saved := saved_files(folder)) is not None:
        return [*saved]
    splits = [name for name in _SPLITS if (folder / name).is_dir() or _is_pair(folder / name)]
    if len(splits) > 1:
        raise InputError(
            f"the folder {folder} holds the splits {' and '.join(splits)}. Name one, {folder / splits[0]}; for validation on"
            " the other, give both with --train-data-path and --valid-data-path."
        )
    found: list[Path] = []
    prefixes: set[str] = set()
    for here, folders, names in os.walk(folder):  # follows no link to a folder
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        if is_mds(Path(here)):
            found.append(Path(here))
            folders.clear()
            continue
        if (saved := saved_files(Path(here))) is not None:
            found += saved
            continue
        kinds = [ending for ending in (*ENDINGS, *TABLES) if ending != ".bin"]
        found += [Path(here, each) for each in names if Path(each).suffix.lower() in kinds and each[0] != "."]
        stems = (Path(here, each).with_suffix("") for each in names if each.endswith(".idx") and each[0] != ".")
        prefixes.update(str(stem) for stem in stems if _is_pair(stem))
    masks = [path.name for path in found if _MASK.search(path.name)]
    if masks:
        get_logger().warning(
            "%s: %s passed over, which hold no token ids: %s", folder, plural(len(masks), "mask"), listed(masks, 3)
        )
    return sorted([*prefixes, *(path for path in found if path.name not in masks)], key=str)


def _open(path: str | Path, tokenizer: LoadedTokenizer, dtype: str | None) -> _Foreign:
    path = Path(path)
    if path.suffix.lower() in TABLES:
        return TokenTable(path)
    return open_mds(path, dtype) if is_mds(path) else open_flat(path, tokenizer, dtype)


@dataclass
class _Domain:
    """One split of a domain."""

    name: str
    folder: Path
    split: str
    tokenizer: LoadedTokenizer
    dtype: str | None
    documents: DocumentsEnd
    taken: TakenIn
    ends: int = 0
    sources: list[_Foreign] = field(default_factory=list)

    def prefixes(self, held: Sequence[str | _Foreign], shown: ReadProgress) -> list[str]:
        """A prefix for each, made where it is not there."""
        made: list[str] = []
        for number, one in enumerate(held):
            if isinstance(one, str):
                made.append(one)
                continue
            self.folder.mkdir(parents=True, exist_ok=True)
            prefix = self.folder / f"{self.split}-{number:05}"
            self._make(one, prefix)
            shown.add(_num_bytes(one))
            made.append(str(prefix))
        if self.sources and not self.ends:
            by_row = "" if isinstance(self.sources[0], FlatFile) else "; where each row is a document, --documents row"
            raise InputError(
                f"domain '{self.name}': {self.sources[0].path} does not hold token {self.tokenizer.eod_id}, the tokenizer's"
                " end of document, at all, so that it would be one document. Name the token that ends documents with"
                f" --eod{by_row}."
            )
        return made

    def _make(self, one: _Foreign, prefix: Path) -> None:
        self.sources.append(one)
        (source,) = input_files([one.path / INDEX if isinstance(one, MdsFolder) else one.path])
        note_path = prefix.with_name(prefix.name + ".json")
        note = read_note(TakenNote, note_path)
        made_by = {"eod_id": self.tokenizer.eod_id, "dtype": self.dtype, "documents": self.documents}
        asked = {"source": source, **made_by}
        if note is None or any(getattr(note, key) != value for key, value in asked.items()) or not _whole(prefix):
            note_path.unlink(missing_ok=True)
            ends, copied = self._write(one, prefix)
            note = TakenNote.model_validate({**asked, "ends": ends, "copied": copied})
            write_note(note, note_path)
        self.ends += note.ends
        if note.copied:
            self.taken.converted += 1
            self.taken.num_bytes += bin_path(prefix).stat().st_size
        else:
            self.taken.in_place += 1

    def _write(self, one: _Foreign, prefix: Path) -> tuple[int, bool]:
        """Writes index and, where they cannot stay, tokens; returns the ends found, and whether tokens were copied."""
        idx_path(prefix).unlink(missing_ok=True)
        bin_path(prefix).unlink(missing_ok=True)
        cutter = Cutter(self.tokenizer.eod_id, one.path)
        as_it_is = one.as_it_is if isinstance(one, FlatFile) else None
        if isinstance(one, FlatFile) and as_it_is is not None:
            os.symlink(os.path.abspath(one.path), bin_path(prefix))
            lengths = cutter.lengths(one.pieces()) if one.index is None else one.indexed_lengths()
            number = write_index(prefix, as_it_is, lengths)
            return (number if one.index is not None else cutter.num_ends), False
        kind = pick_dtype(self.tokenizer.vocab_size)
        if isinstance(one, FlatFile):
            documents = cutter.documents(one.pieces())
        elif self.documents == "row":
            documents = one.rows()
        else:
            documents = cutter.documents(tokens for tokens, _ in one.rows())
        with IndexedWriter(prefix, kind) as writer:
            for tokens, lengths in documents:
                self._check_ids(one.path, tokens)
                writer.add_documents(tokens, lengths[lengths > 0])
        by_token = isinstance(one, FlatFile) or self.documents == "token"
        return (cutter.num_ends if by_token else writer.num_documents), True

    def _check_ids(self, path: Path, tokens: np.ndarray) -> None:
        wrong = (tokens < 0) | (tokens >= self.tokenizer.vocab_size)
        if wrong.any():
            raise InputError(
                f"domain '{self.name}': {path} holds the token id {tokens[wrong][0]}, but the tokenizer's ids are 0 to"
                f" {self.tokenizer.vocab_size - 1}. Give the tokenizer that the files were made with, or the type of their"
                " ids with --dtype."
            )


def _whole(prefix: Path) -> bool:
    try:
        IndexedTokens(prefix, verify=False)
    except InputError:
        return False
    return True
