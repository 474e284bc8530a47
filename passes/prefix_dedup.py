"""`prefix-dedup`: common subexpression elimination over KV."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from attrs import define, field, frozen, validators

from sagellm_ir.cost import CostModel
from sagellm_ir.graph import IRGraph, RequestDecl
from sagellm_ir.nodes import AllReduce, IRNode, KVFetch, KVMigrate, KVNode, Prefill
from sagellm_ir.passes.base import Pass, PassContext
from sagellm_ir.passes.blocks import BlockTable, Cuts, RadixTree
from sagellm_ir.passes.rewrite import (
    Names,
    finish,
    merge,
    part,
    sources,
    split,
    topological,
)
from sagellm_ir.target import DEVICE

__all__ = ["PrefixDedup"]

_PROMPT = (Prefill, KVFetch, KVMigrate)
"""Nodes whose values others may use; only those of decodes can not be shared."""


@frozen
class PrefixDedup(Pass):
    """Computes a prefix that several requests have in common once.

    Prompts form a radix tree over block ids (as in L. Zheng et al., "SGLang", arXiv 2312.07104).
    Where prompts part is a boundary. The first request that runs through a boundary, its leader,
    computes up to there in a node of its own (`%x.s0`, `%x.s1`, ..., named after the leader's
    prefill `%x`); the others, its followers, start there with that node as prefix. Leaders come
    first: by arrival, then those that wait for nobody, then by priority, then as declared; but
    nothing that stands before a node on account of the graph's edges comes after it.

    - Only full blocks are shared, and never a whole prompt: its last token has to be computed.
    - Order edges stay with the request that had them: a follower waits for the leader's node and
      for what it waited for before. So a turn of a session shares with the turn before it.
    - Nodes that a move copies stay as they are; decodes are not touched.
    - Cached prefixes (`kv_fetch` without source) are shared like computed ones.

    A boundary is worth it when at least `min_tokens` lie between it and the boundary above it and,
    if `gated`, when the followers that part there save more arithmetic than the step that they may
    have to wait costs besides its rows: followers * prefill(above, here) > step_overhead. If
    not, they part at the boundary above.

    Time is O(n log n) in blocks, in numpy, and linear in nodes. The pass is idempotent.
    """

    name: ClassVar[str] = "prefix-dedup"
    needs: ClassVar[tuple[str, ...]] = ("built",)

    min_tokens: int = field(default=1, validator=validators.gt(0))
    """Fewest tokens worth a node of their own; less than a block means a block."""
    gated: bool = True
    """Ask the cost model."""

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        while True:
            result, again = self._share(graph, ctx)
            if not again:
                return result
            graph = result

    def _share(self, graph: IRGraph, ctx: PassContext) -> tuple[IRGraph, bool]:
        """The graph after one walk, and whether another may find more: edges between requests
        that the walk took away may have kept a request from leading. Each walk leaves fewer tokens
        to compute, so there are few."""
        order = _leaders_first(graph)
        tree = RadixTree.of(BlockTable(order, graph.target.block_size))
        kept = [i for i in self._worth_it(tree, CostModel(graph.target)) if ctx.may_rewrite()]
        if not kept:
            return graph, False
        sharing = _Sharing(graph, tree.cuts(kept), ctx, self.name)
        nodes = topological(graph.nodes, _ranks(graph, order))
        sharing.visit(nodes)
        if not sharing.changed:
            return graph, False
        ordered = nodes is graph.nodes
        shared = finish(graph, sharing.nodes, sharing.gone, sharing.idle, ordered=ordered)
        return shared, sharing.again

    def _worth_it(self, tree: "RadixTree", cost: CostModel) -> list[int]:
        """The boundaries to keep, in leaders' order. Followers of others go to the one above."""
        stop, parent, followers = tree.stop.tolist(), tree.parent.tolist(), tree.followers.tolist()
        overhead = cost.target.device.step_overhead if self.gated else 0.0
        kept = []
        for i in np.argsort(-tree.stop, kind="stable").tolist():
            above = stop[parent[i]] if parent[i] >= 0 else 0
            saved = followers[i] * cost.prefill(above, stop[i])
            if stop[i] - above >= self.min_tokens and saved > overhead:
                kept.append(i)
            elif parent[i] >= 0:
                followers[parent[i]] += followers[i]
        return sorted(kept)


def _leaders_first(graph: IRGraph) -> list[RequestDecl]:
    """The requests in the order in which they may lead."""
    waiting = {n.request for n in graph.nodes if n.after and isinstance(n, KVNode)}
    return sorted(graph.requests, key=lambda r: (r.arrival, r.id in waiting, -r.priority))


def _ranks(graph: IRGraph, order: list[RequestDecl]) -> list[int]:
    """The place of each node's request; what is no KV stays behind the node before it."""
    places = {request.id: i for i, request in enumerate(order)}
    ranks, place = [], 0
    for node in graph.nodes:
        if isinstance(node, KVNode):
            place = places[node.request]
        ranks.append(place)
    return ranks


