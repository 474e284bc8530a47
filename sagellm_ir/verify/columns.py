"""`Columns`: a graph as flat arrays, so that a law is a few array operations over all nodes."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, Decode, IRNode, KVFetch, KVMigrate, KVNode, Prefill
from sagellm_ir.target import DEVICE

__all__ = ["NONE", "Columns", "Edges", "Ints", "Mask"]

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NONE = -1
"""Stands for no node, request, worker, tier or step."""

_IDS = 1 << 63

_PREFILL, _DECODE, _FETCH, _MIGRATE, _ALLREDUCE = range(1, 6)
_CODES: dict[type[IRNode], int] = {
    Prefill: _PREFILL,
    Decode: _DECODE,
    KVFetch: _FETCH,
    KVMigrate: _MIGRATE,
    AllReduce: _ALLREDUCE,
}


def _ints(values: Iterable[Any]) -> Ints:
    return np.fromiter(values, dtype=np.int64)


class Edges:
    """Edges from nodes to the nodes they name."""

    def __init__(self, lists: Sequence[tuple[str, ...]], index: dict[str, int]) -> None:
        self.count = _ints(map(len, lists))
        """For each node, how many names it gives."""
        self.user = np.repeat(np.arange(len(lists)), self.count)
        self.names = [name for names in lists for name in names]
        self.target = _ints([index.get(name, NONE) for name in self.names])
        """For each edge, the node it names; `NONE` when there is no such node."""


class Columns:
    """The fields of a graph's nodes as arrays; index `i` is `graph.nodes[i]`.

    Arrays over names (`prefix`, `request`, ...) hold indexes, and `NONE` where there is nothing.
    What stands behind the structure laws (`prefix` and later) needs a graph that obeys them.
    """

    def __init__(self, graph: IRGraph, known: IRGraph | None = None) -> None:
        self.graph = graph
        self.nodes = nodes = graph.nodes
        self.known = known
        self.names = [node.name for node in nodes]
        self.index = {name: i for i, name in enumerate(self.names)}
        self.operands = Edges([node.operands for node in nodes], self.index)
        self.after = Edges([node.after for node in nodes], self.index)
        codes = np.fromiter((_CODES.get(type(node), 0) for node in nodes), dtype=np.int8)
        self.is_prefill: Mask = codes == _PREFILL
        self.is_decode: Mask = codes == _DECODE
        self.is_fetch: Mask = codes == _FETCH
        self.is_migrate: Mask = codes == _MIGRATE
        self.is_allreduce: Mask = codes == _ALLREDUCE
        self.is_move: Mask = self.is_fetch | self.is_migrate
        self.is_forward: Mask = self.is_prefill | self.is_decode
        self.kv = [node for node in nodes if isinstance(node, KVNode)]
        self.is_kv: Mask = np.fromiter((isinstance(node, KVNode) for node in nodes), dtype=bool)
        self.kv_at: Ints = np.flatnonzero(self.is_kv)
        self.request_index = {request.id: i for i, request in enumerate(graph.requests)}
        self.worker_index = {worker.name: i for i, worker in enumerate(graph.target.workers)}
        self.tier_index = {tier.name: i for i, tier in enumerate(graph.target.tiers)}
        self.prompt = _ints(request.prompt_len for request in graph.requests)
        self.end = _ints(request.stop for request in graph.requests)

    @cached_property
    def ids(self) -> Ints:
        """The block ids of all requests, one request after the other; an id that is no block id
        (it does not fit 64 bits) shows as -1."""
        blocks = [request.blocks for request in self.graph.requests]
        try:
            return np.fromiter(chain.from_iterable(blocks), dtype=np.int64)
        except OverflowError:
            return _ints(id if id < _IDS else NONE for ids in blocks for id in ids)

    @cached_property
    def id_count(self) -> Ints:
        """Block ids of each request."""
        return _ints([len(request.blocks) for request in self.graph.requests])

    @cached_property
    def id_start(self) -> Ints:
        """Where the ids of each request start in `ids`."""
        return np.cumsum(self.id_count) - self.id_count

    @cached_property
    def space(self) -> Ints:
        """The namespace of each request: equal for equal adapters and tenants."""
        spaces: dict[tuple[str | None, str | None], int] = {}
        return _ints(
            [spaces.setdefault((r.adapter, r.tenant), len(spaces)) for r in self.graph.requests]
        )

    def _spread(self, values: Iterable[Any], default: int = NONE) -> Ints:
        """Values of the KV nodes, with a default for the other nodes."""
        column: Ints = np.full(len(self.nodes), default, dtype=np.int64)
        column[self.kv_at] = _ints(values)
        return column

    @cached_property
    def request(self) -> Ints:
        return self._spread([self.request_index.get(node.request, NONE) for node in self.kv])

    @cached_property
    def start(self) -> Ints:
        return self._spread([node.start for node in self.kv], 0)

    @cached_property
    def stop(self) -> Ints:
        return self._spread([node.stop for node in self.kv], 0)

    @cached_property
    def worker(self) -> Ints:
        """Worker of each node; unknown ones count as none."""
        workers = self.worker_index
        return _ints([workers.get(node.worker or "", NONE) for node in self.nodes])

    @cached_property
    def tier(self) -> Ints:
        """The tier each KV lives in."""
        tiers = self.tier_index
        return self._spread([tiers.get(node.tier, NONE) for node in self.kv])

    @property
    def device(self) -> int:
        """The device's tier."""
        return self.tier_index.get(DEVICE, NONE)

    @cached_property
    def prefix(self) -> Ints:
        """What holds `[0, start)` for each KV node."""
        index = self.index
        return self._spread([index.get(node.prefix or "", NONE) for node in self.kv])

    @cached_property
    def source(self) -> Ints:
        """What each move copies."""
        found: Ints = np.full(len(self.nodes), NONE, dtype=np.int64)
        for i in np.flatnonzero(self.is_move).tolist():
            node = self.nodes[i]
            if isinstance(node, (KVFetch, KVMigrate)) and node.source is not None:
                found[i] = self.index.get(node.source, NONE)
        return found

    @cached_property
    def step(self) -> Ints:
        return _ints([NONE if node.step is None else node.step for node in self.nodes])

    @cached_property
    def finish(self) -> Ints:
        """The last step each node runs in: its step, and `until` of a decode that has one."""
        last = self.step.copy()
        for i in np.flatnonzero(self.is_decode).tolist():
            node = self.nodes[i]
            if isinstance(node, Decode) and node.until is not None:
                last[i] = node.until
        return last

    @cached_property
    def forwards(self) -> Ints:
        """Forwards each decode takes: one less when it starts where the prompt ends."""
        at_end = self.start == self.prompt[self.request] if len(self.prompt) else self.is_decode
        return np.where(self.is_decode, self.stop - self.start - at_end, 0)

    @cached_property
    def first_block(self) -> Ints:
        """Index, in its request's table, of the first block each node owns."""
        return -(-self.start // self.graph.target.block_size)

    @cached_property
    def blocks(self) -> Ints:
        """Blocks each node owns."""
        return -(-self.stop // self.graph.target.block_size) - self.first_block

    @cached_property
    def last_use(self) -> Ints:
        """The last step in which each node's KV is needed: by itself, by what has it in its prefix
        chain, or by a move that copies it."""
        last = self.finish.tolist()
        rows = zip(self.prefix.tolist(), self.source.tolist(), self.finish.tolist(), strict=True)
        for i, (prefix, source, finish) in reversed(list(enumerate(rows))):
            if prefix != NONE and last[prefix] < last[i]:
                last[prefix] = last[i]
            if source != NONE and last[source] < finish:
                last[source] = finish
        return _ints(last)
