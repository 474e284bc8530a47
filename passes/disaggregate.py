"""`disaggregate`: decides which worker runs what, and copies KV between workers."""

from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar

from attrs import frozen

from sagellm_ir.cost import CostModel
from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, Decode, IRNode, KVFetch, KVMigrate, KVNode, Origin, Prefill
from sagellm_ir.nodes.allreduce import payload
from sagellm_ir.passes.base import Pass, PassContext
from sagellm_ir.passes.rewrite import Names
from sagellm_ir.target import DEVICE

__all__ = ["Disaggregate"]


@frozen
class Disaggregate(Pass):
    """Places every node on a worker, and copies KV over where an edge crosses.

    Law: what is computed stays as it is. Prefills run on workers of role `prefill` or `general`,
    decodes on `decode` or `general`. A value that is read on another worker is copied there once
    (`%x.w1`), its own span only, on top of the copy of its prefix.

    Requests that share a prefix stay together, and groups go to the worker with the least work
    so far. A group that is more than a worker's share is taken apart below its prefix, which is
    then copied. A decode stays where its prompt was computed, if it may; else it goes where load
    and missing KV together cost least. (Splitting prefill and decode: Y. Zhong et al.,
    "DistServe", OSDI 2024; prefix affinity against load: V. Srivatsa et al., "Preble", ICLR 2025.)
    """

    name: ClassVar[str] = "disaggregate"
    needs: ClassVar[tuple[str, ...]] = ("built",)
    gives: ClassVar[str | None] = "placed"

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        if len(graph.target.workers) == 1:
            return graph.replace(stage="placed")
        places = _Placer(graph).places()
        nodes = _Writer(graph, places).nodes()
        copies = sum(isinstance(node, KVMigrate) and node.to == DEVICE for node in nodes)
        ctx.count("copies between workers", copies)
        return graph.replace(nodes=tuple(nodes), stage="placed")


