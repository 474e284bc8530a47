"""`Timeline`: what the simulation decided, and why each request waited."""

from collections import Counter
from enum import Enum
from typing import NamedTuple

from attrs import frozen

from sagellm_ir.passes.scheduling.problem import Problem

__all__ = ["Limit", "Piece", "RequestTrace", "Timeline", "explain"]


class Limit(str, Enum):
    """Why a step took no more work, or why a request did not run in it."""

    TOKENS = "tokens"
    """The step's token budget was used up, or the next prefill did not fit in the rest."""
    BATCH = "batch"
    """`max_batch` sequences ran already."""
    KV = "kv"
    """The KV span of the next request did not fit beside those reserved."""
    ORDER = "order"
    """An order edge, or KV that another worker or request had yet to make."""
    PRIORITY = "priority"
    """Another request was ahead in the queue, and it was that one the step had no room for."""


class Piece(NamedTuple):
    """A part of a prefill that ends before the node does."""

    stop: int
    step: int


@frozen
class RequestTrace:
    """The way of one request through the schedule. Steps are indexes."""

    request: str
    ready: int
    """The first step it could have been admitted in, had there been room."""
    admitted: int
    first: int
    """The step of its first forward or move."""
    last: int
    waited: Counter[Limit]
    """Steps between arrival and admission, by what held it back in each."""


class Timeline:
    """Columns by node, by request and by step. -1: none."""

    def __init__(self, nodes: int, requests: int) -> None:
        self.step = [-1] * nodes
        self.until = [-1] * nodes
        """By decode: the last step it runs in."""
        self.pieces: dict[int, list[Piece]] = {}
        """By node that was cut: its pieces but the last, which `step` and `until` are of."""
        self.ready = [-1] * requests
        """By request: the first step it could have been admitted in, had there been room."""
        self.opened = [-1] * requests
        """By request: the step in which it was first in the queue, and its nodes were claimed."""
        self.queued = [-1] * requests
        """By request: the step from which on it waited for nothing but room."""
        self.admitted = [-1] * requests
        """By request: the step in which its first job was admitted."""
        self.loops: list[int] = []
        """By step: forwards."""
        self.worker: list[int] = []
        self.start: list[float] = []
        """By step: virtual time, in seconds."""
        self.cost: list[float] = []
        """By step: seconds."""
        self.limit: list[Limit | None] = []
        """By step: what kept more work out; None when nothing did."""
        self.head: list[int] = []
        """By step: the request that was kept out first."""
        self.issued: list[int] = []
        """Nodes in the order in which they start; one that was cut stands here for each piece."""
        self.places: list[int] = []
        """The step of each entry of `issued`."""

    def gather(self) -> None:
        """Moves steps in which nothing starts next to the step before them on their worker.

        A graph does not say whose a step is: it is the worker's of what starts in it, else that
        of the step before. A step in which nothing starts depends on nothing but its worker's
        earlier steps, so it may move up to them.
        """
        started = set(self.places)
        groups: list[list[int]] = []
        latest: dict[int, list[int]] = {}
        for step, worker in enumerate(self.worker):
            if step in started:
                latest[worker] = []
                groups.append(latest[worker])
            latest[worker].append(step)
        order = [step for group in groups for step in group]
        self._renumber(order)

    def _renumber(self, order: list[int]) -> None:
        new = [0] * (len(order) + 1)
        new[-1] = -1  # stands for no step
        for index, step in enumerate(order):
            new[step] = index
        for name in ("loops", "worker", "start", "cost", "limit", "head"):
            column = getattr(self, name)
            setattr(self, name, [column[step] for step in order])
        for name in ("step", "until", "ready", "opened", "queued", "admitted", "places"):
            setattr(self, name, [new[step] for step in getattr(self, name)])
        for node, pieces in self.pieces.items():
            self.pieces[node] = [Piece(p.stop, new[p.step]) for p in pieces]
        by_step = sorted(range(len(self.issued)), key=self.places.__getitem__)
        self.issued = [self.issued[i] for i in by_step]
        self.places = [self.places[i] for i in by_step]


def explain(problem: Problem, timeline: Timeline) -> tuple[RequestTrace, ...]:
    """The way of each request, in the order of the graph's requests.

    What held a request back in a step is what the step had no room for, when the request was
    first in the queue; PRIORITY when it was not; ORDER when it could not be queued because of
    what it has to wait for.
    """
    return tuple(_trace(problem, timeline, i) for i in range(len(problem.owned)))


def _trace(problem: Problem, timeline: Timeline, request: int) -> RequestTrace:
    nodes = problem.owned[request]
    steps = [timeline.step[node] for node in nodes]
    steps += [piece.step for node in nodes for piece in timeline.pieces.get(node, ())]
    first = min(steps)
    last = max(max(timeline.step[node], timeline.until[node]) for node in nodes)
    ready, admitted = timeline.ready[request], timeline.admitted[request]
    if admitted < 0:  # other requests have claimed all of its nodes
        admitted = first
    waited: Counter[Limit] = Counter()
    for step in range(ready, admitted):
        if timeline.worker[step] == timeline.worker[first]:
            waited[_reason(timeline, request, step)] += 1
    name = problem.graph.requests[request].id
    return RequestTrace(name, ready, admitted, first, last, waited)


def _reason(timeline: Timeline, request: int, step: int) -> Limit:
    if timeline.head[step] == request:
        return timeline.limit[step] or Limit.ORDER
    if 0 <= timeline.opened[request] <= step < timeline.queued[request]:
        return Limit.ORDER
    return Limit.PRIORITY
