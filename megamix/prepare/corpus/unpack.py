"""Readers of package archives and of the file formats inside them, in memory: nothing is installed, run or unpacked.

An archive that is cut short or damaged raises `DamagedArchive`, whatever its format, so that the caller can fetch it
again.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import zstandard

Member = tuple[str, bytes]
"""The path of a file inside an archive, with no leading ``./``, and its contents."""

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
_DAMAGE = (
    EOFError,
    lzma.LZMAError,
    zlib.error,
    zstandard.ZstdError,
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    struct.error,
)


class DamagedArchive(Exception):
    """An archive, or a file inside it, is cut short or otherwise cannot be decoded."""


@contextlib.contextmanager
def damage_reported(name: str) -> Iterator[None]:
    """Turns the decoding errors of the many formats into one `DamagedArchive` that names the file."""
    try:
        yield
    except _DAMAGE as error:
        raise DamagedArchive(f"{name} is damaged or incomplete: {error or type(error).__name__}") from error


def members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """The regular files of ``archive`` (.deb, .whl, .zip or a tar) whose path is ``wanted``, in archive order.

    Links are left out: what they point to is in the archive under its own name, and a link is never followed.

    Raises:
        DamagedArchive: the archive cannot be decoded to its end.
    """
    with damage_reported(archive.name), archive.open("rb") as stream:
        if archive.suffix == ".deb":
            name, data = next((m for m in read_ar(stream.read()) if m[0].startswith("data.tar")), ("", b""))
            if not name:
                raise DamagedArchive(f"{archive.name} holds no data.tar member, so it is no Debian package.")
            yield from tar_members(io.BytesIO(data), name, wanted)
        elif archive.suffix in (".whl", ".zip"):
            yield from _zip_members(stream, wanted)
        else:
            yield from tar_members(stream, archive.name, wanted)


def read_ar(data: bytes) -> Iterator[Member]:
    """The members of a Unix ``ar`` archive, the outer format of a .deb.

    Raises:
        DamagedArchive: no ar archive, or a member is shorter than its header says.
    """
    if not data.startswith(_AR_MAGIC):
        raise DamagedArchive(f"no ar archive: it begins with {data[:8]!r}, expected {_AR_MAGIC!r}.")
    position = len(_AR_MAGIC)
    while position < len(data):
        header = data[position : position + _AR_HEADER]
        size_field = header[48:58].strip()
        if len(header) < _AR_HEADER or header[58:] != b"`\n" or not size_field.isdigit():
            raise DamagedArchive(f"the ar header at byte {position} is damaged or incomplete.")
        size = int(size_field)
        body = data[position + _AR_HEADER : position + _AR_HEADER + size]
        if len(body) < size:
            raise DamagedArchive(f"the ar archive ends inside a member: {len(body)} of its {size} bytes are there.")
        yield header[:16].decode("ascii", "replace").strip().rstrip("/"), body
        position += _AR_HEADER + size + size % 2  # members start at even offsets


def _decompressed(stream: IO[bytes], name: str) -> IO[bytes]:
    if name.endswith((".gz", ".tgz")):
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    if name.endswith(".xz"):
        return lzma.LZMAFile(stream)  # type: ignore[return-value]
    if name.endswith(".zst"):
        return zstandard.ZstdDecompressor().stream_reader(stream)  # type: ignore[return-value]
    if name.endswith(".bz2"):
        return bz2.BZ2File(stream)  # type: ignore[return-value]
    return stream


def tar_members(stream: IO[bytes], name: str, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """The wanted regular files of a tar stream, compressed as the suffix of ``name`` says."""
    with damage_reported(name):
        plain = _decompressed(stream, name)
        with tarfile.open(fileobj=plain, mode="r|") as tar:
            for info in tar:
                path = info.name.removeprefix("./")
                if info.isfile() and wanted(path):
                    body = tar.extractfile(info)
                    yield path, body.read() if body else b""
        while plain.read(1 << 20):  # the checksum lies behind the last member
            pass


def _zip_members(stream: IO[bytes], wanted: Callable[[str], bool]) -> Iterator[Member]:
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            if not info.is_dir() and wanted(info.filename):
                yield info.filename, archive.read(info)


def decode(data: bytes) -> str:
    """UTF-8 where the bytes are valid UTF-8, Latin-1 otherwise (old source files and manual pages)."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


