"""`Columns`: a graph as flat arrays, so that a law or a pass is a few array operations over all nodes."""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from itertools import compress, repeat
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

import numpy as np

from sagellm_ir.arrays import NONE, Edges, Ints, Mask, ints, joined
from sagellm_ir.nodes import AllReduce, Decode, IRNode, KVFetch, KVMigrate, KVNode, Prefill
from sagellm_ir.target import DEVICE

if TYPE_CHECKING:
    from sagellm_ir.graph import IRGraph

__all__ = ["Columns"]

_OTHER, _PREFILL, _DECODE, _FETCH, _MIGRATE, _ALLREDUCE = range(6)
_AT_ONCE = 2048
"""Nodes that are read at a time."""

_CODES: dict[type[IRNode], int] = {
    Prefill: _PREFILL,
    Decode: _DECODE,
    KVFetch: _FETCH,
    KVMigrate: _MIGRATE,
    AllReduce: _ALLREDUCE,
}


def _indexes(values: list[Any], index: dict[Any, int]) -> Ints:
    """Where an index has some names; `NONE` where it does not."""
    if values.count(None) == len(values):
        return np.full(len(values), NONE, dtype=np.int64)
    return ints(map(index.get, values, repeat(NONE)))


def _numbers(values: list[int | None]) -> Ints:
    """Numbers, and `NONE` for None."""
    unset = values.count(None)
    if unset == len(values):
        return np.full(unset, NONE, dtype=np.int64)
    return ints([NONE if value is None else value for value in values] if unset else values)


class Columns:
    """The fields of a graph's nodes as arrays; index `i` is `graph.nodes[i]`.

    Arrays over names (`prefix`, `request`, ...) hold indexes, and `NONE` where there is nothing.
    What stands behind the structure laws (`prefix` and later) needs a graph that obeys them.
    The nodes are read once, a few thousand at a time so that they stay in the processor's cache,
    and properties of nodes are worked out of what was read.
    """

    def __init__(self, graph: "IRGraph") -> None:
        self._graph = ref(graph)
        self.nodes = nodes = graph.nodes
        self.requests = graph.request_columns
        self.worker_index = {worker.name: i for i, worker in enumerate(graph.target.workers)}
        self.tier_index = {tier.name: i for i, tier in enumerate(graph.target.tiers)}
        self.index: dict[str, int] = {}
        """Nodes by name."""
        self.names: list[str] = []
        self.named_workers: list[str | None] = []
        """The worker of each node, as the node names it."""
        self.operands, self.after = Edges(), Edges()
        self._steps: list[int | None] = []
        codes: list[int] = []
        spans: list[tuple[Ints, Ints, Ints]] = []
        for low in range(0, len(nodes), _AT_ONCE):
            some = nodes[low : low + _AT_ONCE]
            kinds = [_CODES.get(type(node), _OTHER) for node in some]
            names = [node.name for node in some]
            self.index.update(zip(names, range(low, low + len(some)), strict=True))
            self.operands.read([node.operands for node in some], self.index)
            self.after.read([node.after for node in some], self.index)
            self.names += names
            self._steps += [node.step for node in some]
            self.named_workers += [node.worker for node in some]
            codes += kinds
            every = _OTHER not in kinds and _ALLREDUCE not in kinds
            spans.append(self._spans(some, every))
        self.operands.close(self.index)
        self.after.close(self.index)
        self.code = np.array(codes, dtype=np.int8)
        """Kinds, as numbers in no order that means anything."""
        self.is_prefill: Mask = self.code == _PREFILL
        self.is_decode: Mask = self.code == _DECODE
        self.is_fetch: Mask = self.code == _FETCH
        self.is_migrate: Mask = self.code == _MIGRATE
        self.is_allreduce: Mask = self.code == _ALLREDUCE
        self.is_move: Mask = self.is_fetch | self.is_migrate
        self.is_forward: Mask = self.is_prefill | self.is_decode
        self.is_kv: Mask = self.is_forward | self.is_move
        for i in np.flatnonzero(self.code == _OTHER).tolist():
            self.is_kv[i] = isinstance(nodes[i], KVNode)
        request, start, stop = map(list, zip(*spans, strict=True)) if spans else ([], [], [])
        self.request = self._spread(joined(request), NONE)
        self.start = self._spread(joined(start), 0)
        self.stop = self._spread(joined(stop), 0)

    @property
    def graph(self) -> "IRGraph":
        """The graph whose columns these are. They do not keep it alive: it keeps them, and a
        circle of the two would outlive its last use until the next cyclic collection."""
        graph = self._graph()
        assert graph is not None, "the columns of a graph that is gone"
        return graph

    def of(self, graph: "IRGraph") -> "Columns":
        """These columns as those of another graph with the same nodes, requests and target."""
        columns = copy(self)
        columns._graph = ref(graph)
        return columns

    def _spans(self, nodes: Sequence[IRNode], every: bool) -> tuple[Ints, Ints, Ints]:
        """Requests, starts and stops of those nodes that are KV nodes, or `every` one."""
        some = nodes if every else [node for node in nodes if isinstance(node, KVNode)]
        spans, count = cast(Sequence[KVNode], some), len(some)
        requests = map(self.request_index.get, [node.request for node in spans], repeat(NONE))
        starts, stops = [node.start for node in spans], [node.stop for node in spans]
        return ints(requests, count), ints(starts, count), ints(stops, count)

    def _spread(self, values: Ints, default: int) -> Ints:
        """Values of the KV nodes, with a default for the other nodes."""
        if self.is_kv.all():
            return values
        column: Ints = np.full(len(self.nodes), default, dtype=np.int64)
        column[self.is_kv] = values
        return column

    @property
    def request_index(self) -> dict[str, int]:
        """Requests by id."""
        return self.requests.index

    @property
    def prompt(self) -> Ints:
        """Tokens of each request's prompt."""
        return self.requests.prompt

    @property
    def end(self) -> Ints:
        """Tokens of each request, prompt and answer."""
        return self.requests.end

    @property
    def ids(self) -> Ints:
        """The block ids of all requests, one request after the other."""
        return self.requests.ids

    @property
    def first_id(self) -> Ints:
        """For each of `ids`, where it stands first."""
        return self.requests.first_id

    @property
    def id_count(self) -> Ints:
        """Block ids of each request."""
        return self.requests.id_count

    @property
    def id_start(self) -> Ints:
        """Where the ids of each request start in `ids`."""
        return self.requests.id_start

    @property
    def space(self) -> Ints:
        """The namespace of each request."""
        return self.requests.space

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
        """The step of each node that has one."""
        return _numbers(self._steps)

    @cached_property
    def until(self) -> Ints:
        """The last step of each decode that has one."""
        until: Ints = np.full(len(self.nodes), NONE, dtype=np.int64)
        decodes = compress(self.nodes, self.is_decode.tolist())
        until[self.is_decode] = _numbers([cast(Decode, node).until for node in decodes])
        return until

    @cached_property
    def finish(self) -> Ints:
        """The last step each node runs in: its step, and `until` of a decode that has one."""
        return np.where(self.until == NONE, self.step, self.until)

    @cached_property
    def loops(self) -> Ints:
        """Forwards of each step."""
        return np.array(self.graph.loops, dtype=np.int64)

    @cached_property
    def decode_loops(self) -> Ints:
        """By how much decodes advance in each step: see `IRGraph.decode_loops`."""
        return np.array(self.graph.decode_loops, dtype=np.int64)

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
        return ints(last)
