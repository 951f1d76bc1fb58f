"""Manual pages: roff source to plain text.

Not a typesetter: it fills paragraphs, keeps headings, tagged lists, literal blocks and tables, and drops fonts, sizes
and layout. It knows the `man` macros and the common part of `mdoc`, and the conditionals by which pages choose
between terminal and printer.
"""

# ruff: noqa: RUF001 (typographic characters are what the tables below are about)

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from megamix.prepare.corpus.mdoc import inline as mdoc_inline

_SPECIAL = {
    "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "Fo": "«", "Fc": "»", "fo": "‹", "fc": "›",
    "Bq": "„", "bq": "‚", "em": "—", "en": "–", "hy": "-", "mi": "−", "mu": "×", "di": "÷", "ha": "^",
    "bu": "•",  # codespell:ignore bu
    "ti": "~", "rs": "\\", "sl": "/", "<=": "≤", ">=": "≥", "!=": "≠", "+-": "±", "de": "°", "sc": "§", "ss": "ß",
    "->": "→", "<-": "←", "at": "@", "sh": "#", "Do": "$", "ga": "`", "aa": "´", "ba": "|", "or": "|", "br": "|",
    "lB": "[", "rB": "]", "lC": "{", "rC": "}", "la": "⟨", "ra": "⟩", "co": "©", "rg": "®", "tm": "™", "pl": "+",
    "eq": "=", "12": "½", "14": "¼", "34": "¾", "ae": "æ", "AE": "Æ", "/o": "ø", "/O": "Ø", "ul": "_", "*m": "μ",
}  # fmt: skip
_ACCENTS = {":": "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303", ",": "\u0327", "o": "\u030a"}
_SINGLE = {"e": "\\", "\\": "\\", "-": "-", "'": "'", "`": "`", ".": ".", "t": "\t", " ": " ", "~": " ", "0": " "}
_JOIN = "\ue000"
"""Stands for ``\\c`` until lines are joined: the next line follows with no space."""

_ESCAPE = re.compile(
    r"""\\(?:
      (?:f|m|M|F|Y|n[-+]?|g|k)(?:\[[^\]]*\]|\(..|.)         # fonts, colours, registers: nothing to show
    | s(?:\[[^\]]*\]|'[^']*'|[-+]?\(..|[-+]?\d{1,2})        # sizes
    | \*(?:\[(?P<long>[^\]]*)\]|\((?P<two>..)|(?P<one>.))   # strings
    | \((?P<char>..) | \[(?P<name>[^\]]*)\]                 # special characters
    | [hvwlLxXoDbZANRSHBC]'[^']*'                           # motions, lines and widths
    | (?P<single>.) | $
    )""",
    re.VERBOSE | re.DOTALL,
)
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\.|\S)+)')
_CONDITION = re.compile(r"\s*(!?)\s*('[^']*'[^']*'|\"[^\"]*\"[^\"]*\"|(?:\\.|\S)+?(?=\\\{|\s|$))\s*(.*)", re.DOTALL)
_WIDE = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")

_PARAGRAPH = {"PP", "P", "LP", "HP", "Pp", "Sp", "sp", "Lp"}
_BREAK = {"br", "RS", "RE", "in", "ti", "ce", "OP", "YS", "UC"}
_ALTERNATING = {"BR", "RB", "BI", "IB", "IR", "RI"}
_PLAIN = {"B", "I", "R", "SM", "SB", "BX", "CW", "FN", "Text", "Topic", "Dl", "D1"}
_LITERAL_ON, _LITERAL_OFF = {"nf", "EX", "Vb", "CS", "DS", "Bd"}, {"fi", "EE", "Ve", "CE", "DE", "Ed"}
_SKIPPED_BLOCKS = {"de", "de1", "am", "am1", "ig", "dei", "ami"}


def special_character(name: str) -> str:
    """The character that roff's ``\\(xx`` or ``\\[name]`` stands for; empty where it is not known."""
    if name in _SPECIAL:
        return _SPECIAL[name]
    if len(name) == 2 and name[0] in _ACCENTS and name[1].isalpha() and (name[0] != "o" or name[1] in "aA"):
        return unicodedata.normalize("NFC", name[1] + _ACCENTS[name[0]])
    codes = re.fullmatch(r"u([0-9A-Fa-f]{4,6})", name)
    if codes and not 0xD800 <= int(codes[1], 16) <= 0xDFFF and int(codes[1], 16) < 0x110000:
        return chr(int(codes[1], 16))
    return ""


