"""A graph as flat lists by node index: what the scheduling simulation works on."""

import math
from collections import defaultdict

from attrs import frozen

from sagellm_ir.cost import CostModel
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import (
    AllReduce,
    Decode,
    IRNode,
    KVFetch,
    KVMigrate,
    KVNode,
    Prefill,
)
from sagellm_ir.target import DEVICE

__all__ = ["COLLECTIVE", "DECODE", "MOVE", "PREFILL", "Problem", "flatten"]

PREFILL, DECODE, MOVE, COLLECTIVE = range(4)


@frozen
class Problem:
    """Lists by node index, unless they say by request index. A missing node is -1."""

    graph: IRGraph
    kind: list[int]
    size: list[int]
    """Rows of a prefill; forwards of a decode; 0 for the rest."""
    start: list[int]
    """Tokens before the node's own."""
    stop: list[int]
    ends: list[bool]
    """Whether it is the prefill that ends a prompt."""
    blocks: list[int]
    """Device blocks that the node owns."""
    prefix: list[int]
    operands: list[list[int]]
    waits: list[list[int]]
    """Nodes that must have finished before this one starts."""
    users: list[list[int]]
    """Nodes that take this one as an operand; collectives left out."""
    followers: dict[int, list[int]]
    """Reverse of `waits`."""
    worker: list[int]
    copied: set[int]
    """Nodes that moves copy: their spans must stay as they are."""
    instant: dict[int, int]
    """Decodes without forwards, by the prefill that makes their token."""
    owner: list[int]
    """The request a node belongs to."""
    owned: list[list[int]]
    """By request: its nodes, in order."""
    rank: list[int]
    """By request: its place in the order of admission."""

    def transfer(self, node: int, cost: CostModel) -> float:
        """Seconds of a move."""
        move, size = self.graph.nodes[node], self.graph.target.block_size
        assert isinstance(move, KVFetch | KVMigrate)
        blocks = -(-move.stop // size) + -move.start // size
        if isinstance(move, KVMigrate):
            return cost.transfer(blocks, move.to)
        return 0.0 if move.src == DEVICE else cost.transfer(blocks, move.src)


def flatten(graph: IRGraph) -> Problem:
    """Looks at every node once. A collective is no unit of work: it runs with its operands."""
    nodes, block_size = graph.nodes, graph.target.block_size
    index = {node.name: i for i, node in enumerate(nodes)}
    kind = [_KIND.get(type(node), MOVE) for node in nodes]
    operands = [[index[name] for name in node.operands] for node in nodes]
    size = [_size(graph, node) for node in nodes]
    prefix = [
        index[node.prefix] if isinstance(node, KVNode) and node.prefix else -1 for node in nodes
    ]
    instant = {
        prefix[i]: i
        for i, node in enumerate(nodes)
        if kind[i] == DECODE and not size[i] and kind[prefix[i]] == PREFILL
    }
    waits = _waits(graph, index, kind, operands, instant)
    users: list[list[int]] = [[] for _ in nodes]
    followers: dict[int, list[int]] = defaultdict(list)
    for i in range(len(nodes)):
        if kind[i] != COLLECTIVE:
            for read in operands[i]:
                users[read].append(i)
            for wait in waits[i]:
                followers[wait].append(i)
    requests = {request.id: i for i, request in enumerate(graph.requests)}
    owner = [requests[node.request] if isinstance(node, KVNode) else -1 for node in nodes]
    owned: list[list[int]] = [[] for _ in requests]
    for i, request in enumerate(owner):
        if request >= 0:
            owned[request].append(i)
    places = {worker.name: i for i, worker in enumerate(graph.target.workers)}
    return Problem(
        graph=graph,
        kind=kind,
        size=size,
        start=[node.start if isinstance(node, KVNode) else 0 for node in nodes],
        stop=[node.stop if isinstance(node, KVNode) else 0 for node in nodes],
        ends=[
            isinstance(node, Prefill) and node.stop == graph.request[node.request].prompt_len
            for node in nodes
        ],
        blocks=[_blocks(node, block_size) for node in nodes],
        prefix=prefix,
        operands=operands,
        waits=waits,
        users=users,
        followers=followers,
        worker=[places[node.worker] if node.worker else 0 for node in nodes],
        copied={
            index[node.source]
            for node in nodes
            if isinstance(node, KVFetch | KVMigrate) and node.source is not None
        },
        instant=instant,
        owner=owner,
        owned=owned,
        rank=_ranks(graph, users, operands, owned),
    )


_KIND: dict[type[IRNode], int] = {Prefill: PREFILL, Decode: DECODE, AllReduce: COLLECTIVE}


def _waits(
    graph: IRGraph,
    index: dict[str, int],
    kind: list[int],
    operands: list[list[int]],
    instant: dict[int, int],
) -> list[list[int]]:
    """Order edges of each node, between units of work.

    To wait for a collective is to wait for its operands; what a decode without forwards waits
    for, its prefill waits for.
    """
    nothing: list[int] = []
    waits = [nothing] * len(kind)
    made_by = {decode: prefill for prefill, decode in instant.items()}
    for i, node in enumerate(graph.nodes):
        if node.after and kind[i] != COLLECTIVE:
            found = waits[made_by.get(i, i)].copy()
            for name in node.after:
                wait = index[name]
                found += operands[wait] if kind[wait] == COLLECTIVE else [wait]
            waits[made_by.get(i, i)] = found
    return waits


def _size(graph: IRGraph, node: IRNode) -> int:
    if isinstance(node, Prefill):
        return node.stop - node.start
    if isinstance(node, Decode):
        # the prefill that ends the prompt has made the first token already
        return node.stop - node.start - (node.start == graph.request[node.request].prompt_len)
    return 0


def _blocks(node: IRNode, block_size: int) -> int:
    if isinstance(node, KVNode) and node.tier == DEVICE:
        return -(-node.stop // block_size) + -node.start // block_size
    return 0


def _ranks(
    graph: IRGraph, users: list[list[int]], operands: list[list[int]], owned: list[list[int]]
) -> list[int]:
    """Larger priority first, then earlier deadline, then depth-first order of the prefix forest,
    then arrival, then position.

    What shares a prefix then runs together, and the prefix is live once and for a short time.
    """
    order = [-1] * len(users)
    count = 0
    for root, reads in enumerate(operands):
        stack = [] if reads else [root]
        while stack:
            node = stack.pop()
            if order[node] < 0:
                order[node] = count
                count += 1
                stack += users[node][::-1]
    keys = [
        (
            -request.priority,
            math.inf if request.deadline is None else request.deadline,
            order[nodes[-1]] if nodes else 0,
            request.arrival,
            i,
        )
        for i, (request, nodes) in enumerate(zip(graph.requests, owned, strict=True))
    ]
    rank = [0] * len(keys)
    for place, key in enumerate(sorted(keys)):
        rank[key[-1]] = place
    return rank
