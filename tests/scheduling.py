"""A plain scheduler for tests: any choice it is offered gives a legal schedule."""

from collections.abc import Callable, Sequence
from typing import Any

from attrs import define, evolve, field

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, Decode, IRNode, KVFetch, KVMigrate, Prefill

__all__ = ["schedule"]

Choose = Callable[[Sequence[Any]], Any]


def schedule(graph: IRGraph, choose: Choose) -> IRGraph:
    """The graph, scheduled; `choose` picks one of several options each time."""
    run = _Run(graph, choose)
    while len(run.step) < len(graph.nodes) or run.left:
        run.advance()
    nodes = []
    for node in graph.nodes:
        node = evolve(node, step=run.step[node.name])
        if isinstance(node, Decode):
            node = evolve(node, until=run.finish[node.name])
        nodes.append(node)
    return graph.replace(nodes=tuple(nodes), loops=tuple(run.loops), stage="scheduled")


@define
class _Run:
    graph: IRGraph
    choose: Choose
    loops: list[int] = field(factory=list)
    step: dict[str, int] = field(factory=dict)
    finish: dict[str, int] = field(factory=dict)
    """The last step of what is done."""
    left: dict[str, int] = field(factory=dict)
    """Forwards that running decodes still need."""
    last_worker: str = ""

    def worker(self, node: IRNode) -> str:
        return node.worker or self.graph.target.workers[0].name

    def forwards(self, node: Decode) -> int:
        prompt = self.graph.request[node.request].prompt_len
        return node.stop - node.start - (node.start == prompt)

    def running(self, worker: str) -> list[str]:
        by_name = self.graph.by_name
        return [name for name in self.left if self.worker(by_name[name]) == worker]

    def advance(self) -> None:
        """One step of one worker."""
        now = len(self.loops)
        names = [worker.name for worker in self.graph.target.workers]
        busy = [name for name in names if self.running(name)]
        idle_owner = self.last_worker if self.last_worker in busy else (busy or [""])[0]
        ready = {name: self.ready(name, now) for name in names}
        options = [name for name in names if ready[name] or name == idle_owner]
        assert options, "some node is always ready"
        worker = self.choose(options)
        self.last_worker = worker
        self.run(worker, ready[worker], now)

    def ready(self, worker: str, now: int) -> list[IRNode]:
        """What may start now on a worker, within the target's budgets, in node order."""
        target = self.graph.target
        rows = len(self.running(worker))
        # decodes under way may rest for a step, but then none may start in it
        rest = bool(rows) and not target.mixed and self.choose((True, False))
        rows = 0 if rest else rows
        tokens, sequences = rows, rows
        found: dict[str, IRNode] = {}
        for node in self.graph.nodes:
            if node.name in self.step or self.worker(node) != worker:
                continue
            if not self.may_start(node, found, now):
                continue
            if isinstance(node, Prefill):
                size = node.stop - node.start
                over = tokens + size > target.max_tokens or sequences == target.max_batch
                if over or (rows and not target.mixed):
                    continue
                tokens, sequences = tokens + size, sequences + 1
            elif isinstance(node, Decode) and self.forwards(node):
                if rest:
                    continue
                prefill = any(isinstance(other, Prefill) for other in found.values())
                over = tokens == target.max_tokens or sequences == target.max_batch
                if over or (prefill and not target.mixed):
                    continue
                tokens, sequences, rows = tokens + 1, sequences + 1, rows + 1
            found[node.name] = node
        return list(found.values())

    def may_start(self, node: IRNode, starting: dict[str, IRNode], now: int) -> bool:
        by_name = self.graph.by_name
        if isinstance(node, AllReduce):
            return all(name in starting for name in node.operands)
        for name in (*node.operands, *node.after):
            other = by_name[name]
            if self.finish.get(name, now) < now:
                continue
            same_step = isinstance(other, (KVFetch, KVMigrate))
            if name in node.operands:
                same_step |= isinstance(node, Prefill) and isinstance(other, Prefill)
                same_step |= isinstance(node, Decode) and not self.forwards(node)
            if name not in starting or not same_step:
                return False
        return True

    def run(self, worker: str, starting: list[IRNode], now: int) -> None:
        decodes = [node for node in starting if isinstance(node, Decode)]
        self.left |= {node.name: self.forwards(node) for node in decodes if self.forwards(node)}
        prefill = any(isinstance(node, Prefill) for node in starting)
        rest = prefill and not self.graph.target.mixed
        running = [] if rest else self.running(worker)
        most = min([self.graph.target.max_loops, *(self.left[name] for name in running)])
        loops = 1 if prefill or not running else self.choose(range(1, most + 1))
        self.loops.append(loops)
        for node in starting:
            self.step[node.name] = self.finish[node.name] = now
        for name in running:
            self.left[name] -= loops
            self.finish[name] = len(self.graph.nodes) * 100_000
            if not self.left[name]:
                del self.left[name]
                self.finish[name] = now
