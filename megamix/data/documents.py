"""Raw text: which files make up which domain, and the documents in them.

    find_inputs(specs)        domain -> files
    read_blocks(file)         blocks of about a megabyte of whole lines, undecoded: cheap, so one process feeds many
    Block.texts(text_key)     the documents of a block: UTF-8 and JSON are decoded here, in any process

A ``.txt`` file is one document. All others hold one JSON object a line. Damage is an `InputError` with file and line.
"""

from __future__ import annotations

import bisect
import contextlib
import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from megamix.errors import InputError

TEXT_KEY = "text"
_IN_FOLDERS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")  # a folder may hold other files, such as a report in .json
_READABLE = (*_IN_FOLDERS, ".json", ".json.gz", ".json.zst")
_DOMAIN_NAME = re.compile(r"\w[\w.+-]*")
_READ_BYTES = 1 << 18
_DAMAGED_STREAM = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
_MAX_SKIPPED_BYTES = 1 << 26  # how far into a compressed file a sample looks


def find_inputs(specs: Sequence[str]) -> dict[str, list[Path]]:
    """Finds the input files of every domain.

    Args:
        specs: Each is ``name=path[,path...]``, where a path may be a file, a glob or a folder (searched recursively),
            or a folder whose entries are the domains: ``<domain>.jsonl[.gz|.zst]``, ``<domain>.txt``, or a sub-folder
            ``<domain>/`` of such files. Hidden files and files of other kinds in a folder are left out.

    Returns:
        Sorted files by domain, domains sorted by name.

    Raises:
        InputError: Nothing found, a path that is missing or unreadable, a file of an unknown kind that was asked for by
            name, a name no folder can have, two domains with one name, or a domain without text.
    """
    found: dict[str, list[Path]] = {}
    for spec in specs:
        for name, paths in _domains_of(spec):
            if name in found:
                raise InputError(
                    f"two domains are called '{name}': {found[name][0]} and {paths[0]}. Rename one, or give the files"
                    f" of one domain together: {name}=FIRST,SECOND."
                )
            if not _DOMAIN_NAME.fullmatch(name):
                raise InputError(
                    f"'{name}' cannot be the name of a domain (from {paths[0]}). Use letters, digits, '_', '-', '+' and"
                    " '.', and begin with a letter or digit."
                )
            _check_readable(name, paths)
            found[name] = paths
    if not found:
        raise InputError(
            f"no input found in: {', '.join(specs) or '(nothing given)'}. Give name=FILES or a folder of"
            " <domain>.jsonl files or <domain>/ sub-folders."
        )
    return dict(sorted(found.items()))


def _domains_of(spec: str) -> Iterator[tuple[str, list[Path]]]:
    folder = Path(spec)
    if folder.is_dir():
        for entry in sorted(_entries(folder)):
            if entry.is_dir():
                yield entry.name, _files_below(entry)
            elif suffix := _suffix(entry, _IN_FOLDERS):
                yield entry.name.removesuffix(suffix), [entry]
        return
    name, equals, patterns = spec.partition("=")
    if not equals:
        hint = f" To use it as a domain: {folder.name.split('.')[0]}={spec}." if folder.exists() else ""
        raise InputError(f"input '{spec}' is neither a folder nor of the form name=path[,path...].{hint}")
    paths = sorted({path for pattern in patterns.split(",") if pattern for path in _expand(name, pattern)})
    if not paths:
        raise InputError(f"domain '{name}': '{spec}' names no files. Write {name}=path[,path...].")
    yield name, paths


def _expand(name: str, pattern: str) -> list[Path]:
    if os.path.isdir(pattern):
        return _files_below(Path(pattern))
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    paths = [Path(match) for match in matches if not os.path.isdir(match)]
    if not paths:
        raise InputError(f"domain '{name}': no file matches '{pattern}'. Check the path.")
    for path in paths:
        if not _suffix(path, _READABLE):
            raise InputError(f"domain '{name}': {path} is of an unknown kind. Known: {', '.join(_READABLE)}.")
    return paths


def _files_below(folder: Path) -> list[Path]:
    paths: list[Path] = []
    for entry in _entries(folder):
        if entry.is_dir():
            paths += _files_below(entry)
        elif _suffix(entry, _IN_FOLDERS):
            paths.append(entry)
    return sorted(paths) or [folder]  # an empty folder stands for itself, so that the message can name it


