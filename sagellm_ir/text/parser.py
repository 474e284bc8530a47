"""Text -> `IRGraph`: `lines.py` finds the lines and their parts, this module reads the parts.

The parser accepts every graph that is well formed as text; whether it makes sense is for
`sagellm_ir.verify` to say.
"""

import re
from typing import Any, TypeVar

import attrs
from lark import Token
from lark.exceptions import UnexpectedInput

from sagellm_ir.diagnostics import SageIRError, suggest
from sagellm_ir.graph import STAGES, CachedBlocks, IRGraph, RequestDecl
from sagellm_ir.nodes import KINDS, IRNode, KVNode, Location
from sagellm_ir.target import Device, ModelSpec, Target, Tier, Worker
from sagellm_ir.text.errors import Fault, diagnose, fault_of
from sagellm_ir.text.lines import DeclarationLine, NodeLine, StepsLine, read_lines
from sagellm_ir.text.syntax import attributes_of
from sagellm_ir.text.values import (
    MAX_INTS,
    NAME,
    node_attributes,
    position,
    read_attributes,
    unquote,
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
_SYMBOL = re.compile(rf"@{NAME}[ \t]*")
_RUN = re.compile(r"[ \t]*(\d{1,18})(?:x(\d{1,18}))?[ \t]*(,|\])")


def parse_graph(text: str, filename: str = "<text>") -> IRGraph:
    """Reads a graph; `filename` is what errors and node locations name.

    Raises:
        SageIRError: the text is not of this version or not well formed.
    """
    try:
        return _Builder(filename).graph(*read_lines(text))
    except UnexpectedInput as error:
        raise SageIRError(diagnose(fault_of(error, text), text, filename)) from None
    except Fault as fault:
        raise SageIRError(diagnose(fault, text, filename)) from None


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
            if isinstance(line, NodeLine):
                nodes.append(self._node(line))
            elif isinstance(line, StepsLine):
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

    def _node(self, line: NodeLine) -> IRNode:
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

    def _declaration(self, line: DeclarationLine) -> None:
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

    def _steps(self, line: StepsLine) -> None:
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


def _wrong_kind(line: NodeLine, message: str, help: str = "") -> Fault:
    return Fault(line.kind_at, message, width=len(line.kind), help=help)


def _construct(cls: type[Class], where: Token, fields: dict[str, Any]) -> Class:
    """Calls the class; what its validators refuse is a fault at `where`."""
    try:
        return cls(**fields)
    except ValueError as error:
        raise Fault(position(where), str(error), width=len(where.rstrip())) from None
