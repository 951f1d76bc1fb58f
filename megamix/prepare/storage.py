"""Input files, here or behind a URL that fsspec opens (s3://, gs://, hdfs://, https://, ...).

A remote file is read in ranges, each tried again when the connection breaks; a range names its bytes, so no byte can
come twice. fsspec is imported only here.
"""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.core.packages import need

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try."""
_BUFFER_BYTES = 1 << 17
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_VERSIONS = ("ETag", "etag", "generation", "checksum", "md5Hash", "LastModified", "Last-Modified", "last_modified",
             "mtime", "created", "modificationTime", "modification_time", "blob_id", "last_commit")  # fmt: skip
"""What file systems call that which changes with a file, the surest first."""
_SEEN: dict[Url, Any] = {}
"""What file systems said of files."""
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError,
              TypeError, ImportError)  # fmt: skip


class Url(str):
    """Address of a remote file; unlike a `Path` it keeps both slashes."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The last part of the path, without a query."""
        return re.split(r"[?#]", self, maxsplit=1)[0].rstrip("/").rpartition("/")[2]


InputPath = Path | Url


class Stat(NamedTuple):
    """Size of a file, and what changes with its contents."""

    num_bytes: int
    mtime_ns: int
    version: str | None
    """Of a remote file: its etag, or time of the last change."""


def is_url(text: str) -> bool:
    """Whether a path is an address."""
    return _SCHEME.match(text) is not None


def located(text: str) -> InputPath:
    """A path as it is given."""
    return Url(text) if is_url(text) else Path(text)


def open_input(path: str | InputPath) -> BinaryIO:
    """Opens a file for reading.

    Raises:
        OSError: A local file cannot be opened.
        InputError: A remote one cannot.
    """
    if not is_url(str(path)):
        return open(path, "rb")
    return io.BufferedReader(_RemoteFile(Url(path)), _BUFFER_BYTES)


def stat_of(path: str | InputPath) -> Stat:
    """Size and version of a file.

    Raises:
        OSError, InputError: See `open_input`.
    """
    if not is_url(str(path)):
        found = Path(path).stat()
        return Stat(found.st_size, found.st_mtime_ns, None)
    if path not in _SEEN:
        system, place = _system(Url(path))
        _SEEN[Url(path)] = _tried(Url(path), lambda: system.info(place))
    info = _SEEN[Url(path)]
    if info.get("size") is None or info.get("partial") is False:
        raise InputError(f"{path}: its server does not give parts of files, which reading needs. Download it first.")
    version = next((f"{key} {info[key]}" for key in _VERSIONS if info.get(key) is not None), None)
    return Stat(int(info["size"]), 0, version)


def forget() -> None:
    """Asks anew for what is known of remote files; called where a command begins."""
    _SEEN.clear()


def find_remote(url: Url) -> list[Url]:
    """The files of an address that may be a file, a folder (searched recursively) or a glob, sorted.

    Raises:
        InputError: There is none, or the place cannot be reached.
    """
    system, place = _system(url)
    if any(sign in url for sign in "*["):
        found = _tried(url, lambda: system.glob(place, detail=True))
    elif remote_folder(url) is not None:
        found = _tried(url, lambda: system.find(place, detail=True))
    else:
        return [url]
    files = {Url(system.unstrip_protocol(each)): info for each, info in found.items() if info.get("type") == "file"}
    _SEEN.update({file: info for file, info in files.items() if info.get("size") is not None})
    return sorted(files)


def remote_folder(url: Url) -> Url | None:
    """The address that the names of a folder's files begin with; None if it is no folder's."""
    if url.startswith(("http://", "https://")) and not url.endswith("/"):
        return None  # any page with links would be one
    system, place = _system(url)
    return Url(system.unstrip_protocol(place).rstrip("/")) if _tried(url, lambda: system.isdir(place)) else None


def _system(url: Url) -> tuple[Any, str]:
    fsspec = need("fsspec", f"reading {url}")
    try:
        return fsspec.core.url_to_fs(str(url))
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{url} cannot be opened: {_reason(error)}. Check the address, or install what it names."
        ) from error


def _tried(url: Url, action: Any) -> Any:
    """What an action gives, tried again where it fails for a reason that may pass."""
    for number in range(len(WAITS) + 1):
        try:
            return action()
        except _PERMANENT as error:
            raise InputError(
                f"cannot read {url}: {_reason(error)}. Check the address, the rights and the network."
            ) from error
        except InputError:
            raise
        except Exception as error:  # every file system has its own kinds
            if number == len(WAITS):
                raise InputError(
                    f"cannot read {url}: {_reason(error)}, {number + 1} times. Check the network; the same command goes on."
                ) from error
            get_logger().warning("%s: %s; trying again in %g s", url, _reason(error), WAITS[number])
            time.sleep(WAITS[number])
    raise AssertionError


def _reason(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return f"{type(error).__name__}{f' ({first})' if first else ''}"


class _RemoteFile(io.RawIOBase):
    """A remote file, read in ranges."""

    def __init__(self, url: Url) -> None:
        super().__init__()
        self._url, self._at = url, 0
        self._system, self._place = _system(url)
        self._size = stat_of(url).num_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._at))
        if wanted:
            view[:wanted] = _tried(self._url, lambda: self._range(self._at, wanted))
            self._at += wanted
        return wanted

    def _range(self, start: int, size: int) -> bytes:
        data = self._system.cat_file(self._place, start=start, end=start + size)
        if len(data) > size:
            raise InputError(
                f"{self._url}: its server sends whole files instead of the parts asked for. Download it first."
            )
        if len(data) < size:
            raise EOFError(f"{len(data)} of {size} bytes came")
        return data
