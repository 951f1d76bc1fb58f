"""One cleaner per kind of source: from the files of an archive to documents.

A cleaner takes the wanted files, in any order, and yields ``(key, text)``; keys are unique, and a domain's documents
are written in the order of their keys, so the result does not depend on the order of the archive.
"""

# ruff: noqa: RUF001 (letters of other alphabets are what the tables below are about)

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

from megamix.prepare.corpus.mail import html_to_text, read_mail
from megamix.prepare.corpus.roff import roff_to_text
from megamix.prepare.corpus.unpack import (
    DamagedArchive,
    Member,
    damage_reported,
    decode,
    read_dictd,
    read_rdb,
    tar_members,
)

Document = tuple[str, str]
Cleaner = Callable[[Iterable[Member]], Iterator[Document]]
CLEANERS: dict[str, Cleaner] = {}

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")


def tidy(text: str) -> str:
    """Unix line ends, no control characters, no lone surrogates, no blanks at line ends, no blank lines around."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n")
    text = _CONTROLS.sub("", text).encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip("\n")


def _cleaner(function: Cleaner) -> Cleaner:
    CLEANERS[function.__name__] = function
    return function


def _per_file(function: Callable[[str, bytes], str]) -> Callable[[str, bytes], str]:
    """Registers a function from one file to one document."""

    def clean(files: Iterable[Member]) -> Iterator[Document]:
        for name, data in files:
            yield name, function(name, data)

    CLEANERS[function.__name__] = clean
    return function


@_per_file
def verbatim(name: str, data: bytes) -> str:
    """Source code and other text that needs no cleaning."""
    return decode(_gunzipped(name, data))


@_per_file
def man(name: str, data: bytes) -> str:
    return roff_to_text(decode(_gunzipped(name, data)))


@_per_file
def emails(name: str, data: bytes) -> str:
    return read_mail(data)


@_per_file
def html(name: str, data: bytes) -> str:
    return html_to_text(decode(data))


@_per_file
def licence_json(name: str, data: bytes) -> str:
    return json.loads(data)["licenseText"]


def _gunzipped(name: str, data: bytes) -> bytes:
    if not name.endswith(".gz"):
        return data
    with damage_reported(name):
        return gzip.decompress(data)


# Some snippets are whole files ("ly snippet:"), others fragments ("ly snippet contents follows:").
_SNIPPET = re.compile(r"% ly snippet.*?:\n% \*+\n(.*?)\n% \*+\n% end ly snippet", re.DOTALL)
_BOOKKEEPING = re.compile(r"^\\(?:sourcefilename|sourcefileline)\b.*\n?", re.MULTILINE)


@_per_file
def lilypond(name: str, data: bytes) -> str:
    """The music between lilypond-book's markers; without them the whole file would be mostly its preamble."""
    match = _SNIPPET.search(decode(data))
    return re.sub(r"\n{3,}", "\n\n", _BOOKKEEPING.sub("", match[1])) if match else ""


_LONGEST_RECORD = 50_000


@_cleaner
def flat_records(files: Iterable[Member]) -> Iterator[Document]:
    """Sequence databases as flat files: a document per record, which ends with a line ``//``.

    A few records are megabytes of one genome, two thirds of the whole; they are cut at line ends, so that a split by
    documents into training and validation stays near the shares asked for.
    """
    for name, data in files:
        for number, record in enumerate(re.split(r"^//\s*$", decode(data), flags=re.MULTILINE)):
            record = record.strip("\n")
            for part, text in enumerate(_cut(record + "\n//" if record.strip() else "", _LONGEST_RECORD)):
                yield f"{name}#{number:06d}-{part:04d}", text


def _cut(text: str, longest: int) -> Iterator[str]:
    while len(text) > longest:
        end = text.rfind("\n", 0, longest)
        end = end if end > 0 else longest
        yield text[:end]
        text = text[end:].lstrip("\n")
    yield text


