"""`FlatGraph`: a scheduled graph as flat lists and per-step lists, for one fast pass over it."""

from functools import cached_property

import numpy as np

from sagellm_ir.arrays import NONE, Ints, Mask, grouped
from sagellm_ir.columns import Columns
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import KINDS, AllReduce, IRNode, KVNode
from sagellm_ir.target import DEVICE

__all__ = ["NONE", "FlatGraph"]


class FlatGraph:
    """Indexes of a scheduled graph; node `i` is `graph.nodes[i]`, and -1 stands for no node.

    Raises:
        SageIRError: a node has no step, a step outside the graph's, or an unknown kind.
    """

    def __init__(self, graph: IRGraph) -> None:
        self.graph = graph
        c = graph.columns
        _check(c)
        self.parent: list[int] = c.prefix.tolist()
        """The node's prefix."""
        self.source: list[int] = c.source.tolist()
        """What a move copies."""
        self.owner: list[int] = c.request.tolist()
        """The number of the node's request in the graph."""
        names = [request.id for request in graph.requests]
        self.request = [names[owner] if owner != NONE else "" for owner in self.owner]
        tiers = [tier.name for tier in graph.target.tiers]
        self.tier = [tiers[tier] if tier != NONE else DEVICE for tier in c.tier.tolist()]
        """Where the value lives."""
        self.start: list[int] = c.start.tolist()
        self.stop: list[int] = c.stop.tolist()
        self.span: list[int] = (c.stop - c.start).tolist()
        """Tokens of `[start, stop)`."""
        self.first: list[int] = c.first_block.tolist()
        """Index of the first block it owns, in its request's table."""
        self.blocks: list[int] = c.blocks.tolist()
        """Blocks it owns."""
        self.forwards: list[int] = c.forwards.tolist()
        """Of decodes: one less than tokens when the prefill before made the first token."""
        self.moves = _by_step(c, c.is_move, c.step)
        """Fetches and migrates of each step, in node order; the same for the next three."""
        self.prefills = _by_step(c, c.is_prefill, c.step)
        self.decodes = _by_step(c, c.is_decode, c.step)
        self.reduces = _by_step(c, c.is_allreduce, c.step)
        self.ended = _by_step(c, c.is_decode, c.finish + 1)
        """Decodes and collectives that ran for the last time in the step before each step."""
        self.dead = [kv[::-1] for kv in _by_step(c, c.is_kv, c.last_use + 1)]
        """Values whose last use was in the step before each step, from the last node on."""
        workers = [worker.name for worker in graph.target.workers]
        self.worker = [workers[max(worker, 0)] for worker in c.worker.tolist()]
        """The worker of each node."""
        self.step_worker = [workers[0]] * len(graph.loops)
        if c.is_allreduce.any():
            self._end_reduces(c)
        if len(workers) > 1:
            self._place(workers)

    def kv(self, i: int) -> KVNode:
        """Node `i`, known to hold KV."""
        node = self.graph.nodes[i]
        assert isinstance(node, KVNode), node
        return node

    @cached_property
    def children(self) -> dict[int, list[int]]:
        """For each node, those that have it as their prefix."""
        children: dict[int, list[int]] = {}
        for i, parent in enumerate(self.parent):
            children.setdefault(parent, []).append(i)
        return children

    def _end_reduces(self, c: Columns) -> None:
        """A collective ends with its operands, or before a later one that takes a row over."""
        last: dict[int, int] = {}
        summed: dict[tuple[str, str], int] = {}
        for step, reduces in enumerate(self.reduces):
            for i in reduces:
                node = c.nodes[i]
                assert isinstance(node, AllReduce), node
                last[i] = max(
                    (int(c.finish[c.index[name]]) for name in node.operands), default=step
                )
                for name in node.operands:
                    before = summed.get((node.group, name), NONE)
                    if before != NONE and c.step[before] != step:
                        last[before] = min(last[before], step - 1)
                    summed[node.group, name] = i
        for i, step in last.items():
            self.ended[step + 1] = [*self.ended[step + 1], i]

    def _place(self, names: list[str]) -> None:
        """Find the worker of each step: that of what starts in it, or of the decodes that run."""
        running = dict.fromkeys(names, 0)
        worker = names[0]
        for step in range(len(self.graph.loops)):
            for i in self.ended[step]:
                running[self.worker[i]] -= 1
            lasting = self.decodes[step] + self.reduces[step]
            for i in lasting:
                running[self.worker[i]] += 1
            if here := lasting or self.prefills[step] or self.moves[step]:
                worker = self.worker[here[0]]
            elif not running[worker]:
                worker = next((name for name in names if running[name]), worker)
            self.step_worker[step] = worker


def _check(c: Columns) -> None:
    """Refuses nodes that lowering can not place."""
    steps = len(c.graph.loops)
    placed = (c.step >= 0) & (c.finish >= c.step) & (c.finish < steps)
    known = c.is_forward | c.is_move | c.is_allreduce
    if len(bad := np.flatnonzero(~(placed & known))):
        raise _unplaced(c.nodes[bad[0]], steps)


def _by_step(c: Columns, nodes: Mask, step: Ints) -> list[list[int]]:
    """Some nodes by their steps, in order in each; there is a last list for what is behind them."""
    return grouped(np.flatnonzero(nodes), step[nodes], len(c.graph.loops) + 1)


def _unplaced(node: IRNode, steps: int) -> SageIRError:
    if type(node) not in KINDS.values():
        message = f"lowering knows no node kind {node.kind!r} (%{node.name})"
        return SageIRError(Diagnostic(message, node.loc))
    message = f"%{node.name} has no step among the graph's {steps}"
    return SageIRError(Diagnostic(message, node.loc, help="run the pass 'schedule'"))
