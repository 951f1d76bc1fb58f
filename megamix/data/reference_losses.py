"""Cache of a reference model's loss of every training label, written once and read beside the tokens.

    OUT/reference.json   data, tokenizer, sample length and checkpoint of the losses
    OUT/NAME.f16         one file a domain: float16 [windows, S]; row j holds the losses, in nats, of the S labels of
                         window j of `megamix.data.tokens.stream`

A row that was not computed is zero, and a computed loss is never zero (the smallest stored is 2^-24), so a missing row
is detected when it is read. Every label has a loss, also one that ``eod_mask_loss`` leaves out of training.

An unfinished cache has OUT/progress.json in place of reference.json: the number of rows, in the order of `Selection`,
that are safe on disk; a later call writes the rows after them.

Legend: S tokens in a sample, n samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from megamix.core.config import Config, validate
from megamix.core.errors import InputError, MegamixError, did_you_mean
from megamix.core.files import parse_json, read_json, replace_json, writing
from megamix.data.domain_names import file_name
from megamix.data.tokens.mapped_files import TOKEN_FILES

FILE_NAME = "reference.json"
PROGRESS = "progress.json"
"""In place of `FILE_NAME` in an unfinished cache."""
DTYPE = np.dtype("<f2")
SMALLEST, LARGEST = 2.0**-24, 65504.0
"""The range of float16, zero left out."""
Ints = NDArray[np.int64]


class CachedDomain(Config):
    """Losses of one domain."""

    digest: str
    """Hash of the domain's data; see `megamix.data.tokens.manifest.digest`."""
    windows: int = pydantic.Field(ge=0)
    """Rows of the file: samples of seq_length in the domain's training tokens."""
    computed: int = pydantic.Field(ge=0)
    """Rows that hold losses; fewer than ``windows`` in a cache for one run only."""
    selection: str | None = None
    """SHA-256 of the numbers of these rows (int64); None for all rows."""
    blocks: str | None = None
    """Hashes of the file's blocks (`megamix.data.tokens.hashes`); None in an unfinished cache and in older ones."""


class CacheKey(Config):
    """Identity of the labels in a cache: sample length, data, and position ids."""

    seq_length: int = pydantic.Field(gt=0)
    """Tokens in a sample: decides windows and the context of every label."""
    reset_position_ids: bool
    """Whether positions restart in every document of a sample."""
    attention: Literal["sample", "document"] = "sample"
    """What the tokens attended to; older caches lack it."""
    tokenizer: str
    """SHA-256 of tokenizer.json."""
    domains: dict[str, CachedDomain]
    """By name."""


class CacheInfo(CacheKey):
    """reference.json."""

    format: Literal["megamix-reference"] = "megamix-reference"
    """Says what the file is."""
    version: Literal[1] = 1
    """Version of the layout."""
    checkpoint: str
    """The reference model."""
    checkpoint_sha256: str
    """Hash of its checkpoint.json, which holds the hash of every file in it."""


def losses_path(folder: Path, domain: str) -> Path:
    """The file of a domain."""
    return folder / (file_name(domain) + ".f16")


class ReferenceLosses:
    """Reference losses of a run's domains, memory-mapped.

    Args:
        key: the run's data, whose ``computed`` rows are ignored. The cache may hold more domains.

    Raises:
        InputError: no cache, or an unfinished, damaged or different one; the message says what differs.
    """

    def __init__(self, folder: Path, key: CacheKey) -> None:
        self.folder = folder
        self.info = read_info(folder)
        _check_same(self.info, key, f"the reference losses in {folder}", "Run `megamix reference` for this data.")
        self._names = list(key.domains)
        self._owner = TOKEN_FILES.owner(self, *self._names)
        for name in self._names:
            _map(folder, self.info, name)  # raises where it is damaged

    def read_window(self, domain: int, sample: int, losses: NDArray[np.float32]) -> None:
        """Fills ``losses``, float32 [S], with the losses of a sample's labels.

        Raises:
            InputError: the sample's losses were not computed.
        """
        losses[:] = self._rows(self._names[domain])[sample]
        # Not "<= 0", which NaN would pass.
        if not losses.min() > 0:
            name = self._names[domain]
            entry = self.info.domains[name]
            raise InputError(
                f"{losses_path(self.folder, name)} has no losses of sample {sample} of domain '{name}' (it holds those "
                f"of {entry.computed} of {entry.windows} samples). It was made for a run that reads others, or is "
                "damaged: run `megamix reference` for this run, or for whole domains."
            )

    def _rows(self, name: str) -> NDArray[np.float16]:
        return TOKEN_FILES.get((self._owner, name), lambda: _map(self.folder, self.info, name))


def read_info(folder: Path) -> CacheInfo:
    """reference.json of a finished cache.

    Raises:
        InputError: there is none, it is unfinished, or of another format.
    """
    path = folder / FILE_NAME
    if not path.is_file() and (folder / PROGRESS).is_file():
        raise InputError(
            f"the reference losses in {folder} are not finished. Run the same `megamix reference` command again: it goes "
            "on where it stopped."
        )
    lost, damaged = "Give the folder that `megamix reference` wrote.", "Run `megamix reference` again."
    return validate(CacheInfo, read_json(path, lost=lost, damaged=damaged), str(path))


