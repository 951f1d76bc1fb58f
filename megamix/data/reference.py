"""A reference model's loss of every training label, written once and read beside the tokens.

    OUT/reference.json   what the losses are of: data, tokenizer, sample length, checkpoint
    OUT/NAME.f16         one file a domain: float16 [windows, S]; row j holds the losses, in nats, of the S labels of
                         window j of `megamix.data.stream`

A row that was not computed is zero, and a computed loss is never zero (the smallest that is stored is 2^-24), so that a
hole in a file is seen where it is read. Every label has its loss, also one that ``eod_mask_loss`` leaves out of
training. `megamix.data.reference_writer` writes these files.

Legend: S tokens in a sample.
"""

from __future__ import annotations

import json
import urllib.parse
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from megamix.config import Config, validate
from megamix.errors import InputError, did_you_mean

FILE_NAME = "reference.json"
PROGRESS = "progress.json"
"""What an unfinished cache has in place of `FILE_NAME`."""
DTYPE = np.dtype("<f2")


class CachedDomain(Config):
    """The losses of one domain."""

    digest: str
    """Names the domain's data; see `megamix.domain_change.digest`."""
    windows: int = pydantic.Field(ge=0)
    """Rows of the file: samples of seq_length in the domain's training tokens."""
    computed: int = pydantic.Field(ge=0)
    """Rows that hold losses; fewer than ``windows`` where the cache was made for one run only."""


class CacheKey(Config):
    """What the losses of a cache are of: the sample length, the data, and how the model reads it."""

    seq_length: int = pydantic.Field(gt=0)
    """Tokens in a sample: windows, and the context of every label, depend on it."""
    reset_position_ids: bool
    """Whether positions begin anew in every document of a sample."""
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
    """Of that checkpoint's checkpoint.json, which holds the hash of every file in it."""


def losses_path(folder: Path, domain: str) -> Path:
    """The file of a domain, whose name may hold what file names may not."""
    return folder / (urllib.parse.quote(domain, safe=" ()+,") + ".f16")


class ReferenceLosses:
    """The reference losses of a run's domains, memory-mapped.

    Args:
        folder: Of the cache.
        key: The run's data; ``computed`` is not looked at. The cache may hold more domains.

    Raises:
        InputError: No such cache, one that is unfinished or damaged, or one of other data; the message says what
            differs.
    """

    def __init__(self, folder: Path, key: CacheKey) -> None:
        self.folder = folder
        self.info = read_info(folder)
        _check_same(self.info, key, f"the reference losses in {folder}", "Run `megamix reference` for this data.")
        self._names = list(key.domains)
        self._rows = [self._open(name) for name in self._names]

    def _open(self, name: str) -> NDArray[Any]:
        path, rows = losses_path(self.folder, name), self.info.domains[name].windows
        wanted = rows * self.info.seq_length * DTYPE.itemsize
        try:
            size = path.stat().st_size
            if size == wanted:
                return np.memmap(path, DTYPE, "r", shape=(rows, self.info.seq_length))
        except OSError as error:
            raise InputError(
                f"cannot read the reference losses {path} of domain '{name}': {error.strerror or error}. Copy the folder "
                "as a whole, or run `megamix reference` again."
            ) from error
        raise InputError(
            f"the reference losses {path} of domain '{name}' have {size} bytes, expected {wanted} ({rows} samples of "
            f"{self.info.seq_length} labels): the file was cut short or belongs to another cache. Copy it again, or run "
            "`megamix reference` again."
        )

    def read_window(self, domain: int, sample: int, losses: NDArray[np.float32]) -> None:
        """Fills ``losses``, float32 [S], with those of a sample's labels.

        Raises:
            InputError: They were not computed.
        """
        losses[:] = self._rows[domain][sample]
        # Not "<= 0", which NaN would pass.
        if not losses.min() > 0:
            name = self._names[domain]
            entry = self.info.domains[name]
            raise InputError(
                f"{losses_path(self.folder, name)} has no losses of sample {sample} of domain '{name}' (it holds those "
                f"of {entry.computed} of {entry.windows} samples). It was made for a run that reads others, or is "
                "damaged: run `megamix reference` for this run, or for whole domains."
            )


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
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}. Give the folder that `megamix reference` wrote."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}. Run `megamix reference` again.") from error
    return validate(CacheInfo, data, str(path))


def _check_same(info: CacheKey, key: CacheKey, what: str, remedy: str) -> None:
    """Raises InputError where ``info`` is not of the data, tokenizer and sample length of ``key``."""
    for field, words in (
        ("seq_length", "data.seq_length"),
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
