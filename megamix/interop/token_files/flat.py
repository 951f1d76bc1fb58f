"""Flat files of token ids, one after the other.

    NAME.npy   OLMo, dolma: the ids alone, without a header, in spite of the name; or numpy's own format
    NAME.ds    datatrove, nanotron: the ids alone; NAME.ds.index has the ends of the documents, uint64 in tokens,
               NAME.ds.metadata begins with ``tokenizer|bytes of a token``
    NAME.bin   nanoGPT: the ids alone; llm.c: after a header of 256 int32

Sources: dolma's ``tokenizer/memmap_writer.py`` (1.2), OLMo-core's ``data/utils.py`` (3.0), datatrove's
``pipeline/tokens/tokenizer.py`` (0.10), llm.c's ``dev/data/data_common.py``. Where a file does not say of which type
its ids are, OLMo-core's rule holds: the narrowest unsigned type for the vocabulary, from uint16 on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamix.core.errors import InputError
from megamix.data.tokens.tokenizer import LoadedTokenizer

ENDINGS = (".npy", ".ds", ".bin")
DTYPES = ("uint8", "uint16", "uint32", "int32", "int64", "uint64")
"""Types that ``--dtype`` names."""
_AT_ONCE = 1 << 20
_LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: version and type
_LLM_C_HEADER = 256 * 4
_LOOKED_AT = 1 << 16  # tokens of a file whose type is checked
_FEW = 64  # tokens say nothing about their type


@dataclass(frozen=True)
class FlatFile:
    """A flat file.

    Attributes:
        offset: bytes before the first token.
        index: the file of the documents' ends; None where a token ends them.
    """

    path: Path
    dtype: np.dtype[Any]
    offset: int
    num_tokens: int
    index: Path | None

    @property
    def as_it_is(self) -> np.dtype[Any] | None:
        """The type under which Megatron's format takes the bytes of the file as they are; None: it does not."""
        narrow = {"uint8": "u1", "uint16": "<u2", "int32": "<i4", "uint32": "<i4"}  # ids are below 2^31
        fits = not self.offset and self.dtype.newbyteorder("<") == self.dtype and self.dtype.name in narrow
        return np.dtype(narrow[self.dtype.name]) if fits else None

    def pieces(self) -> Iterator[np.ndarray]:
        """The tokens, in pieces.

        Raises:
            InputError: the file ended early.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            left = self.num_tokens
            while left:
                tokens = np.fromfile(file, self.dtype, min(left, _AT_ONCE))
                if not tokens.size:
                    raise InputError(f"{self.path} ended {left:,} tokens early. Do not write to it meanwhile.")
                yield tokens
                left -= len(tokens)

    def indexed_lengths(self) -> Iterator[np.ndarray]:
        """Lengths of the documents by `index`, in pieces.

        Raises:
            InputError: the ends fall, or the last is not the number of tokens.
        """
        assert self.index is not None
        last = 0
        with open(self.index, "rb") as file:
            while (ends := np.fromfile(file, "<u8", _AT_ONCE)).size:
                lengths = np.diff(ends.astype(np.int64), prepend=last)
                if lengths.min() < 0:
                    raise InputError(f"{self.index}: the ends of documents fall. Copy it and {self.path.name} again.")
                last = int(ends[-1])
                yield lengths
        if last != self.num_tokens:
            raise InputError(
                f"{self.index}: the last document ends after {last:,} tokens, but {self.path} holds {self.num_tokens:,} of"
                f" {self.dtype.name}. Copy both again, or name the type of the ids with --dtype."
            )


def open_flat(path: Path, tokenizer: LoadedTokenizer, dtype: str | None) -> FlatFile:
    """Opens a flat file.

    Args:
        dtype: one of `DTYPES`; None: as the file says, else by the vocabulary.

    Raises:
        InputError: it cannot be read or holds no ids, has another shape than [tokens], or its ids are of another type.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_LLM_C_HEADER)
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
    offset, said = _header(path, head)
    found = np.dtype(said or dtype or _by_vocabulary(tokenizer))
    if found.byteorder == "=":
        found = found.newbyteorder("<")
    if found.kind not in "iu":
        raise InputError(f"{path} holds {found.name}, expected integers, the ids of tokens.")
    if said and dtype and found != np.dtype(dtype):
        raise InputError(f"{path} says that it holds {found.name}, but --dtype says {dtype}. Leave --dtype out.")
    num_tokens, left = divmod(size - offset, found.itemsize)
    if left or not num_tokens:
        raise InputError(
            f"{path} holds {size - offset:,} bytes of tokens, expected some, a multiple of {found.itemsize}, for"
            f" {found.name}. Name the type of the ids with --dtype, or copy the file again."
        )
    index = path.with_name(path.name + ".index")
    has_index = path.name.lower().endswith(".ds") and index.is_file()
    flat = FlatFile(path, found, offset, num_tokens, index if has_index else None)
    _check_type(flat, tokenizer)
    return flat


