"""`FlatGraph`: a scheduled graph as flat arrays and per-step lists, for one fast pass over it."""

from collections import defaultdict
from functools import cached_property

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import (
    KINDS,
    AllReduce,
    Decode,
    IRNode,
    KVFetch,
    KVMigrate,
    KVNode,
    Prefill,
)
from sagellm_ir.target import DEVICE

__all__ = ["FlatGraph"]

NONE = -1
PerStep = dict[int, list[int]]


class FlatGraph:
    """Indexes of a scheduled graph; node `i` is `graph.nodes[i]`, and -1 stands for no node.

    Raises:
        SageIRError: a node has no step, a step outside the graph's, or an unknown kind.
    """

    def __init__(self, graph: IRGraph) -> None:
        self.graph = graph
        count, steps = len(graph.nodes), len(graph.loops)
        self.parent = [NONE] * count
        """The node's prefix."""
        self.source = [NONE] * count
        """What a move copies."""
        self.request = [""] * count
        self.tier = [DEVICE] * count
        """Where the value lives."""
        self.start = [0] * count
        self.stop = [0] * count
        self.span = [0] * count
        """Tokens of `[start, stop)`."""
        self.first = [0] * count
        """Index of the first block it owns, in its request's table."""
        self.blocks = [0] * count
        """Blocks it owns."""
        self.last = [0] * count
        """The last step that needs it."""
        self.forwards = [0] * count
        """Of decodes: one less than tokens when the prefill before made the first token."""
        self.moves: PerStep = defaultdict(list)
        """Fetches and migrates of each step, in node order; the same for the next three."""
        self.prefills: PerStep = defaultdict(list)
        self.decodes: PerStep = defaultdict(list)
        self.reduces: PerStep = defaultdict(list)
        self.ended: PerStep = defaultdict(list)
        """Decodes and collectives that ran for the last time in the step before each step."""
        self.dead: PerStep = defaultdict(list)
        """Values whose last use was in the step before each step."""
        self.worker: list[str] = []
        """The worker of each node."""
        self.step_worker: list[str] = [""] * steps
        self._read(graph)
        self._live()
        self._place(graph)

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

    def _read(self, graph: IRGraph) -> None:
        block_size, steps = graph.target.block_size, len(graph.loops)
        default = graph.target.workers[0].name
        lists: dict[type[IRNode], PerStep] = {
            Prefill: self.prefills,
            Decode: self.decodes,
            KVFetch: self.moves,
            KVMigrate: self.moves,
            AllReduce: self.reduces,
        }
        index: dict[str, int] = {}
        for i, node in enumerate(graph.nodes):
            index[node.name] = i
            kind, step = type(node), node.step
            if step is None or not 0 <= step < steps or kind not in lists:
                raise _unplaced(node, steps)
            lists[kind][step].append(i)
            self.worker.append(node.worker or default)
            self.last[i] = step
            if not isinstance(node, KVNode):
                last = max((self.last[index[name]] for name in node.operands), default=step)
                self.last[i] = last
                continue
            self.request[i] = node.request
            self.start[i] = start = node.start
            self.stop[i] = stop = node.stop
            self.span[i] = stop - start
            self.first[i] = first = -(-start // block_size)
            self.blocks[i] = -(-stop // block_size) - first
            if isinstance(node, Decode):
                self._read_decode(i, node, steps)
            elif kind is not Prefill:
                self._read_move(i, node, index)
                continue
            if start:
                self.parent[i] = index[node.operands[-1]]
        self._end_reduces(graph)

    def _end_reduces(self, graph: IRGraph) -> None:
        """A collective ends with its operands, or before a later one that takes a row over."""
        summed: dict[tuple[str, str], int] = {}
        for step in sorted(self.reduces):
            for i in self.reduces[step]:
                node = graph.nodes[i]
                assert isinstance(node, AllReduce), node
                for name in node.operands:
                    before = summed.get((node.group, name), NONE)
                    if before != NONE and graph.nodes[before].step != step:
                        self.last[before] = min(self.last[before], step - 1)
                    summed[node.group, name] = i
        for reduces in self.reduces.values():
            for i in reduces:
                self.ended[self.last[i] + 1].append(i)

    def _read_decode(self, i: int, node: Decode, steps: int) -> None:
        until = self.last[i] if node.until is None else node.until
        if not self.last[i] <= until < steps:
            raise _unplaced(node, steps)
        self.last[i] = until
        self.ended[until + 1].append(i)
        first = node.start == self.graph.request[node.request].prompt_len
        self.forwards[i] = self.span[i] - first

    def _read_move(self, i: int, node: KVNode, index: dict[str, int]) -> None:
        self.tier[i] = node.tier
        if source := node.source if isinstance(node, KVFetch | KVMigrate) else None:
            self.source[i] = index[source]
        if node.prefix:
            self.parent[i] = index[node.prefix]

    def _live(self) -> None:
        """Extend each value's life to its last use: prefixes live as long as what needs them."""
        last, nodes = self.last, self.graph.nodes
        for i in range(len(last) - 1, NONE, -1):
            parent, source = self.parent[i], self.source[i]
            if parent != NONE and last[parent] < last[i]:
                last[parent] = last[i]
            if source != NONE and last[source] < (step := nodes[i].step or 0):
                last[source] = step
            if self.span[i]:
                self.dead[last[i] + 1].append(i)

    def _place(self, graph: IRGraph) -> None:
        """Find the worker of each step: that of what starts in it, or of the decodes that run."""
        names = [worker.name for worker in graph.target.workers]
        if len(names) == 1:
            self.step_worker = names * len(graph.loops)
            return
        running = dict.fromkeys(names, 0)
        worker = names[0]
        for step in range(len(graph.loops)):
            for i in self.ended.get(step, ()):
                running[self.worker[i]] -= 1
            lasting = [*self.decodes.get(step, ()), *self.reduces.get(step, ())]
            for i in lasting:
                running[self.worker[i]] += 1
            if here := lasting or self.prefills.get(step) or self.moves.get(step):
                worker = self.worker[here[0]]
            elif not running[worker]:
                worker = next((name for name in names if running[name]), worker)
            self.step_worker[step] = worker


def _unplaced(node: IRNode, steps: int) -> SageIRError:
    if type(node) not in KINDS.values():
        message = f"lowering knows no node kind {node.kind!r} (%{node.name})"
        return SageIRError(Diagnostic(message, node.loc))
    message = f"%{node.name} has no step among the graph's {steps}"
    return SageIRError(Diagnostic(message, node.loc, help="run the pass 'schedule'"))
