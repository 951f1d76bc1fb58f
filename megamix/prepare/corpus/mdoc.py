"""The inline macros of mdoc, the manual page language of the BSDs, as plain text."""

# ruff: noqa: RUF001 (typographic quotes are meant)

from __future__ import annotations

_QUOTES = {
    "Op": "[]", "Bq": "[]", "Oo": "[ ", "Oc": " ]", "Pq": "()", "Po": "( ", "Pc": " )", "Aq": "<>", "Brq": "{}",
    "Dq": "“”", "Sq": "‘’", "Ql": "‘’", "Qq": '""', "Do": "“ ", "Dc": " ”", "So": "‘ ", "Sc": " ’", "Qo": '" ', "Qc":
    ' "',
}  # fmt: skip
_WORDS = {
    "Ar", "Cm", "Ic", "Pa", "Va", "Vt", "Dv", "Ev", "Er", "Li", "Em", "Sy", "No", "Fa", "Ft", "Fn", "Tn", "Ad", "An",
    "Sx", "Lk", "Mt", "Cd", "In", "Ms", "St", "Nd", "Nm", "Fl", "Xr", "Ns",  # codespell:ignore nd
}  # fmt: skip
_NAMES = {"Bx": "BSD", "Ux": "UNIX", "At": "AT&T UNIX", "Fx": "FreeBSD", "Nx": "NetBSD", "Ox": "OpenBSD"}
_CLOSING = set(".,;:!?)]")


def inline(name: str, args: list[str], page: str) -> str:
    """The text of an inline macro and the macros among its arguments; empty for a macro that shows nothing.

    Args:
        name: the macro, without its dot.
        args: its arguments, escapes already replaced.
        page: the name of the page, which ``.Nm`` with no argument stands for.
    """
    if name not in _WORDS and name not in _QUOTES and name not in _NAMES:
        return ""
    if name == "Nd":  # codespell:ignore nd
        return "- " + " ".join(args)
    return _render([name, *args], page).strip()


def _render(tokens: list[str], page: str) -> str:
    text, glue, flag, index = "", True, False, 0
    while index < len(tokens):
        token = tokens[index]
        index += 1
        piece = ""
        if token in _QUOTES:
            left, right = _QUOTES[token]
            if " " in (left, right):  # one half of a pair that spans lines
                piece = (left + right).strip()
            else:
                inner, closing = tokens[index:], []
                while inner and inner[-1] in _CLOSING:
                    closing.insert(0, inner.pop())
                piece, index = left + _render(inner, page).strip() + right + "".join(closing), len(tokens)
        elif token in _NAMES:
            piece = _NAMES[token]
        elif token == "Fl":
            flag = True
            if index == len(tokens) or tokens[index] in _WORDS:
                piece, flag = "-", False
        elif token == "Xr" and index < len(tokens):
            section = tokens[index + 1] if index + 1 < len(tokens) and tokens[index + 1][:1].isdigit() else ""
            piece = tokens[index] + (f"({section})" if section else "")
            index += 2 if section else 1
        elif token == "Nm" and (index == len(tokens) or tokens[index] in _WORDS):
            piece = page
        elif token == "Ns":
            glue = True
        elif token not in _WORDS:
            piece, flag = ("-" if flag else "") + token, False
        if piece:
            text += piece if glue or piece in _CLOSING else " " + piece
            glue = False
    return text
