"""Parser errors: where a text goes wrong, and what was expected there."""

import re
from collections.abc import Iterable

from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from sagellm_ir.diagnostics import Diagnostic
from sagellm_ir.nodes import Location

__all__ = ["Fault", "diagnose", "fault_of"]

_WIDTH = 100
"""Columns of a source line that an error shows."""

_NAME = r'(?:[A-Za-z0-9_.\-]+|"(?:[^"\\\n]|\\.)*")'
_GRAPH = "'graph @name {'"
_BODY = "a node such as '%p = prefill @r[0:16]', a declaration such as 'request @r', or '}'"
_EXPECTED = {
    "HEADER": "'sagellm_ir 1'",
    "GRAPH": _GRAPH,
    "SYMBOL": "a name such as @r0",
    "RBRACE": _BODY,
    "LBRACE": "'{'",
    "OPERANDS": "operands such as (%p)",
    "ATTRS": "attributes such as {step = 3}",
    "AFTER": "'after %p'",
    "TYPE": "a type such as ': kv<16>'",
    "LIST": "a list such as [1x5, 16x2]",
}
"""What each terminal stands for. `}` implies all that may start a line of the body."""

_PIECES: dict[str, tuple[tuple[str, str], ...]] = {
    "%": (
        (f"%{_NAME}", "a name after '%'"),
        (r"\s*=", "'=' after the name of the result"),
        (r"\s*[A-Za-z_]\w*", "a node kind after '='"),
    ),
    "@": (
        (f"@{_NAME}", "a name after '@'"),
        (r"\s*\[", "a span '[start:stop]' after the request"),
        (r"[^\]\n]*\]", "']'"),
    ),
    "(": ((r"\([^()\n]*\)", "')' on the same line"),),
    "{": (
        (r"\{\s*[A-Za-z_]\w*", "an attribute's name"),
        (r"\s*=", "'=' after the attribute's name"),
        (r'[^{}"\n]*(?:"(?:[^"\\\n]|\\.)*"[^{}"\n]*)*\}', "'}' on the same line"),
    ),
    "[": ((r"\[[^\]\n]*\]", "']' on the same line"),),
    ":": ((r":\s*[a-z_]+", "a type such as 'kv<16>' after ':'"), (r"<[^>\n]*>", "'>'")),
    "a": ((r"after\b", _BODY), (rf"\s*%{_NAME}", "a name such as %p after 'after'")),
}
"""How what starts with a character goes on, piece by piece: finds the piece that is wrong."""


_OPENED = {"(": "OPERANDS", "{": "ATTRS", "[": "LIST", ":": "TYPE", "%": "RESULT", "a": "AFTER"}
"""The terminal that starts with each character."""


class Fault(Exception):
    """A text is wrong at the offset `at`."""

    def __init__(self, at: int, message: str, *, width: int = 1, help: str = "") -> None:
        super().__init__(message)
        self.at, self.message, self.width, self.help = at, message, width, help


def fault_of(error: UnexpectedInput, text: str) -> Fault:
    """What a Lark error means for whoever wrote the text."""
    if isinstance(error, UnexpectedCharacters):
        return _unexpected(error.pos_in_stream or 0, error.allowed, text)
    if isinstance(error, UnexpectedToken) and error.token.type != "$END":
        return _unexpected(error.token.start_pos or 0, error.expected, text)
    expected = _expectation(getattr(error, "expected", ()))
    return Fault(len(text.rstrip()), f"the text ends where {expected} was expected")


def _unexpected(at: int, allowed: Iterable[str], text: str) -> Fault:
    allowed = set(allowed)
    start, end = text[at], at
    fits = start == "@" or _OPENED.get(start) in allowed
    for pattern, wanted in _PIECES.get(start, ()) if fits else ():
        found = re.compile(pattern).match(text, end)
        if not found and wanted.endswith("on the same line"):
            return Fault(at, f"{start!r} is not closed: expected {wanted}")
        if not found:
            while text[end : end + 1] in (" ", "\t"):
                end += 1
            return Fault(end, f"expected {wanted}{_found(text, end)}")
        end = found.end()
    return Fault(at, f"expected {_expectation(allowed)}{_found(text, at)}")


def _found(text: str, at: int) -> str:
    word = re.compile(r"[\w.\-]+|\S").match(text, at)
    return f", found {word.group()[:40]!r}" if word else ", found the end of the line"


def _expectation(terminals: Iterable[str]) -> str:
    names = sorted({_EXPECTED[name] for name in terminals if name in _EXPECTED}, key=len)
    return " or ".join(names) or "the end of the text"


def diagnose(fault: Fault, text: str, filename: str) -> Diagnostic:
    """The diagnostic of a fault: its line and column, and the line with a caret."""
    before = text.rfind("\n", 0, fault.at) + 1
    end = text.find("\n", fault.at)
    line = text[before : end if end >= 0 else len(text)]
    number, column = text.count("\n", 0, before) + 1, fault.at - before
    cut = max(0, column - _WIDTH * 2 // 3) if len(line) > _WIDTH else 0
    shown = re.sub(r"[^\x20-\x7e\xa0-\uffff]", " ", line[cut : cut + _WIDTH])
    gutter = f"{number:>4} | "
    carets = "^" * max(1, min(fault.width, len(shown) - (column - cut)))
    window = f"{gutter}{shown}\n{'| ':>{len(gutter)}}{' ' * (column - cut)}{carets}"
    return Diagnostic(
        fault.message, Location(filename, number, column + 1), window=window, help=fault.help
    )
