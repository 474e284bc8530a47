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
    names = _Names()
    lines = [f"sagellm_ir {TEXT_VERSION}", ""]
    lines.append(
        f"graph @{format_name(graph.name)} {{stage = {format_value(graph.stage, 'str')}}} {{"
    )
    lines += [f"  {line}" for line in _declarations(graph)]
    if graph.nodes and len(lines) > 3:
        lines.append("")
    if provenance:
        lines += [f"  {node_text(node, names)}{_provenance(node)}" for node in graph.nodes]
    else:
        lines += [f"  {node_text(node, names)}" for node in graph.nodes]
    lines.append("}\n")
    return "\n".join(lines)


def node_text(node: IRNode, names: dict[str, str] | None = None) -> str:
    """One node as text, without a line end. `names` caches how names are written."""
    names = _Names() if names is None else names
    text = f"%{names[node.name]} = {node.kind}"
    if isinstance(node, KVNode):
        text = f"{text} @{names[node.request]}[{node.start}:{node.stop}]"
    if node.operands:
        text = f"{text}(%{', %'.join([names[name] for name in node.operands])})"
    cls: type = type(node)
    values = [
        key + format_value(value, type_name)
        for key, get, default, type_name in _getters(cls)
        if (value := get(node)) != default
    ]
    if values:
        text = f"{text} {{{', '.join(values)}}}"
    if node.after:
        text = f"{text} after %{', %'.join([names[name] for name in node.after])}"
    return f"{text} : {node.type}"


@cache
def _getters(cls: type) -> tuple[tuple[str, Callable[[Any], Any], Any, str], ...]:
    """For each attribute of a class: `key = `, how to get its value, its default and its type."""
    return tuple(
        (f"{attribute.text} = ", attrgetter(attribute.field), attribute.default, attribute.type)
        for attribute in attributes_of(cls)
    )


def _provenance(node: IRNode) -> str:
    notes = [
        f"{label}: {' '.join(str(value).split())}"
        for label, value in (("loc", node.loc), ("origin", node.origin))
        if value is not None
    ]
    return f"  // {' '.join(notes)}" if notes else ""


def _declarations(graph: IRGraph) -> Iterator[str]:
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
    yield from (_declaration("request", request) for request in graph.requests)
    if graph.loops:
        runs = ((loops, sum(1 for _ in run)) for loops, run in groupby(graph.loops))
        yield f"steps [{', '.join(f'{loops}x{count}' for loops, count in runs)}]"


def _declaration(keyword: str, value: Any) -> str:
    """`keyword @name {key = value, ...}`, without the attributes that have their default."""
    cls: type = type(value)
    name = getattr(value, attrs.fields(cls)[0].name)
    values = [
        key + format_value(field, type_name)
        for key, get, default, type_name in _getters(cls)
        if (field := get(value)) != default
    ]
    block = f" {{{', '.join(values)}}}" if values else ""
    return f"{keyword} @{format_name(name)}{block}"
