"""`IRGraph` -> text. See `docs/architecture.md` for a sample and `grammar_v1.lark` for the syntax."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from operator import attrgetter
from typing import Any

import attrs

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import IRNode, KVNode
from sagellm_ir.target import Target
from sagellm_ir.text.syntax import (
    TEXT_VERSION,
    Attribute,
    are_simple,
    attributes_of,
    format_name,
    format_value,
)

__all__ = ["node_text", "print_graph"]


Quoted = Mapping[str, str]
"""The names that need quotes, and how the text shows them. Nearly always there are none."""


def _quoted(names: Sequence[str]) -> Quoted:
    if are_simple(names):
        return {}
    return {name: text for name in names if (text := format_name(name)) != name}


def _names_of(node: IRNode) -> list[str]:
    own = [node.request] if isinstance(node, KVNode) else []
    return [node.name, *own, *node.operands, *node.after]


def print_graph(graph: IRGraph, *, provenance: bool = False) -> str:
    """The graph as text, one node a line.

    Args:
        graph: what to print.
        provenance: end node lines with `// loc: ... origin: ...`, where these are known.
    """
    names = [node.name for node in graph.nodes]
    names += [request.id for request in graph.requests]
    quoted = _quoted(names)
    stage = format_value(graph.stage, "str")
    lines = [
        f"sagellm_ir {TEXT_VERSION}\n\n",
        f"graph @{format_name(graph.name)} {{stage = {stage}}} {{\n",
    ]
    declarations = list(_declarations(graph, quoted))
    nodes = [node_text(node, quoted) for node in graph.nodes]
    if provenance:
        nodes = [
            f"{text}{_provenance(node)}" for text, node in zip(nodes, graph.nodes, strict=True)
        ]
    parts = [_indented(block) for block in (declarations, nodes) if block]
    return "".join((*lines, "\n".join(parts), "}\n"))


def _indented(lines: list[str]) -> str:
    inner = "\n  ".join(lines)
    return f"  {inner}\n"


def node_text(node: IRNode, quoted: Quoted | None = None) -> str:
    """One node as text, without a line end. `quoted` holds the names that need quotes."""
    if quoted is None:
        quoted = _quoted(_names_of(node))
    span = operands = after = ""
    name = node.name
    if quoted:
        name = quoted.get(name, name)
    if isinstance(node, KVNode):
        request = node.request
        if quoted:
            request = quoted.get(request, request)
        span = f" @{request}[{node.start}:{node.stop}]"
    if node.operands:
        operands = f"(%{_listed(node.operands, quoted)})"
    if node.after:
        after = f" after %{_listed(node.after, quoted)}"
    return f"%{name} = {node.kind}{span}{operands}{_block(node)}{after} : {node.type}"


def _listed(names: tuple[str, ...], quoted: Quoted) -> str:
    """`a, %b, %c`"""
    if quoted:
        names = tuple(quoted.get(name, name) for name in names)
    return names[0] if len(names) == 1 else ", %".join(names)


def _block(owner: Any) -> str:
    """` {key = value, ...}` of the attributes that do not have their default, or nothing."""
    cls: type = type(owner)
    get, attributes, defaults = _columns(cls)
    if (found := get(owner)) == defaults:
        return ""
    shown = [  # most attributes are plain integers, which need no call
        f"{attribute.text} = {value}"
        if type(value) is int and attribute.type == "int"
        else f"{attribute.text} = {format_value(value, attribute.type)}"
        for attribute, value, usual in zip(attributes, found, defaults)  # noqa: B905  (hot)
        if value is not usual and value != usual
    ]
    return f" {{{', '.join(shown)}}}"


@cache
def _columns(cls: type) -> tuple[Callable[[Any], Any], tuple[Attribute, ...], tuple[Any, ...]]:
    """A getter of all attributes of a class, as one tuple; the attributes; their defaults."""
    attributes = attributes_of(cls)
    names = [attribute.field for attribute in attributes]
    if len(names) > 1:
        get: Callable[[Any], Any] = attrgetter(*names)
    else:  # attrgetter of one name gives no tuple

        def get(value: Any) -> tuple[Any, ...]:
            return tuple(getattr(value, name) for name in names)

    return get, attributes, tuple(attribute.default for attribute in attributes)


def _provenance(node: IRNode) -> str:
    notes = [
        f"{label}: {' '.join(str(value).split())}"
        for label, value in (("loc", node.loc), ("origin", node.origin))
        if value is not None
    ]
    return f"  // {' '.join(notes)}" if notes else ""


def _declarations(graph: IRGraph, quoted: Quoted) -> Iterator[str]:
    target, default = graph.target, Target()
    for keyword, value, usual in (
        ("target", target, default),
        ("model", target.model, default.model),
        ("device", target.device, default.device),
    ):
        line = _declaration(keyword, value)
        if line != _declaration(keyword, usual):
            yield line
    if target.tiers != default.tiers:
        yield from (_declaration("tier", tier) for tier in target.tiers)
    if target.workers != default.workers:
        yield from (_declaration("worker", worker) for worker in target.workers)
    yield from (_declaration("cache", cached) for cached in graph.cache)
    for request in graph.requests:
        name = quoted.get(request.id, request.id)
        yield f"request @{name}{_block(request)}"
    if graph.loops:
        runs = ((loops, sum(1 for _ in run)) for loops, run in groupby(graph.loops))
        yield f"steps [{', '.join(f'{loops}x{count}' for loops, count in runs)}]"


def _declaration(keyword: str, value: Any) -> str:
    """`keyword @name {key = value, ...}`; the first field of a declaration is its name."""
    cls: type = type(value)
    name = format_name(getattr(value, _name_field(cls)))
    return f"{keyword} @{name}{_block(value)}"


@cache
def _name_field(cls: type) -> str:
    return str(attrs.fields(cls)[0].name)