@_cleaner
def summaries(files: Iterable[Member]) -> Iterator[Document]:
    """Encyclopedia articles: the title and the first paragraphs."""
    for name, data in files:
        for key, article in json.loads(data).items():
            title, text = (article.get("title") or key).strip(), (article.get("extract") or "").strip()
            yield f"{name}#{key}", f"{title}\n\n{text}" if text else ""


_RECIPE_WORDS = {
    "de-de": ("Für", "Zeit", "Zutaten", "Zubereitung"),
    "da-dk": ("Antal", "Tid", "Ingredienser", "Fremgangsmåde"),
}


@_cleaner
def recipes(files: Iterable[Member]) -> Iterator[Document]:
    """Recipes as a cook would write them down; `''` and `'''` are the wiki's quotes for italics and bold."""
    for name, data in files:
        language = name.rsplit("recipes_", 1)[-1].removesuffix(".json")
        serves, time, ingredients, steps = _RECIPE_WORDS.get(language, ("Serves", "Time", "Ingredients", "Method"))
        for key, recipe in json.loads(data).items():
            parts = [recipe["title"]]
            facts = [f"{word}: {recipe[k]}" for word, k in ((serves, "servings"), (time, "time")) if recipe.get(k)]
            parts += ["\n".join(facts)] if facts else []
            lists = ((ingredients, "ingredients", "- {1}"), (steps, "steps", "{0}. {1}"))
            for word, field, form in lists:
                items = [item.strip() for item in recipe.get(field) or [] if item and item.strip()]
                if items:
                    parts.append("\n".join([f"{word}:", *(form.format(i, item) for i, item in enumerate(items, 1))]))
            text = re.sub(r"'{2,}", "", "\n\n".join(parts))
            # A template that the extraction emptied leaves brackets with nothing in them.
            text = re.sub(r" ?\(\s*/?\s*\)", "", text).replace("/)", ")").replace("(/", "(")
            yield f"{name}#{key}", text if recipe.get("steps") else ""


_GCIDE_SOURCE = re.compile(
    r"\s*\[[^\]\n]*(?:Webster|WordNet|PJC|Century Dict|RDH|RHUD)[^\]\n]*\]|\s*\[(?:RP|AS|GG|MW10|EB11)\]"
)
_GCIDE_LETTER = re.compile(
    r"\[(?:(?P<mark>[.^=~`'\",-])(?P<letter>[A-Za-z]{1,2})|(?P<short>[A-Za-z]{1,2})\^|(?P<name>[A-Za-z]+))\]"
)
_GCIDE_MARKS = {
    ".": "\u0307", "^": "\u0302", "=": "\u0304", "-": "\u0304", "~": "\u0303", "`": "\u0300", "'": "\u0301",
    '"': "\u0308", ",": "\u0327",
}  # fmt: skip
_GCIDE_NAMES = {
    "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "eth": "ð", "thorn": "þ", "yogh": "ȝ", "imac": "ī", "aum": "ä",
    "add": "a\u0324", "udd": "u\u0324", "asl": "ā", "ng": "ŋ", "th": "th", "deg": "°", "root": "√", "sect": "§",
    "pounds": "£", "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "bprime": "′", "dsdot": "ṣ",
}  # fmt: skip


def _gcide_letter(match: re.Match[str]) -> str:
    if match["name"]:
        return _GCIDE_NAMES.get(match["name"], match[0])
    letters, mark = (match["letter"], _GCIDE_MARKS[match["mark"]]) if match["mark"] else (match["short"], "\u0306")
    letters = {"ae": "æ", "oe": "œ"}.get(letters, letters)
    return unicodedata.normalize("NFC", letters[0] + mark + letters[1:])


