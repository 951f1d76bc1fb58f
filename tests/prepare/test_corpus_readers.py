"""The corpus's readers and cleaners on tiny inputs: what each takes out of a file, and that damage is reported."""

from __future__ import annotations

import base64
import gzip
import json
import lzma
import struct
import zlib
from pathlib import Path

import pytest
from packages import make_ar, make_deb, make_tar, make_wheel

from megamix.prepare.corpus.clean import CLEANERS, tidy
from megamix.prepare.corpus.mail import html_to_text, read_mail
from megamix.prepare.corpus.roff import roff_to_text
from megamix.prepare.corpus.unpack import DamagedArchive, members, read_ar, read_dictd, read_rdb, read_xdr_strings

# --- archives


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
