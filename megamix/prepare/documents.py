"""Input files of every domain: from files, folders, globs, addresses and Hugging Face datasets."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.core.paths import expand
from megamix.core.text import listed, plural
from megamix.data.domain_names import check_domain_name
from megamix.prepare import storage
from megamix.prepare.hub import hub_files, is_hub_dataset, saved_files
from megamix.prepare.kinds import COMPRESSED, IN_FOLDERS, IN_FOLDERS_SAID, MAGIC, READABLE, ending, is_text_file
from megamix.prepare.storage import InputPath, Url, is_url


def find_inputs(
    specs: Sequence[str], out: Path | None = None, text_files: Sequence[str] = ()
) -> dict[str, list[InputPath]]:
    """Finds the input files of every domain, and says which files of a folder are passed over.

    Args:
        specs: Each is ``name=path[,path...]``, where a path may be a file, a glob or a folder (searched recursively),
            here or at an address that fsspec opens, or ``hf://NAME[:CONFIG][@SPLIT]``; or a folder whose entries are
            the domains: ``<domain>.jsonl``, ``<domain>.parquet``, ``<domain>.txt``, or a sub-folder ``<domain>/`` of
            such files. In a folder, hidden files and files of other kinds are left out.
        out: Output folder, which is no input where it lies in one.
        text_files: Patterns of names of files that are read in folders as well, each one document.

    Returns:
        Sorted files by domain, domains sorted by name.

    Raises:
        InputError: Nothing found, a missing or unreadable path, something else than a file, a named file of an unknown
            kind, a compressed file under another kind's name, a name that no domain can have, two domains with one
            name, a domain without text, or an input that is the output folder.
    """
    storage.forget()
    search = _Search(out, text_files)
    found: dict[str, list[InputPath]] = {}
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
        out, text_files: See `find_inputs`.
    """

    def __init__(self, out: Path | None, text_files: Sequence[str]) -> None:
        self._out, self._text_files = None if out is None else out.resolve(), text_files
        self._passed_over: dict[InputPath, list[str]] = {}

    def domains_of(self, spec: str) -> Iterator[tuple[str, list[InputPath]]]:
        """The domains of an argument, and their files."""
        name, equals, patterns = spec.partition("=")
        if is_url(name):
            yield from self._domains_at(expand(spec))
            return
        folder = Path(spec if equals else expand(spec))
        if os.path.isdir(folder):  # a name of 300 characters is an error to pathlib
            self._refuse_output(folder)
            if saved_files(folder) is not None:
                raise InputError(f"{folder} is one saved dataset. Name it as a domain: {folder.name}={folder}.")
            for entry in sorted(self._entries(folder)):
                if entry.is_dir():
                    yield entry.name, self._files_below(entry)
                elif self._is_read(entry):
                    yield entry.name.removesuffix(ending(entry, IN_FOLDERS) or entry.suffix), [entry]
                else:
                    self._pass_over(folder, entry)
            return
        if not equals:
            hint = f" To use it as a domain: {folder.name.split('.')[0]}={spec}." if os.path.exists(folder) else ""
            raise InputError(f"input '{spec}' is neither a folder nor of the form name=path[,path...].{hint}")
        given = [path for pattern in patterns.split(",") if pattern for path in self._expand(name, pattern)]
        paths = sorted(set(given), key=_in_order)
        if not paths:
            raise InputError(f"domain '{name}': '{spec}' names no files. Write {name}=path[,path...].")
        yield name, paths

    def say_passed_over(self) -> None:
        """Logs, for each folder, the files that are not read."""
        for folder, names in self._passed_over.items():
            get_logger().warning(
                "%s: %s passed over, not of a kind that is read in a folder (%s): %s. Text among them: --text-files '*.ENDING', each file"
                " a document; JSON lines in a .json: NAME=FILES",
                folder,
                plural(len(names), "file"),
                IN_FOLDERS_SAID,
                listed(sorted(names), 5),
            )

    def _domains_at(self, spec: str) -> Iterator[tuple[str, list[InputPath]]]:
        """The domains of a remote folder."""
        if is_hub_dataset(spec):
            raise InputError(f"input '{spec}' is one dataset. Name it as a domain: NAME={spec}.")
        if (folder := storage.remote_folder(Url(spec))) is None:
            raise InputError(f"input '{spec}' is no folder with a file or folder per domain. Name a file: NAME={spec}.")
        found: dict[str, list[InputPath]] = {}
        for path in self._kept(folder, storage.find_remote(Url(spec))):
            first, _, rest = path.removeprefix(folder).lstrip("/").partition("/")
            name = first if rest else first.removesuffix(ending(path, IN_FOLDERS) or os.path.splitext(first)[1])
            found.setdefault(name, []).append(path)
        yield from found.items()

    def _kept(self, folder: Url, paths: Sequence[Url]) -> list[Url]:
        """The files of a remote folder that are read."""
        kept = [path for path in paths if self._is_read(path)]
        for path in paths:
            if path not in kept and not path.name.startswith("."):
                self._passed_over.setdefault(folder, []).append(path.name)
        return kept

    def _is_read(self, path: InputPath) -> bool:
        hidden = path.name.startswith(".")
        return not hidden and (ending(path, IN_FOLDERS) is not None or is_text_file(path, self._text_files))

    def _expand(self, name: str, pattern: str) -> list[InputPath]:
        pattern = expand(pattern)
        if is_hub_dataset(pattern):
            return [*hub_files(pattern)]
        if is_url(pattern):
            paths: list[InputPath] = [path for path in storage.find_remote(Url(pattern)) if path.name[:1] != "."]
            if paths != [pattern] and not any(sign in pattern for sign in "*["):
                paths = [*self._kept(Url(pattern), [path for path in paths if isinstance(path, Url)])]
        elif os.path.isdir(pattern):
            self._refuse_output(Path(pattern))
            return self._files_below(Path(pattern))
        else:
            matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            paths = [Path(match) for match in matches if not os.path.isdir(match) and not self._is_output(Path(match))]
        if not paths:
            raise InputError(f"domain '{name}': no file matches '{pattern}'. Check the path.")
        for path in paths:
            if not ending(path, READABLE) and not is_text_file(path, self._text_files):
                raise InputError(
                    f"domain '{name}': {path} is of an unknown kind. Known: {IN_FOLDERS_SAID}; also .json, of lines;"
                    " --text-files for others, each one document."
                )
        return paths

    def _files_below(self, folder: Path, above: tuple[Path, ...] = ()) -> list[InputPath]:
        if (saved := saved_files(folder)) is not None:
            return [*saved]
        here = folder.resolve()
        if here in above:
            raise InputError(f"the folder {folder} is a link to {here}, which it lies in. Remove the link.")
        paths: list[InputPath] = []
        for entry in self._entries(folder):
            if entry.is_dir():
                paths += [path for path in self._files_below(entry, (*above, here)) if path != entry]
            elif self._is_read(entry):
                paths.append(entry)
            else:
                self._pass_over(folder, entry)
        return sorted(paths, key=_in_order) or [
            folder
        ]  # an empty folder stands for itself, so that the message can name it

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


