"""Mapped files, opened when they are read and closed again when many others are.

A mapped file takes a file descriptor for as long as it is mapped, and a corpus may have more files than a process may
open: 40,000 domains of two files, or 2,500 files a domain.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

import numpy as np

from megamix.core.errors import InputError
from megamix.core.processes import allow_more_files

MOST = 16_384
"""Files mapped at a time at most; the kernel allows a process 65,530 mappings of any kind (vm.max_map_count)."""
T = TypeVar("T")


class MappedFiles:
    """What was made of mapped files, by key; those that were not asked for the longest are dropped.

    A dropped file is closed once nobody has an array of it any more. Safe to use from several threads.

    Args:
        most: kept at a time; default: `most_open`.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, object] = OrderedDict()
        self._lock = threading.RLock()  # a user may be collected while it is held

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` has made for ``key``, made again if it was dropped."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]  # type: ignore[return-value]
        made = make()
        with self._lock:
            if self._most is None:
                self._most = most_open()
            self._kept[key] = made
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return made

    def forget(self, owner: object, *parts: str) -> None:
        """Drops what was made for the keys (owner, part)."""
        with self._lock:
            for part in parts:
                self._kept.pop((owner, part), None)

    def owner(self, user: object, *parts: str) -> object:
        """Half of a key, for as long as ``user`` lives: a file written anew under its name is another one."""
        owner = object()
        weakref.finalize(user, self.forget, owner, *parts).atexit = False
        return owner

    def drop(self) -> bool:
        """Drops half of what is kept; returns whether there was anything."""
        with self._lock:
            number = (len(self._kept) + 1) // 2
            for _ in range(number):
                self._kept.popitem(last=False)
        return number > 0


TOKEN_FILES = MappedFiles()
"""Token files and indexes of this process."""


def most_open() -> int:
    """Files that are mapped at a time: half of what this process may open, and not more than `MOST`."""
    return max(2, min(may_open() // 2, MOST))


def may_open() -> int:
    """Files that this process may open: its soft limit becomes the hard one."""
    allow_more_files()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard if hard != resource.RLIM_INFINITY else 2**20


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, uint8 [size], mapped.

    Not an `np.memmap`: its slices cost several times as much as an array's, and opening it twice as much.

    Raises:
        InputError: it cannot be read.
    """
    while True:
        try:
            with open(path, "rb") as file:
                # An empty file cannot be mapped.
                if os.fstat(file.fileno()).st_size == 0:
                    return np.empty(0, np.uint8)
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENOMEM) and TOKEN_FILES.drop():
                continue  # others of this process have taken more than the half that is left for them
            advice = "Check the path, or run `megamix prepare`."
            if error.errno == errno.EMFILE:
                advice = f"This process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}: raise `ulimit -n`."
            raise InputError(f"cannot read {path}: {error.strerror or error}. {advice}") from error
