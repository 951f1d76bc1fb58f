"""The README and its chapters, as a reader meets them: code blocks, command lines, links and names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from commands import ROOT
from markdown_it import MarkdownIt
from markdown_it.token import Token

PAGES = {
    "README": ROOT / "README.md",
    **{path.parent.name: path for path in sorted((ROOT / "megamix").glob("*/README.md"))},
    **{name: ROOT / name / "README.md" for name in ("kernels", "configs", "slurm")},
}
"""By the name of the folder."""
MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Code:
    """A piece of code on a page.

    Attributes:
        text: what it says.
        language: of a fenced block; "" of an indented one; None of a span in a line.
        column: number of the table's column that it stands in; None outside of tables.
        header: title of that table's first column.
    """

    text: str
    language: str | None = None
    column: int | None = None
    header: str = ""


def tokens(path: Path) -> list[Token]:
    return MARKDOWN.parse(path.read_text(encoding="utf-8"))


def pieces_of_code(path: Path) -> Iterator[Code]:
    """All code of a page, in its order."""
    column, header, in_head = None, "", False
    for token in tokens(path):
        if token.type == "thead_open":
            header, in_head = "", True
        elif token.type == "tbody_open":
            in_head = False
        elif token.type == "tr_open" and not in_head:
            column = -1
        elif token.type == "td_open" and column is not None:
            column += 1
        elif token.type == "table_close":
            column, header = None, ""
        elif token.type in ("fence", "code_block"):
            yield Code(token.content, token.info)
        elif token.type == "inline":
            header = header or (token.content if in_head else "")
            spans = [child.content for child in token.children or [] if child.type == "code_inline"]
            yield from (Code(span, None, column, header) for span in spans)


def python_blocks(page: str) -> list[str]:
    return [code.text for code in pieces_of_code(PAGES[page]) if code.language == "python"]


def readme_code(page: str, containing: str, language: str = "python") -> str:
    """The one block of a page in this language that has ``containing`` in it."""
    blocks = [code.text for code in pieces_of_code(PAGES[page]) if code.language == language]
    (block,) = [block for block in blocks if containing in block]
    return block


def command_lines(page: str) -> list[tuple[list[str], bool]]:
    """The arguments of every ``megamix`` command of a page, and whether it is a line of its own (a command within a
    sentence may leave arguments out)."""
    found = []
    for code in pieces_of_code(PAGES[page]):
        if code.language in (None, "", "sh"):
            for line in code.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if "megamix " in line else []
                if "megamix" in words and words[0] not in ("pip", "podman", "import", "from"):
                    found.append((words[words.index("megamix") + 1 :], code.language is not None))
    return found


def links(path: Path) -> list[str]:
    """Where the links of a page lead, those to other sites left out."""
    children = [child for token in tokens(path) for child in token.children or []]
    found = [str(child.attrs["href"]) for child in children if child.type == "link_open"]
    return [link for link in found if "://" not in link]


def anchors(path: Path) -> set[str]:
    """Of every heading, as GitHub makes them."""
    found, inside = set(), False
    for token in tokens(path):
        if token.type == "inline" and inside:
            found.add(re.sub(r"[^\w\- ]", "", token.content.lower()).replace(" ", "-"))
        inside = token.type == "heading_open"
    return found
