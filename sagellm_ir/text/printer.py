"""`IRGraph` -> text. See `docs/architecture.md` for a sample and `grammar_v1.lark` for the syntax."""

from collections.abc import Callable, Iterator
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


class _Names(dict[str, str]):
    """Names as the text shows them, each looked at once."""

    def __missing__(self, name: str) -> str:
        self[name] = text = format_name(name)
        return text


def _names_of(graph: IRGraph) -> _Names:
    names = [node.name for node in graph.nodes] + [request.id for request in graph.requests]
    return _Names(zip(names, names, strict=True) if are_simple(names) else ())


def print_graph(graph: IRGraph, *, provenance: bool = False) -> str:
    """The graph as text, one node a line.

    Args:
        graph: what to print.
        provenance: end node lines with `// loc: ... origin: ...`, where these are known.
    """
    names = _names_of(graph)
    stage = format_value(graph.stage, "str")
    lines = [
        f"sagellm_ir {TEXT_VERSION}\n\n",
        f"graph @{format_name(graph.name)} {{stage = {stage}}} {{\n",
    ]
    declarations = list(_declarations(graph, names))
    nodes = [node_text(node, names) for node in graph.nodes]
    if provenance:
        nodes = [
            f"{text}{_provenance(node)}" for text, node in zip(nodes, graph.nodes, strict=True)
        ]
    parts = [_indented(block) for block in (declarations, nodes) if block]
    return "".join((*lines, "\n".join(parts), "}\n"))


def _indented(lines: list[str]) -> str:
    inner = "\n  ".join(lines)
    return f"  {inner}\n"


def node_text(node: IRNode, names: dict[str, str] | None = None) -> str:
    """One node as text, without a line end. `names` caches how names are written."""
    names = _Names() if names is None else names
    span = operands = after = ""
    if isinstance(node, KVNode):
        span = f" @{names[node.request]}[{node.start}:{node.stop}]"
    if values := node.operands:
        one = len(values) == 1
        inner = names[values[0]] if one else ", %".join(map(names.__getitem__, values))
        operands = f"(%{inner})"
    if node.after:
        after = f" after %{', %'.join(map(names.__getitem__, node.after))}"
    head = f"%{names[node.name]} = {node.kind}"
    return f"{head}{span}{operands}{_block(node)}{after} : {node.type}"


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


def _declarations(graph: IRGraph, names: _Names) -> Iterator[str]:
    target, default = graph.target, Target()
    for keyword, value, usual in (
        ("target", target, default),
        ("model", target.model, default.model),
        ("device", target.device, default.device),
    ):
        line = _declaration(keyword, value, names)
        if line != _declaration(keyword, usual, names):
            yield line
    if target.tiers != default.tiers:
        yield from (_declaration("tier", tier, names) for tier in target.tiers)
    if target.workers != default.workers:
        yield from (_declaration("worker", worker, names) for worker in target.workers)
    yield from (_declaration("cache", cached, names) for cached in graph.cache)
    for request in graph.requests:
        yield f"request @{names[request.id]}{_block(request)}"
    if graph.loops:
        runs = ((loops, sum(1 for _ in run)) for loops, run in groupby(graph.loops))
        yield f"steps [{', '.join(f'{loops}x{count}' for loops, count in runs)}]"


def _declaration(keyword: str, value: Any, names: _Names) -> str:
    """`keyword @name {key = value, ...}`; the first field of a declaration is its name."""
    cls: type = type(value)
    name = getattr(value, _name_field(cls))
    return f"{keyword} @{names[name]}{_block(value)}"


@cache
def _name_field(cls: type) -> str:
    return str(attrs.fields(cls)[0].name)
