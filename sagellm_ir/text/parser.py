"""Text -> `IRGraph`: Lark finds the lines and their parts, this module reads the parts.

The parser accepts every graph that is well formed as text; whether it makes sense is for
`sagellm_ir.verify` to say.
"""

import json
import re
from collections.abc import Mapping
from functools import cache, lru_cache
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
from sagellm_ir.text.syntax import TEXT_VERSION, Attribute, attributes_of

__all__ = ["parse_graph"]

MAX_INTS = 1 << 25
"""Integers that all lists of a text may hold together: a range is short, what it means is not."""

_DECLARATIONS: dict[str, type] = {
    "target": Target,
    "model": ModelSpec,
    "device": Device,
    "tier": Tier,
    "worker": Worker,
    "cache": CachedBlocks,
    "request": RequestDecl,
}
_STRING = r'"(?:[^"\\\n]|\\.)*"'
_NAME = rf"(?:([A-Za-z0-9_.\-]+)|({_STRING}))"
_RESULT = re.compile(rf"%{_NAME}[ \t]*=[ \t]*(\w+)")
_SYMBOL = re.compile(rf"@{_NAME}[ \t]*")
_SPAN = re.compile(rf"@{_NAME}[ \t]*\[[ \t]*(\d{{1,18}})[ \t]*:[ \t]*(\d{{1,18}})[ \t]*\]")
_ONE_OPERAND = re.compile(r"\(%([A-Za-z0-9_.\-]+)\)[ \t]*")
_VALUE_NAME = re.compile(rf"[ \t]*%{_NAME}[ \t]*(,|\)|$)")
_PAIR = re.compile(
    rf"[ \t]*([A-Za-z_]\w*)[ \t]*=[ \t]*({_STRING}|\[[^\]\n]*\]|[^\s,\[\]{{}}\"]+)[ \t]*(,|\}})"
)
_INT = re.compile(r"-?\d{1,18}")
_RANGE = re.compile(r"[ \t]*(-?\d{1,18})(?:[ \t]*:[ \t]*(-?\d{1,18}))?[ \t]*(,|\])")
_RUN = re.compile(r"[ \t]*(\d{1,18})(?:x(\d{1,18}))?[ \t]*(,|\])")
_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
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


def _at(token: Token) -> int:
    """Where a token starts. Lark always knows; its type says it may not."""
    return token.start_pos or 0


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
    result: Token
    cls: type[IRNode]
    fields: dict[str, Any]
    type: Token | None


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
        result, span, operands, block, after, type_token = parts
        found = _RESULT.match(result)
        assert found, "the grammar's RESULT and _RESULT agree"
        bare, quoted, kind = found.groups()
        cls: type[IRNode] | None = KINDS.get(kind)
        if cls is None:
            raise Fault(
                _at(result) + found.start(3),
                f"unknown node kind {kind!r}",
                width=len(kind),
                help=suggest(kind, KINDS),
            )
        fields: dict[str, Any] = dict(_node_attributes(cls, block)) if block else {}
        fields["name"] = bare or _unquote(quoted, _at(result) + 1)
        if issubclass(cls, KVNode):
            _read_span(fields, kind, span, result)
        elif span:
            raise Fault(_at(span), f"a {kind} has no span", width=len(span.rstrip()))
        if operands:
            fields["operands"] = _value_names(operands, 1)
        if after:
            fields["after"] = _value_names(after, 5)
        return _Node(result, cls, fields, type_token)


def _read_span(fields: dict[str, Any], kind: str, span: Token | None, result: Token) -> None:
    if span is None:
        raise Fault(
            _at(result) + len(result.rstrip()),
            f"expected the span of tokens that this {kind} covers, such as @r0[0:16]",
        )
    found = _SPAN.match(span)
    if not found:
        bracket = span.index("[")
        raise Fault(
            _at(span) + bracket,
            "expected a span of two integers such as [0:16]",
            width=len(span.rstrip()) - bracket,
        )
    bare, quoted, start, stop = found.groups()
    fields["request"] = bare or _unquote(quoted, _at(span) + 1)
    fields["start"] = int(start)
    fields["stop"] = int(stop)


def _value_names(token: Token, at: int) -> tuple[str, ...]:
    """`%a, %b`, from offset `at` of a token to its end or its `)`."""
    if at == 1 and (one := _ONE_OPERAND.fullmatch(token)):
        return (one[1],)
    if at == 1 and not token[1:].strip(" \t)"):
        return ()
    names, more = [], ","
    while more == ",":
        found = _VALUE_NAME.match(token, at)
        if not found:
            at += len(token[at:]) - len(token[at:].lstrip())
            raise Fault(_at(token) + at, "expected a value such as %p, then ',' or ')'")
        bare, quoted, more = found.groups()
        names.append(bare or _unquote(quoted, _at(token) + at))
        at = found.end()
    return tuple(names)


def _unquote(quoted: str, at: int) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError as error:
        raise Fault(at, f"not a valid string: {error}", width=len(quoted)) from None


def _node_attributes(cls: type, block: Token) -> Mapping[str, Any]:
    try:
        return _cached_attributes(cls, str(block))
    except Fault as fault:
        fault.at += _at(block)
        raise


@lru_cache(maxsize=4096)
def _cached_attributes(cls: type, block: str) -> Mapping[str, Any]:
    """Blocks such as `{step = 3}` stand on many nodes."""
    return _attributes(cls, block)