def arguments(text: str) -> list[str]:
    """A macro line's arguments; double quotes group words, and a doubled one inside quotes is a quote."""
    return [(m[1].replace('""', '"') if m[2] is None else m[2]) for m in _ARGUMENT.finditer(text)]


def roff_to_text(source: str) -> str:
    """The text of a manual page; empty for a page that only includes another one (``.so``)."""
    return _Page().render(source)


class _Page:
    """Renders one page; ``lines`` is what is finished, ``words`` the paragraph under way."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.words: list[str] = []
        self.strings: dict[str, str] = {"R": "®", "Tm": "™", "lq": "“", "rq": "”"}
        self.fill = True
        self.tag = False  # the next piece of text is the tag of a list item
        self.pending = ""  # a short tag, which shares its line with the item
        self.name = ""
        self.address, self.link_start = "", 0
        self.branches: list[bool] = []  # the outcome of each `.ie` that waits for its `.el`

    def render(self, source: str) -> str:
        lines = iter(re.sub(r"\\\n", "", source.replace("\r\n", "\n")).split("\n"))
        for line in lines:
            self.line(line, lines)
        self.flush()
        text = "\n".join(self.lines)
        return re.sub(r"\n{3,}", "\n\n", text).strip()

    def line(self, line: str, rest: Iterator[str]) -> None:
        line = re.sub(r"(?<!\\)((?:\\\\)*)\\[\"#].*", r"\1", line).replace(r"\}", "")
        if line[:1] in (".", "'") and line[:2] != "''":
            match = re.match(r".\s*([^\s\\]+)\s*(.*)", line, re.DOTALL)
            if match:
                self.macro(match[1], match[2].strip(), rest)
            return
        if not line.strip():
            self.paragraph()
            return
        text = self.unescape(line)
        if self.fill and line[0] == " ":
            self.flush()
        self.text(text)

    def text(self, text: str) -> None:
        if not self.fill:
            self.lines.append(text.rstrip().replace(_JOIN, ""))
            return
        self.words.append(text.strip())
        if self.tag:
            self.tag = False
            self.end_tag()

    def end_tag(self) -> None:
        tag = joined(self.words)
        self.words = []
        if len(tag) <= 3:  # bullets and numbers stand before their item, as on paper
            self.pending = tag
        else:
            self.lines.append(tag)

    def flush(self) -> None:
        text = joined(([self.pending] if self.pending else []) + self.words)
        self.words, self.pending = [], ""
        if text:
            self.lines.append(text)

    def paragraph(self) -> None:
        self.flush()
        self.lines.append("")

    def unescape(self, text: str) -> str:
        def replace(match: re.Match[str]) -> str:
            string = match["long"] or match["two"] or match["one"]
            if string is not None:
                return self.strings.get(string, "")
            name = match["char"] or match["name"]
            if name is not None:
                return special_character(name)
            if match["single"] == "c":
                return _JOIN
            return _SINGLE.get(match["single"] or "", "")

        return _ESCAPE.sub(replace, text)

    def macro(self, name: str, rest: str, lines: Iterator[str]) -> None:
        if name in _SKIPPED_BLOCKS:
            _skip_until_end(lines, rest if name == "ig" else "")
        elif name in ("if", "ie", "el"):
            self.conditional(name, rest, lines)
        elif name == "TS":
            self.flush()
            self.table(lines)
        elif name in ("ds", "as"):
            key, _, value = rest.partition(" ")
            before = self.strings.get(key, "") if name == "as" else ""
            self.strings[key] = before + self.unescape(value.strip().removeprefix('"'))
        else:
            self.layout(name, [self.unescape(a) for a in arguments(rest)])

    def layout(self, name: str, args: list[str]) -> None:
        if name in ("TH", "Dt"):
            self.heading(args[0] + (f"({args[1]})" if len(args) > 1 else "") if args else "", level=0)
        elif name in ("SH", "SS", "Sh", "Ss"):
            self.heading(" ".join(args), level=1)
            self.fill, self.tag = True, not args and name in ("SH", "SS")
        elif name in _PARAGRAPH:
            self.paragraph()
        elif name in ("TP", "TQ"):
            self.paragraph() if name == "TP" else self.flush()
            self.tag = True
        elif name in ("IP", "It", "AP"):
            self.item(name, args)
        elif name in _LITERAL_ON or name in _LITERAL_OFF:
            self.paragraph() if name in ("EX", "Vb", "CS", "DS", "Bd") else self.flush()
            self.fill = name in _LITERAL_OFF or (name == "Bd" and not {"-literal", "-unfilled"} & set(args))
        elif name in _BREAK:
            self.flush()
            if name == "OP" and args:
                self.text("[" + " ".join(args) + "]")
        elif name in _ALTERNATING:
            self.text("".join(args)) if args else None
        elif name in _PLAIN:
            self.text(" ".join(args)) if args else None
        elif name in ("UR", "MT", "UE", "ME", "URL", "SY"):  # codespell:ignore ue
            self.link(name, args)
        else:
            self.mdoc(name, args)

    def link(self, name: str, args: list[str]) -> None:
        """A link, whose address is shown behind its text, or ``.SY``, the start of a synopsis."""
        if name == "SY":
            self.flush()
            self.text(" ".join(args))
        elif name in ("UR", "MT"):
            self.address = args[0] if args else ""
            self.link_start = len(self.words)
        elif name == "URL" and args:
            self.text(" ".join([*args[1:2], f"<{args[0]}>"]) + "".join(args[2:3]))
        elif self.address:
            shown = f"<{self.address}>" if len(self.words) > self.link_start else self.address
            self.text(shown + "".join(args[:1]))
            self.address = ""

    def mdoc(self, name: str, args: list[str]) -> None:
        if name == "Nm" and args and not self.name:
            self.name = args[0]
        text = mdoc_inline(name, args, self.name)
        if text:
            self.text(text)

    def heading(self, text: str, level: int) -> None:
        self.flush()
        if text:
            self.lines += ["", text] if level else [text, ""]

    def item(self, name: str, args: list[str]) -> None:
        self.paragraph() if name != "It" else self.flush()
        if name == "It" and args:
            tag = mdoc_inline(args[0], args[1:], self.name) or " ".join(args)
        else:
            tag = " ".join(args[:1] if name == "IP" else args[:3])
        if tag:
            self.words = [tag]
            self.end_tag()

    def conditional(self, name: str, rest: str, lines: Iterator[str]) -> None:
        if name == "el":
            holds, body = not (self.branches.pop() if self.branches else True), rest
        else:
            match = _CONDITION.match(rest)
            if not match:
                return
            # A page is rendered as GNU roff for a terminal; numeric tests of other registers fail.
            holds = match[2] == "n" or match[2].startswith((r"\n(.g", r"\n[.g"))
            holds, body = holds != bool(match[1]), match[3]
            if name == "ie":
                self.branches.append(holds)
        opened = body.startswith(r"\{")
        if holds:
            self.line(body.removeprefix(r"\{").lstrip(), lines) if body.removeprefix(r"\{").strip() else None
        elif opened:
            depth = body.count(r"\{") - body.count(r"\}")
            while depth > 0:
                line = next(lines, None)
                if line is None:
                    return
                depth += line.count(r"\{") - line.count(r"\}")

    def table(self, lines: Iterator[str]) -> None:
        """A tbl block: the rows with their cells between bars; the lines that describe columns end with a full stop."""
        separator, in_format, row = "\t", True, ""
        for line in lines:
            if re.match(r"[.']\s*TE", line):
                break
            if in_format:
                option = re.search(r"tab\s*\((.)\)", line)
                separator = option[1] if option else separator
                in_format = not line.rstrip().endswith(".")
                continue
            if line.startswith(".T&"):
                in_format = True
            if line.startswith((".", "'")) or not line.strip("_= \t"):
                continue
            row = f"{row} {line}" if row else line
            if row.count("T{") > row.count("T}"):
                continue
            cells = [re.sub(r"T[{}]", "", self.unescape(cell)).strip() for cell in row.split(separator)]
            self.lines.append(" | ".join(cell for cell in cells if cell))
            row = ""
        self.lines.append("")


def _skip_until_end(lines: Iterator[str], end: str) -> None:
    pattern = re.compile(r"[.']\s*" + (re.escape(end.strip()) if end.strip() else r"\."))
    for line in lines:
        if pattern.match(line):
            return


def joined(words: list[str]) -> str:
    """Lines joined by a space, except between two Chinese or Japanese characters and where ``\\c`` forbids it."""
    text = ""
    for word in words:
        if not word:
            continue
        together = not text or text.endswith(_JOIN) or word.startswith(_JOIN)
        together = together or bool(_WIDE.match(text[-1]) and _WIDE.match(word[0]))
        text = text.removesuffix(_JOIN) + ("" if together else " ") + word.removeprefix(_JOIN)
    return text.replace(_JOIN, "").strip()
