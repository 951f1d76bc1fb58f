"""Hugging Face datasets: those of the hub, as arrow files of the library's cache, and folders that it saved.

The library `datasets` fetches and converts; what it leaves on disk is read as any other arrow file, so that shards, a
kill and a second call work as with them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from megamix.core.errors import InputError
from megamix.core.files import read_json
from megamix.core.packages import need

HUB = "hf://"
_FILES_OF_THE_HUB = re.compile(r"hf://(datasets|buckets|spaces)/")
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def is_hub_dataset(text: str) -> bool:
    """Whether a path names a dataset of the hub; ``hf://datasets/...`` names files there, which fsspec opens."""
    return text.startswith(HUB) and _FILES_OF_THE_HUB.match(text) is None


def hub_files(text: str) -> list[Path]:
    """The arrow files of ``hf://NAME[:CONFIG][@SPLIT]``, in order; split ``train`` if none is named.

    Raises:
        InputError: datasets is not installed, or it cannot load the dataset.
    """
    rest, _, split = text.removeprefix(HUB).partition("@")
    name, _, config = rest.partition(":")
    if not name or re.search(r"[\[%+]", split):
        raise InputError(f"'{text}': expected hf://NAME[:CONFIG][@SPLIT] with the name of a whole split.")
    datasets = need("datasets", f"reading {text}")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split or "train")
        files = [Path(each["filename"]) for each in loaded.cache_files]
    except Exception as error:  # the library and the hub's client raise dozens of kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        if Path(name).exists():
            raise InputError(
                f"{text} names what is here, not a dataset of the hub. Leave hf:// out: {name}."
            ) from error
        raise InputError(
            f"{text} cannot be loaded: {reason}. Check name, config (:CONFIG), split (@SPLIT) and the network, or download"
            " its files and give their folder."
        ) from error
    if not files:
        raise InputError(
            f"{text}: the library datasets holds it in memory. Save it (save_to_disk) and give the folder."
        )
    return files


def saved_files(folder: Path) -> list[Path] | None:
    """The arrow files of a folder that ``Dataset.save_to_disk`` wrote, in order; None for any other folder.

    Files that the library left beside them later, of ``map`` for example, are none of the dataset's.

    Raises:
        InputError: a folder of several splits, or one without its files.
    """
    if (folder / _SPLITS).is_file():
        splits = read_json(folder / _SPLITS).get("splits", [])
        raise InputError(
            f"{folder} is a saved dataset with the splits {', '.join(splits)}. Name one: {folder / (splits or ['train'])[0]}."
        )
    if not (folder / _STATE).is_file():
        return None
    state: Any = read_json(folder / _STATE)
    if not isinstance(state, dict) or "_data_files" not in state:
        return None
    files = [folder / os.path.basename(each["filename"]) for each in state["_data_files"]]
    missing = [path for path in files if not path.is_file()]
    if missing or not files:
        raise InputError(
            f"{folder} is a saved dataset without {missing[0].name if missing else 'data'}. Copy it again."
        )
    return files