class _Placer:
    """Chooses a worker for each node. Nodes and workers are indexes."""

    def __init__(self, graph: IRGraph) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        self.cost = CostModel(graph.target)
        self.index = {node.name: i for i, node in enumerate(graph.nodes)}
        roles = [worker.role for worker in graph.target.workers]
        self.prefillers = self._with_role(roles, "prefill")
        self.decoders = self._with_role(roles, "decode")
        self.load = [0.0] * len(roles)
        """Seconds of work given to each worker."""
        self.place: list[int] = [-1] * len(graph.nodes)
        self.copied: set[tuple[int, int]] = set()
        """Values that have been, or will be, copied to a worker."""
        self.chosen: dict[int, int] = {}
        """The worker of each unit."""
        self.parent = [self._parent(node) for node in graph.nodes]
        seconds = [self._seconds(node) for node in graph.nodes]
        prefills = [isinstance(node, Prefill) for node in graph.nodes]
        if not set(self.prefillers) & set(self.decoders):
            seconds = [
                s if is_prefill else 0.0 for s, is_prefill in zip(seconds, prefills, strict=True)
            ]
        self.unit = self._units(seconds)
        self.prefill_work: dict[int, float] = defaultdict(float)
        self.decode_work: dict[int, float] = defaultdict(float)
        for i, unit in enumerate(self.unit):
            (self.prefill_work if prefills[i] else self.decode_work)[unit] += seconds[i]

    def _with_role(self, roles: Sequence[str], role: str) -> list[int]:
        found = [i for i, has in enumerate(roles) if has in (role, "general")]
        if not found:
            raise SageIRError(
                Diagnostic(
                    f"no worker of target {self.graph.target.name!r} may run a {role}: their roles "
                    f"are {', '.join(sorted(set(roles)))}",
                    help=f"add a worker of role {role!r} or 'general'",
                )
            )
        return found

    def places(self) -> list[int]:
        """The worker of each node."""
        for i, node in enumerate(self.nodes):
            if isinstance(node, Prefill):
                self.place[i] = self._of_unit(self.unit[i], self.prefillers)
            elif isinstance(node, Decode):
                self.place[i] = self._for_decode(node, self.parent[i])
            elif isinstance(node, KVFetch) and node.source is None:
                self.place[i] = self._for_hit(i, node)
            elif isinstance(node, KVFetch | KVMigrate):
                assert node.source is not None, "hits were seen to"
                self.place[i] = self.place[self.index[node.source]]
        return self.place

    def _parent(self, node: IRNode) -> int:
        """What the node builds on or copies, or -1."""
        return self.index[node.operands[-1]] if node.operands else -1

    def _seconds(self, node: IRNode) -> float:
        if isinstance(node, Prefill):
            return self.cost.prefill(node.start, node.stop)
        if isinstance(node, Decode):
            context = (node.start + node.stop) // 2
            idle = self.cost.forward(0, 0, 0, 0)
            once = self.cost.forward(1, context, context, 1) - idle
            # a forward's fixed cost is shared by the rows of a full batch
            return (node.stop - node.start) * (once + idle / self.graph.target.max_batch)
        return 0.0

    def _units(self, seconds: Sequence[float]) -> list[int]:
        """The unit of each node, by its root: what is placed together.

        A unit is a tree of the prefix forest. While a tree is more than a worker's share of the
        work, its root is a unit of its own, and so are the trees below it.
        """
        subtree, children = list(seconds), [0] * len(self.nodes)
        for i in range(len(self.nodes) - 1, -1, -1):
            if (above := self.parent[i]) >= 0:
                subtree[above] += subtree[i]
                children[above] += isinstance(self.nodes[i], Prefill)
        share = sum(seconds) / len(self.prefillers)
        unit = list(range(len(self.nodes)))
        split = [False] * len(self.nodes)
        for i, above in enumerate(self.parent):
            if above >= 0 and not (split[above] and children[above] > 1):
                unit[i] = unit[above]
            # below a root that is split, a single child only makes the shared prefix longer
            split[i] = subtree[i] > share and (above < 0 or split[above])
        return unit

    def _of_unit(self, unit: int, workers: Sequence[int]) -> int:
        """The worker of a unit: that on which it ends first, copies of its prefix included."""
        if unit not in self.chosen:
            prefix = self.parent[unit]
            best = min(workers, key=lambda w: (self.load[w] + self._copying(prefix, w), w))
            self.load[best] += self.prefill_work[unit] + self._copying(prefix, best)
            if best in self.decoders:
                self.load[best] += self.decode_work[unit]
            self._copy(prefix, best)
            self.chosen[unit] = best
        return self.chosen[unit]

    def _for_decode(self, node: Decode, prefix: int) -> int:
        before, there = self.nodes[prefix], self.place[prefix]
        instant = node.stop - node.start == 1 and isinstance(before, Prefill)
        if there in self.decoders or instant or isinstance(before, Decode):
            return there
        best = min(self.decoders, key=lambda w: (self.load[w] + self._copying(prefix, w), w))
        self.load[best] += self._seconds(node) + self._copying(prefix, best)
        self._copy(prefix, best)
        return best

    def _for_hit(self, i: int, node: KVFetch) -> int:
        """A worker whose cache has the blocks: that of the unit if it may be."""
        size = self.graph.target.block_size
        blocks = self.graph.request[node.request].blocks
        wanted = set(blocks[node.start // size : node.stop // size])
        lines = [line for line in self.graph.cache if line.tier == node.src]
        everywhere = {b for line in lines if line.worker is None for b in line.blocks}
        holders = [
            w
            for w, worker in enumerate(self.graph.target.workers)
            if wanted
            <= everywhere.union(*(line.blocks for line in lines if line.worker == worker.name))
        ]
        assert holders, "a verified graph fetches what one cache has"
        able = [w for w in holders if w in self.prefillers]
        if able and self._of_unit(self.unit[i], able) in holders:
            return self.chosen[self.unit[i]]
        return min(holders, key=lambda w: (self.load[w], w))

    def _chain(self, value: int, worker: int) -> list[int]:
        """What of a value and its prefixes has yet to be copied to a worker, last part first."""
        missing = []
        while value >= 0 and self.place[value] != worker and (value, worker) not in self.copied:
            missing.append(value)
            value = self.prefix(value)
        return missing

    def prefix(self, value: int) -> int:
        """The prefix of a value, or -1."""
        node = self.nodes[value]
        assert isinstance(node, KVNode), "collectives have no users"
        return self.index[node.prefix] if node.prefix else -1

    def _copying(self, value: int, worker: int) -> float:
        """Seconds to bring a value to a worker."""
        size = self.graph.target.block_size
        seconds = 0.0
        for part in self._chain(value, worker):
            node = self.nodes[part]
            assert isinstance(node, KVNode), "collectives have no users"
            blocks = -(-node.stop // size) + -node.start // size
            seconds += self.cost.transfer(blocks, DEVICE)
        return seconds

    def _copy(self, value: int, worker: int) -> None:
        self.copied.update((part, worker) for part in self._chain(value, worker))


class _Writer:
    """Writes nodes down with their workers, and copies in front of what needs them."""

    def __init__(self, graph: IRGraph, places: Sequence[int]) -> None:
        self.graph = graph
        self.place = {node.name: w for node, w in zip(graph.nodes, places, strict=True)}
        self.workers = [worker.name for worker in graph.target.workers]
        self.names = Names(graph)
        self.copies: dict[tuple[str, int], str] = {}
        self.out: list[IRNode] = []

    def nodes(self) -> list[IRNode]:
        """All nodes, in order."""
        for node in self.graph.nodes:
            if isinstance(node, AllReduce):
                self._collective(node)
                continue
            assert isinstance(node, KVNode), "there are no other kinds"
            worker, operands = self.place[node.name], node.operands
            if node.prefix is not None and node.tier == DEVICE:
                operands = (*operands[:-1], self._bring(node.prefix, worker, node))
            self.out.append(node.replace(operands=operands, worker=self.workers[worker]))
        return self.out

    def _bring(self, name: str, worker: int, user: KVNode) -> str:
        """The name of a value on a worker; copies it there, prefix first, if it has to be."""
        chain: list[KVNode] = []
        at: str | None = name
        while at is not None and self.place[at] != worker and (at, worker) not in self.copies:
            node = self.graph.by_name[at]
            assert isinstance(node, KVNode), "collectives have no users"
            chain.append(node)
            at = node.prefix
        before: tuple[str, ...] = () if at is None else (self.copies.get((at, worker), at),)
        size = self.graph.target.block_size
        for k in range(len(chain) - 1, -1, -1):
            node = chain[k]
            # what was appended inside its last block is part of that block: copy it after that
            full = -(-node.stop // size) * size
            appended = [part.name for part in chain[:k] if part.start < full]
            copy = KVMigrate(
                self.names.fresh(f"{node.name}.{self.workers[worker]}"),
                node.request,
                node.start,
                node.stop,
                operands=(node.name, *before),
                after=tuple(appended[:1]),
                worker=self.workers[worker],
                to=DEVICE,
                loc=user.loc,
                origin=Origin("disaggregate", (node.name,)),
            )
            self.out.append(copy)
            before = (copy.name,)
            self.copies[node.name, worker] = copy.name
        return before[0]

    def _collective(self, node: AllReduce) -> None:
        """The collective, on the worker of its operands; one for each if they are apart."""
        by_worker: dict[int, list[str]] = defaultdict(list)
        for name in node.operands:
            by_worker[self.place[name]].append(name)
        for number, (worker, names) in enumerate(by_worker.items()):
            part = node.replace(operands=tuple(names), worker=self.workers[worker])
            if len(by_worker) > 1:
                size = sum(payload(self.graph.by_name[name], self.graph.target) for name in names)
                fresh = self.names.fresh(f"{node.name}.{self.workers[worker]}")
                part = part.replace(bytes=size, name=fresh if number else node.name)
            self.out.append(part)