def is_cache(folder: Path) -> bool:
    """Whether a folder holds reference losses, finished or not."""
    if (folder / FILE_NAME).is_file():
        return True
    try:
        return parse_json((folder / PROGRESS).read_bytes())["info"]["format"] == "megamix-reference"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_progress(folder: Path) -> tuple[CacheInfo, int]:
    """The header of a cache and the number of rows safe on disk; all rows of a finished one.

    Raises:
        InputError: no cache, or a damaged one.
    """
    progress = folder / PROGRESS
    if (folder / FILE_NAME).is_file() or not progress.is_file():
        info = read_info(folder)
        done = sum(domain.computed for domain in info.domains.values())
    else:
        try:
            data = parse_json(progress.read_bytes())
            info, done = validate(CacheInfo, data["info"], str(progress)), int(data["done"])
        except OSError as error:
            raise InputError(f"cannot read {progress}: {error.strerror or error}. Check the path.") from error
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(
                f"{progress} is damaged ({error}). Choose another --out, or remove that folder."
            ) from error
    for name in info.domains:
        _map(folder, info, name)
    return info, done


def _map(folder: Path, info: CacheInfo, name: str) -> NDArray[np.float16]:
    """The losses of a domain, [windows, S], mapped read-only.

    Raises:
        InputError: the file is missing, or not of the right size.
    """
    path, rows = losses_path(folder, name), info.domains[name].windows
    wanted = rows * info.seq_length * DTYPE.itemsize
    try:
        size = path.stat().st_size
        if size == wanted:
            return np.memmap(path, DTYPE, "r", shape=(rows, info.seq_length))
    except OSError as error:
        raise InputError(
            f"cannot read the reference losses {path} of domain '{name}': {error.strerror or error}. Copy the folder "
            "as a whole, or remove it and run `megamix reference` again."
        ) from error
    raise InputError(
        f"the reference losses {path} of domain '{name}' have {size} bytes, expected {wanted} ({rows} samples of "
        f"{info.seq_length} labels): the file was cut short or belongs to another cache. Copy it again, or remove the "
        "folder and run `megamix reference` again."
    )


def _check_same(info: CacheKey, key: CacheKey, what: str, remedy: str) -> None:
    """Raises InputError unless ``info`` has the data, tokenizer and sample length of ``key``."""
    for field, words in (
        ("seq_length", "data.seq_length"),
        ("attention", "data.attention"),
        ("reset_position_ids", "data.reset_position_ids"),
        ("tokenizer", "the tokenizer's SHA-256"),
    ):
        seen, wanted = getattr(info, field), getattr(key, field)
        if seen != wanted:
            raise InputError(f"{what} were made with {words} {seen}, this run has {wanted}. {remedy}")
    for name, domain in key.domains.items():
        cached = info.domains.get(name)
        if cached is None:
            raise InputError(f"{what} have none of domain '{name}'.{did_you_mean(name, info.domains)} {remedy}")
        for field, words in (("digest", "data"), ("windows", "number of samples")):
            seen, wanted = getattr(cached, field), getattr(domain, field)
            if seen != wanted:
                raise InputError(
                    f"{what} are of domain '{name}' with the {words} {seen}, this run has {wanted}. {remedy}"
                )


class Selection:
    """Windows of each domain that a cache holds, computed domain by domain, ascending.

    Args:
        rows: for each domain ascending window numbers, or the number of windows from the first on.
    """

    def __init__(self, rows: Sequence[Ints | int]) -> None:
        self._rows = rows
        self.counts = np.array([row if isinstance(row, int) else row.size for row in rows], np.int64)
        self._ends = np.cumsum(self.counts)

    @property
    def total(self) -> int:
        """Windows of all domains."""
        return int(self._ends[-1])

    def at(self, index_n: Ints) -> tuple[Ints, Ints]:
        """(domain, window) at each place of the selection, int64 [n] each."""
        domain_n = np.searchsorted(self._ends, index_n, side="right")
        place_n = index_n - (self._ends - self.counts)[domain_n]
        for domain, row in enumerate(self._rows):
            if not isinstance(row, int):
                mine_n = domain_n == domain
                place_n[mine_n] = row[place_n[mine_n]]
        return domain_n, place_n

    def describe(self, key: CacheKey) -> dict[str, CachedDomain]:
        """The domains of ``key`` with this selection."""
        described = {}
        for (name, domain), row in zip(key.domains.items(), self._rows, strict=True):
            whole = isinstance(row, int) or row.size == domain.windows
            selection = None if whole else hashlib.sha256(np.asarray(row, "<i8").tobytes()).hexdigest()
            computed = row if isinstance(row, int) else row.size
            described[name] = CachedDomain(
                digest=domain.digest, windows=domain.windows, computed=computed, selection=selection
            )
        return described


