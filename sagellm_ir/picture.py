"""Pictures of a graph as text: Graphviz `dot` and Mermaid flow charts, one box a node."""

from collections.abc import Iterable, Iterator

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import IRNode, KVNode

__all__ = ["COLOURS", "OTHER", "dot_text", "to_dot", "to_mermaid"]

COLOURS = {
    "prefill": "#cfe2ff",
    "decode": "#d1e7dd",
    "kv_fetch": "#fff3cd",
    "kv_migrate": "#ffe5d0",
    "allreduce": "#e2d9f3",
}
OTHER = "#eeeeee"


def dot_text(*lines: str) -> str:
    """Lines as a quoted Graphviz text."""
    escaped = (line.replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'


def _label(node: IRNode) -> tuple[str, str]:
    span = f"@{node.request}[{node.start}:{node.stop}]" if isinstance(node, KVNode) else node.type
    where = "" if node.step is None else f" step {node.step}"
    return node.name, f"{node.kind} {span}{where}"


def _edges(graph: IRGraph) -> Iterator[tuple[int, int, bool]]:
    """(from, to, is it data) by node position."""
    position = {node.name: index for index, node in enumerate(graph.nodes)}
    for index, node in enumerate(graph.nodes):
        for name in node.operands:
            yield position[name], index, True
        for name in node.after:
            yield position[name], index, False


def to_dot(graph: IRGraph) -> str:
    """Graphviz text: data edges are solid, order edges dashed."""
    lines = [f"digraph {dot_text(graph.name)} {{", "  rankdir = LR;"]
    lines.append('  node [shape = box, style = "rounded,filled", fontname = "monospace"];')
    for index, node in enumerate(graph.nodes):
        colour = COLOURS.get(node.kind, OTHER)
        lines.append(f'  n{index} [label = {dot_text(*_label(node))}, fillcolor = "{colour}"];')
    for source, sink, is_data in _edges(graph):
        lines.append(f"  n{source} -> n{sink}{'' if is_data else ' [style = dashed]'};")
    return "\n".join([*lines, "}"])


def to_mermaid(graph: IRGraph) -> str:
    """A Mermaid flow chart: data edges are solid, order edges dotted."""

    def quoted(lines: Iterable[str]) -> str:
        return '"' + "<br/>".join(lines).replace('"', "#quot;") + '"'

    lines = ["flowchart LR"]
    kinds = sorted({node.kind for node in graph.nodes})
    lines += [f"  classDef {kind} fill:{COLOURS.get(kind, OTHER)},stroke:#555" for kind in kinds]
    for index, node in enumerate(graph.nodes):
        lines.append(f"  n{index}[{quoted(_label(node))}]:::{node.kind}")
    for source, sink, is_data in _edges(graph):
        lines.append(f"  n{source} {'-->' if is_data else '-.->'} n{sink}")
    return "\n".join(lines)
