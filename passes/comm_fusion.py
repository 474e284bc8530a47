"""`comm-fusion`: one collective for all rows of a step."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import ClassVar

from attrs import field, frozen, validators

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, Decode, IRNode, Origin, Prefill
from sagellm_ir.nodes.allreduce import payload
from sagellm_ir.passes.base import Pass, PassContext
from sagellm_ir.passes.rewrite import Names, merge
from sagellm_ir.verify.schedule import step_workers

__all__ = ["CommFusion"]

Place = tuple[str | None, str, bool]
"""A worker, a group of ranks, and whether it is of prefills that decodes rest beside."""


@frozen
class CommFusion(Pass):
    """Coalesces the collectives of the rows that run in one step into one.

    Law: in every step, each row is summed by one collective; the bytes of a step stay the same,
    and its calls become those of one row. A collective stands from its step on, until another
    one takes over a row of it, or its rows end: so there is a new one whenever a row comes or
    goes, over all rows that run then. The nodes of the result stand in the order they run.

    One call moves what many would have, and the latency is paid once (bucketing: S. Li et al.,
    "PyTorch Distributed", VLDB 2020).
    """

    name: ClassVar[str] = "comm-fusion"
    needs: ClassVar[tuple[str, ...]] = ("scheduled",)

    bucket_bytes: int = field(default=0, validator=validators.ge(0))
    """Most bytes of a collective of several rows; 0: no limit."""
    fuse_norm: bool = True
    """Let the call add the residual and normalise, too, when there are several ranks."""

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        sums = [node for node in graph.nodes if isinstance(node, AllReduce)]
        if not sums or not ctx.may_rewrite():
            return graph
        fusion = _Fusion(graph, sums, self.bucket_bytes, self.fuse_norm and graph.target.tp > 1)
        fused = fusion.fused()
        if {_key(node) for node in fused} == {_key(node) for node in sums}:
            return graph
        ctx.count("collectives before", len(sums))
        ctx.count("collectives after", len(fused))
        return graph.replace(nodes=fusion.placed(fused))


def _key(node: AllReduce) -> tuple[object, ...]:
    return node.step, node.operands, node.group, node.bytes, node.calls, node.fused


class _Fusion:
    """One run."""

    def __init__(
        self, graph: IRGraph, sums: Iterable[AllReduce], bucket_bytes: int, fuse_norm: bool
    ) -> None:
        self.graph = graph
        self.limit = bucket_bytes
        self.kind = "residual-norm" if fuse_norm else None
        self.names = Names(graph)
        self.order = {node.name: i for i, node in enumerate(_by_step(graph.nodes))}
        self.old: dict[Place, dict[str, AllReduce]] = defaultdict(dict)
        """By place: each row, and the collective that sums it."""
        self.gone = {node.name: node.operands for node in sums}
        for node in sums:
            for name in node.operands:
                if self._runs(name):
                    apart = not graph.target.mixed and isinstance(graph.by_name[name], Prefill)
                    self.old[node.worker, node.group, apart][name] = node
        self.used: set[str] = set()
        workers = [worker.name for worker in graph.target.workers]
        self.owners: list[str] = []
        """The worker of each step, when there are several."""
        if len(workers) > 1:
            self.owners = [workers[i] for i in step_workers(graph.columns).tolist()]

    def fused(self) -> list[AllReduce]:
        """The new collectives."""
        return [new for rows in self.old.values() for new in self._of_place(rows)]

    def _of_place(self, rows: dict[str, AllReduce]) -> Iterator[AllReduce]:
        """Goes through the steps in which a row comes or goes."""
        comes: dict[int, list[str]] = defaultdict(list)
        goes: dict[int, list[str]] = defaultdict(list)
        for name in rows:
            first, last = self._span(name)
            comes[first].append(name)
            goes[self._next(last + 1, name)].append(name)
        goes.pop(len(self.graph.loops), None)
        running: dict[str, None] = {}
        before: set[tuple[str, ...]] = set()
        for step in sorted({*comes, *goes}):
            for name in goes.get(step, ()):
                del running[name]
            running.update(dict.fromkeys(comes.get(step, ())))
            buckets = list(self._buckets(running, rows))
            for bucket in buckets:
                if bucket not in before:
                    yield self._sum(bucket, step, rows)
            before = set(buckets)

    def _next(self, step: int, name: str) -> int:
        """The first step from `step` on in which rows that run beside this one may run, or the
        number of steps: one of its worker, and for a decode one in which decodes do not rest."""
        graph, node = self.graph, self.graph.by_name[name]
        steps, worker = len(graph.loops), node.worker or graph.target.workers[0].name
        rests = isinstance(node, Decode)
        while step < steps and (
            (self.owners and self.owners[step] != worker)
            or (rests and not graph.decode_loops[step])
        ):
            step += 1
        return step

    def _span(self, name: str) -> tuple[int, int]:
        """First and last step of a row."""
        node = self.graph.by_name[name]
        assert node.step is not None, "the stage is scheduled"
        last = node.until if isinstance(node, Decode) else node.step
        assert last is not None, "the stage is scheduled"
        return node.step, last

    def _buckets(
        self, running: Iterable[str], rows: dict[str, AllReduce]
    ) -> Iterator[tuple[str, ...]]:
        """The rows, in node order, in as few runs as the limit allows."""
        bucket: list[str] = []
        size = 0
        for name in sorted(running, key=self.order.__getitem__):
            more = self._bytes(name, rows[name])
            if bucket and self.limit and size + more > self.limit:
                yield tuple(bucket)
                bucket, size = [], 0
            bucket.append(name)
            size += more
        if bucket:
            yield tuple(bucket)

    def _runs(self, name: str) -> bool:
        """Whether a row has a forward: a decode of one token may have none."""
        node = self.graph.by_name[name]
        prompt = self.graph.request[node.request].prompt_len if isinstance(node, Decode) else 0
        return not isinstance(node, Decode) or node.stop - node.start > (node.start == prompt)

    def _bytes(self, name: str, old: AllReduce) -> int:
        """Payload of one row; that of several together is shared out by their sizes."""
        if len(old.operands) == 1:
            return old.bytes
        return payload(self.graph.by_name[name], self.graph.target)

    def _sum(self, bucket: tuple[str, ...], step: int, rows: dict[str, AllReduce]) -> AllReduce:
        """The collective of some rows; the first to sum a row keeps the name it had."""
        olds = [rows[name] for name in bucket]
        base = olds[0]
        name = base.name if base.name not in self.used else self.names.fresh(f"{base.name}.{step}")
        self.used.add(base.name)
        sources = merge(old.name for old in olds)
        return AllReduce(
            name,
            operands=bucket,
            bytes=sum(self._bytes(row, rows[row]) for row in bucket),
            calls=max(old.calls for old in olds),
            fused=self.kind or base.fused,
            group=base.group,
            step=step,
            worker=base.worker,
            loc=base.loc,
            origin=base.origin if sources == (name,) else Origin("comm-fusion", sources),
        )

    def placed(self, fused: Iterable[AllReduce]) -> tuple[IRNode, ...]:
        """The graph's nodes in the order they run, each step's collectives behind its nodes.

        What waited for a collective waits for its rows.
        """
        nodes: list[IRNode] = []
        for node in self.graph.nodes:
            if not isinstance(node, AllReduce):
                if not self.gone.keys().isdisjoint(node.after):
                    after = merge(*(self.gone.get(name, (name,)) for name in node.after))
                    nodes.append(node.replace(after=after))
                else:
                    nodes.append(node)
        nodes += fused
        return _by_step(nodes)


def _by_step(nodes: Iterable[IRNode]) -> tuple[IRNode, ...]:
    return tuple(sorted(nodes, key=lambda node: -1 if node.step is None else node.step))