def open_progress(folder: Path, info: CacheInfo) -> int | None:
    """Starts or continues a cache; one process calls this before any `ReferenceWriter` is made.

    Returns:
        The number of rows safe on disk; None for a finished cache.

    Raises:
        InputError: the folder cannot be written, or holds something else.
    """
    remedy = "Choose another --out, or remove that folder."
    if (folder / FILE_NAME).is_file():
        _check_continues(read_info(folder), info, folder, remedy)
        return None
    if (folder / PROGRESS).is_file():
        begun, done = read_progress(folder)
        _check_continues(begun, info, folder, remedy)
        return done
    with writing(f"to {folder}", remedy):
        folder.mkdir(parents=True, exist_ok=True)
        for name, domain in info.domains.items():
            with losses_path(folder, name).open("wb") as file:
                file.truncate(domain.windows * info.seq_length * DTYPE.itemsize)
        save_progress(folder, info, 0)
    return 0


def save_progress(folder: Path, info: CacheInfo, done: int) -> None:
    """Writes that ``done`` rows are safe on disk; one process calls this, after every rank's `sync`."""
    replace_json(folder / PROGRESS, {"done": done, "info": info.model_dump(mode="json")})


def finish(folder: Path, info: CacheInfo, blocks: Mapping[str, str]) -> None:
    """Finishes a cache whose rows are all safe on disk.

    Args:
        blocks: hashes of the blocks of every domain's file.
    """
    domains = {name: domain.model_copy(update={"blocks": blocks[name]}) for name, domain in info.domains.items()}
    data = info.model_copy(update={"domains": domains}).model_dump(mode="json")
    head = {key: data[key] for key in ("format", "version")}
    replace_json(folder / FILE_NAME, {**head, **data})
    (folder / PROGRESS).unlink(missing_ok=True)


class ReferenceWriter:
    """Writer of rows of a cache that `open_progress` has started; several processes may write different rows."""

    def __init__(self, folder: Path, info: CacheInfo) -> None:
        self._names = list(info.domains)
        self._paths = [losses_path(folder, name) for name in self._names]
        # Not through a memory map: machines that share a folder would write whole pages over each other's rows.
        self._files = [os.open(path, os.O_WRONLY) for path in self._paths]
        self._row_bytes = info.seq_length * DTYPE.itemsize
        self._touched: set[int] = set()

    def write(self, domain_n: Ints, sample_n: Ints, loss_nS: NDArray[np.float32]) -> None:
        """Writes the losses of windows, clamped to what float16 holds.

        Raises:
            MegamixError: a loss that is not finite, or a file that cannot be written.
        """
        bad_n = ~np.isfinite(loss_nS).all(axis=1)
        if bad_n.any():
            row = int(np.flatnonzero(bad_n)[0])
            raise MegamixError(
                f"the reference model's loss is not finite in domain '{self._names[domain_n[row]]}', sample "
                f"{sample_n[row]}. Use another checkpoint, or engine.precision=fp32."
            )
        rows = np.clip(loss_nS, SMALLEST, LARGEST).astype(DTYPE)
        for domain, sample, row in zip(domain_n.tolist(), sample_n.tolist(), rows, strict=True):
            with self._naming(domain):
                os.pwrite(self._files[domain], row.tobytes(), sample * self._row_bytes)
            self._touched.add(domain)

    def sync(self) -> None:
        """Flushes the rows to disk.

        Raises:
            MegamixError: the disk is full or fails.
        """
        for domain in self._touched:
            with self._naming(domain):
                os.fsync(self._files[domain])
        self._touched.clear()

    def close(self) -> None:
        for file in self._files:
            os.close(file)

    @contextlib.contextmanager
    def _naming(self, domain: int) -> Iterator[None]:
        """Names the file in an error; a full disk shows only here, since the files are sparse."""
        try:
            yield
        except OSError as error:
            raise MegamixError(
                f"cannot write {self._paths[domain]}: {error.strerror or error}. Make room; the same command goes on."
            ) from error


def _check_continues(seen: CacheInfo, info: CacheInfo, folder: Path, remedy: str) -> None:
    """Raises InputError unless ``seen``, the cache in ``folder``, is the one to continue."""
    _check_same(seen, info, f"the reference losses in {folder}", remedy)
    if seen.checkpoint_sha256 != info.checkpoint_sha256:
        raise InputError(
            f"the reference losses in {folder} are of the checkpoint {seen.checkpoint} ({seen.checkpoint_sha256[:12]}), "
            f"asked for is {info.checkpoint} ({info.checkpoint_sha256[:12]}). {remedy}"
        )
    if list(seen.domains) != list(info.domains):
        raise InputError(
            f"the reference losses in {folder} are of the domains {', '.join(seen.domains)}, asked for are "
            f"{', '.join(info.domains)}. {remedy}"
        )
    for name, domain in info.domains.items():
        old = seen.domains[name]
        if (old.computed, old.selection) != (domain.computed, domain.selection):
            raise InputError(
                f"the reference losses in {folder} are of {old.computed} samples of domain '{name}' that were chosen for "
                f"another run, asked for are {domain.computed}. {remedy}"
            )
