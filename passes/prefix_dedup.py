"""`prefix-dedup`: common subexpression elimination over KV."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from operator import le
from typing import ClassVar, cast

import numpy as np
from attrs import field, frozen, validators

from sagellm_ir.arrays import NONE, Ints, Mask
from sagellm_ir.columns import Columns
from sagellm_ir.cost import CostModel
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, IRNode, KVFetch, Prefill
from sagellm_ir.passes.base import Pass, PassContext
from sagellm_ir.passes.blocks import BlockTable, Cuts, RadixTree
from sagellm_ir.passes.rewrite import (
    Names,
    finish,
    merge,
    part,
    split,
    topological,
)

__all__ = ["PrefixDedup"]


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
    if `gated`, when the followers that part there save more work than the step that they may
    have to wait costs besides its rows: followers * saved(above, here) > step_overhead. If
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
        tree = RadixTree.of(BlockTable(graph.columns, order))
        kept = [i for i in self._worth_it(tree, CostModel(graph.target)) if ctx.may_rewrite()]
        if not kept:
            return graph, False
        sharing = _Sharing(graph, tree.cuts(kept), self.name)
        ranks = _ranks(graph.columns, order)
        in_order = bool((ranks[1:] >= ranks[:-1]).all())
        visited: Sequence[int] = range(len(graph.nodes))
        if not in_order:
            index = graph.columns.index
            visited = [index[node.name] for node in topological(graph.nodes, ranks.tolist())]
        nodes = sharing.rewrite(visited)
        if not sharing.changed:
            return graph, False
        for what, number in sharing.counts.items():
            ctx.count(what, number)
        shared = finish(graph, nodes, sharing.gone, sharing.idle, ordered=in_order)
        return shared, sharing.again

    def _worth_it(self, tree: RadixTree, cost: CostModel) -> list[int]:
        """The boundaries to keep, in leaders' order. Followers of others go to the one above."""
        parent, followers = tree.parent.tolist(), tree.followers.tolist()
        above = np.where(tree.parent >= 0, tree.stop[tree.parent], 0)
        tokens, saves = (tree.stop - above).tolist(), cost.saved(above, tree.stop).tolist()
        overhead = cost.target.device.step_overhead if self.gated else 0.0
        kept = []
        for i in np.argsort(-tree.stop, kind="stable").tolist():
            if tokens[i] >= self.min_tokens and followers[i] * saves[i] > overhead:
                kept.append(i)
            elif parent[i] >= 0:
                followers[parent[i]] += followers[i]
        return sorted(kept)


def _leaders_first(graph: IRGraph) -> Ints:
    """The requests, as indexes, in the order in which they may lead."""
    c = graph.columns
    waiting: Mask = np.zeros(len(graph.requests), dtype=bool)
    waiting[c.request[c.is_kv & (c.after.count > 0)]] = True
    arrivals = [request.arrival for request in graph.requests]
    urgent = [-request.priority for request in graph.requests]
    keys = list(zip(arrivals, waiting.tolist(), urgent, strict=True))
    if all(map(le, keys, keys[1:])):
        return np.arange(len(keys))
    return np.array(sorted(range(len(keys)), key=keys.__getitem__))