@define
class _Sharing:
    """Rewrites nodes, visited in topological order, so that operands are always earlier ones."""

    graph: IRGraph
    cuts: Cuts
    ctx: PassContext
    by: str
    nodes: list[IRNode] = field(factory=list)
    gone: dict[str, tuple[str, ...]] = field(factory=dict)
    idle: set[str] = field(factory=set)
    values: dict[int, str] = field(factory=dict)
    """By boundary, the value that ends there."""
    hits: dict[str, int] = field(factory=dict)
    """By request, behind which of the cuts that others had computed in its prompt when its first
    node was visited."""
    waits: dict[str, tuple[str, ...]] = field(factory=dict)
    """By node, the order edges of it and its ancestors in its request, if there are any."""
    changed: bool = False
    again: bool = False
    """Whether an edge between requests was taken away."""

    counts: Counter[str] = field(factory=Counter)

    names: Names = field(init=False)
    copied: set[str] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.names = Names(self.graph)
        self.copied = sources(self.graph)

    def visit(self, nodes: Sequence[IRNode]) -> None:
        """Rewrites nodes."""
        parts, gone, waits, take = self.cuts.parts, self.gone, self.waits, self.nodes.append
        for node in nodes:
            if gone and not gone.keys().isdisjoint(node.operands):
                self.again = True
            if isinstance(node, _PROMPT) and node.request in parts:
                low, high = parts[node.request]
                if node.after or waits:
                    self.wait(node)
                if not isinstance(node, KVMigrate) and self.rewritable(node):
                    self.share(node, low, high)
                else:
                    self.keep(node, low, high)
            elif not isinstance(node, AllReduce):
                take(node)
        for what, number in self.counts.items():
            self.ctx.count(what, number)

    def rewritable(self, node: Prefill | KVFetch) -> bool:
        """Whether it computes or pins a part of the prompt, and no move copies that."""
        return node.name not in self.copied and (isinstance(node, Prefill) or node.source is None)

    def wait(self, node: KVNode) -> None:
        """Notes the order edges of a node and its ancestors in its request."""
        prefix = self.graph.by_name.get(node.prefix or "")
        inherited = isinstance(prefix, KVNode) and prefix.request == node.request
        above = self.waits.get(prefix.name, ()) if prefix and inherited else ()
        if node.after or above:
            self.waits[node.name] = merge(above, node.after)

    def keep(self, node: KVNode, low: int, high: int) -> None:
        """Takes a node as it is; from now on others may use its value."""
        self.nodes.append(node)
        at = bisect_left(self.cuts.stops, node.stop, low, high)
        if at < high and self.cuts.stops[at] == node.stop and node.tier == DEVICE:
            self.values.setdefault(self.cuts.boundaries[at], node.name)

    def share(self, node: Prefill | KVFetch, low: int, high: int) -> None:
        """Replaces what others compute of a node by their value, and cuts the rest where the
        node's request leads. The cuts in its prompt are those from `low` to `high`."""
        stops, boundaries = self.cuts.stops, self.cuts.boundaries
        computed = self.computed(node.request, low, high)
        first, at = computed, bisect_left(stops, node.stop, low, high)
        ends_here = at < high and stops[at] == node.stop
        if at < computed and ends_here and boundaries[at] in self.values:
            self.skip(node, node.stop, "nodes shared")
            waits = self.waits.get(node.name, ())
            self.gone[node.name] = merge((self.values[boundaries[at]],), waits)
            return
        if at >= computed > low and stops[computed - 1] > node.start:
            self.skip(node, stops[computed - 1], "prefixes shared")
            prefix = self.values[boundaries[computed - 1]]
            waits = self.waits.get(node.name, ())
            node = part(node, node.name, stops[computed - 1], node.stop, (prefix,), waits)
        else:
            first = max(bisect_right(stops, node.start, low, high), computed)
        if first < at:
            self.lead(node, first, at)
        else:
            self.nodes.append(node)
        if ends_here:
            self.values.setdefault(boundaries[at], node.name)

    def lead(self, node: Prefill | KVFetch, first: int, at: int) -> None:
        """Cuts a node at some cuts."""
        self.changed = True
        self.counts["prefixes led"] += at - first
        names = self.names.numbered(f"{node.name}.s")
        pieces = split(node, self.cuts.stops[first:at], names, self.by)
        self.nodes += pieces
        for piece, boundary in zip(pieces, self.cuts.boundaries[first:at]):  # noqa: B905
            self.values.setdefault(boundary, piece.name)

    def computed(self, request: str, low: int, high: int) -> int:
        """Behind which of the cuts in its prompt that others had computed before its first node."""
        if request in self.hits:
            return self.hits[request]
        if self.cuts.stops[high - 1] == self.graph.request[request].prompt_len:
            high -= 1
        while high > low and self.cuts.boundaries[high - 1] not in self.values:
            high -= 1
        self.hits[request] = high
        return high

    def skip(self, node: KVNode, until: int, what: str) -> None:
        """Notes that `[node.start, until)` is taken from another request, and that a node no
        longer needs its ancestors."""
        self.changed = True
        counts = self.counts
        counts[what] += 1
        if isinstance(node, Prefill):
            counts["tokens saved"] += until - node.start
        if not node.start:
            return
        prefix = self.graph.by_name.get(node.prefix or "")
        while isinstance(prefix, KVNode) and prefix.name not in self.idle:
            if prefix.request != node.request:
                self.again = True
                return
            self.idle.add(prefix.name)
            prefix = self.graph.by_name.get(prefix.prefix or "")
