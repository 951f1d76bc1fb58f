"""``manifest.json``: the domains of a data set, written by `prepare` or `blend adopt` and opened by training.

Paths are relative to its folder, so a prepared folder can be moved as a whole; adopted files elsewhere have absolute
paths. The fingerprint is a hash of the domains' names, of the hash of every token file, of the document ranges in use
and of the tokenizer's hash. A resume compares it.

Version 2 also has size and hashes of every file and of its blocks, which `verify` compares; version 1, of megamix 0.1,
has the hash of every whole .bin file alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pydantic

from megamix.core.config import Config, validate
from megamix.core.errors import DataChanged, InputError, check_known, did_you_mean, given_twice
from megamix.core.files import read_json, replace_file
from megamix.data.domain_names import check_domain_name
from megamix.data.tokens.hashes import FileHashes
from megamix.data.tokens.indexed import bin_path, idx_path
from megamix.data.tokens.stream import DomainTokens

if TYPE_CHECKING:
    from megamix.data.tokens.tokenizer import LoadedTokenizer
    from megamix.data.tokens.writer import WrittenTokens

FILE_NAME = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
"""Name of the tokenizer beside the manifest."""
FORMAT = "megamix-manifest"
VERSION = 2
WITHOUT_CONTENTS = 1
"""Version of a manifest without the contents of every file."""
Split = Literal["train", "validation"]


class TokenizerEntry(Config):
    """Tokenizer of the token ids."""

    file: str
    """tokenizer.json, relative to the manifest."""
    sha256: str
    """Hash of the file."""
    vocab_size: int
    """Largest token id + 1."""
    eod_id: int
    """Token that ends every document."""

    @classmethod
    def of(cls, tokenizer: LoadedTokenizer) -> TokenizerEntry:
        """The entry of a tokenizer stored beside the manifest as `TOKENIZER_FILE`."""
        return cls(
            file=TOKENIZER_FILE, sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id
        )


class PairContents(Config):
    """Contents of one .bin/.idx pair, for `verify`; see `FileHashes`."""

    bin_bytes: int
    """Size of the .bin file."""
    bin_blocks: str
    """Digests of its blocks."""
    idx_bytes: int
    """Size of the .idx file."""
    idx_sha256: str
    """Hash of the whole .idx file."""
    idx_blocks: str
    """Digests of its blocks."""

    @classmethod
    def of(cls, data: FileHashes, index: FileHashes) -> PairContents:
        """The contents of a pair, by the hashes of its files."""
        return cls(
            bin_bytes=data.num_bytes,
            bin_blocks=data.blocks,
            idx_bytes=index.num_bytes,
            idx_sha256=index.sha256,
            idx_blocks=index.blocks,
        )


class SplitEntry(Config):
    """Token files of one split of a domain."""

    prefixes: tuple[str, ...]
    """Paths without .bin/.idx, relative to the manifest or absolute, in stream order."""
    tokens: int
    """Tokens of all files, including end-of-document tokens."""
    documents: int
    """Documents of all files."""
    max_token: int
    """Largest token id that occurs."""
    sha256: tuple[str, ...]
    """Hash of every whole .bin file, in the order of the prefixes."""
    ranges: tuple[tuple[int, int] | None, ...] | None = None
    """Documents [first, end) of every file that belong to this split; None for all."""
    contents: tuple[PairContents, ...] | None = None
    """In the order of the prefixes; None in a manifest of version 1."""

    @classmethod
    def of(cls, prefix: str, written: WrittenTokens) -> SplitEntry:
        """The entry of one pair of files; ``prefix`` is relative to the manifest."""
        return cls(
            prefixes=(prefix,),
            tokens=written.tokens,
            documents=written.documents,
            max_token=written.max_token,
            sha256=(written.sha256,),
            contents=(PairContents.of(written.data, written.index),),
        )


class ValidationEntry(SplitEntry):
    """Validation split, with the loss of a unigram model."""

    unigram_nats: float
    """Mean nats per token of the validation stream under a unigram model with add-one smoothing over the whole
    vocabulary, fitted on the domain's own training tokens."""


class DomainEntry(Config):
    """One domain of the data set."""

    name: str
    train: SplitEntry
    validation: ValidationEntry


