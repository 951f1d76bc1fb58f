"""Downloads by the registries' own clients: ``apt-get download``, ``pip download``, ``npm pack``. Nothing is installed.

A package is downloaded into a separate folder with a temporary name, which is renamed when the client has finished: a
folder with its final name holds a whole archive. To learn a source distribution's metadata, pip runs the build script
inside it, so the table prefers wheels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

from megamix.prepare.corpus.sources import Package

_TIMEOUT_SECONDS = 1800
_apt_lock = threading.Lock()
_apt_updated = False


class FetchError(Exception):
    """A package could not be downloaded; the message says why and what would help."""


def fetch(package: Package, cache: Path) -> Path:
    """The archive of ``package``, downloaded into ``cache`` unless it is there already.

    Raises:
        FetchError: the client is missing, the package is not found, or the network does not answer.
    """
    cache = cache.resolve()  # the clients run in it, where a relative path would lead elsewhere
    final, part = cache / package.key, cache / f".part-{package.key}"
    if not final.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _download(package, part)
        found = [path for path in part.iterdir() if path.is_file()]
        if len(found) != 1:
            raise FetchError(f"the download of the {package.label} left {len(found)} files, expected one")
        os.replace(part, final)
    archives = sorted(path for path in final.iterdir() if path.is_file())
    if not archives:
        discard(package, cache)
        raise FetchError(f"the cache folder {final} was empty and has been removed; try again")
    return archives[0]


def discard(package: Package, cache: Path) -> None:
    """Removes a downloaded archive, so that the next `fetch` downloads it again."""
    shutil.rmtree(cache / package.key, ignore_errors=True)


def version(package: Package, archive: Path) -> str:
    """The version that was downloaded; a .deb names its own in the file name (name_version_architecture.deb)."""
    return package.version or unquote(archive.stem.split("_")[1] if archive.stem.count("_") >= 2 else "unknown")


def _download(package: Package, folder: Path) -> None:
    if package.registry == "deb":
        _apt(package.name, folder)
    elif package.registry == "npm":
        spec = f"{package.name}@{package.version}" if package.version else package.name
        _run(["npm", "pack", spec, "--ignore-scripts", "--fetch-retries=2", "--pack-destination", str(folder)], folder)
    else:
        spec = f"{package.name}=={package.version}" if package.version else package.name
        only = "--only-binary=:all:" if package.registry == "wheel" else "--no-binary=:all:"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            only,
            "--no-input",
            "--disable-pip-version-check",
        ]
        _run([*command, "--retries", "2", "--timeout", "30", "--dest", str(folder), spec], folder)


def _apt(name: str, folder: Path) -> None:
    global _apt_updated
    command = ["apt-get", "download", "-o", "Acquire::Retries=2", name]
    try:
        _run(command, folder)
        return
    except FetchError as error:
        # Missing or outdated lists are the one failure with a remedy here, and only for root.
        stale = re.search(r"Unable to locate|no installation candidate|Can't find a source|404", str(error))
        if not stale or os.geteuid() != 0:
            hint = " (ask root to run 'apt-get update')" if stale else ""
            raise FetchError(f"{error}{hint}") from error
    with _apt_lock:
        if not _apt_updated:
            _run(["apt-get", "update"], folder)
            _apt_updated = True
    _run(command, folder)


def _run(command: list[str], folder: Path) -> None:
    client = "pip" if command[0] == sys.executable else command[0]
    if client != "pip" and shutil.which(client) is None:
        raise FetchError(f"this machine has no {client}")
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            env={**os.environ, "LC_ALL": "C"},  # the messages are searched
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{client} did not finish within {_TIMEOUT_SECONDS} s") from error
    except OSError as error:
        raise FetchError(f"{client} cannot be run: {error.strerror or error}") from error
    if done.returncode:
        raise FetchError(f"{client} failed: {_reason(done.stderr or done.stdout) or f'exit status {done.returncode}'}")


def _reason(output: str) -> str:
    """The lines of a client's output that say what went wrong, shortened."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"E:|ERROR|Err:|npm (?:error|ERR!)", line)]
    if not telling:
        telling = lines[-1:]
    return "; ".join(dict.fromkeys(telling[:3]))[:400]
