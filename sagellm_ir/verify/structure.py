"""Laws of form: names, definitions, kinds of operands. The other laws rely on these."""

import difflib
from collections.abc import Iterator

import numpy as np

from sagellm_ir.arrays import NONE, places
from sagellm_ir.columns import Columns
from sagellm_ir.diagnostics import suggest
from sagellm_ir.nodes import IRNode, KVFetch, KVMigrate, KVNode
from sagellm_ir.target import DEVICE
from sagellm_ir.verify.report import Finding

__all__ = ["LAWS"]


def unique_names(c: Columns) -> Iterator[Finding]:
    """No two nodes have one name."""
    if len(c.index) == len(c.names):
        return
    first: dict[str, int] = {}
    for i, name in enumerate(c.names):
        if first.setdefault(name, i) != i:
            yield Finding(f"%{name} is defined twice", i)


def known_operands(c: Columns) -> Iterator[Finding]:
    """Every operand is a node of the graph."""
    for edge in places(c.operands.target == NONE):
        name = c.operands.names[edge]
        yield Finding(
            f"operand %{name} is not defined",
            int(c.operands.user[edge]),
            help=_near(name, c),
        )


def known_after(c: Columns) -> Iterator[Finding]:
    """Every order edge names a node of the graph."""
    for edge in places(c.after.target == NONE):
        name = c.after.names[edge]
        yield Finding(
            f"'after' names %{name}, which is not defined",
            int(c.after.user[edge]),
            help=_near(name, c),
        )


def _near(name: str, c: Columns) -> str:
    """A suggestion, where the graph is small enough to look for one."""
    near = difflib.get_close_matches(name, c.names, n=1) if len(c.names) <= 1000 else []
    return f"did you mean %{near[0]}?" if near else ""


def defined_before_use(c: Columns) -> Iterator[Finding]:
    """A definition stands before its uses, so there is no cycle."""
    late = [
        (int(edges.user[edge]), edges.names[edge])
        for edges in (c.operands, c.after)
        for edge in np.flatnonzero(edges.target >= edges.user).tolist()
    ]
    if late and (cycle := _cycle(c)):
        path = " -> ".join(f"%{name}" for name in cycle)
        yield Finding(f"the graph has a cycle: {path}", c.index[cycle[0]])
        return
    for user, name in sorted(late):
        yield Finding(
            f"%{name} is used before it is defined",
            user,
            help=f"move %{name} above this line",
        )


def _cycle(c: Columns) -> list[str]:
    """The names along a cycle, from the earliest one back to it; empty when there is none."""
    import networkx as nx  # takes longer to import than all of the IR

    try:
        found = nx.find_cycle(c.graph.to_networkx().reverse())
    except nx.NetworkXNoCycle:
        return []
    names = [edge[0] for edge in found]
    first = min(range(len(names)), key=lambda k: c.index[names[k]])
    return [*names[first:], *names[: first + 1]]


def known_requests(c: Columns) -> Iterator[Finding]:
    """Every KV belongs to a request of the graph."""
    for i in places(c.is_kv & (c.request == NONE)):
        node = c.nodes[i]
        assert isinstance(node, KVNode)
        yield Finding(
            f"request @{node.request} is not declared",
            i,
            help=suggest(node.request, c.request_index),
        )


def known_workers(c: Columns) -> Iterator[Finding]:
    """Every worker is one of the target's."""
    if c.named_workers.count(None) == len(c.nodes):
        return
    for i in places(c.worker == NONE):
        worker = c.named_workers[i]
        if worker is not None:
            yield Finding(
                f"the target has no worker {worker!r}", i, help=suggest(worker, c.worker_index)
            )


def known_tiers(c: Columns) -> Iterator[Finding]:
    """Every tier is one of the target's."""
    for i in places(c.is_move):
        node = c.nodes[i]
        tier = node.src if isinstance(node, KVFetch) else getattr(node, "to", DEVICE)
        if tier not in c.tier_index:
            yield Finding(f"the target has no tier {tier!r}", i, help=suggest(tier, c.tier_index))


def operand_counts(c: Columns) -> Iterator[Finding]:
    """A KV node has a prefix exactly when it starts after 0; moves have a source besides."""
    count = c.operands.count
    inner = c.start > 0
    wrong = c.is_forward & (count != inner)
    wrong |= c.is_fetch & ((count < inner) | (count > 1 + inner))
    wrong |= c.is_migrate & (count != 1 + (inner & (c.tier == c.device)))
    wrong |= c.is_allreduce & (count < 1)
    for i in places(wrong):
        yield Finding(_expected_operands(c.nodes[i], int(count[i])), i)


def _expected_operands(node: IRNode, count: int) -> str:
    if isinstance(node, KVMigrate):
        prefix = " and its prefix where it lands" if node.to == DEVICE and node.start else ""
        return f"a kv_migrate that starts at {node.start} takes its source{prefix}, not {count} operands"
    if not isinstance(node, KVNode):
        return f"{node.kind} takes at least one operand"
    source = "a source or none" if isinstance(node, KVFetch) else ""
    prefix = "its prefix" if node.start else ""
    wanted = ", and ".join(part for part in (source, prefix) if part) or "no operands"
    return f"a {node.kind} that starts at {node.start} takes {wanted}, not {count} operands"


def operand_kinds(c: Columns) -> Iterator[Finding]:
    """KV nodes take KV; collectives take prefills and decodes."""
    user, target = c.operands.user, c.operands.target
    wrong_kv = c.is_kv[user] & ~c.is_kv[target]
    wrong_sum = c.is_allreduce[user] & ~c.is_forward[target]
    wrong = (wrong_kv | wrong_sum) & (target != NONE)
    for edge in places(wrong):
        node, operand = c.nodes[user[edge]], c.nodes[target[edge]]
        wanted = "KV" if isinstance(node, KVNode) else "prefills and decodes"
        yield Finding(
            f"{node.kind} takes {wanted}, but %{operand.name} is of kind {operand.kind} "
            f"and type {operand.type}",
            int(user[edge]),
        )


LAWS = (
    unique_names,
    known_operands,
    known_after,
    defined_before_use,
    known_requests,
    known_workers,
    known_tiers,
    operand_counts,
    operand_kinds,
)
