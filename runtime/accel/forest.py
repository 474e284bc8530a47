"""Prefix groups of a batch -> the nodes that are read once for all their sequences.

A sequence's keys are cut into abutting spans: the packed nodes on its path, root first, then its
private part. A node that does not pay is not lost: its tokens are read with the next packed node
below it, or with the private part.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from operator import attrgetter

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import PrefixGroup
from sagellm_ir.runtime.accel.gate import Gate
from sagellm_ir.runtime.accel.spec import AttentionSpec

__all__ = ["Forest", "Node", "SharedPrefix", "find_groups", "plan_forest", "shared_prefixes"]

Ints = NDArray[np.int32]


@lru_cache(maxsize=16)
def _saved(gate: Gate, spec: AttentionSpec) -> Callable[[int, int, int], float]:
    """`Gate.saved`: a server sees the same groups again and again."""
    return lru_cache(maxsize=4096)(partial(gate.saved, spec))


@frozen
class SharedPrefix:
    """Sequences whose block tables agree on the pages of tokens `[start, stop)`.

    Groups form a forest: a group nests in the one that ends where it starts and holds its rows, as
    `lowering.plan.PrefixGroup` does for requests. `start` and `stop` are multiples of a block.
    """

    start: int
    stop: int
    rows: Sequence[int] | Ints
    """Indices of the sequences in the batch, in any order, each once."""


@frozen(eq=False)
class Node:
    """Keys `[begin, end)`, read once for the sequences `rows`."""

    begin: int
    end: int
    rows: Ints
    queries: int
    """Query tokens of those sequences."""


@frozen(eq=False)
class Forest:
    """What a batch shares after the gate."""

    nodes: tuple[Node, ...]
    """Parents before children."""
    private: Ints
    """`[batch]`: where each sequence's private part begins, a multiple of the block size."""


def plan_forest(
    spec: AttentionSpec,
    groups: Sequence[SharedPrefix],
    q_lens: Ints,
    kv_lens: Ints,
    gate: Gate | None,
) -> Forest:
    """Choose the nodes to pack.

    Args:
        groups: the batch's prefix groups, in any order.
        q_lens: `[batch]` new tokens of each sequence.
        kv_lens: `[batch]` all its tokens, the new ones included.
        gate: what decides; None packs every group of two sequences or more.

    Raises:
        SageIRError: a group is not aligned to blocks, names an unknown or repeated sequence, does
            not continue a group that holds all its sequences, or reaches into new tokens.
    """
    private = np.zeros(len(q_lens), np.int32)
    if not groups:
        return Forest((), private)
    ordered = sorted(groups, key=attrgetter("start"))
    lists = [_indices(group.rows) for group in ordered]
    every = lists[0] if len(lists) == 1 else np.concatenate(lists)
    counts = [len(rows) for rows in lists]
    history = kv_lens - q_lens
    outer = _outer(spec, ordered, every, counts, history)
    if outer is None:
        raise SageIRError(_why(spec, ordered, lists, history))
    firsts = [0, *accumulate(counts[:-1])]
    queries = np.add.reduceat(q_lens[every], firsts).tolist()
    unread: list[int] = []  # of each group, where its unpacked tail begins: its stop, if packed
    nodes: list[Node] = []
    gain = 0.0
    saved_by = None if gate is None else _saved(gate, spec)
    for group, rows, count, above in zip(ordered, lists, queries, outer, strict=True):
        begin = unread[above] if above >= 0 else 0
        packed = len(rows) > 1 and count > 0
        if packed and saved_by is not None:
            saved = saved_by(count, len(rows), group.stop - begin)
            packed = saved > 0
            gain += max(saved, 0.0)
        unread.append(group.stop if packed else begin)
        if packed:
            nodes.append(Node(begin, group.stop, rows, count))
    # Of a sequence in several groups the last one counts, which is the innermost.
    private[every] = np.repeat(np.array(unread, np.int32), counts)
    if gate is not None and gain <= gate.launch:
        return Forest((), np.zeros(len(q_lens), np.int32))
    return Forest(tuple(nodes), private)