def _entries(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror or error}.") from error


def _suffix(path: Path, known: Sequence[str]) -> str | None:
    return next((suffix for suffix in known if path.name.endswith(suffix)), None)


def _check_readable(name: str, paths: list[Path]) -> None:
    if paths[0].is_dir():
        raise InputError(
            f"domain '{name}': the folder {paths[0]} holds no {', '.join(_IN_FOLDERS)} file. Remove it, or name its"
            f" files ({name}=FILES)."
        )
    for path in paths:
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise InputError(f"domain '{name}': cannot read {path}: {error.strerror or error}.") from error
    if not any(path.stat().st_size for path in paths):
        raise InputError(f"domain '{name}' is empty: {paths[0]} has 0 bytes. Remove the domain or give it text.")


@dataclass(frozen=True)
class Block:
    """Whole lines of one file, or one whole ``.txt`` file, not decoded yet. Small to pickle."""

    path: str
    """The file."""
    data: bytes
    """The lines, decompressed."""
    first_line: int
    """Number of the first line, from 1."""
    file_bytes: int
    """Bytes of the file, as it lies on the disk, that were read for this block."""

    def texts(self, text_key: str = TEXT_KEY) -> list[str]:
        """The documents, in order; empty ones too.

        Raises:
            InputError: Invalid UTF-8 or JSON, or a line without a text; the message names file and line.
        """
        data = self.data.removeprefix(b"\xef\xbb\xbf") if self.first_line == 1 else self.data
        if self.path.endswith(".txt"):
            try:
                return [data.decode("utf-8")]
            except UnicodeDecodeError as error:
                line = data.count(b"\n", 0, error.start) + 1
                raise InputError(_not_utf8(self.path, line, error)) from error
        return [
            self._text(line, number, text_key)
            for number, line in enumerate(data.split(b"\n"), self.first_line)
            if line and not line.isspace()
        ]

    def _text(self, line: bytes, number: int, text_key: str) -> str:
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(_not_utf8(self.path, number, error)) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({error}). Expected one JSON object a line.") from error
        if not isinstance(record, dict):
            raise InputError(f"{where}: holds {type(record).__name__}, expected an object with the key '{text_key}'.")
        if text_key not in record:
            seen = ", ".join(sorted(record)[:8]) or "none"
            raise InputError(f"{where}: no key '{text_key}' (keys: {seen}). Fix the line, or choose another key.")
        text = record[text_key]
        if not isinstance(text, str):
            raise InputError(f"{where}: '{text_key}' is {type(text).__name__}, expected a string. Fix the line.")
        if b"\\u" in line:
            _check_surrogates(text, where)
        return text


def _check_surrogates(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: the escape \\u{ord(text[error.start]):04x} is half of a character (a lone surrogate)."
            " Fix or remove the line."
        ) from error


