"""`comm-fusion`: one collective for all rows of a step."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import ClassVar

from attrs import field, frozen, validators

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, Decode, IRNode, Origin
from sagellm_ir.nodes.allreduce import payload
from sagellm_ir.passes.base import Pass, PassContext
from sagellm_ir.passes.rewrite import Names, merge

__all__ = ["CommFusion"]

Place = tuple[str | None, str]
"""A worker and a group of ranks."""


@frozen
class CommFusion(Pass):
    """Coalesces the collectives of the rows that run in one step into one.

    Law: in every step, each row is summed by one collective; the bytes of a step stay the same,
    and its calls become those of one row. A collective stands from its step on, until another
    one takes over a row of it, or its rows end: so there is a new one whenever a row comes or
    goes, over all rows that run then.

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
        ctx.count("collectives before", len(sums))
        ctx.count("collectives after", len(fused))
        nodes = fusion.placed(fused)
        return graph if nodes == graph.nodes else graph.replace(nodes=nodes)


class _Fusion:
    """One run."""

    def __init__(
        self, graph: IRGraph, sums: Iterable[AllReduce], bucket_bytes: int, fuse_norm: bool
    ) -> None:
        self.graph = graph
        self.limit = bucket_bytes
        self.kind = "residual-norm" if fuse_norm else None
        self.names = Names(graph)
        self.order = {node.name: i for i, node in enumerate(graph.nodes)}
        self.old: dict[Place, dict[str, AllReduce]] = defaultdict(dict)
        """By place: each row, and the collective that sums it."""
        for node in sums:
            for name in node.operands:
                self.old[node.worker, node.group][name] = node
        self.used: set[str] = set()

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
            goes[last + 1].append(name)
        running: dict[str, None] = {}
        before: set[tuple[str, ...]] = set()
        for step in sorted({*comes, *goes}):
            for name in goes.get(step, ()):
                del running[name]
            running.update(dict.fromkeys(comes.get(step, ())))
            buckets = list(self._buckets(running))
            for bucket in buckets:
                if bucket not in before:
                    yield self._sum(bucket, step, rows)
            before = set(buckets)

    def _span(self, name: str) -> tuple[int, int]:
        """First and last step of a row."""
        node = self.graph.by_name[name]
        assert node.step is not None, "the stage is scheduled"
        last = node.until if isinstance(node, Decode) else node.step
        assert last is not None, "the stage is scheduled"
        return node.step, last

    def _buckets(self, rows: Iterable[str]) -> Iterator[tuple[str, ...]]:
        """The rows, in node order, in as few runs as the limit allows."""
        bucket: list[str] = []
        size = 0
        for name in sorted(rows, key=self.order.__getitem__):
            more = self._bytes(name)
            if bucket and self.limit and size + more > self.limit:
                yield tuple(bucket)
                bucket, size = [], 0
            bucket.append(name)
            size += more
        if bucket:
            yield tuple(bucket)

    def _bytes(self, name: str) -> int:
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
            bytes=sum(map(self._bytes, bucket)),
            calls=max(old.calls for old in olds),
            fused=self.kind or base.fused,
            group=base.group,
            step=step,
            worker=base.worker,
            loc=base.loc,
            origin=base.origin if sources == (name,) else Origin("comm-fusion", sources),
        )

    def placed(self, fused: Iterable[AllReduce]) -> tuple[IRNode, ...]:
        """The graph's nodes with the new collectives, each behind its last operand.

        What waited for a collective waits for its rows.
        """
        behind: dict[str, list[AllReduce]] = defaultdict(list)
        for node in fused:
            behind[node.operands[-1]].append(node)
        old = {node.name: node.operands for rows in self.old.values() for node in rows.values()}
        nodes: list[IRNode] = []
        for node in self.graph.nodes:
            if isinstance(node, AllReduce):
                continue
            if not old.keys().isdisjoint(node.after):
                after = merge(*(old.get(name, (name,)) for name in node.after))
                node = node.replace(after=after)
            nodes += (node, *behind.get(node.name, ()))
        return tuple(nodes)