def _in_order(path: InputPath) -> tuple[bool, InputPath]:
    return isinstance(path, Url), path


def _check_readable(name: str, paths: list[InputPath]) -> None:
    if not paths or (isinstance(paths[0], Path) and paths[0].is_dir()):
        raise InputError(
            f"domain '{name}': the folder {paths[0]} holds no file to read: {IN_FOLDERS_SAID}. Remove it, name its"
            f" files ({name}=FILES), or say which are text (--text-files '*.ENDING')."
        )
    for path in paths:
        if isinstance(path, Url):  # a request each; what is wrong shows when it is read
            continue
        try:
            if path.exists() and not path.is_file():
                what = "a pipe" if path.is_fifo() else "no regular file"
                raise InputError(f"domain '{name}': {path} is {what}, expected a file. Write its text to one.")
            with open(path, "rb") as file:
                head = file.read(max(map(len, MAGIC.values())))
        except OSError as error:
            raise InputError(f"domain '{name}': cannot read {path}: {error.strerror or error}.") from error
        for kind, magic in MAGIC.items():
            if head.startswith(magic) and not ending(path, (kind, ".tgz") if kind == ".gz" else (kind,)):
                raise InputError(
                    f"domain '{name}': {path} begins as a {kind} file does. "
                    + (
                        f"Give its name that ending: {path.name}{kind}."
                        if kind in (*COMPRESSED, ".parquet", ".arrow")
                        else "Unpack it."
                    )
                )
    if not any(storage.stat_of(path).num_bytes for path in paths):
        raise InputError(f"domain '{name}' is empty: {paths[0]} has 0 bytes. Remove the domain or give it text.")
