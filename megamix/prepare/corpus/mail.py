"""E-mails to four headers and their readable text; and HTML to text, with the standard library's parser."""

from __future__ import annotations

import codecs
import email
import email.errors
import email.header
import email.message
import re
from html.parser import HTMLParser

_HEADERS = ("From", "To", "Date", "Subject")
_BLOCKS = {
    "p", "div", "br", "tr", "table", "li", "ul", "ol", "dl", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "hr",
    "pre", "blockquote", "center", "form", "option", "title", "section", "article", "header", "footer",
}  # fmt: skip
_PARAGRAPHS = {"p", "table", "ul", "ol", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "blockquote"}
_HIDDEN = {"script", "style", "noscript", "template"}
_BASE64_BLOCK = re.compile(
    r"(?:^[A-Za-z0-9+/=]{56,}[ \t]*\n){3,}(?:^[A-Za-z0-9+/]*={1,2}[ \t]*(?:\n|\Z))?", re.MULTILINE
)
_UUENCODED = re.compile(r"^begin \d{3} .*\n(?:^[ -`]{1,62}[ \t]*\n)+?^end[ \t]*$", re.MULTILINE)
_EAST_ASIAN = ("gb18030", "big5", "shift_jis", "euc_kr")
_COMMON = set("的一是不了在人有我他這这個个上們们來来到時时大為为子中你說说國国年和要のはをに")


class _TextOfHtml(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0
        self.literal = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in _HIDDEN
        self.literal += tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n\n" if tag in _PARAGRAPHS else "\n")
        if tag == "li":
            self.parts.append("- ")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:  # `<script/>` opens nothing that would ever be closed
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN:
            self.hidden = max(0, self.hidden - 1)
        if tag == "pre":
            self.literal = max(0, self.literal - 1)
        if tag in _BLOCKS and tag != "br":
            self.parts.append("\n\n" if tag in _PARAGRAPHS else "\n")

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        if not self.literal:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith(("\n", " ")):
                data = data.lstrip(" ")
        if data:
            self.parts.append(data)


def html_to_text(html: str) -> str:
    """The readable text of HTML: blocks on lines of their own, no scripts, styles and comments, entities resolved."""
    parser = _TextOfHtml()
    # Spam hides tags such as <!-x-> in words; the parser would take the rest of the page for an unfinished declaration.
    parser.feed(re.sub(r"<[!?](?!--)[^>]*>|<!--.*?-->", "", html, flags=re.DOTALL))
    parser.close()
    lines = [line.rstrip() for line in "".join(parser.parts).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def decode_mail_bytes(data: bytes, charset: str | None) -> str:
    """Text from a message's bytes: the declared charset if it is known and fits, else UTF-8, else a guess.

    The guess is for spam that declares nothing: mostly non-ASCII bytes that are valid in an East Asian encoding are
    read as that, everything else as Windows-1252.
    """
    declared = (charset or "").strip(" \"'").lower()
    if declared in ("gb2312", "gbk"):
        declared = "gb18030"  # a superset of both
    if declared in ("iso-8859-1", "latin-1", "latin1", "us-ascii", "ascii"):
        declared = (
            "utf-8"  # often a lie; where it is not, UTF-8 fails and Windows-1252 below contains Latin-1's letters
        )
    for name in (declared, "utf-8"):
        try:
            return codecs.decode(data, name)
        except (LookupError, ValueError):
            continue
    if sum(byte >= 0x80 for byte in data) > len(data) // 4:
        guess = _east_asian(data)
        if guess is not None:
            return guess
    try:
        return data.decode("cp1252")
    except ValueError:
        return data.decode("latin-1")


def _east_asian(data: bytes) -> str | None:
    """The East Asian reading with most characters that are common in its language; None where none is valid.

    Validity alone decides little: what is valid in one of these encodings is mostly valid in another, and nonsense.
    """
    best, most = None, -1
    for name in _EAST_ASIAN:
        try:
            text = data.decode(name)
        except ValueError:
            continue
        common = sum(letter in _COMMON for letter in text)
        if name == "euc_kr":
            common = sum("가" <= letter <= "힣" for letter in text) // 2
        if common > most:
            best, most = text, common
    return best


def _header(message: email.message.Message, name: str) -> str:
    value = message.get(name)
    if value is None:
        return ""
    pieces = []
    try:
        decoded = email.header.decode_header(value)
    except (email.errors.HeaderParseError, ValueError):
        decoded = [(str(value), None)]
    for piece, charset in decoded:
        if isinstance(piece, bytes):
            piece = decode_mail_bytes(piece, charset if charset != "unknown-8bit" else None)
        elif any("\udc80" <= letter <= "\udcff" for letter in piece):  # raw 8-bit bytes in a header
            piece = decode_mail_bytes(piece.encode("utf-8", "surrogateescape"), None)
        pieces.append(piece)
    return re.sub(r"\s+", " ", "".join(pieces)).strip()


def _part_text(part: email.message.Message) -> str:
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return ""
    text = decode_mail_bytes(payload, part.get_content_charset()).replace("\r\n", "\n").replace("\r", "\n")
    looks_html = re.search(r"<\s*(html|body|table|font|br|p)\b", text[:2000], re.IGNORECASE) is not None
    if part.get_content_subtype() == "html" or (looks_html and text.lstrip()[:1] == "<"):
        return html_to_text(text)
    return text


def _readable(part: email.message.Message) -> list[str]:
    """The texts of a message's parts in order; of alternatives the plain one if it says anything."""
    if part.get_content_type() == "message/rfc822" or not part.is_multipart():
        if part.is_multipart():
            return [mail_to_text(part.get_payload(0))]  # type: ignore[arg-type]
        if part.get_content_maintype() != "text":
            return []
        return [_part_text(part)]
    payload = part.get_payload()
    children = [child for child in payload if isinstance(child, email.message.Message)]  # type: ignore[union-attr]
    if part.get_content_subtype() == "alternative":
        versions = [_readable(child) for child in children]
        return next((version for version in versions if any(text.strip() for text in version)), [])
    return [text for child in children for text in _readable(child)]


def mail_to_text(message: email.message.Message) -> str:
    """From, To, Date and Subject, a blank line, and the text parts; attachments and encoded blocks are dropped."""
    head = [f"{name}: {value}" for name in _HEADERS if (value := _header(message, name))]
    body = "\n\n".join(text.strip("\n") for text in _readable(message) if text.strip())
    body = _UUENCODED.sub("", _BASE64_BLOCK.sub("", body + "\n"))
    body = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t\xa0]+$", "", body, flags=re.MULTILINE)).strip()
    return "\n".join(head) + "\n\n" + body if body else ""


def read_mail(data: bytes) -> str:
    """The text of one raw message; empty where it holds nothing readable."""
    return mail_to_text(email.message_from_bytes(data))
