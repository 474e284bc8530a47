"""What the sweep decided -> the scheduled graph."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import (
    AllReduce,
    Decode,
    IRNode,
    KVFetch,
    KVMigrate,
    KVNode,
    Origin,
    Prefill,
    collective,
)
from sagellm_ir.passes.eviction.insert import Extra, insert
from sagellm_ir.passes.eviction.live import Live
from sagellm_ir.passes.eviction.steps import StepFacts
from sagellm_ir.passes.eviction.sweep import Batch
from sagellm_ir.passes.eviction.ways import Away
from sagellm_ir.passes.rewrite import Names, split

__all__ = ["emit"]

BY = "evict"


def emit(live: Live, steps: StepFacts, batches: Iterable[Batch]) -> IRGraph:
    """The graph with what leaves and comes back, its nodes in the order they run."""
    return _Emitter(live, steps, batches).graph()


class _Emitter:
    """State of one run. Values are node indexes, steps those of the old graph."""

    def __init__(self, live: Live, steps: StepFacts, batches: Iterable[Batch]) -> None:
        self.live = live
        self.nodes = live.graph.nodes
        self.target = live.graph.target
        self.steps = steps
        self.spare = steps.spare.copy()
        self.batches = {batch.step: batch for batch in batches}
        self.names = Names(live.graph)
        self.sums = any(isinstance(node, AllReduce) for node in self.nodes)
        self.starts: dict[int, list[int]] = defaultdict(list)
        """By step: the nodes that start in it."""
        self.now: dict[int, str] = {}
        """By value that came back: the name of what holds it now."""
        self.computed: dict[int, bool] = {}
        """By value that came back: whether it was computed again, the last time."""
        self.out: list[list[IRNode]] = [[] for _ in live.graph.loops]
        self.extra: dict[int, list[Extra]] = {}
        """Steps to put in, by the step they come before."""
        self.cuts: dict[int, list[int]] = {}
        """By decode: the steps before which it stops for one that is put in."""
        self.running: list[set[int]] = [set() for _ in self.target.workers]

    def graph(self) -> IRGraph:
        """Goes through the steps in order."""
        ends: dict[int, list[int]] = defaultdict(list)
        for i, step in enumerate(self.live.step):
            self.starts[step].append(i)
            if isinstance(self.nodes[i], Decode):
                ends[self.live.end[i]].append(i)
        for step in range(len(self.out)):
            instead: dict[int, list[IRNode]] = {}
            if step in self.batches:
                instead = self._bring_back(self.batches[step], self.starts[step])
            for i in self.starts[step]:
                self.out[step] += instead[i] if i in instead else (self._rewired(i),)
                if isinstance(self.nodes[i], Decode):
                    self.running[self.live.worker[i]].add(i)
            for i in ends[step]:
                self.running[self.live.worker[i]].discard(i)
        if self.extra:
            return insert(self.live, self.steps, self.out, self.extra, self.cuts, self.names)
        return self.live.graph.replace(nodes=tuple(node for out in self.out for node in out))

    def _rewired(self, i: int) -> IRNode:
        """The node, reading what has come back where it had read what has left."""
        node = self.nodes[i]
        if not self.now or not isinstance(node, KVNode) or not node.operands:
            return node
        operands = node.operands
        for at in (self.live.prefix[i], self.live.source[i]):
            if at in self.now:
                old, new = self.nodes[at].name, self.now[at]
                operands = tuple(new if name == old else name for name in operands)
        return node if operands == node.operands else node.replace(operands=operands)

    # --- coming back ---

    def _bring_back(self, batch: Batch, starts: list[int]) -> dict[int, list[IRNode]]:
        """Emits copies, fetches and prefills; returns what nodes of this step are exchanged for.

        They run in the step that needs them. A prefill for which that has no room, and what has
        to be there before it, goes into steps put in before; decodes rest meanwhile.
        """
        readers = self._readers(batch, starts)
        stay = self._stay(batch, readers)
        at: dict[int, int] = {}
        extras: list[Extra] = []
        instead: dict[int, list[IRNode]] = {}
        for value, away in batch.values:
            unstarted = value in starts
            made = self._returned(batch.step, value, away, readers.get(value), unstarted)
            if unstarted:
                instead[value] = []
            if value in stay:
                (instead[value] if unstarted else self.out[batch.step]).extend(made)
                continue
            prefix = self.live.prefix[value]
            self._ahead(prefix, starts, extras, instead)
            first = at.get(prefix, 0)
            if prefix in at and away.store >= 0 and self.computed[prefix]:
                first += 1  # a move cannot build on what the forward of its own step makes
            for node in made:
                first = self._into(extras, first, node)
            at[value] = first
        if extras:
            self.extra[batch.step] = extras
        if extras and self.target.mixed:  # else decodes rest beside any prefill
            for decode in self.running[self.live.worker[batch.values[0][0]]]:
                self.cuts.setdefault(decode, []).append(batch.step)
        return instead

    def _ahead(
        self,
        value: int,
        starts: list[int],
        extras: list[Extra],
        instead: dict[int, list[IRNode]],
    ) -> None:
        """Moves of this step that a step put in before it builds on run there."""
        chain: list[int] = []
        while value in starts and value not in instead:
            chain.append(value)
            value = self.live.prefix[value]
        for node in reversed(chain):
            self._into(extras, 0, self._rewired(node))
            instead[node] = []

    def _readers(self, batch: Batch, starts: list[int]) -> dict[int, str]:
        """By value: the request of a prefill in this step that builds on it, if there is one."""
        back = {value for value, _ in batch.values}
        readers: dict[int, str] = {}
        for node in starts:
            if isinstance(prefill := self.nodes[node], Prefill):
                at = self.live.prefix[node]
                while at in back and at not in readers:
                    readers[at] = prefill.request
                    at = self.live.prefix[at]
        return readers

    def _stay(self, batch: Batch, readers: dict[int, str]) -> set[int]:
        """Values that can come back in the very step that needs them."""
        stay = {value for value, _ in batch.values}
        early = self._read_before_forward(batch)
        for value, away in reversed(batch.values):
            node = self.live.graph.nodes[value]
            assert isinstance(node, KVNode)
            rows = node.stop - node.start if away.store < 0 else 0
            fits = rows <= self.spare[batch.step] and (value in readers or not rows)
            if value not in stay or not fits or (rows and value in early):
                self._with_roots(value, stay)
            else:
                self.spare[batch.step] -= rows
        return stay

    def _read_before_forward(self, batch: Batch) -> set[int]:
        """Values that something other than a prefill builds on or copies in this step."""
        early = {self.live.prefix[value] for value, away in batch.values if away.store >= 0}
        back = {value for value, _ in batch.values}
        for i in self.starts[batch.step]:
            if i not in back and not isinstance(self.nodes[i], Prefill | AllReduce):
                early |= {self.live.prefix[i], self.live.source[i]}
        return early

    def _with_roots(self, value: int, stay: set[int]) -> None:
        """Takes a value and what it builds on out of `stay`."""
        while value in stay:
            stay.discard(value)
            value = self.live.prefix[value]

    def _returned(
        self, step: int, value: int, away: Away, reader: str | None, unstarted: bool
    ) -> list[IRNode]:
        """The nodes that bring a value back. A fetch from the device's cache that has not run
        yet keeps its name: it was only planned."""
        node = self.nodes[value]
        assert isinstance(node, KVNode)
        suffix = "back" if away.store >= 0 else "again"
        name = node.name if unstarted else self.names.fresh(f"{node.name}.{suffix}")
        operands = self._prefix(value)
        tier = self.target.tiers[away.store].name
        if away.since >= 0:
            copy = self._copy(value, node, tier, away.since)
            operands = (copy, *operands)
        self.now[value] = name
        self.computed[value] = away.store < 0
        where: dict[str, Any] = {
            "operands": operands,
            "after": node.after if unstarted else (),
            "step": step,
            "worker": node.worker,
            "loc": node.loc,
            "origin": Origin(BY, (node.name,)),
        }
        if away.store >= 0:
            return [KVFetch(name, node.request, node.start, node.stop, **where, src=tier)]
        request = node.request if reader is None else reader
        return self._chunks(Prefill(name, request, node.start, node.stop, **where))

    def _prefix(self, value: int) -> tuple[str, ...]:
        at = self.live.prefix[value]
        return () if at < 0 else (self.now.get(at, self.nodes[at].name),)

    def _copy(self, value: int, node: KVNode, tier: str, step: int) -> str:
        """Emits the copy to a lower tier; returns its name."""
        copy = KVMigrate(
            self.names.fresh(f"{node.name}.spill"),
            node.request,
            node.start,
            node.stop,
            operands=(self.now.get(value, node.name),),
            to=tier,
            step=step,
            worker=node.worker,
            loc=node.loc,
            origin=Origin(BY, (node.name,)),
        )
        self.out[step].append(copy)
        return copy.name

    def _chunks(self, node: Prefill) -> list[IRNode]:
        """The prefill in parts that a step has room for, each with its collective."""
        size, most = self.target.block_size, self.target.max_tokens
        stride = most // size * size or most
        cuts = range(node.start + stride, node.stop, stride)
        fresh = (self.names.fresh(f"{node.name}.{number}") for number in range(len(cuts)))
        parts = split(node, cuts, fresh, BY)
        if not self.sums:
            return list(parts)
        return [new for part in parts for new in (part, self._sum(part))]

    def _sum(self, node: IRNode) -> AllReduce:
        made = collective(node, self.target, self.names.fresh(f"{node.name}.sum"))
        return made.replace(step=node.step)

    def _into(self, extras: list[Extra], first: int, node: IRNode) -> int:
        """Puts a node into the first extra step, from `first` on, that has room for it."""
        rows = node.stop - node.start if isinstance(node, Prefill) else 0
        name = {node.request} if isinstance(node, Prefill) else set()
        while True:
            if first == len(extras):
                extras.append(Extra())
            extra = extras[first]
            fits = extra.rows + rows <= self.target.max_tokens
            if fits and len(extra.requests | name) <= self.target.max_batch:
                extra.nodes.append(node)
                extra.rows += rows
                extra.requests |= name
                return first
            first += 1
