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
        self.stop = [0] * count
        self.span = [0] * count
        """Tokens of `[start, stop)`."""
        self.first = [0] * count
        """Index of the first block it owns, in its request's table."""
        self.blocks = [0] * count
        """Blocks it owns."""
        self.last = [0] * count
        """The last step that needs it."""
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

    def forwards(self, i: int) -> int:
        """Forwards that decode `i` takes: one less when the prefill before it gave a token."""
        node = self.kv(i)
        return self.span[i] - (node.start == self.graph.request[node.request].prompt_len)

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
            if not isinstance(node, KVNode):
                last = max((self.last[index[name]] for name in node.operands), default=step)
                self.last[i] = last
                self.ended[last + 1].append(i)
                continue
            start, stop, operands = node.start, node.stop, node.operands
            self.stop[i] = stop
            self.span[i] = stop - start
            self.first[i] = first = -(-start // block_size)
            self.blocks[i] = -(-stop // block_size) - first
            self.last[i] = step
            if isinstance(node, Decode):
                until = step if node.until is None else node.until
                if not step <= until < steps:
                    raise _unplaced(node, steps)
                self.last[i] = until
                self.ended[until + 1].append(i)
            if kind is KVFetch or kind is KVMigrate:
                if kind is KVMigrate or len(operands) > (start > 0):
                    self.source[i] = index[operands[0]]
                if (kind is KVFetch and start) or (kind is KVMigrate and len(operands) > 1):
                    self.parent[i] = index[operands[-1]]
            elif start:
                self.parent[i] = index[operands[-1]]

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