class Manifest(Config):
    """Prepared data set: `Manifest.load` reads one, `Manifest.build` makes one."""

    format: Literal["megamix-manifest"] = FORMAT
    version: Literal[1, 2] = VERSION
    """Version of the file's layout."""
    tokenizer: TokenizerEntry
    dtype: str
    """Type that holds every stored token: uint16 or int32."""
    validation_fraction: float
    """Requested share of the documents to hold out."""
    split: str | None = None
    """Megatron's ``--split`` that made the document ranges; None if no file is shared between splits."""
    domains: tuple[DomainEntry, ...]
    """In the order of all arrays with one entry a domain."""
    fingerprint: str

    _folder: Path = pydantic.PrivateAttr(default_factory=Path)

    @classmethod
    def build(
        cls,
        folder: Path,
        *,
        tokenizer: TokenizerEntry,
        dtype: str,
        validation_fraction: float,
        domains: Sequence[DomainEntry],
        split: str | None = None,
    ) -> Manifest:
        """A manifest for ``folder``, with its fingerprint; `save` writes it."""
        for domain in domains:
            check_domain_name(domain.name, folder)
        known = all(split.contents is not None for domain in domains for split in (domain.train, domain.validation))
        manifest = cls(
            version=VERSION if known else WITHOUT_CONTENTS,
            tokenizer=tokenizer,
            dtype=dtype,
            validation_fraction=validation_fraction,
            split=split,
            domains=tuple(domains),
            fingerprint=_fingerprint(tokenizer, domains),
        )
        manifest._folder = Path(folder)
        return manifest

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Reads and checks a manifest.

        Args:
            path: the file, or the folder it lies in.

        Raises:
            InputError: no such file, not JSON, another format or version, wrong or missing entries, two domains with
                one name, token ids beyond the vocabulary, or a wrong fingerprint.
            DataChanged: a token file is missing.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        data = read_json(
            path,
            "the manifest",
            lost="Run `megamix prepare`, or check the path.",
            damaged="Run `megamix prepare` again.",
        )
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            seen = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise InputError(f"{path} is no megamix manifest: its format is {seen!r}, expected {FORMAT!r}.")
        if data.get("version") not in (WITHOUT_CONTENTS, VERSION):
            raise InputError(
                f"{path} has version {data.get('version')!r}, this megamix reads {WITHOUT_CONTENTS} and {VERSION}."
                " Run `megamix prepare` again, or use the megamix that wrote it."
            )
        manifest = validate(cls, data, str(path))
        manifest._folder = path.parent
        manifest._check(path)
        return manifest

    @property
    def folder(self) -> Path:
        """The folder of the manifest, to which paths are relative."""
        return self._folder

    @property
    def domain_names(self) -> list[str]:
        """Names in the order of `domains`."""
        return [domain.name for domain in self.domains]

    def domain(self, name: str) -> DomainEntry:
        """The entry of a domain; an unknown name is an `InputError` that suggests the nearest one."""
        if (found := self._by_name.get(name)) is not None:
            return found
        raise InputError(f"{self.folder / FILE_NAME} has no domain '{name}'." + did_you_mean(name, self.domain_names))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that no domain has."""
        return [name for name in names if name not in self._by_name]

    @functools.cached_property
    def _by_name(self) -> dict[str, DomainEntry]:
        return {domain.name: domain for domain in self.domains}

    def natural_weights(self, names: Sequence[str] | None = None) -> np.ndarray:
        """Shares of the training tokens, float64 [K], sum 1, of all domains or of ``names``."""
        domains = self.domains if names is None else [self.domain(name) for name in names]
        tokens_K = np.array([domain.train.tokens for domain in domains], dtype=np.float64)
        return tokens_K / tokens_K.sum()

    def prefixes(self, name: str, split: Split) -> list[Path]:
        """Paths of a split's token files, without suffix."""
        return [self.folder / prefix for prefix in self._split(name, split).prefixes]

    def open_domain(self, name: str, split: Split = "train", *, verify: bool = True) -> DomainTokens:
        """Opens one split of a domain as a token stream; for ``verify`` see `IndexedTokens`.

        Raises:
            InputError: no such domain or split, or files that are damaged or differ from the manifest.
        """
        entry = self._split(name, split)
        tokens = DomainTokens(name, self.prefixes(name, split), entry.tokens, verify=verify, ranges=entry.ranges)
        # Adopted domains may have narrower types than the widest; reading widens them.
        if not np.can_cast(tokens.dtype, self.dtype):
            raise InputError(
                f"domain '{name}': its {split} files store {tokens.dtype.name}, but the manifest says {self.dtype}."
                " Run `megamix prepare` again."
            )
        return tokens

    def load_tokenizer(self) -> LoadedTokenizer:
        """Opens the tokenizer.

        Raises:
            InputError: it is missing, damaged, or not the one the tokens were made with.
        """
        from megamix.data.tokens.tokenizer import LoadedTokenizer

        tokenizer = LoadedTokenizer(self.folder / self.tokenizer.file, eod=self.tokenizer.eod_id)
        tokenizer.expect(self.tokenizer.sha256)
        return tokenizer

    def save(self) -> Path:
        """Writes ``manifest.json`` into its folder, whole or not at all, and returns its path."""
        path = self.folder / FILE_NAME
        text = json.dumps(self.model_dump(mode="json", exclude_none=True), indent=1, ensure_ascii=False)
        replace_file(path, (text + "\n").encode("utf-8"))
        return path

    def _split(self, name: str, split: str) -> SplitEntry:
        domain = self.domain(name)
        check_known([split], ("train", "validation"), "unknown split")
        return domain.train if split == "train" else domain.validation

    def _check(self, path: Path) -> None:
        names = self.domain_names
        doubled = given_twice(names)
        if doubled or not names:
            problem = f"names the domain '{doubled[0]}' twice" if doubled else "has no domains"
            raise InputError(f"{path} {problem}. Run `megamix prepare` again.")
        wanted = _fingerprint(self.tokenizer, self.domains)
        if self.fingerprint != wanted:
            raise InputError(
                f"{path}: the fingerprint {self.fingerprint[:12]} does not fit the contents ({wanted[:12]}): the"
                " file was edited. Put the old one back, or run `megamix prepare` again."
            )
        for domain in self.domains:
            for split in (domain.train, domain.validation):
                self._check_split(path, domain.name, split)

    def _check_split(self, path: Path, name: str, split: SplitEntry) -> None:
        if split.max_token >= self.tokenizer.vocab_size:
            raise InputError(
                f"{path}: domain '{name}' holds the token id {split.max_token}, but the vocabulary has"
                f" {self.tokenizer.vocab_size} entries. Run `megamix prepare` again with the right tokenizer."
            )
        if len(split.prefixes) != len(split.sha256) or not split.prefixes:
            raise InputError(
                f"{path}: domain '{name}' has {len(split.prefixes)} token files and {len(split.sha256)} hashes,"
                " expected one hash for each of at least one file. Run `megamix prepare` again."
            )
        if split.contents is not None and len(split.contents) != len(split.prefixes):
            raise InputError(
                f"{path}: domain '{name}' has {len(split.prefixes)} token files and the contents of"
                f" {len(split.contents)}, expected as many. Run `megamix prepare` again."
            )
        if split.ranges is not None and len(split.ranges) != len(split.prefixes):
            raise InputError(
                f"{path}: domain '{name}' has {len(split.prefixes)} token files and {len(split.ranges)} document"
                " ranges, expected one range (or null) for each file. Run `megamix blend adopt` again."
            )
        for prefix in split.prefixes:
            for file in (bin_path(self.folder / prefix), idx_path(self.folder / prefix)):
                if not file.is_file():
                    raise DataChanged(
                        f"domain '{name}': {file} is missing. Copy the prepared folder as a whole, or run"
                        " `megamix prepare` again."
                    )


def _fingerprint(tokenizer: TokenizerEntry, domains: Sequence[DomainEntry]) -> str:
    content = {"tokenizer": tokenizer.sha256, "domains": [_identity(domain) for domain in domains]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def _identity(domain: DomainEntry) -> list[object]:
    """Identity of a domain's data, wherever it lies. Whole files, the usual case, add no ranges."""
    splits = (domain.train, domain.validation)
    ranges = [split.ranges for split in splits]
    return [domain.name, *(list(split.sha256) for split in splits), *(ranges if any(ranges) else ())]


def joined_contents(splits: Sequence[SplitEntry]) -> tuple[PairContents, ...] | None:
    """The contents of the files of several splits, in their order; None if one has none."""
    found: list[PairContents] = []
    for split in splits:
        if split.contents is None:
            return None
        found += split.contents
    return tuple(found)


def digest(entry: DomainEntry) -> str:
    """Hash of a domain's data: of its manifest entry without paths, and without what only version 2 has."""
    content = [
        split.model_dump(mode="json", exclude={"prefixes", "contents"}) for split in (entry.train, entry.validation)
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
