"""Input files: those of every domain, and an even sample of their texts. `blocks` reads what is in a file."""

from __future__ import annotations

import bisect
import contextlib
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.core.paths import expand
from megamix.core.text import listed, plural
from megamix.data.domain_names import check_domain_name
from megamix.prepare.blocks import TEXT_KEY, Block, iter_documents, pieces_of, read_piece
from megamix.prepare.kinds import (
    COMPRESSED,
    IN_FOLDERS,
    IN_FOLDERS_SAID,
    MAGIC,
    READABLE,
    ending,
    is_compressed,
    is_one_document,
    is_parquet,
)

_MAX_SKIPPED_BYTES = 1 << 26  # of a compressed file that a sample may read


def find_inputs(specs: Sequence[str], out: Path | None = None) -> dict[str, list[Path]]:
    """Finds the input files of every domain, and says which files of a folder are passed over.

    Args:
        specs: Each is ``name=path[,path...]``, where a path may be a file, a glob or a folder (searched recursively),
            or a folder whose entries are the domains: ``<domain>.jsonl``, ``<domain>.parquet``,
            ``<domain>.txt``, or a sub-folder ``<domain>/`` of such files. In a folder, hidden files and files of
            other kinds are left out.
        out: Output folder, which is no input where it lies in one.

    Returns:
        Sorted files by domain, domains sorted by name.

    Raises:
        InputError: Nothing found, a missing or unreadable path, something else than a file, a named file of an unknown
            kind, a compressed file under another kind's name, a name that no domain can have, two domains with one
            name, a domain without text, or an input that is the output folder.
    """
    search = _Search(out)
    found: dict[str, list[Path]] = {}
    for spec in specs:
        for name, paths in search.domains_of(spec):
            if name in found:
                raise InputError(
                    f"two domains are called '{name}': {found[name][0]} and {paths[0]}. Rename one, or give the files"
                    f" of one domain together: {name}=FIRST,SECOND."
                )
            check_domain_name(name, paths[0])
            _check_readable(name, paths)
            found[name] = paths
    if not found:
        raise InputError(
            f"no input found in: {', '.join(specs) or '(nothing given)'}. Give name=FILES or a folder of"
            " <domain>.jsonl files or <domain>/ sub-folders."
        )
    search.say_passed_over()
    return dict(sorted(found.items()))