@_cleaner
def dictionary(files: Iterable[Member]) -> Iterator[Document]:
    """A dictd dictionary, 50 entries to a document, since one entry is a line or two.

    Braces round cross-references and the source tags of every sense (`[1913 Webster]`) are dropped, being markup and a
    refrain, and letters spelt in ASCII (`[=o]`) become what they stand for.
    """
    entries = [
        tidy(_GCIDE_LETTER.sub(_gcide_letter, _GCIDE_SOURCE.sub("", entry).replace("{", "").replace("}", "")))
        for entry in _dictd_entries(files)
    ]
    for number, start in enumerate(range(0, len(entries), 50)):
        yield f"{number:06d}", "\n\n".join(entries[start : start + 50])


@_cleaner
def glossary(files: Iterable[Member]) -> Iterator[Document]:
    """A dictd dictionary whose entries are articles: a document each."""
    for number, entry in enumerate(_dictd_entries(files)):
        yield f"{number:06d}", entry.replace("{", "").replace("}", "")


def _dictd_entries(files: Iterable[Member]) -> list[str]:
    parts = {("dict" if name.endswith(".dz") else "index"): data for name, data in files}
    if len(parts) < 2:
        raise DamagedArchive("a dictd dictionary is a .dict.dz and an .index file; the archive lacks one of them.")
    return [entry for entry in read_dictd(parts["dict"], parts["index"]) if entry.strip()]


_CHAPTER = re.compile(r"^\s*(?:chapter|letter)\s+(?:[ivxlc]+|\d+|[a-z-]+)\.?\s*$", re.IGNORECASE)


@_cleaner
def novels(files: Iterable[Member]) -> Iterator[Document]:
    """Novels kept as R character vectors of lines, split at the chapters."""
    for name, data in files:
        for book, lines in enumerate(read_rdb(data)):
            starts = [0] + [i for i, line in enumerate(lines) if _CHAPTER.match(line)] + [len(lines)]
            for chapter, (start, end) in enumerate(itertools.pairwise(starts)):
                text = "\n".join(lines[start:end])
                yield f"{name}#{book:02d}-{chapter:03d}", re.sub(r"\n{3,}", "\n\n", text)


_DATED = re.compile(r"^(?=(?:\d{4}-\d\d-\d\d|(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) \w{3} +\d)\b)", re.MULTILINE)


@_cleaner
def changelogs(files: Iterable[Member]) -> Iterator[Document]:
    """The ChangeLog files of a source tarball inside the package, a document per dated entry."""
    for name, data in files:
        for path, body in tar_members(io.BytesIO(data), name, lambda path: "/ChangeLog" in path):
            for number, entry in enumerate(_DATED.split(decode(body))):
                yield f"{path}#{number:06d}", entry


_SCENE = re.compile(r"^(?=\s*(?:ACT|SCENE|Scene|Scena|Actus)\b)", re.MULTILINE)


@_cleaner
def plays(files: Iterable[Member]) -> Iterator[Document]:
    """Plays and poems, split at scenes; headings with no scene under them join what follows."""
    for name, data in files:
        text, number = "", 0
        for part in [*_SCENE.split(decode(data).replace("\r\n", "\n")), None]:
            if part is None or (len(text) > 2000 and part):
                yield f"{name}#{number:04d}", re.sub(r"\n{3,}", "\n\n", text)
                text, number = "", number + 1
            text += part or ""


@_cleaner
def scripture(files: Iterable[Member]) -> Iterator[Document]:
    """Verses as JSON lines, joined to chapters."""
    chapters: dict[tuple[int, str, int], list[str]] = {}
    books: dict[str, int] = {}
    for _, data in files:
        for line in data.decode("utf-8").splitlines():
            verse = json.loads(line)
            key = (books.setdefault(verse["book"], len(books)), verse["book"], int(verse["chapter"]))
            chapters.setdefault(key, [f"{verse['book']} {verse['chapter']}", ""]).append(
                f"{verse['verse']} {verse['text']}"
            )
    for (order, _, chapter), lines in chapters.items():
        yield f"{order:03d}-{chapter:03d}", "\n".join(lines)
