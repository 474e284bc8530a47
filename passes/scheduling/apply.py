"""A timeline -> the scheduled graph."""

from collections.abc import Iterator

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, Decode, IRNode, Origin, Prefill
from sagellm_ir.nodes.allreduce import payload
from sagellm_ir.passes.rewrite import Names, prefill_part
from sagellm_ir.passes.scheduling.problem import COLLECTIVE, Problem
from sagellm_ir.passes.scheduling.timeline import Piece, Timeline

__all__ = ["apply", "at_step"]

BY = "schedule"


def apply(problem: Problem, timeline: Timeline) -> IRGraph:
    """The graph with steps, its nodes in the order they run, each followed by its collectives."""
    nodes, step, until, pieces = (
        problem.graph.nodes,
        timeline.step,
        timeline.until,
        timeline.pieces,
    )
    names = Names(problem.graph)
    ordered: list[IRNode] = []
    parts: dict[int, Iterator[IRNode]] = {}
    cut: dict[str, list[IRNode]] = {}
    for i in timeline.issued:
        if i not in pieces:
            ordered.append(at_step(nodes[i], step[i], until[i]))
            continue
        if i not in parts:
            node = nodes[i]
            assert isinstance(node, Prefill), "only prefills are cut"
            cut[node.name] = _cut(node, pieces[i], step[i], names)
            parts[i] = iter(cut[node.name])
        ordered.append(next(parts[i]))
    if COLLECTIVE in problem.kind:
        ordered = _with_collectives(problem.graph, ordered, cut, names)
    return problem.graph.replace(
        nodes=tuple(ordered), stage="scheduled", loops=tuple(timeline.loops)
    )


def at_step(node: IRNode, step: int, until: int = -1) -> IRNode:
    """The node in a step. Direct construction takes less time than `replace`."""
    if type(node) is Prefill:
        return prefill_part(
            node, node.name, node.start, node.stop, node.operands, node.after, step, node.origin
        )
    if type(node) is Decode:
        return Decode(
            node.name,
            node.request,
            node.start,
            node.stop,
            operands=node.operands,
            after=node.after,
            step=step,
            worker=node.worker,
            loc=node.loc,
            origin=node.origin,
            until=until,
        )
    return node.replace(step=step)


def _cut(node: Prefill, pieces: list[Piece], step: int, names: Names) -> list[IRNode]:
    """The node as a chain; its last part keeps its name, so its users stay as they are."""
    chain: list[IRNode] = []
    origin, operands, after, start = Origin(BY, (node.name,)), node.operands, node.after, node.start
    for number, (stop, at) in enumerate(pieces):
        name = names.fresh(f"{node.name}.{number}")
        chain.append(prefill_part(node, name, start, stop, operands, after, at, origin))
        operands, after, start = (name,), (), stop
    chain.append(
        prefill_part(node, node.name, start, node.stop, operands, after, step, node.origin)
    )
    return chain


def _with_collectives(
    graph: IRGraph, ordered: list[IRNode], cut: dict[str, list[IRNode]], names: Names
) -> list[IRNode]:
    """Every collective behind its operand. One whose operands run apart becomes one for each."""
    place = {node.name: i for i, node in enumerate(ordered)}
    behind: dict[str, list[IRNode]] = {}
    for node in graph.nodes:
        if not isinstance(node, AllReduce):
            continue
        spans = {_span(ordered[place[name]]) for name in node.operands}
        if len(spans) == 1 and not any(name in cut for name in node.operands):
            last = max(node.operands, key=place.__getitem__)
            behind.setdefault(last, []).append(node.replace(step=ordered[place[last]].step))
            continue
        parts = [part for o in node.operands for part in cut.get(o, [ordered[place[o]]])]
        for part in parts:
            name = node.name if part is parts[-1] else names.fresh(f"{node.name}.0")
            size = payload(part, graph.target)
            one = node.replace(name=name, operands=(part.name,), bytes=size, step=part.step)
            behind.setdefault(part.name, []).append(one)
    return [item for node in ordered for item in (node, *behind.get(node.name, ()))]


def _span(node: IRNode) -> tuple[int | None, int | None]:
    return node.step, node.until if isinstance(node, Decode) else node.step