class _Search:
    """Search of folders for input files.

    Args:
        out: See `find_inputs`.
    """

    def __init__(self, out: Path | None) -> None:
        self._out = None if out is None else out.resolve()
        self._passed_over: dict[Path, list[str]] = {}

    def domains_of(self, spec: str) -> Iterator[tuple[str, list[Path]]]:
        """The domains of an argument, and their files."""
        folder = Path(spec if "=" in spec else expand(spec))
        if os.path.isdir(folder):  # a name of 300 characters is an error to pathlib
            self._refuse_output(folder)
            for entry in sorted(self._entries(folder)):
                if entry.is_dir():
                    yield entry.name, self._files_below(entry)
                elif suffix := ending(entry, IN_FOLDERS):
                    yield entry.name.removesuffix(suffix), [entry]
                else:
                    self._pass_over(folder, entry)
            return
        name, equals, patterns = spec.partition("=")
        if not equals:
            hint = f" To use it as a domain: {folder.name.split('.')[0]}={spec}." if os.path.exists(folder) else ""
            raise InputError(f"input '{spec}' is neither a folder nor of the form name=path[,path...].{hint}")
        paths = sorted({path for pattern in patterns.split(",") if pattern for path in self._expand(name, pattern)})
        if not paths:
            raise InputError(f"domain '{name}': '{spec}' names no files. Write {name}=path[,path...].")
        yield name, paths

    def say_passed_over(self) -> None:
        """Logs, for each folder, the files that are not read."""
        for folder, names in self._passed_over.items():
            get_logger().warning(
                "%s: %s passed over, not of a kind that is read in a folder (%s): %s. Name what is text: name=FILES",
                folder,
                plural(len(names), "file"),
                IN_FOLDERS_SAID,
                listed(sorted(names), 5),
            )

    def _expand(self, name: str, pattern: str) -> list[Path]:
        pattern = expand(pattern)
        if os.path.isdir(pattern):
            self._refuse_output(Path(pattern))
            return self._files_below(Path(pattern))
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        paths = [Path(match) for match in matches if not os.path.isdir(match) and not self._is_output(Path(match))]
        if not paths:
            raise InputError(f"domain '{name}': no file matches '{pattern}'. Check the path.")
        for path in paths:
            if not ending(path, READABLE):
                raise InputError(
                    f"domain '{name}': {path} is of an unknown kind. Known: {IN_FOLDERS_SAID}; also .json, of lines."
                )
        return paths

    def _files_below(self, folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
        here = folder.resolve()
        if here in above:
            raise InputError(f"the folder {folder} is a link to {here}, which it lies in. Remove the link.")
        paths: list[Path] = []
        for entry in self._entries(folder):
            if entry.is_dir():
                paths += [path for path in self._files_below(entry, (*above, here)) if path != entry]
            elif ending(entry, IN_FOLDERS):
                paths.append(entry)
            else:
                self._pass_over(folder, entry)
        return sorted(paths) or [folder]  # an empty folder stands for itself, so that the message can name it

    def _entries(self, folder: Path) -> list[Path]:
        try:
            held = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
            return [entry for entry in held if not self._is_output(entry)]
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read the folder {folder}: {reason}. Check it, and links in it.") from error

    def _pass_over(self, folder: Path, entry: Path) -> None:
        self._passed_over.setdefault(folder, []).append(entry.name)

    def _is_output(self, path: Path) -> bool:
        return self._out is not None and path.resolve().is_relative_to(self._out)

    def _refuse_output(self, folder: Path) -> None:
        if self._is_output(folder):
            raise InputError(
                f"the input {folder} is the output folder {self._out}, or lies in it: the next call would read what this"
                " one has written. Choose another --out; one inside the input is passed over."
            )


def _check_readable(name: str, paths: list[Path]) -> None:
    if paths[0].is_dir():
        raise InputError(
            f"domain '{name}': the folder {paths[0]} holds no file to read: {IN_FOLDERS_SAID}. Remove it, or name its"
            f" files ({name}=FILES)."
        )
    for path in paths:
        try:
            if path.exists() and not path.is_file():
                what = "a pipe" if path.is_fifo() else "no regular file"
                raise InputError(f"domain '{name}': {path} is {what}, expected a file. Write its text to one.")
            with open(path, "rb") as file:
                head = file.read(max(map(len, MAGIC.values())))
        except OSError as error:
            raise InputError(f"domain '{name}': cannot read {path}: {error.strerror or error}.") from error
        for kind, magic in MAGIC.items():
            if head.startswith(magic) and not ending(path, (kind,)):
                raise InputError(
                    f"domain '{name}': {path} begins as a {kind} file does. "
                    + (
                        f"Give its name that ending: {path.name}{kind}."
                        if kind in (*COMPRESSED, ".parquet")
                        else "Unpack it."
                    )
                )
    if not any(path.stat().st_size for path in paths):
        raise InputError(f"domain '{name}' is empty: {paths[0]} has 0 bytes. Remove the domain or give it text.")


def sample_texts(paths: Sequence[Path], *, num_bytes: int, text_key: str = TEXT_KEY) -> Iterator[str]:
    """Yields about ``num_bytes`` of text spread evenly over the files of a domain, deterministically.

    Uncompressed files are sampled in pieces at even distances, parquet files at the beginnings of row groups; of a
    compressed file, every n-th block within its first 64 MiB of text. Texts longer than a piece are cut. A domain of
    uncompressed files below ``num_bytes`` is taken whole.

    Raises:
        InputError: A damaged file, if nothing could be read; other damage is found when everything is read.
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
        if is_compressed(path):
            texts = _sample_compressed(path, size, len(offsets) * piece_bytes, text_key) if offsets else iter(())
        elif is_parquet(path):
            texts = _sample_parquet(path, len(offsets), piece_bytes, text_key)
        elif ends[-1] <= num_bytes:
            texts = iter_documents(path, text_key, skip_bad=True)
        else:
            texts = itertools.chain.from_iterable(_sample_at(path, at, piece_bytes, text_key) for at in offsets)
        with contextlib.suppress(InputError):
            for text in texts:
                empty = empty and not text.strip()
                yield text
    if empty:  # there is no text, or reading in order raises the error
        yield from itertools.islice((text for path in paths for text in iter_documents(path, text_key)), 1)


def _sample_at(path: Path, offset: int, num_bytes: int, text_key: str) -> Iterator[str]:
    with open(path, "rb") as file:
        file.seek(offset)
        if offset:
            file.readline()  # the rest of a line that began earlier
        data = file.read(num_bytes)
        if is_one_document(path):
            yield data.decode("utf-8", errors="ignore")
            return
        data += file.readline()
    block = Block(str(path), 0, (0, 0), offset, offset + len(data), len(data), data)
    for text in block.documents(text_key, skip_bad=True).texts:
        yield text[:num_bytes]


def _sample_parquet(path: Path, num_pieces: int, num_bytes: int, text_key: str) -> Iterator[str]:
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


def _sample_compressed(path: Path, size: int, num_bytes: int, text_key: str) -> Iterator[str]:
    block_bytes = 1 << 16
    text_bytes = min(4 * size, _MAX_SKIPPED_BYTES)  # text compresses to about a quarter
    stride = max(1, text_bytes // num_bytes)
    taken = 0
    (piece,) = pieces_of(path)
    for block in itertools.islice(read_piece(piece, block_bytes=block_bytes), 0, None, stride):
        for text in block.documents(text_key, skip_bad=True).texts:
            yield text[:num_bytes]
            taken += len(text)
        if taken >= num_bytes:
            return