_DICTD_DIGITS = {
    letter: value for value, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}


def _dictd_number(text: str) -> int:
    value = 0
    for letter in text:
        value = value * 64 + _DICTD_DIGITS[letter]
    return value


def read_dictd(dictionary: bytes, index: bytes) -> list[str]:
    """The entries of a dictd dictionary in the order of its text, each once however many headwords lead to it.

    Args:
        dictionary: the ``.dict.dz`` file; dictzip is gzip with a table for random access, which is not needed here.
        index: the ``.index`` file; lines of headword, offset and length, the numbers in dictd's base 64.

    Raises:
        DamagedArchive: the dictionary cannot be decompressed, or the index does not fit it.
    """
    with damage_reported("the dictionary"):
        text = gzip.decompress(dictionary)
    places = set()
    for line in index.decode("utf-8", "replace").splitlines():
        fields = line.split("\t")
        if len(fields) < 3:
            continue
        try:
            places.add((_dictd_number(fields[1]), _dictd_number(fields[2])))
        except KeyError as error:
            raise DamagedArchive(f"the dictionary's index has a bad number in the line {line!r}.") from error
    if places and max(start + length for start, length in places) > len(text):
        raise DamagedArchive("the dictionary's index points behind its text.")
    entries = (decode(text[start : start + length]) for start, length in sorted(places))
    # The dictionary describes itself in entries of this name, which are reached by others, too.
    return [entry for entry in entries if not re.match(r"\s*00-?database", entry)]


_R_STRINGS, _R_STRING = 16, 9


def read_rdb(data: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database (``.rdb``) in file order; other objects are passed over.

    The file is a row of chunks, each a big-endian length followed by a zlib stream of one serialised R object.
    """
    position = 0
    while position + 4 < len(data):
        decoder = zlib.decompressobj()
        with damage_reported("the R database"):
            chunk = decoder.decompress(data[position + 4 :])
        if not decoder.eof or len(chunk) != struct.unpack_from(">I", data, position)[0]:
            raise DamagedArchive("the R database ends inside a chunk.")
        position = len(data) - len(decoder.unused_data)
        strings = read_xdr_strings(chunk)
        if strings is not None:
            yield strings


def read_xdr_strings(data: bytes) -> list[str] | None:
    """The strings of an R character vector serialised as XDR (format 2 or 3); None for any other object."""
    if data[:2] != b"X\n":
        raise DamagedArchive(f"no XDR serialisation: it begins with {data[:2]!r}, expected b'X\\n'.")
    with damage_reported("the R object"):
        (version,) = struct.unpack_from(">i", data, 2)
        position = 14  # behind the versions of the format, of the writer and of the oldest reader
        if version == 3:
            position += 4 + struct.unpack_from(">i", data, position)[0]  # the name of the native encoding
        flags, count = struct.unpack_from(">Ii", data, position)
        if flags & 0xFF != _R_STRINGS:
            return None
        position += 8
        strings = []
        for _ in range(count):
            flags, length = struct.unpack_from(">Ii", data, position)
            if flags & 0xFF != _R_STRING:
                raise DamagedArchive(f"an element of type {flags & 0xFF} in an R character vector.")
            position += 8
            body = data[position : position + max(length, 0)]
            if len(body) < length:
                raise DamagedArchive("the R object ends inside a string.")
            strings.append(decode(body))  # a length of -1 is R's NA
            position += len(body)
        return strings
