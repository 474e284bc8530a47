"""Text -> `IRGraph`: Lark finds the lines and their parts, this module reads the parts.

The parser accepts every graph that is well formed as text; whether it makes sense is for
`sagellm_ir.verify` to say.
"""

import re
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple, TypeVar, cast

import attrs
from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedInput

from sagellm_ir.diagnostics import SageIRError, suggest
from sagellm_ir.graph import STAGES, CachedBlocks, IRGraph, RequestDecl
from sagellm_ir.nodes import KINDS, IRNode, KVNode, Location
from sagellm_ir.target import Device, ModelSpec, Target, Tier, Worker
from sagellm_ir.text.errors import Fault, diagnose, fault_of
from sagellm_ir.text.syntax import TEXT_VERSION, attributes_of
from sagellm_ir.text.values import (
    MAX_INTS,
    NAME,
    node_attributes,
    position,
    read_attributes,
    unquote,
    value_names,
)

__all__ = ["parse_graph"]


_DECLARATIONS: dict[str, type] = {
    "target": Target,
    "model": ModelSpec,
    "device": Device,
    "tier": Tier,
    "worker": Worker,
    "cache": CachedBlocks,
    "request": RequestDecl,
}
_RESULT = re.compile(rf"%{NAME}[ \t]*=[ \t]*(\w+)[ \t]*(?:@{NAME}[ \t]*(\[.*))?")
_SYMBOL = re.compile(rf"@{NAME}[ \t]*")
_SPAN = re.compile(r"\[[ \t]*(\d{1,18})[ \t]*:[ \t]*(\d{1,18})[ \t]*\]")
_RUN = re.compile(r"[ \t]*(\d{1,18})(?:x(\d{1,18}))?[ \t]*(,|\])")
_HEADER = re.compile(r"(?:\s+|//[^\n]*)*(sagellm_ir[ \t]+(\S+))?")


def parse_graph(text: str, filename: str = "<text>") -> IRGraph:
    """Reads a graph; `filename` is what errors and node locations name.

    Raises:
        SageIRError: the text is not of this version or not well formed.
    """
    try:
        return _Builder(filename).graph(*_lines(text))
    except UnexpectedInput as error:
        raise SageIRError(diagnose(fault_of(error, text), text, filename)) from None
    except Fault as fault:
        raise SageIRError(diagnose(fault, text, filename)) from None


@cache
def _lark() -> Lark:
    grammar = files("sagellm_ir.text").joinpath(f"grammar_v{TEXT_VERSION}.lark")
    return Lark(
        grammar.read_text(encoding="utf-8"),
        parser="lalr",
        transformer=_Lines(),
        maybe_placeholders=True,
    )


def _lines(text: str) -> tuple[Token, Token | None, list[Any]]:
    """The graph's name, its attributes, and its lines."""
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


class _Node(NamedTuple):
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


class _Declaration(NamedTuple):
    keyword: Token
    symbol: Token
    block: Token | None


class _Steps(NamedTuple):
    keyword: Token
    runs: Token


