"""Manifest of version 1 to version 2: the hashes of every file's blocks, added to what is there."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from megamix.core.errors import InputError
from megamix.data.tokens.hashes import FileHashes, hash_file
from megamix.data.tokens.indexed import bin_path, idx_path
from megamix.data.tokens.manifest import DomainEntry, Manifest, PairContents, SplitEntry

S = TypeVar("S", bound=SplitEntry)


def with_contents(manifest: Manifest) -> Manifest:
    """The manifest with the contents of all its files, which are read once. The fingerprint stays.

    Raises:
        InputError: an index that does not fit its data, or a file that cannot be read. A .bin file is to be verified
            beforehand.
    """
    known: dict[Path, FileHashes] = {}

    def contents(prefix: str) -> PairContents:
        pair = [path(manifest.folder / prefix) for path in (bin_path, idx_path)]
        for file in pair:
            if file not in known:
                try:
                    known[file] = hash_file(file)
                except OSError as error:
                    raise InputError(f"cannot read {file}: {error.strerror or error}. Check the disk.") from error
        return PairContents.of(known[pair[0]], known[pair[1]])

    def filled(split: S) -> S:
        return split.model_copy(update={"contents": tuple(map(contents, split.prefixes))})

    domains = []
    for domain in manifest.domains:
        manifest.open_domain(domain.name, "train")  # checks the indexes, of which version 1 has no hash
        manifest.open_domain(domain.name, "validation")
        domains.append(DomainEntry(name=domain.name, train=filled(domain.train), validation=filled(domain.validation)))
    return Manifest.build(
        manifest.folder,
        tokenizer=manifest.tokenizer,
        dtype=manifest.dtype,
        validation_fraction=manifest.validation_fraction,
        split=manifest.split,
        domains=domains,
    )
