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
_RESULT = re.compile(rf"%{_NAME}[ \t]*=[ \t]*(\w+)[ \t]*(?:@{_NAME}[ \t]*(\[.*))?")
_SYMBOL = re.compile(rf"@{_NAME}[ \t]*")
_SPAN = re.compile(r"\[[ \t]*(\d{1,18})[ \t]*:[ \t]*(\d{1,18})[ \t]*\]")
_ONE_OPERAND = re.compile(r"\(%([A-Za-z0-9_.\-]+)\)[ \t]*")
_VALUE_NAME = re.compile(rf"[ \t]*%{_NAME}[ \t]*(,|\)|$)")
_A_NAME = re.compile(rf"[ \t]*%{_NAME}")
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
        at = _at(result)
        found = _RESULT.match(result)
        assert found, "the grammar's RESULT and _RESULT agree"
        bare, quoted, kind, request, quoted_request, span = cast("tuple[Any, ...]", found.groups())
        if span:
            numbers = _SPAN.match(span)
            if not numbers:
                width = len(span.rstrip())
                raise Fault(at + found.start(6), "expected two integers as in [0:16]", width=width)
            request = request or _unquote(quoted_request, at + found.start(5))
            span = (request, int(numbers[1]), int(numbers[2]))
        return _Node(
            result.line,
            result.column,
            kind,
            at + found.start(3),
            span,
            bare or _unquote(quoted, at + 1),
            _value_names(operands, 1) if operands else (),
            _value_names(after, 5) if after else (),
            str(block) if block else "",
            _at(block) if block else 0,
            type_token[1:].strip() if type_token else "",
            _at(type_token) + type_token.index(type_token[1:].strip()) if type_token else 0,
        )


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
            name = _A_NAME.match(token, at)
            wanted = "',' or ')'" if name else "a value such as %p"
            raise Fault(
                _at(token) + _past_blanks(token, name.end() if name else at), f"expected {wanted}"
            )
        bare, quoted, more = found.groups()
        names.append(bare or _unquote(quoted, _at(token) + at))
        at = found.end()
    return tuple(names)


def _past_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t"):
        at += 1
    return at


def _unquote(quoted: str, at: int) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError as error:
        raise Fault(at, f"not a valid string: {error}", width=len(quoted)) from None


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
            raise Fault(_past_blanks(block, at), "expected 'name = value', then ',' or '}'")
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
            raise Fault(
                at + _past_blanks(text, offset), "expected an integer or a range such as 0:33"
            )
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
        cls: Any = KINDS.get(line.kind)
        if cls is None:
            raise _wrong_kind(line, f"unknown node kind {line.kind!r}", suggest(line.kind, KINDS))
        if (line.span is not None) != issubclass(cls, KVNode):
            wanted = "has no span" if line.span else "covers a span of tokens, such as @r0[0:16]"
            raise _wrong_kind(line, f"{line.kind} {wanted}")
        try:
            attributes = _cached_attributes(cls, line.block) if line.block else {}
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


def _wrong_kind(line: _Node, message: str, help: str = "") -> Fault:
    return Fault(line.kind_at, message, width=len(line.kind), help=help)


def _construct(cls: type[Class], where: Token, fields: dict[str, Any]) -> Class:
    """Calls the class; what its validators refuse is a fault at `where`."""
    try:
        return cls(**fields)
    except ValueError as error:
        raise Fault(_at(where), str(error), width=len(where.rstrip())) from None
