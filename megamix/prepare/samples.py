"""Even samples of a domain's texts, on which a tokenizer is trained."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Iterator, Sequence

from megamix.core.errors import InputError
from megamix.prepare.blocks import TEXT_KEY, Block
from megamix.prepare.kinds import is_compressed, kind_of
from megamix.prepare.pieces import iter_documents, pieces_of, read_piece
from megamix.prepare.storage import InputPath, open_input, stat_of

_MAX_SKIPPED_BYTES = 1 << 26  # of a compressed file that a sample may read


def sample_texts(
    paths: Sequence[InputPath], *, num_bytes: int, text_key: str = TEXT_KEY, text_files: Sequence[str] = ()
) -> Iterator[str]:
    """Yields about ``num_bytes`` of text spread evenly over the files of a domain, deterministically.

    Uncompressed files are sampled in pieces at even distances, tables at the beginnings of row groups; of a compressed
    file or an archive, every n-th block within its first 64 MiB of text. Texts longer than a piece are cut. A domain of
    uncompressed files below ``num_bytes`` is taken whole.

    Args:
        text_files: See `pieces_of`.

    Raises:
        InputError: A damaged file, if nothing could be read; other damage is found when everything is read.
    """
    sizes = [stat_of(path).num_bytes for path in paths]
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
        kind, given = kind_of(path, text_files), (text_key, text_files)
        if kind == "rows":
            texts = _sample_rows(path, len(offsets), piece_bytes, text_key)
        elif kind == "members" or (kind == "lines" and is_compressed(path)):
            texts = _sample_stream(path, size, len(offsets) * piece_bytes, *given) if offsets else iter(())
        elif ends[-1] <= num_bytes:
            texts = iter_documents(path, *given, skip_bad=True)
        else:
            whole = kind == "whole"
            texts = itertools.chain.from_iterable(_sample_at(path, at, piece_bytes, text_key, whole) for at in offsets)
        with contextlib.suppress(InputError):
            for text in texts:
                empty = empty and not text.strip()
                yield text
    if empty:  # there is no text, or reading in order raises the error
        yield from itertools.islice((text for path in paths for text in iter_documents(path, text_key, text_files)), 1)


def _sample_at(path: InputPath, offset: int, num_bytes: int, text_key: str, whole: bool) -> Iterator[str]:
    with open_input(path) as file:
        file.seek(offset)
        if offset:
            file.readline()  # the rest of a line that began earlier
        data = file.read(num_bytes)
        if whole:
            yield data.decode("utf-8", errors="ignore")
            return
        data += file.readline()
    block = Block(str(path), 0, (0, 0), offset, offset + len(data), len(data), data=data)
    for text in block.documents(text_key, skip_bad=True).texts:
        yield text[:num_bytes]


def _sample_rows(path: InputPath, num_pieces: int, num_bytes: int, text_key: str) -> Iterator[str]:
    groups = pieces_of(path, text_key=text_key)
    for number in range(min(num_pieces, len(groups))):
        piece = groups[number * len(groups) // min(num_pieces, len(groups))]
        left = num_bytes * max(1, num_pieces // len(groups))
        for block in read_piece(piece, text_key=text_key, block_bytes=num_bytes):
            for text in block.documents(text_key, skip_bad=True).texts:
                yield text[:num_bytes]
                left -= min(len(text), num_bytes)
            if left <= 0:
                break


def _sample_stream(
    path: InputPath, size: int, num_bytes: int, text_key: str, text_files: Sequence[str]
) -> Iterator[str]:
    block_bytes = 1 << 16
    text_bytes = min(4 * size, _MAX_SKIPPED_BYTES)  # text compresses to about a quarter
    stride = max(1, text_bytes // num_bytes)
    taken = 0
    (piece,) = pieces_of(path, text_files=text_files)
    for block in itertools.islice(read_piece(piece, block_bytes=block_bytes), 0, None, stride):
        for text in block.documents(text_key, skip_bad=True).texts:
            yield text[:num_bytes]
            taken += len(text)
        if taken >= num_bytes:
            return