@cache
def _by_text(cls: type) -> dict[str, Attribute]:
    found = {attribute.text: attribute for attribute in attributes_of(cls)}
    return {"stage": found["stage"]} if cls is IRGraph else found


def _attributes(cls: type, block: str) -> dict[str, Any]:
    """`{key = value, ...}` as fields of a class. Faults are relative to the block."""
    known = _by_text(cls)
    fields: dict[str, Any] = {}
    at, more = 1, ","
    while more == ",":
        pair = _PAIR.match(block, at)
        if not pair:
            at += len(block[at:]) - len(block[at:].lstrip())
            raise Fault(at, "expected 'name = value', then ',' or '}'")
        key, value, more = pair.groups()
        attribute = known.get(key)
        if attribute is None:
            raise Fault(
                pair.start(1),
                f"unknown attribute {key!r}",
                width=len(key),
                help=suggest(key, known),
            )
        if attribute.field in fields:
            raise Fault(pair.start(1), f"attribute {key!r} is given twice", width=len(key))
        fields[attribute.field] = _value(attribute, value, pair.start(2))
        at = pair.end()
    return fields


def _value(attribute: Attribute, text: str, at: int) -> Any:
    if attribute.optional and text == "none":
        return None
    if attribute.type == "int" and _INT.fullmatch(text):
        return int(text)
    if attribute.type == "str":
        if text[0] == '"':
            return _unquote(text, at)
        if _BARE.fullmatch(text):
            return text
    if attribute.type == "bool" and text in ("true", "false"):
        return text == "true"
    if attribute.type == "float":
        try:
            return float(text)
        except ValueError:
            pass  # the fault below says what was expected
    if attribute.type == "ints" and text[0] == "[":
        return _ints(text, at)
    wanted = {
        "int": "an integer of at most 18 digits",
        "float": "a number",
        "bool": "true or false",
        "str": "a word or a quoted string",
        "ints": "a list of integers such as [0:33, 40]",
    }[attribute.type]
    raise Fault(at, f"{attribute.text}: expected {wanted}, found {text[:40]}", width=len(text))


def _ints(text: str, at: int) -> tuple[int, ...]:
    """`[0:33, 40]`."""
    if not text[1:-1].strip():
        return ()
    values: list[int] = []
    offset, more = 1, ","
    while more == ",":
        found = _RANGE.match(text, offset)
        if not found:
            offset += len(text[offset:]) - len(text[offset:].lstrip())
            raise Fault(at + offset, "expected an integer or a range such as 0:33")
        first, stop, more = found.groups()
        if stop is None:
            values.append(int(first))
        else:
            if int(stop) - int(first) + len(values) > MAX_INTS:
                raise Fault(at + offset, f"a text may list at most {MAX_INTS} integers")
            values.extend(range(int(first), int(stop)))
        offset = found.end()
    return tuple(values)


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
                _at(block),
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
        result, cls, fields, written = line
        loc = Location(self.filename, result.line or 0, result.column or 0)
        node = _construct(cls, result, fields | {"loc": loc})
        if written is not None:
            shown = written[1:].strip()
            if shown != node.type:
                at = _at(written)
                raise Fault(
                    at + written.index(shown),
                    f"expected the type {node.type} here, found {shown}",
                    width=len(shown),
                    help=f"the result of this {node.kind} has the type {node.type}",
                )
        return node

    def _declaration(self, line: _Declaration) -> None:
        keyword = line.keyword.strip()
        cls = _DECLARATIONS.get(keyword)
        if cls is None:
            raise Fault(
                _at(line.keyword),
                f"unknown declaration {keyword!r}",
                width=len(keyword),
                help=suggest(keyword, _DECLARATIONS),
            )
        if self.declared[keyword] and keyword in ("target", "model", "device"):
            raise Fault(
                _at(line.keyword),
                f"a graph has one {keyword}, this is the second",
                width=len(keyword),
            )
        fields = self._block(cls, line.block)
        for attribute in attributes_of(cls):
            if attribute.default is attrs.NOTHING and attribute.field not in fields:
                raise Fault(
                    _at(line.symbol) + len(line.symbol.rstrip()),
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
            fields = _attributes(cls, block)
        except Fault as fault:
            fault.at += _at(block)
            raise
        self._count(sum(len(value) for value in fields.values() if isinstance(value, tuple)), block)
        return fields

    def _count(self, ints: int, where: Token) -> None:
        self.ints += ints
        if self.ints > MAX_INTS:
            raise Fault(_at(where), f"a text may list at most {MAX_INTS} integers")

    def _steps(self, line: _Steps) -> None:
        text, offset, more = line.runs, 1, ","
        if self.loops:
            raise Fault(_at(line.keyword), "a graph has one line of steps", width=5)
        loops: list[int] = []
        while more == ",":
            found = _RUN.match(text, offset)
            if not found:
                raise Fault(
                    _at(text) + offset,
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
    return found[1] or _unquote(found[2], _at(token) + 1)


def _construct(cls: type[Class], where: Token, fields: dict[str, Any]) -> Class:
    """Calls the class; what its validators refuse is a fault at `where`."""
    try:
        return cls(**fields)
    except ValueError as error:
        raise Fault(_at(where), str(error), width=len(where.rstrip())) from None
