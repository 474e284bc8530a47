"""`Columns`: a graph as flat arrays, so that a law is a few array operations over all nodes."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain, compress, repeat
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import AllReduce, Decode, IRNode, KVFetch, KVMigrate, KVNode, Prefill
from sagellm_ir.target import DEVICE

__all__ = ["NONE", "Columns", "Edges", "Ints", "Mask", "first_places"]

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NONE = -1
"""Stands for no node, request, worker, tier or step."""

_IDS = 1 << 63

_OTHER, _PREFILL, _DECODE, _FETCH, _MIGRATE, _ALLREDUCE = range(6)
_CODES: dict[type[IRNode], int] = {
    Prefill: _PREFILL,
    Decode: _DECODE,
    KVFetch: _FETCH,
    KVMigrate: _MIGRATE,
    AllReduce: _ALLREDUCE,
}


def _ints(values: Iterable[Any]) -> Ints:
    return np.fromiter(values, dtype=np.int64)


def _indexes(values: list[Any], index: dict[Any, int]) -> Ints:
    """Where an index has some names; `NONE` where it does not."""
    if values.count(None) == len(values):
        return np.full(len(values), NONE, dtype=np.int64)
    return _ints(map(index.get, values, repeat(NONE)))


def _steps(values: list[int | None]) -> Ints:
    """Steps, and `NONE` for None."""
    unset = values.count(None)
    if unset == len(values):
        return np.full(unset, NONE, dtype=np.int64)
    return _ints([NONE if step is None else step for step in values] if unset else values)


def first_places(ids: Ints) -> Ints:
    """For each of some ids >= 0, where it stands first. Ids are usually small: a table is enough."""
    if not len(ids) or int(ids.max()) < 8 * len(ids):
        table = np.zeros(int(ids.max(initial=0)) + 1, dtype=np.int64)
        table[ids[::-1]] = np.arange(len(ids) - 1, -1, -1)
        return table[ids]
    _, first, which = np.unique(ids, return_index=True, return_inverse=True)
    return first[which]


class Edges:
    """Edges from nodes to the nodes they name."""

    def __init__(self, lists: Sequence[tuple[str, ...]], index: dict[str, int]) -> None:
        self.count = _ints(map(len, lists))
        """For each node, how many names it gives."""
        self.start = np.cumsum(self.count) - self.count
        """For each node, its first edge, if it has one."""
        self.user = np.repeat(np.arange(len(lists)), self.count)
        self.names = list(chain.from_iterable(lists))
        self.target = _ints(map(index.get, self.names, repeat(NONE)))
        """For each edge, the node it names; `NONE` when there is no such node."""

    def nth(self, nodes: Mask, place: Ints | int) -> Ints:
        """What some nodes name at some place of their list; `NONE` for the other nodes."""
        found: Ints = np.full(len(nodes), NONE, dtype=np.int64)
        found[nodes] = self.target[(self.start + place)[nodes]]
        return found


class Columns:
    """The fields of a graph's nodes as arrays; index `i` is `graph.nodes[i]`.

    Arrays over names (`prefix`, `request`, ...) hold indexes, and `NONE` where there is nothing.
    What stands behind the structure laws (`prefix` and later) needs a graph that obeys them.
    Each field of each node is read once, and properties of nodes are worked out of these.
    """

    def __init__(self, graph: IRGraph, known: IRGraph | None = None) -> None:
        self.graph = graph
        self.nodes = nodes = graph.nodes
        self.known = known
        self.names = [node.name for node in nodes]
        self.index = dict(zip(self.names, range(len(nodes)), strict=True))
        self.operands = Edges([node.operands for node in nodes], self.index)
        self.after = Edges([node.after for node in nodes], self.index)
        codes = np.fromiter(map(_CODES.get, map(type, nodes), repeat(_OTHER)), dtype=np.int8)
        self.is_prefill: Mask = codes == _PREFILL
        self.is_decode: Mask = codes == _DECODE
        self.is_fetch: Mask = codes == _FETCH
        self.is_migrate: Mask = codes == _MIGRATE
        self.is_allreduce: Mask = codes == _ALLREDUCE
        self.is_move: Mask = self.is_fetch | self.is_migrate
        self.is_forward: Mask = self.is_prefill | self.is_decode
        self.is_kv: Mask = self.is_forward | self.is_move
        for i in np.flatnonzero(codes == _OTHER).tolist():
            self.is_kv[i] = isinstance(nodes[i], KVNode)
        self.request_index = {request.id: i for i, request in enumerate(graph.requests)}
        self.worker_index = {worker.name: i for i, worker in enumerate(graph.target.workers)}
        self.tier_index = {tier.name: i for i, tier in enumerate(graph.target.tiers)}
        self.prompt = _ints([request.prompt_len for request in graph.requests])
        self.end = self.prompt + _ints([request.max_new_tokens for request in graph.requests])

    @cached_property
    def kv(self) -> Sequence[Any]:
        """The KV nodes, in order."""
        every = bool(self.is_kv.all())
        return self.nodes if every else list(compress(self.nodes, self.is_kv.tolist()))

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
        return _ints(map(len, [request.blocks for request in self.graph.requests]))

    @cached_property
    def id_start(self) -> Ints:
        """Where the ids of each request start in `ids`."""
        return np.cumsum(self.id_count) - self.id_count

    @cached_property
    def space(self) -> Ints:
        """The namespace of each request: equal for equal adapters and tenants."""
        requests = self.graph.requests
        pairs = list(zip([r.adapter for r in requests], [r.tenant for r in requests], strict=True))
        spaces = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        return _ints(map(spaces.__getitem__, pairs))

    def _spread(self, values: Iterable[Any], default: int = NONE) -> Ints:
        """Values of the KV nodes, with a default for the other nodes."""
        column: Ints = np.full(len(self.nodes), default, dtype=np.int64)
        column[self.is_kv] = _ints(values)
        return column

    @cached_property
    def request(self) -> Ints:
        names = [node.request for node in self.kv]
        return self._spread(map(self.request_index.get, names, repeat(NONE)))

    @cached_property
    def start(self) -> Ints:
        return self._spread([node.start for node in self.kv], 0)

    @cached_property
    def stop(self) -> Ints:
        return self._spread([node.stop for node in self.kv], 0)

    @cached_property
    def named_workers(self) -> list[str | None]:
        """The worker of each node, as the node names it."""
        return [node.worker for node in self.nodes]

    @cached_property
    def worker(self) -> Ints:
        """Worker of each node; unknown ones count as none."""
        return _indexes(self.named_workers, self.worker_index)

    @cached_property
    def tier(self) -> Ints:
        """The tier each KV lives in."""
        tier = np.where(self.is_kv, self.device, NONE)
        for i in np.flatnonzero(self.is_kv & ~self.is_forward & ~self.is_fetch).tolist():
            tier[i] = self.tier_index.get(cast(KVNode, self.nodes[i]).tier, NONE)
        return tier

    @property
    def device(self) -> int:
        """The device's tier."""
        return self.tier_index.get(DEVICE, NONE)

    @cached_property
    def prefix(self) -> Ints:
        """What holds `[0, start)` for each KV node: the last operand, behind a source if any."""
        some = np.where(self.is_migrate, self.operands.count > 1, self.start > 0)
        some &= self.is_kv & (self.operands.count > 0)
        return self.operands.nth(some, self.operands.count - 1)

    @cached_property
    def source(self) -> Ints:
        """What each move copies."""
        prefix = self.is_fetch & (self.start > 0)
        return self.operands.nth(self.is_move & (self.operands.count > prefix), 0)

    @cached_property
    def step(self) -> Ints:
        return _steps([node.step for node in self.nodes])

    @cached_property
    def until(self) -> Ints:
        """The last step of each decode that has one."""
        until: Ints = np.full(len(self.nodes), NONE, dtype=np.int64)
        decodes = compress(self.nodes, self.is_decode.tolist())
        until[self.is_decode] = _steps([cast(Decode, node).until for node in decodes])
        return until

    @cached_property
    def finish(self) -> Ints:
        """The last step each node runs in: its step, and `until` of a decode that has one."""
        return np.where(self.until == NONE, self.step, self.until)

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
