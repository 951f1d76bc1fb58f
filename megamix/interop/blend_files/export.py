"""Export of the blend of a run or a data set to the formats of other projects.

    megatron         "W PREFIX W PREFIX ...", for --data-path or --data-args-path: training files
    per-split-json   for --per-split-data-args-path: training files with the weights, validation files with natural ones
    doremi           DoReMi's domain config: the weights, and natural ones for evaluation
    json             {domain: weight}

The files of a domain share its weight by their tokens. Weights keep all digits: Megatron divides them by their sum and
gives the next sample to the file whose count lags its weight most, so counts stay within a few samples of weight times
length. Megatron refuses weight 0 (a bare AssertionError), so its two formats omit such a domain, and a note says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megamix.core.errors import InputError, did_you_mean
from megamix.core.files import replace_file, writing
from megamix.data.tokens.manifest import FILE_NAME, Manifest, Split
from megamix.data.tokens.stream import DomainTokens
from megamix.mixing.megatron_blend import data_path, per_split_json
from megamix.mixing.weight_files import doremi_config, read_weights
from megamix.training.records.mean_weights import run_weights
from megamix.training.records.recorded_run import CONFIG, MIX, RecordedMix, RecordedRun

FORMATS = ("megatron", "per-split-json", "doremi", "json")
WHOLE_SPLIT = "100,0,0"
"""Megatron's ``--split`` for files without validation data."""


@dataclass(frozen=True)
class ExportedBlend:
    """Blend as text, which ends with a newline, and notes for its user."""

    text: str
    notes: list[str]


@dataclass(frozen=True)
class DataSet:
    """Files of an exported blend.

    Attributes:
        source: name of the run or data set, for messages.
        natural: share of the training tokens by domain.
        missing: reason for a manifest of None.
    """

    source: str
    manifest: Manifest | None
    natural: Mapping[str, float]
    missing: str | None = None

    @classmethod
    def of_run(cls, run: RecordedMix) -> DataSet:
        """Data set of a run, with its domains at the end of the run."""
        return cls(str(run.run_dir), run.manifest, run.natural_shares(), run.missing_data)


def export_blend(
    path: Path, format: str = "megatron", which: str | None = None, weights: Path | None = None
) -> ExportedBlend:
    """Static mixture of a run or a data set.

    Args:
        path: a run directory, or a manifest or its folder.
        which: for a run, see `run_weights`; default: mean.
        weights: for a data set, a file for `read_weights`; None: natural weights.

    Raises:
        InputError: ``path`` is neither, an option does not fit it, or the format cannot express it.
    """
    path = Path(path)
    if not is_run(path):
        if which is not None:
            raise InputError(f"--which {which} is for runs, but {path} is a data set. Leave it out, or use --weights.")
        manifest = Manifest.load(path)
        names = manifest.domain_names
        natural = dict(zip(names, manifest.natural_weights().tolist(), strict=True))
        data = DataSet(str(path), manifest, natural)
        return render(natural if weights is None else read_weights(weights, names), format, data)
    if weights is not None:
        raise InputError(f"--weights is for data sets, but {path} is a run, which has its own. Use --which.")
    run = open_run(path)
    return render(run_weights(run, which or "mean"), format, DataSet.of_run(run))


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory rather than a data set.

    Raises:
        InputError: it is neither.
    """
    if (path / CONFIG).is_file() or (path / MIX).is_file():
        return True
    if path.is_file() or (path / FILE_NAME).is_file():
        return False
    raise InputError(f"{path} is neither a run (it has no {CONFIG}) nor a data set (no {FILE_NAME}). Check the path.")


def open_run(path: Path) -> RecordedMix:
    """Record of a run: of `megamix train`, or of another trainer (``SAVE/megamix``, ``output_dir/megamix``)."""
    return RecordedRun.open(path) if (path / CONFIG).is_file() else RecordedMix.open(path)


def render(weights: Mapping[str, float], format: str, data: DataSet) -> ExportedBlend:
    """Weights by domain as text.

    Raises:
        InputError: an unknown format, no data set, a domain without files, or files that the format cannot express.
    """
    if format not in FORMATS:
        raise InputError(f"--format {format}: no such format." + did_you_mean(format, FORMATS))
    if format == "json":
        return ExportedBlend(_json(dict(weights)), [])
    manifest = data.manifest
    if manifest is None:
        raise InputError(f"{data.source}: --format {format} needs its data set. {data.missing} Or use --format json.")
    if format == "doremi":
        return ExportedBlend(_json(doremi_config(weights, {name: data.natural.get(name, 0.0) for name in weights})), [])
    if gone := manifest.missing(name for name, weight in weights.items() if weight > 0):
        raise InputError(
            f"{data.source}: domain '{gone[0]}' has the weight {weights[gone[0]]:.6g} and no files in {manifest.folder}:"
            " it was removed during the run. Use --which final, or --format json."
        )
    used = {name: weight for name, weight in weights.items() if weight > 0}
    out = [name for name, weight in weights.items() if weight == 0]
    notes = [f"Left out, since their weight is 0, which Megatron refuses: {', '.join(out)}."] if out else []
    train = _files(manifest, used, "train")
    if format == "megatron":
        split = manifest.split or WHOLE_SPLIT
        why = "which its validation is held out by" if manifest.split else "validation lies in files of its own"
        return ExportedBlend(data_path(train) + "\n", [*notes, f"Give Megatron --split {split}: {why}."])
    if manifest.split is not None:
        raise InputError(
            f"{data.source}: its validation is held out of the same files by --split {manifest.split}, which"
            " --per-split-data-args-path cannot say. Use --format megatron with that --split."
        )
    notes.append(
        "Give Megatron --eval-iters above 0: at 0 it ends with 'no sample to consume' over the validation files."
    )
    return ExportedBlend(_json(per_split_json(train, _files(manifest, data.natural, "validation"))), notes)


def write_text(path: Path, text: str) -> None:
    """Writes a file and its folder, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    with writing(path, "Choose another --out."):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode("utf-8"))


def _files(manifest: Manifest, weights: Mapping[str, float], split: Split) -> list[tuple[float, str]]:
    """(weight, absolute prefix) of every file with tokens."""
    files = []
    for name, weight in weights.items():
        entry = manifest.domain(name).train if split == "train" else manifest.domain(name).validation
        prefixes = manifest.prefixes(name, split)
        ranges = entry.ranges or [None] * len(prefixes)
        for prefix, documents in zip(prefixes, ranges, strict=True):
            tokens = DomainTokens(name, [prefix], verify=False, ranges=[documents]).num_tokens
            if tokens:
                files.append((weight * (tokens / entry.tokens), os.path.abspath(prefix)))
    return files


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
