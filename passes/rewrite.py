"""What the passes over built graphs share: fresh names, splitting, and putting a graph together."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from operator import le
from typing import Any, TypeVar, cast

from sagellm_ir.graph import IRGraph, RequestDecl
from sagellm_ir.nodes import (
    KINDS,
    AllReduce,
    Decode,
    IRNode,
    KVFetch,
    KVMigrate,
    KVNode,
    Origin,
    Prefill,
    collective,
    payload,
)

__all__ = [
    "Gone",
    "Names",
    "canonical_ranks",
    "finish",
    "merge",
    "part",
    "prefill_part",
    "sources",
    "split",
    "topological",
]

Piece = TypeVar("Piece", bound=KVNode)

Gone = Mapping[str, tuple[str, ...]]
"""For each node that is gone: what holds its KV now, then what its users must wait for besides."""


class Names:
    """Gives names that are new to a graph."""

    def __init__(self, graph: IRGraph) -> None:
        self._old = graph.columns.index
        self._new: set[str] = set()

    def fresh(self, base: str) -> str:
        """`base`, or `base.1`, `base.2`, ...: the first that is not taken; takes it."""
        name, number = base, 0
        while name in self._old or name in self._new:
            number += 1
            name = f"{base}.{number}"
        self._new.add(name)
        return name

    def numbered(self, stem: str) -> Iterator[str]:
        """Fresh names `stem0`, `stem1`, ..., without end."""
        return (self.fresh(f"{stem}{i}") for i in count())


def merge(*names: Iterable[str]) -> tuple[str, ...]:
    """Names of all arguments, each once, in order."""
    return tuple(dict.fromkeys(name for some in names for name in some))


def split(node: Piece, cuts: Sequence[int], names: Iterable[str], by: str) -> list[Piece]:
    """The node as a chain of pieces that meet at `cuts`.

    The last piece keeps the node's name, so users need no change; the first keeps its operands and
    order edges, so nothing of it starts earlier than it did.

    Args:
        node: a prefill or a fetch; of a move with a source the operands are left to the caller.
        cuts: ascending tokens strictly inside the node's span.
        names: of the pieces before the last, at least as many as cuts.
        by: the pass that asks.
    """
    if not cuts:
        return [node]
    origin = Origin(by, (node.name,))
    pieces, operands, after, start = [], node.operands, node.after, node.start
    for stop, name in zip(cuts, names):  # noqa: B905  (names may be endless)
        pieces.append(part(node, name, start, stop, operands, after, origin))
        operands, after, start = (name,), (), stop
    pieces.append(part(node, node.name, start, node.stop, operands, after))
    return pieces


def part(
    node: Piece,
    name: str,
    start: int,
    stop: int,
    operands: tuple[str, ...],
    after: tuple[str, ...],
    origin: Origin | None = None,
) -> Piece:
    """A node like another, for another span. `origin` None means that of the other one."""
    origin = origin or node.origin
    if isinstance(node, Prefill):  # nearly all are
        made = prefill_part(node, name, start, stop, operands, after, node.step, origin)
        return cast(Piece, made)
    return node.replace(
        name=name, start=start, stop=stop, operands=operands, after=after, origin=origin
    )


def prefill_part(
    node: Prefill,
    name: str,
    start: int,
    stop: int,
    operands: tuple[str, ...],
    after: tuple[str, ...],
    step: int | None,
    origin: Origin | None,
) -> Prefill:
    """A prefill like another, for another span, in a step. `replace` takes twice as long."""
    return Prefill(
        name,
        node.request,
        start,
        stop,
        operands=operands,
        after=after,
        step=step,
        worker=node.worker,
        loc=node.loc,
        origin=origin,
    )


def sources(graph: IRGraph) -> set[str]:
    """The nodes whose KV some move copies: a move copies from one node, so such a node's span can
    not change without that of the move."""
    moves = [node for node in graph.nodes if isinstance(node, (KVFetch, KVMigrate))]
    return {move.source for move in moves if move.source is not None}


def canonical_ranks(graph: IRGraph, requests: Sequence[RequestDecl]) -> list[tuple[Any, ...]]:
    """A unique rank for each node: by request, in the order given, then span, kind and name. What
    is no KV stands behind the last of its operands."""
    places = {request.id: i for i, request in enumerate(requests)}
    kinds = {cls: i for i, cls in enumerate(KINDS.values())}
    other = len(kinds)
    ranks = [
        (places[node.request], node.start, node.stop, kinds.get(type(node), other), node.name)
        if isinstance(node, KVNode)
        else ()
        for node in graph.nodes
    ]
    if () in ranks:
        known = dict(zip(graph.by_name, ranks, strict=True))
        for i, node in enumerate(graph.nodes):
            if not ranks[i]:
                last = max((known[name][:3] for name in node.operands), default=(0, 0, 0))
                ranks[i] = known[node.name] = (*last, kinds.get(type(node), other), node.name)
    return ranks


def topological(
    nodes: Sequence[IRNode], ranks: Sequence[Any], *, ordered: bool = True
) -> Sequence[IRNode]:
    """The nodes with operands and `after` before their users; among those that may come next, the
    one of least rank. When ranks are unique the order depends on nothing else.

    Kahn's algorithm (CACM 5(11), 1962) over a heap, unless sorting by rank is enough.

    Args:
        nodes: what to sort.
        ranks: of each node.
        ordered: whether operands and `after` stand before their users already.
    """
    if ordered and all(map(le, ranks, ranks[1:])):
        return nodes
    ranked = [nodes[i] for i in sorted(range(len(nodes)), key=ranks.__getitem__)]
    seen: set[str] = set()
    for node in ranked:
        for name in node.operands:
            if name not in seen:
                return _kahn(ranked)
        if node.after and not seen.issuperset(node.after):
            return _kahn(ranked)
        seen.add(node.name)
    return ranked


def _kahn(nodes: list[IRNode]) -> list[IRNode]:
    """Topological order; among those that may come next, the one that stands first."""
    place = {node.name: i for i, node in enumerate(nodes)}
    users: list[list[int]] = [[] for _ in nodes]
    waits = [0] * len(nodes)
    for i, node in enumerate(nodes):
        for name in (*node.operands, *node.after):
            users[place[name]].append(i)
            waits[i] += 1
    ready = [i for i, count in enumerate(waits) if not count]
    heapify(ready)
    ordered = []
    while ready:
        i = heappop(ready)
        ordered.append(nodes[i])
        for user in users[i]:
            waits[user] -= 1
            if not waits[user]:
                heappush(ready, user)
    assert len(ordered) == len(nodes), "a pass made a cycle"
    return ordered


def finish(
    graph: IRGraph,
    nodes: Iterable[IRNode],
    gone: Gone | None = None,
    idle: Collection[str] = (),
    *,
    ordered: bool = False,
) -> IRGraph:
    """The graph with its nodes exchanged for `nodes`, near the places they had, and with the
    collectives that these need.

    Args:
        graph: the graph before.
        nodes: all but collectives, in topological order when `gone` is seen to; new nodes stand
            just before the old one they were made from.
        gone: what users of a node that is not among `nodes` are to use.
        idle: nodes to leave out if nothing uses them any more.
        ordered: whether `nodes` stand in the order of the graph already.
    """
    gone = _resolve(gone or {})
    kept = [_redirect(node, gone) for node in nodes] if gone else list(nodes)
    if idle:
        kept = _without(kept, idle)
    placed = _with_collectives(graph, kept, gone)
    if ordered and placed is kept:
        return graph.replace(nodes=tuple(kept))
    old = {node.name: i for i, node in enumerate(graph.nodes)}
    ranks = [old.get(node.name, -1) for node in placed]
    place = len(old)
    for i in range(len(ranks) - 1, -1, -1):
        if ranks[i] == -1:
            ranks[i] = place
        else:
            place = ranks[i]
    return graph.replace(nodes=tuple(topological(placed, ranks, ordered=placed is kept)))


def _resolve(gone: Gone) -> Gone:
    """`gone`, without names of nodes that are gone themselves. Later ones may name earlier ones."""
    resolved: dict[str, tuple[str, ...]] = {}
    for name, stand_in in gone.items():
        resolved[name] = merge(*(resolved.get(other, (other,)) for other in stand_in))
    return resolved


def _redirect(node: IRNode, gone: Gone) -> IRNode:
    """The node with what it names exchanged."""
    data = [name for name in node.operands if name in gone]
    if not data and not any(name in gone for name in node.after):
        return node
    operands = tuple(gone[name][0] if name in gone else name for name in node.operands)
    waits = (gone[name][1:] for name in data)
    order = (gone.get(name, (name,)) for name in node.after)
    return node.replace(operands=operands, after=merge(*order, *waits))


def _without(nodes: list[IRNode], idle: Collection[str]) -> list[IRNode]:
    """The nodes but those of `idle` that nothing uses."""
    used: set[str] = set()
    kept = []
    for node in reversed(nodes):
        if node.name in used or node.name not in idle:
            used.update(node.operands, node.after)
            kept.append(node)
    return kept[::-1]


def _with_collectives(graph: IRGraph, nodes: list[IRNode], gone: Gone) -> list[IRNode]:
    """`nodes` with the collectives of `graph` brought up to date.

    One keeps those operands that still compute; each new prefill or decode gets one.
    """
    if not graph.columns.is_allreduce.any():
        return nodes
    sums = [node for node in graph.nodes if isinstance(node, AllReduce)]
    forwards = {node.name: node for node in nodes if isinstance(node, (Prefill, Decode))}
    lost = dict(gone)
    kept: dict[str, list[IRNode]] = {}
    for node in sums:
        if operands := tuple(name for name in node.operands if name in forwards):
            kept.setdefault(operands[-1], []).append(_updated(node, operands, graph, forwards))
        else:
            lost[node.name] = merge(*(gone.get(name, (name,)) for name in node.operands))
    names = Names(graph)
    result: list[IRNode] = []
    for item in nodes:
        result += (item, *kept.get(item.name, ()))
        if item.name in forwards and item.name not in graph.by_name:
            result.append(collective(item, graph.target, names.fresh(f"{item.name}.sum")))
    return [_redirect(item, lost) for item in result] if lost else result


def _updated(
    node: AllReduce, operands: tuple[str, ...], graph: IRGraph, forwards: Mapping[str, IRNode]
) -> AllReduce:
    """A collective over those operands that still compute, with their rows of now."""
    if all(_same_rows(graph.by_name[name], forwards.get(name)) for name in node.operands):
        return node
    size = sum(payload(forwards[name], graph.target) for name in operands)
    return node.replace(operands=operands, bytes=size)


def _same_rows(old: IRNode, new: IRNode | None) -> bool:
    if isinstance(old, Prefill) and isinstance(new, Prefill):
        return old.start == new.start and old.stop == new.stop
    return type(old) is type(new)