def _ranks(c: Columns, order: Ints) -> Ints:
    """The place of each node's request; what is no KV stays behind the node before it."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    last_kv = np.maximum.accumulate(np.where(c.is_kv, np.arange(len(c.nodes)), 0))
    return places[c.request[last_kv]]


class _Sharing:
    """Rewrites nodes, visited in topological order, so that operands are always earlier ones.

    Nodes, requests and cuts are indexes; a missing one is -1. The cuts in a request's prompt are
    those from `low` to `high`.
    """

    def __init__(self, graph: IRGraph, cuts: Cuts, by: str) -> None:
        c = graph.columns
        self.columns, self.nodes, self.cuts, self.by = c, graph.nodes, cuts, by
        self.names = Names(graph)
        self.request, self.prefix = c.request.tolist(), c.prefix.tolist()
        self.start, self.stop = c.start.tolist(), c.stop.tolist()
        self.on_device = (c.tier == c.device).tolist()
        self.rewritable = _rewritable(c).tolist()
        """Whether a node computes or pins a part of a prompt, and no move copies that."""
        self.ordered = bool(c.after.names)
        """Whether there are order edges."""
        self.values: list[str | None] = [None] * (max(cuts.boundaries, default=-1) + 1)
        """By boundary, the value that ends there."""
        self.computed = [-1] * len(graph.requests)
        """By request, behind which of the cuts that others had computed in its prompt when its
        first node was visited; -1: none was."""
        high, stops = np.array(cuts.high, dtype=np.int64), np.array(cuts.stops, dtype=np.int64)
        some = high > np.array(cuts.low, dtype=np.int64)
        self.inner: list[int] = (high - (some & (stops[high - 1] == c.prompt))).tolist()
        """By request, one past the last cut that does not end its prompt."""
        self.concerned: Mask = (c.is_prefill | c.is_move) & some[c.request]
        """Nodes of a prompt with cuts: only values of decodes can not be shared."""
        self.waits: dict[int, tuple[str, ...]] = {}
        """By node, the order edges of it and its ancestors in its request, if there are any."""
        self.gone: dict[str, tuple[str, ...]] = {}
        self.left: set[int] = set()
        """Nodes that are gone."""
        self.idle: set[str] = set()
        self.changed = False
        self.again = False
        """Whether an edge between requests was taken away."""
        self.counts: Counter[str] = Counter()

    def rewrite(self, visited: Sequence[int]) -> list[IRNode]:
        """What becomes of nodes; collectives are left out."""
        nodes, result, done = self.nodes, list[IRNode](), 0
        order = np.asarray(visited)
        rest = nodes if isinstance(visited, range) else [nodes[i] for i in visited]
        for at in np.flatnonzero(self.concerned[order]).tolist():
            i = visited[at]
            if self.ordered:
                self.wait(i)
            pieces = self.share(i) if self.rewritable[i] else self.keep(i)
            if pieces is not None:
                result += rest[done:at]
                result += pieces
                done = at + 1
        result += rest[done:]
        self.again |= bool(np.isin(self.columns.operands.target, list(self.left)).any())
        if self.columns.is_allreduce.any():
            result = [node for node in result if not isinstance(node, AllReduce)]
        return result

    def wait(self, i: int) -> None:
        """Notes the order edges of a node and its ancestors in its request."""
        prefix, after = self.prefix[i], self.nodes[i].after
        inherited = prefix >= 0 and self.request[prefix] == self.request[i]
        above = self.waits.get(prefix, ()) if inherited else ()
        if after or above:
            self.waits[i] = merge(above, after)

    def keep(self, i: int) -> list[IRNode] | None:
        """Lets others use the value of a node from now on. Nothing stands for it: it stays."""
        cuts, request, stop = self.cuts, self.request[i], self.stop[i]
        high = cuts.high[request]
        at = bisect_left(cuts.stops, stop, cuts.low[request], high)
        if at < high and cuts.stops[at] == stop and self.on_device[i]:
            self.put(at, self.nodes[i].name)
        return None

    def put(self, at: int, name: str) -> None:
        """A value ends at a cut; the first one there stays."""
        boundary = self.cuts.boundaries[at]
        if self.values[boundary] is None:
            self.values[boundary] = name

    def share(self, i: int) -> list[IRNode] | None:
        """Replaces what others compute of a node by their value, and cuts the rest where the
        node's request leads. Returns what stands for it, or None if it stays."""
        cuts, request, start, stop = self.cuts, self.request[i], self.start[i], self.stop[i]
        stops, low, high = cuts.stops, cuts.low[request], cuts.high[request]
        node = cast(Prefill | KVFetch, self.nodes[i])
        computed = self.computed[request]
        if computed < 0:
            computed = self.computed[request] = self.reach(request)
        at = bisect_left(stops, stop, low, high)
        ends_here = at < high and stops[at] == stop
        if at < computed and ends_here and (value := self.values[cuts.boundaries[at]]):
            self.skip(i, stop, "nodes shared")
            self.gone[node.name] = merge((value,), self.waits.get(i, ()))
            self.left.add(i)
            return []
        pieces: list[IRNode] | None = None
        first = computed
        if at >= computed > low and stops[computed - 1] > start:
            prefix = self.values[cuts.boundaries[computed - 1]]
            assert prefix is not None, "others had computed it"
            self.skip(i, stops[computed - 1], "prefixes shared")
            waits = self.waits.get(i, ())
            node = part(node, node.name, stops[computed - 1], stop, (prefix,), waits)
            pieces = [node]
        else:
            first = max(bisect_right(stops, start, low, high), computed)
        if first < at:
            pieces = self.lead(node, first, at)
        if ends_here:
            self.put(at, node.name)
        return pieces

    def lead(self, node: Prefill | KVFetch, first: int, at: int) -> list[IRNode]:
        """The node, cut at some cuts."""
        self.changed = True
        self.counts["prefixes led"] += at - first
        names = self.names.numbered(f"{node.name}.s")
        pieces = split(node, self.cuts.stops[first:at], names, self.by)
        for cut in range(first, at):
            self.put(cut, pieces[cut - first].name)
        return list(pieces)

    def reach(self, request: int) -> int:
        """Behind which of the cuts in its prompt that others have computed by now."""
        low, high = self.cuts.low[request], self.inner[request]
        values, boundaries = self.values, self.cuts.boundaries
        while high > low and values[boundaries[high - 1]] is None:
            high -= 1
        return high

    def skip(self, i: int, until: int, what: str) -> None:
        """Notes that `[start, until)` of a node is taken from another request, and that the node no
        longer needs its ancestors."""
        self.changed = True
        self.counts[what] += 1
        if type(self.nodes[i]) is Prefill:
            self.counts["tokens saved"] += until - self.start[i]
        prefix = self.prefix[i]
        while prefix >= 0 and (name := self.nodes[prefix].name) not in self.idle:
            if self.request[prefix] != self.request[i]:
                self.again = True
                return
            self.idle.add(name)
            prefix = self.prefix[prefix]


def _rewritable(c: Columns) -> Mask:
    mask: Mask = c.is_prefill | (c.is_fetch & (c.source == NONE))
    mask[c.source[c.source != NONE]] = False
    return mask
