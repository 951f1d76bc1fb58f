"""``manifest.json``: the domains of a data set, as `prepare` or `blend adopt` wrote it and as training opens it.

Paths in it are relative to its folder, so a prepared folder can be moved as a whole; adopted files that lie elsewhere
have absolute paths. The fingerprint names the data: the domains, the hash of every token file, which documents of it
are used where that is not all of them, and the tokenizer's hash. A resume compares it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pydantic

from megamix.core.config import Config, validate
from megamix.core.errors import InputError, did_you_mean
from megamix.core.files import replace_file
from megamix.data.tokens.indexed import bin_path, idx_path
from megamix.data.tokens.stream import DomainTokens

if TYPE_CHECKING:
    from megamix.data.tokens.tokenizer import LoadedTokenizer

FILE_NAME = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
"""What `prepare` and `blend adopt` call it, beside the manifest."""
FORMAT = "megamix-manifest"
VERSION = 1
Split = Literal["train", "validation"]


class TokenizerEntry(Config):
    """The tokenizer the token ids belong to."""

    file: str
    """tokenizer.json, relative to the manifest."""
    sha256: str
    """Of that file."""
    vocab_size: int
    """Largest token id + 1."""
    eod_id: int
    """Token that ends every document."""

    @classmethod
    def of(cls, tokenizer: LoadedTokenizer) -> TokenizerEntry:
        """The entry of a tokenizer that lies, or will lie, beside the manifest as `TOKENIZER_FILE`."""
        return cls(
            file=TOKENIZER_FILE, sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id
        )


class SplitEntry(Config):
    """The token files of one split of a domain."""

    prefixes: tuple[str, ...]
    """Paths without .bin/.idx, relative to the manifest or absolute, in stream order."""
    tokens: int
    """Tokens of all files together, the end-of-document tokens included."""
    documents: int
    """Documents of all files together."""
    max_token: int
    """Largest token id that occurs."""
    sha256: tuple[str, ...]
    """Of every .bin file as a whole, in the order of the prefixes."""
    ranges: tuple[tuple[int, int] | None, ...] | None = None
    """Of every file the documents [first, end) that belong to this split; None: all of them."""


class ValidationEntry(SplitEntry):
    """The validation split, with the loss that word frequencies alone would reach on it."""

    unigram_nats: float
    """Mean nats per token of the validation stream under a unigram model with add-one smoothing over the whole
    vocabulary, fitted on the domain's own training tokens."""


class DomainEntry(Config):
    """One domain of the data set."""

    name: str
    """The domain's name."""
    train: SplitEntry
    """What training samples from."""
    validation: ValidationEntry
    """What is held out."""


