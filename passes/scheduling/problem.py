"""A graph as flat lists by node index: what the scheduling simulation works on."""

import math
from collections import defaultdict
from collections.abc import Iterator

from attrs import field, frozen

from sagellm_ir.cost import CostModel
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import (
    Decode,
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
    worker: list[int]
    owner: list[int]
    """The request a node belongs to."""
    owned: list[list[int]]
    """By request: its nodes, in order."""
    rank: list[int] = field(factory=list)
    """By request: its place in the order of admission."""
    followers: dict[int, list[int]] = field(factory=lambda: defaultdict(list))
    """Reverse of `waits`."""
    copied: set[int] = field(factory=set)
    """Nodes that moves copy: their spans must stay as they are."""
    instant: dict[int, int] = field(factory=dict)
    """Decodes without forwards, by the prefill that makes their token."""

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
    problem, ordered = _read(graph)
    operands, users, waits = problem.operands, problem.users, problem.waits
    for i, reads in enumerate(operands):
        if problem.kind[i] != COLLECTIVE:
            for read in reads:
                users[read].append(i)
    if ordered:
        index = {node.name: i for i, node in enumerate(graph.nodes)}
        made_by = {decode: prefill for prefill, decode in problem.instant.items()}
        for i in ordered:
            at = made_by.get(i, i)
            found = [index[name] for name in graph.nodes[i].after]
            waits[at] = [*waits[at], *_units(problem, found)]
        for i in sorted({made_by.get(i, i) for i in ordered}):
            for wait in waits[i]:
                problem.followers[wait].append(i)
    problem.rank.extend(_ranks(graph, users, operands, problem.owned))
    return problem


def _units(problem: Problem, nodes: list[int]) -> Iterator[int]:
    """The units of work behind some nodes: to wait for a collective is to wait for its operands."""
    for node in nodes:
        yield from problem.operands[node] if problem.kind[node] == COLLECTIVE else (node,)


def _read(graph: IRGraph) -> tuple[Problem, list[int]]:
    """What each node says of itself, and the units of work with order edges."""
    nodes, count, block_size = graph.nodes, len(graph.nodes), graph.target.block_size
    requests = {request.id: i for i, request in enumerate(graph.requests)}
    prompt = [request.prompt_len for request in graph.requests]
    places = {worker.name: i for i, worker in enumerate(graph.target.workers)}
    nothing: list[int] = []
    problem = Problem(
        graph=graph,
        kind=[COLLECTIVE] * count,
        size=[0] * count,
        start=[0] * count,
        stop=[0] * count,
        ends=[False] * count,
        blocks=[0] * count,
        prefix=[-1] * count,
        operands=[nothing] * count,
        waits=[nothing] * count,
        users=[[] for _ in nodes],
        worker=[0] * count,
        owner=[-1] * count,
        owned=[[] for _ in requests],
    )
    kind, size, prefix, operands = problem.kind, problem.size, problem.prefix, problem.operands
    index: dict[str, int] = {}
    ordered: list[int] = []
    for i, node in enumerate(nodes):
        index[node.name] = i
        if node.operands:
            operands[i] = reads = [index[name] for name in node.operands]
        if node.worker:
            problem.worker[i] = places[node.worker]
        if not isinstance(node, KVNode):
            continue
        if node.after:
            ordered.append(i)
        start, stop, request = node.start, node.stop, requests[node.request]
        problem.start[i], problem.stop[i], problem.owner[i] = start, stop, request
        problem.owned[request].append(i)
        if not isinstance(node, (Prefill, Decode)):
            kind[i] = MOVE
            _read_move(problem, i, node, index)
            continue
        problem.blocks[i] = -(-stop // block_size) + -start // block_size
        if start:
            prefix[i] = reads[-1]
        if isinstance(node, Prefill):
            kind[i], size[i] = PREFILL, stop - start
            problem.ends[i] = stop == prompt[request]
            continue
        # the prefill that ends the prompt has made the first token already
        kind[i], size[i] = DECODE, stop - start - (start == prompt[request])
        if not size[i] and kind[prefix[i]] == PREFILL:
            problem.instant[prefix[i]] = i
    return problem, ordered


def _read_move(problem: Problem, i: int, node: KVNode, index: dict[str, int]) -> None:
    if node.tier == DEVICE:
        size = problem.graph.target.block_size
        problem.blocks[i] = -(-node.stop // size) + -node.start // size
    if node.prefix:
        problem.prefix[i] = index[node.prefix]
    if isinstance(node, (KVFetch, KVMigrate)) and node.source is not None:
        problem.copied.add(index[node.source])


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
