"""Readers of package archives, in memory: nothing is installed, run or unpacked to disk.

An archive that is cut short or damaged raises `DamagedArchive`, whatever its format, so that the caller can fetch it
again.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
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
