"""One domain, from its archive to its file: unpack, clean, drop duplicates, write, record.

Runs in a process of its own (`build_apart`): cleaning is Python and would otherwise share one core, and the memory of a
large domain goes back to the system at once. The process is started afresh rather than forked, since the caller may
hold threads and locks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import zstandard

import megamix
from megamix.prepare.corpus.clean import CLEANERS, tidy
from megamix.prepare.corpus.sources import Package, Source
from megamix.prepare.corpus.unpack import DamagedArchive, members

RECIPE = 1
"""Raised whenever cleaning changes what is written, so that files of an older megamix are built again."""

_SHORTEST_DOCUMENT = 16  # characters; below that there is nothing to learn
_ZSTD_LEVEL = 3
_DAMAGED_EXIT = 3
_SIZE_EXIT = 4


class WrongSize(Exception):
    """A domain came out so small that its source cannot be what the table describes."""


@dataclasses.dataclass(frozen=True)
class DomainRecord:
    """What was written for one domain, as kept in ``corpus.json``."""

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
    """Set where the size differs from what the table expects by more than its tolerance."""
    recipe: int = RECIPE


def record_path(out: Path, domain: str) -> Path:
    """Where the record of a finished domain lies."""
    return out / ".records" / f"{domain}.json"


def finished(out: Path, source: Source) -> DomainRecord | None:
    """The record of a domain whose file is there, whole, and made by the present recipe; None otherwise."""
    try:
        record = DomainRecord(**json.loads(record_path(out, source.domain).read_text(encoding="utf-8")))
        whole = record.recipe == RECIPE and file_sha256(out / record.file) == record.sha256
    except (OSError, ValueError, TypeError):
        return None
    return record if whole else None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that ``path`` never holds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def documents(source: Source, archive: Path) -> list[str]:
    """The cleaned documents without exact duplicates, sorted by path in the package, then place in the file.

    Raises:
        DamagedArchive: the archive cannot be read to its end, or what is inside is not what its name says.
    """
    wanted = re.compile(source.files)
    first: dict[bytes, tuple[str, str]] = {}  # of equal texts the one with the smallest key stays
    try:
        for key, text in CLEANERS[source.cleaner](members(archive, lambda path: wanted.fullmatch(path) is not None)):
            text = tidy(text)
            if len(text) < _SHORTEST_DOCUMENT:
                continue
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest not in first or key < first[digest][0]:
                first[digest] = (key, text)
    except (KeyError, json.JSONDecodeError) as error:
        raise DamagedArchive(f"{archive.name}: unexpected contents ({type(error).__name__}: {error})") from error
    return [text for _, text in sorted(first.values())]


def build_domain(source: Source, archive: Path, version: str, out: Path) -> DomainRecord:
    """Writes ``OUT/<domain>.jsonl.zst`` and its record, each whole or not at all.

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
    record = DomainRecord(
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
    write_whole(out / record.file, data)
    write_whole(record_path(out, source.domain), json.dumps(dataclasses.asdict(record), ensure_ascii=False).encode())
    return record


def build_apart(source: Source, archive: Path, version: str, out: Path) -> DomainRecord:
    """`build_domain` in a fresh Python process.

    Raises:
        DamagedArchive, WrongSize: as `build_domain`.
        RuntimeError: the process failed in another way; the message is its last line.
    """
    order = {"source": dataclasses.asdict(source), "archive": str(archive), "version": version, "out": str(out)}
    root = str(Path(megamix.__file__).parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    done = subprocess.run(
        [sys.executable, "-c", "from megamix.prepare.corpus.domain import main; main()"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode == 0:
        return DomainRecord(**json.loads(done.stdout))
    reason = (done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"])[-1]
    if done.returncode == _DAMAGED_EXIT:
        raise DamagedArchive(reason)
    if done.returncode == _SIZE_EXIT:
        raise WrongSize(reason)
    raise RuntimeError(f"cleaning failed: {reason}")


def main() -> None:
    """The child's side of `build_apart`: an order as JSON on standard input, the record on standard output."""
    order = json.load(sys.stdin)
    fields = order["source"]
    source = Source(**{**fields, "package": Package(**fields["package"])})
    try:
        record = build_domain(source, Path(order["archive"]), order["version"], Path(order["out"]))
    except (DamagedArchive, WrongSize) as error:
        print(error, file=sys.stderr)
        sys.exit(_DAMAGED_EXIT if isinstance(error, DamagedArchive) else _SIZE_EXIT)
    json.dump(dataclasses.asdict(record), sys.stdout, ensure_ascii=False)
