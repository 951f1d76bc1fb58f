"""One domain, from archive to file: unpack, clean, drop duplicates, write.

`build_apart` runs it in a separate process: cleaning is Python and would otherwise share one core, and the memory of a
large domain goes back to the system at once. The process is spawned rather than forked, since the caller has threads.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import re
from pathlib import Path

import zstandard

from megamix.core.files import parse_json, replace_file, replace_json, sha256_of
from megamix.prepare.corpus.clean import CLEANERS, cut, tidy
from megamix.prepare.corpus.sources import Source
from megamix.prepare.corpus.unpack import DamagedArchive, members

RECIPE = 2
"""Version of the cleaning: a change builds the files of an older megamix again."""

# In characters. A shorter document has nothing to learn from; a longer one is cut, so that a split by documents into
# training and validation comes near the shares asked for.
_SHORTEST_DOCUMENT, _LONGEST_DOCUMENT = 16, 32_768
_ZSTD_LEVEL = 3


class WrongSize(Exception):
    """A domain is so small that its package cannot hold what the table describes."""


@dataclasses.dataclass(frozen=True)
class BuiltDomain:
    """Finished domain, as kept in ``corpus.json``."""

    domain: str
    file: str
    documents: int
    text_bytes: int
    sha256: str
    package: str
    version: str
    description: str
    licence: str
    warning: str | None = None
    """Set where the size differs from the table's by more than the tolerance."""
    recipe: int = RECIPE


def note_path(out: Path, domain: str) -> Path:
    """Path of a finished domain's `BuiltDomain`."""
    return out / ".records" / f"{domain}.json"


def finished(out: Path, source: Source) -> BuiltDomain | None:
    """A domain whose file is whole and made by the present recipe; None otherwise."""
    try:
        built = BuiltDomain(**parse_json(note_path(out, source.domain).read_bytes()))
        whole = built.recipe == RECIPE and sha256_of(out / built.file) == built.sha256
    except (OSError, ValueError, TypeError):
        return None
    return built if whole else None


def documents(source: Source, archive: Path) -> list[str]:
    """The cleaned documents without exact duplicates, sorted by path in the package, then place in the file.

    Raises:
        DamagedArchive: the archive cannot be read to its end, or what is inside is not what its name says.
    """
    wanted = re.compile(source.files)
    first: dict[bytes, tuple[str, int, str]] = {}  # of equal texts the one with the smallest key stays
    try:
        for key, text in CLEANERS[source.cleaner](members(archive, lambda path: wanted.fullmatch(path) is not None)):
            for number, piece in enumerate(cut(tidy(text), _LONGEST_DOCUMENT)):
                if len(piece) < _SHORTEST_DOCUMENT:
                    continue
                digest = hashlib.blake2b(piece.encode(), digest_size=16).digest()
                entry = (key, number, piece)
                first[digest] = min(first.get(digest, entry), entry)
    except (KeyError, json.JSONDecodeError) as error:
        raise DamagedArchive(f"{archive.name}: unexpected contents ({type(error).__name__}: {error})") from error
    return [text for _, _, text in sorted(first.values())]


def build_domain(source: Source, archive: Path, version: str, out: Path) -> BuiltDomain:
    """Writes ``OUT/<domain>.jsonl.zst`` and its `BuiltDomain`, each whole or not at all.

    Raises:
        DamagedArchive: the archive cannot be read.
        WrongSize: less than half the expected text came out; nothing is written.
    """
    texts = documents(source, archive)
    text_bytes = sum(len(text.encode()) for text in texts)
    ratio = text_bytes / source.expected_bytes
    sizes = f"{len(texts)} documents, {text_bytes:,} bytes, {ratio:.2f} times the {source.expected_bytes:,} expected"
    if ratio < 0.5:
        raise WrongSize(
            f"{sizes}; the {source.package.label} in version {version} does not hold what this domain is made of"
        )
    low, high = source.tolerance
    warning = None if low <= ratio <= high else f"{sizes}; between {low} and {high} times was expected"

    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj()
    pieces = [compressor.compress(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n") for text in texts]
    data = b"".join([*pieces, compressor.flush()])
    built = BuiltDomain(
        domain=source.domain,
        file=f"{source.domain}.jsonl.zst",
        documents=len(texts),
        text_bytes=text_bytes,
        sha256=hashlib.sha256(data).hexdigest(),
        package=f"{source.package.registry}:{source.package.name}",
        version=version,
        description=source.description,
        licence=source.licence,
        warning=warning,
    )
    note = note_path(out, source.domain)
    note.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out / built.file, data)
    replace_json(note, dataclasses.asdict(built))
    return built


def build_apart(source: Source, archive: Path, version: str, out: Path) -> BuiltDomain:
    """`build_domain` in a fresh Python process.

    Raises:
        DamagedArchive, WrongSize: as `build_domain`.
        RuntimeError: the process died.
    """
    # One pool per domain: a process that dies breaks its pool, which the other domains must survive.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(build_domain, source, archive, version, out).result()
