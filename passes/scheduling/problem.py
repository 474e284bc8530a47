"""A graph as flat lists by node index: what the scheduling simulation works on."""

import math
from collections import defaultdict

import numpy as np
from attrs import field, frozen

from sagellm_ir.arrays import NONE, grouped
from sagellm_ir.columns import Columns
from sagellm_ir.cost import CostModel
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import KVFetch, KVMigrate
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
    made_by: dict[int, int] = field(init=False)
    """Reverse of `instant`."""

    def __attrs_post_init__(self) -> None:
        made_by = {decode: prefill for prefill, decode in self.instant.items()}
        object.__setattr__(self, "made_by", made_by)

    def transfer(self, node: int, cost: CostModel) -> float:
        """Seconds of a move."""
        move, size = self.graph.nodes[node], self.graph.target.block_size
        assert isinstance(move, KVFetch | KVMigrate)
        blocks = -(-move.stop // size) + -move.start // size
        if isinstance(move, KVMigrate):
            return cost.transfer(blocks, move.to)
        return 0.0 if move.src == DEVICE else cost.transfer(blocks, move.src)


def flatten(graph: IRGraph) -> Problem:
    """The graph's columns as lists. A collective is no unit of work: it runs with its operands."""
    c = graph.columns
    unit = c.is_kv[c.operands.user]
    wanted, takers = c.operands.target[unit], c.operands.user[unit]
    kind = np.where(c.is_prefill, PREFILL, np.where(c.is_decode, DECODE, MOVE))
    kind[~c.is_kv] = COLLECTIVE
    size = np.where(c.is_prefill, c.stop - c.start, c.forwards)
    # the prefill that ends the prompt has made the first token already
    instant = np.flatnonzero(c.is_decode & (size == 0) & c.is_prefill[c.prefix])
    problem = Problem(
        graph=graph,
        kind=kind.tolist(),
        size=size.tolist(),
        start=c.start.tolist(),
        stop=c.stop.tolist(),
        ends=(c.is_prefill & (c.stop == c.prompt[c.request])).tolist() if len(c.nodes) else [],
        blocks=np.where(c.tier == c.device, c.blocks, 0).tolist(),
        prefix=c.prefix.tolist(),
        operands=grouped(c.operands.target, c.operands.user, len(c.nodes)),
        waits=[[]] * len(c.nodes),
        users=grouped(takers, wanted, len(c.nodes)),
        worker=np.maximum(c.worker, 0).tolist(),
        owner=c.request.tolist(),
        owned=grouped(np.flatnonzero(c.is_kv), c.request[c.is_kv], len(graph.requests)),
        copied=set(c.source[c.source != NONE].tolist()),
        instant=dict(zip(c.prefix[instant].tolist(), instant.tolist(), strict=True)),
    )
    if c.after.names:
        _read_order(problem, c)
    problem.rank.extend(_ranks(graph, problem.users, problem.operands, problem.owned))
    return problem


def _read_order(problem: Problem, c: Columns) -> None:
    """Order edges between units of work. One with a collective is one with its operands, and one
    to a decode without forwards is one to its prefill."""
    unit = c.is_kv[c.after.user]
    for user, node in zip(c.after.user[unit].tolist(), c.after.target[unit].tolist(), strict=True):
        at = problem.made_by.get(user, user)
        units = problem.operands[node] if problem.kind[node] == COLLECTIVE else [node]
        problem.waits[at] = problem.waits[at] + units
    for i, waits in enumerate(problem.waits):
        for wait in waits:
            problem.followers[wait].append(i)


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