class Manifest(Config):
    """A prepared data set. Load it with `Manifest.load`, make one with `Manifest.build`."""

    format: Literal["megamix-manifest"] = FORMAT
    """Says what the file is."""
    version: Literal[1] = VERSION
    """Version of the layout of this file."""
    tokenizer: TokenizerEntry
    """The tokenizer of all domains."""
    dtype: str
    """Type that holds every stored token: uint16 or int32."""
    validation_fraction: float
    """Share of the documents that was held out, as asked for."""
    split: str | None = None
    """Megatron's ``--split`` that made the document ranges; None where no file is shared between splits."""
    domains: tuple[DomainEntry, ...]
    """In the order of all arrays that have one entry a domain."""
    fingerprint: str
    """sha256 over the names, the hashes of all token files, their document ranges, and the tokenizer's hash."""

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
        """A manifest for ``folder`` with its fingerprint computed; `save` writes it."""
        manifest = cls(
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
            path: The file, or the folder it lies in.

        Raises:
            InputError: No such file, not JSON, another format or version, wrong or missing entries, two domains with
                one name, a token file that is missing, token ids beyond the vocabulary, or a fingerprint that does not
                follow from the contents.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        data = _read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            seen = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise InputError(f"{path} is no megamix manifest: its format is {seen!r}, expected {FORMAT!r}.")
        if data.get("version") != VERSION:
            raise InputError(
                f"{path} has version {data.get('version')!r}, this megamix reads version {VERSION}."
                " Run `megamix prepare` again, or use the megamix that wrote it."
            )
        manifest = validate(cls, data, str(path))
        manifest._folder = path.parent
        manifest._check(path)
        return manifest

    @property
    def folder(self) -> Path:
        """Where the manifest lies; its paths are relative to it."""
        return self._folder

    @property
    def domain_names(self) -> list[str]:
        """The domains, in the order of every array with one entry a domain."""
        return [domain.name for domain in self.domains]

    def domain(self, name: str) -> DomainEntry:
        """The entry of one domain; an unknown name is an `InputError` that suggests the nearest one."""
        for domain in self.domains:
            if domain.name == name:
                return domain
        raise InputError(f"{self.folder / FILE_NAME} has no domain '{name}'." + did_you_mean(name, self.domain_names))

    def natural_weights(self, names: Sequence[str] | None = None) -> np.ndarray:
        """Each domain's share of the training tokens, float64 [K], sums to 1; ``names``: of these domains alone."""
        domains = self.domains if names is None else [self.domain(name) for name in names]
        tokens_K = np.array([domain.train.tokens for domain in domains], dtype=np.float64)
        return tokens_K / tokens_K.sum()

    def prefixes(self, name: str, split: Split) -> list[Path]:
        """The token files of one split, without suffix, as paths that can be opened."""
        return [self.folder / prefix for prefix in self._split(name, split).prefixes]

    def open_domain(self, name: str, split: Split = "train", *, verify: bool = True) -> DomainTokens:
        """Opens one split of a domain as a token stream.

        Args:
            name: The domain.
            split: "train" or "validation".
            verify: See `IndexedTokens`.

        Raises:
            InputError: No such domain or split, damaged files, or files with other tokens than the manifest says.
        """
        entry = self._split(name, split)
        tokens = DomainTokens(name, self.prefixes(name, split), entry.tokens, verify=verify, ranges=entry.ranges)
        # Adopted domains may be narrower than the widest of them; what is read is widened anyway.
        if not np.can_cast(tokens.dtype, self.dtype):
            raise InputError(
                f"domain '{name}': its {split} files store {tokens.dtype.name}, but the manifest says {self.dtype}."
                " Run `megamix prepare` again."
            )
        return tokens

    def load_tokenizer(self) -> LoadedTokenizer:
        """Opens the tokenizer.

        Raises:
            InputError: It is missing, damaged, or another one than the tokens were made with.
        """
        from megamix.data.tokens.tokenizer import LoadedTokenizer

        tokenizer = LoadedTokenizer(self.folder / self.tokenizer.file, eod=self.tokenizer.eod_id)
        tokenizer.expect(self.tokenizer.sha256)
        return tokenizer

    def verify_hashes(self) -> None:
        """Reads every token file and compares its hash: slow, but it sees changed bytes in a file of the right size.

        Raises:
            InputError: A file's contents have changed; the message names the domain and the file.
        """
        hashes: dict[Path, str] = {}  # the splits of a domain may share a file
        for domain in self.domains:
            for split in (domain.train, domain.validation):
                for prefix, wanted in zip(split.prefixes, split.sha256, strict=True):
                    path = bin_path(self.folder / prefix)
                    if path not in hashes:
                        with open(path, "rb") as file:
                            hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
                    seen = hashes[path]
                    if seen != wanted:
                        raise InputError(
                            f"domain '{domain.name}': {path} has the hash {seen[:12]}, the manifest says {wanted[:12]}:"
                            " its contents have changed. Copy it again, or run `megamix prepare` again."
                        )

    def save(self) -> Path:
        """Writes ``manifest.json`` into its folder, whole or not at all, and returns its path."""
        path = self.folder / FILE_NAME
        text = json.dumps(self.model_dump(mode="json", exclude_none=True), indent=1, ensure_ascii=False)
        replace_file(path, (text + "\n").encode("utf-8"))
        return path

    def _split(self, name: str, split: str) -> SplitEntry:
        domain = self.domain(name)
        if split not in ("train", "validation"):
            raise InputError(f"unknown split '{split}'." + did_you_mean(split, ("train", "validation")))
        return domain.train if split == "train" else domain.validation

    def _check(self, path: Path) -> None:
        names = self.domain_names
        doubled = sorted({name for name in names if names.count(name) > 1})
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
        if split.ranges is not None and len(split.ranges) != len(split.prefixes):
            raise InputError(
                f"{path}: domain '{name}' has {len(split.prefixes)} token files and {len(split.ranges)} document"
                " ranges, expected one range (or null) for each file. Run `megamix blend adopt` again."
            )
        for prefix in split.prefixes:
            for file in (bin_path(self.folder / prefix), idx_path(self.folder / prefix)):
                if not file.is_file():
                    raise InputError(
                        f"domain '{name}': {file} is missing. Copy the prepared folder as a whole, or run"
                        " `megamix prepare` again."
                    )


def _fingerprint(tokenizer: TokenizerEntry, domains: Sequence[DomainEntry]) -> str:
    content = {"tokenizer": tokenizer.sha256, "domains": [_identity(domain) for domain in domains]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def _identity(domain: DomainEntry) -> list[object]:
    """What a domain's data is, apart from where it lies. Whole files, the usual case, have no ranges in it."""
    splits = (domain.train, domain.validation)
    ranges = [split.ranges for split in splits]
    return [domain.name, *(list(split.sha256) for split in splits), *(ranges if any(ranges) else ())]


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"cannot read the manifest {path}: {error.strerror or error}. Run `megamix prepare`, or check the path."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}. Run `megamix prepare` again.") from error


def digest(entry: DomainEntry) -> str:
    """Names the data of a domain: a hash over what the manifest says of its files."""
    content = [split.model_dump(mode="json", exclude={"prefixes"}) for split in (entry.train, entry.validation)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
