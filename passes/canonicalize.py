"""`canonicalize`: one form for graphs that mean the same."""

from typing import ClassVar

import numpy as np
from attrs import frozen

from sagellm_ir.arrays import NONE, Mask
from sagellm_ir.columns import Columns
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, Decode, IRNode, KVNode, Prefill
from sagellm_ir.passes.base import Pass, PassContext
from sagellm_ir.passes.rewrite import canonical_ranks, finish, sources, topological

__all__ = ["Canonicalize"]


@frozen
class Canonicalize(Pass):
    """Drops dead nodes, folds adjacent spans, puts boundaries on blocks, sorts nodes.

    - A node is dead when no token comes out of it or of a node that needs it, by operands or order
      edges.
    - A prefill (or decode) folds into the next one of its request when that is its only user:
      nothing needs the KV at the boundary. It undoes `chunk-prefill`. A boundary stays where the
      later node has order edges, since folding would make the earlier part wait too.
      So does one where a move copies the later node's KV.
    - A boundary between two prefills that stays, but could be anywhere, moves down to the end of a
      block, so that no block is written by two nodes. (Where a value has several users the
      verifier asks for a block boundary already.)
    - Nodes are sorted topologically; among those that may come next, by request in order of
      declaration, then by span, kind and name.

    The pass is idempotent.
    """

    name: ClassVar[str] = "canonicalize"
    needs: ClassVar[tuple[str, ...]] = ("built",)

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        if _is_canonical(graph.columns):
            return graph
        graph = _drop_dead(graph, ctx)
        graph = _fold(graph, ctx)
        nodes = tuple(topological(graph.nodes, canonical_ranks(graph, graph.requests)))
        if nodes is not graph.nodes and nodes != graph.nodes and ctx.may_rewrite():
            ctx.count("sorted graphs")
            return graph.replace(nodes=nodes)
        return graph


def _is_canonical(c: Columns) -> bool:
    """Whether a look at the columns tells that there is nothing to do. Most graphs come from
    `build`, which makes them so; of others it may be that only the passes over nodes can tell."""
    if c.is_allreduce.any() or not c.is_kv.all():
        return False
    needed: Mask = np.zeros(len(c.nodes), dtype=bool)
    needed[c.operands.target] = needed[c.after.target] = True
    answers = c.is_decode | (c.is_prefill & (c.stop == c.prompt[c.request]))
    folds = (c.prefix != NONE) & (c.code == c.code[c.prefix]) & (c.request == c.request[c.prefix])
    order = np.stack((c.request, c.start, c.stop))
    rises = np.diff(order) > 0
    same = np.diff(order) == 0
    ascends = rises[0] | (same[0] & (rises[1] | (same[1] & rises[2])))
    return bool((answers | needed).all() and ascends.all() and not folds.any())


def _drop_dead(graph: IRGraph, ctx: PassContext) -> IRGraph:
    """Without the nodes that no token needs. Collectives go with the last of their operands."""
    prompts = {request.id: request.prompt_len for request in graph.requests}
    live: set[str] = set()
    kept: list[IRNode] = []
    for node in reversed(graph.nodes):
        if isinstance(node, AllReduce):
            live.update(node.after)
            live.update(node.operands if node.name in live else ())
        elif node.name in live or _answers(node, prompts) or not ctx.may_rewrite():
            live.update((*node.operands, *node.after))
            kept.append(node)
        else:
            ctx.count("dead nodes")
    return finish(graph, reversed(kept)) if ctx.counts["dead nodes"] else graph


def _answers(node: IRNode, prompts: dict[str, int]) -> bool:
    """Whether tokens come out of a node: a decode, or the prefill that ends a prompt."""
    if isinstance(node, Prefill):
        return node.stop == prompts[node.request]
    return isinstance(node, Decode)


def _fold(graph: IRGraph, ctx: PassContext) -> IRGraph:
    """With adjacent spans folded, and boundaries that stay moved down to blocks."""
    shared = _needed_besides(graph)
    copied = sources(graph)
    kept: dict[str, IRNode] = {}
    folded: list[tuple[str, str]] = []
    block = graph.target.block_size
    for node in graph.nodes:
        if isinstance(node, AllReduce):
            continue
        earlier = kept.get(node.operands[0]) if len(node.operands) == 1 else None
        if (
            earlier is None
            or earlier.name in shared
            or node.name in copied
            or not _abut(earlier, node)
        ):
            kept[node.name] = node
            continue
        assert isinstance(earlier, KVNode)
        assert isinstance(node, KVNode)
        cut = earlier.stop - earlier.stop % block
        if not node.after and ctx.may_rewrite():
            ctx.count("folded spans")
            del kept[earlier.name]
            folded.append((earlier.name, node.name))
            changes = {"start": earlier.start, "operands": earlier.operands}
            node = node.replace(after=earlier.after, **changes)
        elif isinstance(node, Prefill) and earlier.start < cut < earlier.stop and ctx.may_rewrite():
            ctx.count("moved boundaries")
            kept[earlier.name] = earlier.replace(stop=cut)
            node = node.replace(start=cut)
        kept[node.name] = node
    if not (folded or ctx.counts["moved boundaries"]):
        return graph
    gone: dict[str, tuple[str, ...]] = {}
    for name, into in reversed(folded):
        gone[name] = gone.get(into, (into,))
    return finish(graph, kept.values(), gone)


def _needed_besides(graph: IRGraph) -> set[str]:
    """Nodes that something needs besides the first node that takes them as an operand."""
    shared: set[str] = set()
    used: set[str] = set()
    for node in graph.nodes:
        shared.update(node.after)
        if not isinstance(node, AllReduce):
            shared.update(used.intersection(node.operands))
            used.update(node.operands)
    return shared


def _abut(earlier: IRNode, later: IRNode) -> bool:
    """Whether two nodes compute parts of one span in the same way."""
    return (
        type(earlier) is type(later)
        and isinstance(earlier, (Prefill, Decode))
        and isinstance(later, (Prefill, Decode))
        and earlier.request == later.request
        and earlier.worker == later.worker
    )