class _Lines(Transformer[Token, Any]):
    """Called by Lark as each line is recognised. Stateless: one parser serves all texts."""

    def start(self, parts: list[Any]) -> tuple[Token, Token | None, list[Any]]:
        _header, name, block, *lines = parts
        return name, block, lines

    def decl(self, parts: list[Any]) -> _Declaration:
        return _Declaration(*parts)

    def steps(self, parts: list[Any]) -> _Steps:
        return _Steps(*parts)

    def node(self, parts: list[Any]) -> _Node:
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
        return _Node(
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


Class = TypeVar("Class")


class _Builder:
    """Puts a graph together from its lines."""

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.ints = 0
        self.loops: tuple[int, ...] = ()
        self.declared: dict[str, list[Any]] = {keyword: [] for keyword in _DECLARATIONS}
        self.target: dict[str, Any] = {}

    def graph(self, name: Token, block: Token | None, lines: list[Any]) -> IRGraph:
        """The graph of all lines."""
        fields = self._block(IRGraph, block)
        if fields.get("stage", STAGES[0]) not in STAGES:
            assert block is not None
            raise Fault(
                position(block),
                f"unknown stage {fields['stage']!r}",
                width=len(block.rstrip()),
                help=suggest(fields["stage"], STAGES),
            )
        nodes = []
        for line in lines:
            if isinstance(line, _Node):
                nodes.append(self._node(line))
            elif isinstance(line, _Steps):
                self._steps(line)
            else:
                self._declaration(line)
        for keyword in ("model", "device"):
            if self.declared[keyword]:
                self.target[keyword] = self.declared[keyword][0]
        for keyword in ("tier", "worker"):
            if self.declared[keyword]:
                self.target[f"{keyword}s"] = tuple(self.declared[keyword])
        return IRGraph(
            _symbol(name),
            target=Target(**self.target),
            requests=tuple(self.declared["request"]),
            nodes=tuple(nodes),
            cache=tuple(self.declared["cache"]),
            loops=self.loops,
            **fields,
        )

    def _node(self, line: _Node) -> IRNode:
        cls: Any = KINDS.get(line.kind)
        if cls is None:
            raise _wrong_kind(line, f"unknown node kind {line.kind!r}", suggest(line.kind, KINDS))
        if (line.span is not None) != issubclass(cls, KVNode):
            wanted = "has no span" if line.span else "covers a span of tokens, such as @r0[0:16]"
            raise _wrong_kind(line, f"{line.kind} {wanted}")
        try:
            attributes = node_attributes(cls, line.block) if line.block else {}
            node: IRNode = cls(
                line.name,
                *(line.span or ()),
                operands=line.operands,
                after=line.after,
                loc=Location(self.filename, line.line, line.column),
                **attributes,
            )
        except Fault as fault:
            fault.at += line.block_at
            raise
        except ValueError as error:
            raise _wrong_kind(line, str(error)) from None
        if line.type and line.type != node.type:
            raise Fault(
                line.type_at,
                f"expected the type {node.type} here, found {line.type}",
                width=len(line.type),
                help=f"the result of this {node.kind} has the type {node.type}",
            )
        return node

    def _declaration(self, line: _Declaration) -> None:
        keyword = line.keyword.strip()
        cls = _DECLARATIONS.get(keyword)
        if cls is None:
            raise Fault(
                position(line.keyword),
                f"unknown declaration {keyword!r}",
                width=len(keyword),
                help=suggest(keyword, _DECLARATIONS),
            )
        if self.declared[keyword] and keyword in ("target", "model", "device"):
            raise Fault(
                position(line.keyword),
                f"a graph has one {keyword}, this is the second",
                width=len(keyword),
            )
        fields = self._block(cls, line.block)
        for attribute in attributes_of(cls):
            if attribute.default is attrs.NOTHING and attribute.field not in fields:
                raise Fault(
                    position(line.symbol) + len(line.symbol.rstrip()),
                    f"this {keyword} lacks its attribute {attribute.text!r}",
                    help=f"write {{{attribute.text} = ...}}",
                )
        fields[attrs.fields(cls)[0].name] = _symbol(line.symbol)
        if cls is RequestDecl:
            fields["loc"] = Location(
                self.filename, line.keyword.line or 0, line.keyword.column or 0
            )
        if cls is Target:
            self.target = fields
            _construct(cls, line.symbol, fields)
            self.declared[keyword].append(cls)
        else:
            self.declared[keyword].append(_construct(cls, line.symbol, fields))

    def _block(self, cls: type, block: Token | None) -> dict[str, Any]:
        if block is None:
            return {}
        try:
            fields = read_attributes(cls, block)
        except Fault as fault:
            fault.at += position(block)
            raise
        self._count(sum(len(value) for value in fields.values() if isinstance(value, tuple)), block)
        return fields

    def _count(self, ints: int, where: Token) -> None:
        self.ints += ints
        if self.ints > MAX_INTS:
            raise Fault(position(where), f"a text may list at most {MAX_INTS} integers")

    def _steps(self, line: _Steps) -> None:
        text, offset, more = line.runs, 1, ","
        if self.loops:
            raise Fault(position(line.keyword), "a graph has one line of steps", width=5)
        loops: list[int] = []
        while more == ",":
            found = _RUN.match(text, offset)
            if not found:
                raise Fault(
                    position(text) + offset,
                    "expected forwards x steps, such as 16x2, or forwards",
                )
            forwards, count, more = found.groups()
            self._count(int(count or 1), text)
            loops += [int(forwards)] * int(count or 1)
            offset = found.end()
        self.loops = tuple(loops)


def _symbol(token: Token) -> str:
    found = _SYMBOL.match(token)
    assert found, "the grammar's SYMBOL and _SYMBOL agree"
    return found[1] or unquote(found[2], position(token) + 1)


def _wrong_kind(line: _Node, message: str, help: str = "") -> Fault:
    return Fault(line.kind_at, message, width=len(line.kind), help=help)


def _construct(cls: type[Class], where: Token, fields: dict[str, Any]) -> Class:
    """Calls the class; what its validators refuse is a fault at `where`."""
    try:
        return cls(**fields)
    except ValueError as error:
        raise Fault(position(where), str(error), width=len(where.rstrip())) from None
