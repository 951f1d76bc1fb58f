"""Hashes of a file and of its blocks, by which a part of a file can be verified alone."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK_BYTES = 4 << 20
"""A block's digest takes 11 characters of the manifest: 28 MB for 10 TB of tokens."""
DIGEST_BYTES = 8
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class FileHashes:
    """Size and hashes of a file.

    Attributes:
        sha256: of the whole file, hexadecimal.
        blocks: `block_digest` of every block of `BLOCK_BYTES` bytes, the last of which may be shorter, in base64.
    """

    num_bytes: int
    sha256: str
    blocks: str


def block_digest(data: Any) -> bytes:
    """The first `DIGEST_BYTES` bytes of a block's SHA-256: enough against damage, which does not choose its bytes."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


class FileHasher:
    """Hashes of bytes that come in pieces, in one pass."""

    def __init__(self) -> None:
        self._whole, self._block = hashlib.sha256(), hashlib.sha256()
        self._digests: list[bytes] = []
        self._num_bytes = 0

    def update(self, data: Any) -> None:
        """Adds the next bytes, any buffer."""
        left = memoryview(data).cast("B")
        self._whole.update(left)
        while left:
            room = BLOCK_BYTES - self._num_bytes % BLOCK_BYTES
            self._block.update(left[:room])
            self._num_bytes += len(left[:room])
            left = left[room:]
            if self._num_bytes % BLOCK_BYTES == 0:
                self._end_block()

    def hashes(self) -> FileHashes:
        """The hashes of everything added; nothing can be added afterwards."""
        if self._num_bytes % BLOCK_BYTES:
            self._end_block()
        blocks = base64.b64encode(b"".join(self._digests)).decode("ascii")
        return FileHashes(self._num_bytes, self._whole.hexdigest(), blocks)

    def _end_block(self) -> None:
        self._digests.append(self._block.digest()[:DIGEST_BYTES])
        self._block = hashlib.sha256()


def hash_file(path: Path) -> FileHashes:
    """The hashes of a file, read once."""
    hasher = FileHasher()
    with open(path, "rb") as file:
        while data := file.read(_READ_BYTES):
            hasher.update(data)
    return hasher.hashes()
