"""One cleaner per file format: from the files of an archive to texts.

A cleaner takes the wanted files, in any order, and yields ``(key, text)``; keys are unique, and a domain's documents
are written in the order of their keys, so the result does not depend on the order of the archive.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator

from megamix.prepare.corpus.unpack import Member, damage_reported

Document = tuple[str, str]
Cleaner = Callable[[Iterable[Member]], Iterator[Document]]
CLEANERS: dict[str, Cleaner] = {}

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")


def tidy(text: str) -> str:
    """Unix line ends, no control characters, no lone surrogates, no blanks at line ends, no blank lines around."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n")
    text = _CONTROLS.sub("", text).encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip("\n")


def cut(text: str, longest: int) -> Iterator[str]:
    """Pieces of at most ``longest`` characters, divided at blank lines, else at line ends, else anywhere."""
    while len(text) > longest:
        end = max(text.rfind("\n\n", longest // 2, longest), 0) or max(text.rfind("\n", 0, longest), 0) or longest
        yield text[:end]
        text = text[end:].lstrip("\n")
    yield text


def _cleaner(function: Cleaner) -> Cleaner:
    CLEANERS[function.__name__] = function
    return function


def _per_file(function: Callable[[bytes], str]) -> Callable[[bytes], str]:
    """Registers a function from the bytes of one file to one text."""

    def clean(files: Iterable[Member]) -> Iterator[Document]:
        for name, data in files:
            if name.endswith((".gz", ".dz")):
                with damage_reported(name):
                    data = gzip.decompress(data)
            yield name, function(data)

    CLEANERS[function.__name__] = clean
    return function


@_per_file
def verbatim(data: bytes) -> str:
    """UTF-8 where the bytes are valid UTF-8, Latin-1 otherwise (old source files)."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


@_per_file
def licence(data: bytes) -> str:
    """The text of a licence in the SPDX list's JSON."""
    return json.loads(data)["licenseText"]


@_per_file
def edict(data: bytes) -> str:
    """EDICT: a line per entry, in EUC-JP; the first line describes the file."""
    return data.decode("euc_jp", "replace").partition("\n")[2]


_PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


@_per_file
def wordnet(data: bytes) -> str:
    """WordNet's data files, ``offset file part count word id ... | gloss``: the words of each synset and its gloss."""
    lines = []
    for line in data.decode("utf-8").splitlines():
        entry, _, gloss = line.partition(" | ")
        fields = entry.split()
        if gloss and not line.startswith("  "):  # the licence at the beginning is indented
            words = ", ".join(word.replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2])
            lines.append(f"{words} ({_PARTS_OF_SPEECH[fields[2]]}): {gloss.strip()}")
    return "\n".join(lines)


# Some snippets are whole files ("ly snippet:"), others fragments ("ly snippet contents follows:").
_SNIPPET = re.compile(r"% ly snippet.*?:\n% \*+\n(.*?)\n% \*+\n% end ly snippet", re.DOTALL)
_BOOKKEEPING = re.compile(r"^\\(?:sourcefilename|sourcefileline)\b.*\n?", re.MULTILINE)


@_per_file
def lilypond(data: bytes) -> str:
    """The music between lilypond-book's markers; without them the whole file would be mostly its preamble."""
    match = _SNIPPET.search(verbatim(data))
    return re.sub(r"\n{3,}", "\n\n", _BOOKKEEPING.sub("", match[1])) if match else ""


@_cleaner
def summaries(files: Iterable[Member]) -> Iterator[Document]:
    """Encyclopedia articles: the title and the first paragraphs."""
    for name, data in files:
        for key, article in json.loads(data).items():
            title, text = (article.get("title") or key).strip(), (article.get("extract") or "").strip()
            yield f"{name}#{key}", f"{title}\n\n{text}" if text else ""


@_cleaner
def poems(files: Iterable[Member]) -> Iterator[Document]:
    """Poems: title, author and lines."""
    for name, data in files:
        for number, poem in enumerate(json.loads(data)):
            yield f"{name}#{number:04d}", "\n".join([poem["title"], poem["author"], "", *poem["paragraphs"]])


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


@_cleaner
def scripture(files: Iterable[Member]) -> Iterator[Document]:
    """Verses as JSON lines in the order of the books, joined to chapters."""
    for name, data in files:
        verses = map(json.loads, data.decode("utf-8").splitlines())
        chapters = itertools.groupby(verses, key=lambda verse: f"{verse['book']} {verse['chapter']}")
        for number, (title, lines) in enumerate(chapters):
            text = "\n".join(f"{verse['verse']} {verse['text']}" for verse in lines)
            yield f"{name}#{number:05d}", f"{title}\n\n{text}"
