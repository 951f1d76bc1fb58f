"""The corpus's readers and cleaners on tiny inputs: what each takes out of a file, and that damage is reported."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from pathlib import Path

import pytest
from packages import make_ar, make_deb, make_tar, make_wheel

from megamix.prepare.corpus.clean import CLEANERS, cut, tidy
from megamix.prepare.corpus.unpack import DamagedArchive, members, read_ar

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


# --- cleaners


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


def test_wordnet_gives_the_words_and_the_gloss() -> None:
    licence = "  1 This software is provided | to you\n"
    noun = '03641940 06 n 02 lamp 1 desk_lamp 0 002 @ 03410635 n 0000 %p 02801733 n 0000 | furniture; "a lamp"  \n'
    many = "00000001 00 s 0a " + "".join(f"w{i} 0 " for i in range(10)) + "000 | ten words  \n"
    assert clean("wordnet", a=licence + noun + many) == [
        f'lamp, desk lamp (noun): furniture; "a lamp"\n{", ".join(f"w{i}" for i in range(10))} (adjective): ten words'
    ]


def test_edict_is_decoded_without_its_first_line() -> None:
    assert clean("edict", a="亜 /about this file/\n亜門 [あもん] /(n) suborder/\n".encode("euc_jp")) == [
        "亜門 [あもん] /(n) suborder/"
    ]


def test_verbatim_opens_gzip_and_reads_latin_1() -> None:
    packed = gzip.compress("naïve".encode())
    files = {"a.el": "naïve".encode("latin-1"), "b.el.gz": packed, "c.dict.dz": packed}
    assert clean("verbatim", **files) == ["naïve"] * 3
    with pytest.raises(DamagedArchive, match=r"b\.el\.gz"):
        clean("verbatim", **{"b.el.gz": gzip.compress(b"whole")[:-3]})


def test_long_texts_are_cut_at_blank_lines_then_at_line_ends() -> None:
    paragraph, line = "word " * 10 + "\n\n", "acgt" * 15 + "\n"
    for text, ends in ((paragraph * 50, "word "), (line * 50, "acgt"), ("x" * 1000, "x")):
        pieces = list(cut(text, 300))
        assert all(len(piece) <= 300 for piece in pieces)
        assert all(piece.endswith(ends) for piece in pieces[:-1])
        assert "".join(pieces).replace("\n", "") == text.replace("\n", "")
    assert list(cut("short", 5)) == ["short"]


def test_poems_begin_with_title_and_author() -> None:
    poem = {"title": "靜夜思", "author": "李白", "paragraphs": ["牀前看月光。", "疑是地上霜。"]}
    assert clean("poems", a=json.dumps([poem, {**poem, "paragraphs": []}])) == [
        "靜夜思\n李白\n\n牀前看月光。\n疑是地上霜。",
        "靜夜思\n李白",
    ]


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


def test_verses_are_joined_to_chapters() -> None:
    places = [("Ruth", 1, 1), ("Ruth", 1, 2), ("Ruth", 2, 1), ("Acts", 2, 1)]
    verses = [{"book": b, "chapter": c, "verse": v, "text": f"{b}{c}{v}"} for b, c, v in places]
    assert clean("scripture", a="\n".join(map(json.dumps, verses))) == [
        "Ruth 1\n\n1 Ruth11\n2 Ruth12",
        "Ruth 2\n\n1 Ruth21",
        "Acts 2\n\n1 Acts21",
    ]


def test_tidy() -> None:
    assert tidy("\n a \r\nb\x00\x07\fc\ud800 \n\n") == " a\nb\nc?"
