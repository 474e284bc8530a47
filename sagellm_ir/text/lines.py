"""Text -> lines: Lark finds a graph's lines and their parts, whatever they say."""

import re
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple, cast

from lark import Lark, Token, Transformer

from sagellm_ir.text.errors import Fault
from sagellm_ir.text.syntax import TEXT_VERSION
from sagellm_ir.text.values import NAME, position, unquote, value_names

__all__ = ["DeclarationLine", "NodeLine", "StepsLine", "read_lines"]

_RESULT = re.compile(rf"%{NAME}[ \t]*=[ \t]*(\w+)[ \t]*(?:@{NAME}[ \t]*(\[.*))?")
_SPAN = re.compile(r"\[[ \t]*(\d{1,18})[ \t]*:[ \t]*(\d{1,18})[ \t]*\]")
_HEADER = re.compile(r"(?:\s+|//[^\n]*)*(sagellm_ir[ \t]+(\S+))?")


@cache
def _lark() -> Lark:
    grammar = files("sagellm_ir.text").joinpath(f"grammar_v{TEXT_VERSION}.lark")
    return Lark(
        grammar.read_text(encoding="utf-8"),
        parser="lalr",
        transformer=_Lines(),
        maybe_placeholders=True,
    )


def read_lines(text: str) -> tuple[Token, Token | None, list[Any]]:
    """The graph's name, its attributes, and its lines.

    Raises:
        Fault: the text is of another version, or a part of a line is wrong.
        UnexpectedInput: it is not by the grammar.
    """
    _check_version(text)
    # Not a tree: what `_Lines.start` returns.
    return cast("tuple[Token, Token | None, list[Any]]", _lark().parse(text))


def _check_version(text: str) -> None:
    header = _HEADER.match(text)
    if header is None or header[1] is None:
        raise Fault(
            header.end() if header else 0,
            f"expected 'sagellm_ir {TEXT_VERSION}' as the first line",
            help="the first line names the version of the text format",
        )
    if header[2] != str(TEXT_VERSION):
        raise Fault(
            header.start(2),
            f"version {header[2][:20]!r} of the text format cannot be read: "
            f"expected version {TEXT_VERSION}",
            width=len(header[2]),
            help="write the text again with this version of sagellm-ir",
        )


class NodeLine(NamedTuple):
    """A node but for its attributes. Holds plain values: many tokens would burden the collector."""

    line: int
    column: int
    kind: str
    kind_at: int
    span: tuple[str, int, int] | None
    name: str
    operands: tuple[str, ...]
    after: tuple[str, ...]
    block: str
    block_at: int
    type: str
    type_at: int


class DeclarationLine(NamedTuple):
    """What a target or a request, say, is declared by."""

    keyword: Token
    symbol: Token
    block: Token | None


class StepsLine(NamedTuple):
    """The forwards of each step."""

    keyword: Token
    runs: Token


class _Lines(Transformer[Token, Any]):
    """Called by Lark as each line is recognised. Stateless: one parser serves all texts."""

    def start(self, parts: list[Any]) -> tuple[Token, Token | None, list[Any]]:
        _header, name, block, *lines = parts
        return name, block, lines

    def decl(self, parts: list[Any]) -> DeclarationLine:
        return DeclarationLine(*parts)

    def steps(self, parts: list[Any]) -> StepsLine:
        return StepsLine(*parts)

    def node(self, parts: list[Any]) -> NodeLine:
        result, operands, block, after, type_token = parts
        at = position(result)
        found = _RESULT.match(result)
        assert found, "the grammar's RESULT and _RESULT agree"
        bare, quoted, kind, request, quoted_request, span = cast("tuple[Any, ...]", found.groups())
        if span:
            numbers = _SPAN.match(span)
            if not numbers:
                width = len(span.rstrip())
                raise Fault(at + found.start(6), "expected two integers as in [0:16]", width=width)
            request = request or unquote(quoted_request, at + found.start(5))
            span = (request, int(numbers[1]), int(numbers[2]))
        return NodeLine(
            result.line,
            result.column,
            kind,
            at + found.start(3),
            span,
            bare or unquote(quoted, at + 1),
            value_names(operands, 1) if operands else (),
            value_names(after, 5) if after else (),
            str(block) if block else "",
            position(block) if block else 0,
            type_token[1:].strip() if type_token else "",
            position(type_token) + type_token.index(type_token[1:].strip()) if type_token else 0,
        )