def _not_utf8(path: str, line: int, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{path}, line {line}: not valid UTF-8 (byte 0x{byte:02x}, {error.reason}). Convert the file to UTF-8."


def read_blocks(path: str | Path, block_bytes: int = 1 << 20) -> Iterator[Block]:
    """Reads a file as blocks of whole lines of about ``block_bytes``; a ``.txt`` file is one block.

    Block borders depend on the file and ``block_bytes`` alone. Memory: a few blocks, or the longest line.

    Raises:
        InputError: The file cannot be read, or its compressed stream is damaged or cut short.
    """
    path = str(path)
    whole = path.endswith(".txt")
    pieces: list[bytes] = []
    line, size, done = 1, 0, 0
    position = 0
    try:
        with open(path, "rb") as file:
            for piece in _decompressed(file, path):
                position = file.tell()
                pieces.append(piece)
                size += len(piece)
                cut = piece.rfind(b"\n") + 1
                if whole or size < block_bytes or not cut:
                    continue
                data = b"".join((*pieces[:-1], piece[:cut]))
                yield Block(path, data, line, position - done)
                line, done = line + data.count(b"\n"), position
                pieces = [piece[cut:]]
                size = len(pieces[0])
    except _DAMAGED_STREAM as error:
        line += sum(piece.count(b"\n") for piece in pieces)
        raise InputError(
            f"{path}, line {line}: the compressed file is damaged or cut short there ({error}). Fetch it again."
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}. Check the file.") from error
    if data := b"".join(pieces):
        yield Block(path, data, line, position - done)


def _decompressed(file: BinaryIO, path: str) -> Iterator[bytes]:
    if path.endswith(".gz"):
        stream = gzip.GzipFile(fileobj=file)
        while data := stream.read1(_READ_BYTES):
            yield data
    elif path.endswith(".zst"):
        yield from _zstd(file)
    else:
        while data := file.read(_READ_BYTES):
            yield data


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    """Decompresses all frames. zstandard's own reader takes a cut frame for the end of the file."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    while data := file.read(_READ_BYTES):
        while data:
            frame = decompressor.decompressobj() if frame is None or frame.eof else frame
            if text := frame.decompress(data):
                yield text
            data = frame.unused_data if frame.eof else b""
    if frame is not None and not frame.eof:
        raise EOFError("the last frame has no end")


def iter_documents(path: str | Path, text_key: str = TEXT_KEY) -> Iterator[str]:
    """The documents of one file, in order; empty ones too.

    Raises:
        InputError: The file cannot be read or is damaged; the message names file and line.
    """
    for block in read_blocks(path):
        yield from block.texts(text_key)


def sample_texts(paths: Sequence[Path], *, num_bytes: int, text_key: str = TEXT_KEY) -> Iterator[str]:
    """About ``num_bytes`` of text spread evenly over the files of a domain, always the same for the same files.

    Uncompressed files are sampled in pieces at even distances; of a compressed one, every n-th block within its first
    64 MiB of text. Texts longer than a piece are cut. An uncompressed domain below ``num_bytes`` is taken whole.

    Raises:
        InputError: Nothing could be read because a file is damaged (otherwise damage is left to whoever reads it all).
    """
    sizes = [Path(path).stat().st_size for path in paths]
    num_pieces = 256
    piece_bytes = num_bytes // num_pieces
    ends = list(itertools.accumulate(sizes))
    pieces: list[list[int]] = [[] for _ in paths]
    for number in range(num_pieces):
        position = number * ends[-1] // num_pieces
        file = bisect.bisect_right(ends, position)
        pieces[file].append(position - (ends[file] - sizes[file]))
    empty = True
    for path, size, offsets in zip(paths, sizes, pieces, strict=True):
        if str(path).endswith((".gz", ".zst")):
            texts = _sample_compressed(path, size, len(offsets) * piece_bytes, text_key) if offsets else iter(())
        elif ends[-1] <= num_bytes:
            texts = iter_documents(path, text_key)
        else:
            texts = itertools.chain.from_iterable(_sample_at(path, at, piece_bytes, text_key) for at in offsets)
        with contextlib.suppress(InputError):
            for text in texts:
                empty = empty and not text.strip()
                yield text
    if empty:  # either there is no text, or reading in order raises the error that says why
        yield from itertools.islice((text for path in paths for text in iter_documents(path, text_key)), 1)


def _sample_at(path: Path, offset: int, num_bytes: int, text_key: str) -> Iterator[str]:
    with open(path, "rb") as file:
        file.seek(offset)
        if offset:
            file.readline()  # the rest of a line that began earlier
        data = file.read(num_bytes)
        if path.name.endswith(".txt"):
            yield data.decode("utf-8", errors="ignore")
            return
        data += file.readline()
    # The first line number is unknown and unimportant: damage is reported when the file is read in order.
    for text in Block(str(path), data, offset + 1, len(data)).texts(text_key):
        yield text[:num_bytes]


def _sample_compressed(path: Path, size: int, num_bytes: int, text_key: str) -> Iterator[str]:
    block_bytes = 1 << 16
    text_bytes = min(4 * size, _MAX_SKIPPED_BYTES)  # text compresses to about a quarter
    stride = max(1, text_bytes // num_bytes)
    taken = 0
    for block in itertools.islice(read_blocks(path, block_bytes), 0, None, stride):
        for text in block.texts(text_key):
            yield text[:num_bytes]
            taken += len(text)
        if taken >= num_bytes:
            return