def _by_vocabulary(tokenizer: LoadedTokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def _header(path: Path, head: bytes) -> tuple[int, str | None]:
    """Bytes before the first token, and the type of the ids if the file or one beside it says it."""
    if head.startswith(b"\x93NUMPY"):
        return _numpy_header(path)
    if path.name.lower().endswith(".ds"):
        return 0, _datatrove_type(path.with_name(path.name + ".metadata"))
    magic, version, num_tokens = struct.unpack_from("<3i", head) if len(head) == _LLM_C_HEADER else (0, 0, 0)
    if magic in _LLM_C and version == _LLM_C[magic][0]:
        kind = _LLM_C[magic][1]
        if path.stat().st_size != _LLM_C_HEADER + num_tokens * np.dtype(kind).itemsize:
            raise InputError(f"{path}: its header says {num_tokens:,} tokens, but it has another size. Copy it again.")
        return _LLM_C_HEADER, kind
    return 0, None


def _numpy_header(path: Path) -> tuple[int, str]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} begins as numpy's files do, and cannot be read as one: {error}.") from error
    if array.ndim != 1:
        raise InputError(
            f"{path} holds an array of shape {array.shape}, expected one dimension: the ids of all tokens, one after the"
            " other. Save it flat (array.ravel()), with the end-of-document tokens in place."
        )
    assert isinstance(array, np.memmap)
    return int(array.offset), array.dtype.str


def _datatrove_type(metadata: Path) -> str | None:
    try:
        with open(metadata, "rb") as file:
            first = file.readline(4096).decode("utf-8", "replace")
    except OSError:
        return None
    return {"2": "uint16", "4": "uint32"}.get(first.strip().rpartition("|")[2])


def _check_type(flat: FlatFile, tokenizer: LoadedTokenizer) -> None:
    """Refuses a type that the first tokens do not look like."""
    with open(flat.path, "rb") as file:
        file.seek(flat.offset)
        tokens = np.fromfile(file, flat.dtype, _LOOKED_AT)
    highest = (tokenizer.vocab_size - 1) >> 16
    if flat.dtype.itemsize == 2 and len(tokens) >= _FEW and tokens[1::2].max() <= highest < tokens[::2].max():
        raise InputError(
            f"{flat.path}: read as {flat.dtype.name}, every second token is at most {highest}, as if each were half of a"
            " wider number. Give --dtype uint32."
        )
    wrong = (tokens < 0) | (tokens >= tokenizer.vocab_size)
    if wrong.any():
        raise InputError(
            f"{flat.path}, read as {flat.dtype.name}, holds the token id {tokens[wrong][0]}, but the tokenizer's ids are 0"
            f" to {tokenizer.vocab_size - 1}. Give the tokenizer that the file was made with, or the type of its ids with"
            " --dtype."
        )