def _outer(
    spec: AttentionSpec,
    groups: Sequence[SharedPrefix],
    rows: Ints,
    counts: Sequence[int],
    history: Ints,
) -> list[int] | None:
    """Of each group the one that it continues, -1 where it starts at the first token; None: one breaks
    a rule. All at once, as numpy takes as long over eight rows as over a hundred.

    Args:
        rows: of all groups, one after another.
        counts: rows of each.
    """
    size = spec.block_size
    bounds = [(group.start, group.stop) for group in groups]
    if any(not 0 <= start < stop or start % size or stop % size for start, stop in bounds):
        return None
    # A negative number is a large one without its sign.
    if not all(counts) or rows.view(np.uint32).max() >= len(history):
        return None
    stop_of = np.array([*(stop for _, stop in bounds), 0])  # the last: of none
    mine = np.repeat(np.arange(len(groups)), counts)
    if (history[rows] < stop_of[mine]).any():
        return None
    if np.bincount(rows).max() == 1:
        return [-1] * len(groups) if not any(start for start, _ in bounds) else None
    # Of each entry, the group that has the same row before it.
    order = np.argsort(rows, kind="stable")
    sorted_rows, sorted_mine = rows[order], mine[order]
    again = sorted_rows[1:] == sorted_rows[:-1]
    before = np.full(len(rows), -1)
    before[order[1:][again]] = sorted_mine[:-1][again]
    found = before[[0, *accumulate(counts[:-1])]]
    starts = [start for start, _ in bounds]
    if (before != found[mine]).any() or (before == mine).any() or (stop_of[found] != starts).any():
        return None
    return list(found.tolist())


def _indices(rows: Sequence[int] | Ints) -> Ints:
    """As an array; numpy takes long over a `range`."""
    if isinstance(rows, range):
        return np.arange(rows.start, rows.stop, rows.step, dtype=np.int32)
    return np.asarray(rows, np.int32)


def _why(
    spec: AttentionSpec, groups: Sequence[SharedPrefix], lists: Sequence[Ints], history: Ints
) -> Diagnostic:
    """Which of its rules the first group breaks that breaks one."""
    owner = np.full(len(history), -1)  # the group that a sequence's keys were last found in
    problem = ""
    for index, (group, rows) in enumerate(zip(groups, lists, strict=True)):
        span = f"prefix group [{group.start}, {group.stop})"
        if not 0 <= group.start < group.stop:
            problem = f"{span} is empty or negative"
        elif group.start % spec.block_size or group.stop % spec.block_size:
            problem = f"{span} is not made of whole blocks of {spec.block_size} tokens"
        elif not len(rows) or rows.min() < 0 or rows.max() >= len(history):
            problem = f"{span} must name sequences of the batch, 0 to {len(history) - 1}"
        elif np.bincount(rows).max() > 1:
            problem = f"{span} names a sequence twice"
        elif (history[rows] < group.stop).any():
            problem = f"{span} reaches into the new tokens of a sequence"
        else:
            above = int(owner[rows[0]])
            stop = groups[above].stop if above >= 0 else 0
            if stop != group.start or (owner[rows] != above).any():
                problem = f"{span} does not continue one group that ends at {group.start} with all its rows"
            owner[rows] = index
        if problem:
            return Diagnostic(problem, help="see SharedPrefix for the rules of groups")
    raise AssertionError("all groups keep the rules")


def shared_prefixes(
    groups: Iterable[PrefixGroup], rows: Mapping[str, int], history: Sequence[int]
) -> list[SharedPrefix]:
    """A plan step's prefix groups, for a batch in which request `r` is sequence `rows[r]`.

    Requests that are not in the batch, or have not computed all of a group's tokens, are left out, and
    groups of fewer than two that are.

    Args:
        groups: of the step.
        rows: may name sequences behind those of the batch.
        history: `[batch]` tokens of each sequence before its new ones.
    """
    found = []
    for group in groups:
        here = [rows[request] for request in group.requests if request in rows]
        here = [row for row in here if row < len(history) and history[row] >= group.stop]
        if len(here) > 1:
            found.append(SharedPrefix(group.start, group.stop, here))
    return found


def find_groups(block_table: Ints, history: Ints, block_size: int) -> list[SharedPrefix]:
    """The prefix groups that equal leading entries of block tables show.

    Args:
        block_table: `[batch, blocks]` page ids. A page that two rows have at one index must stand
            for one chain of pages before it, as in any prefix cache.
        history: `[batch]` tokens before the new ones; only whole blocks of them are shared.
        block_size: tokens of a page.
    """
    whole = history // block_size
    found: list[SharedPrefix] = []
    todo = [(0, rows) for rows in _split(block_table, whole, np.arange(len(whole)), 0)]
    while todo:
        column, rows = todo.pop()
        limit = int(whole[rows].min())
        same = (block_table[rows, column:limit] == block_table[rows[0], column:limit]).all(0)
        stop = limit if same.all() else column + int(same.argmin())
        found.append(SharedPrefix(column * block_size, stop * block_size, rows.astype(np.int32)))
        todo += [(stop, part) for part in _split(block_table, whole, rows, stop)]
    return found


def _split(
    block_table: Ints, whole: Ints, rows: NDArray[np.int64], column: int
) -> list[NDArray[np.int64]]:
    """Classes of two or more rows with the same whole page in a column."""
    rows = rows[whole[rows] > column]
    if len(rows) < 2:
        return []
    ids = block_table[rows, column]
    order = np.argsort(ids, kind="stable")
    cuts = np.flatnonzero(np.diff(ids[order])) + 1
    return [part for part in np.split(rows[order], cuts) if len(part) > 1]
