"""The law of capacity, which holds after `evict`: no tier holds more than it can."""

from collections.abc import Iterator

import numpy as np

from sagellm_ir.arrays import NONE, Ints, places
from sagellm_ir.columns import Columns
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import KVFetch
from sagellm_ir.target import DEVICE
from sagellm_ir.verify.report import Finding, VerifyError, diagnose

__all__ = ["check_capacity"]


def check_capacity(graph: IRGraph) -> None:
    """Checks that live blocks fit every tier of every worker, in every step.

    A value's blocks are live from its step to its last use. Cached blocks that are fetched are
    live from the first step on, since nothing may overwrite them before: until the fetch in a
    lower tier, until the last use of the fetched value on the device, where a fetch copies
    nothing. Time is O(n log n) at most.

    Raises:
        VerifyError: a tier overflows, or the graph is not scheduled.
    """
    if graph.stage != "scheduled":
        finding = Finding("capacity is known of scheduled graphs only", help="run 'schedule' first")
        raise VerifyError(diagnose(graph, finding))
    if found := [diagnose(graph, finding) for finding in _overflows(graph.columns)]:
        raise VerifyError(*found)


def _overflows(c: Columns) -> Iterator[Finding]:
    target = c.graph.target
    for (tier, worker), held in _live_blocks(c):
        over = np.flatnonzero(held > target.tiers[tier].blocks)
        if len(over):
            peak = int(held.argmax())
            yield Finding(
                f"tier {target.tiers[tier].name!r} of worker {target.workers[worker].name!r} has "
                f"{target.tiers[tier].blocks} blocks, but step {over[0]} needs {held[over[0]]}"
                f"{f', and step {peak} needs {held[peak]}' if peak != over[0] else ''}",
                help="run 'evict' after 'schedule'",
            )


def _live_blocks(c: Columns) -> Iterator[tuple[tuple[int, int], Ints]]:
    """For each tier and worker, the live blocks of each step."""
    tiers, workers, steps = len(c.tier_index), len(c.worker_index), len(c.graph.loops)
    place = np.maximum(c.tier, 0) * workers + np.maximum(c.worker, 0)
    pinned = _pins(c)
    own = c.is_kv & ~_pin_nodes(c)
    for number in range(tiers * workers):
        here = own & (place == number)
        changes: Ints = np.zeros(steps + 1, dtype=np.int64)
        np.add.at(changes, c.step[here], c.blocks[here])
        np.add.at(changes, c.last_use[here] + 1, -c.blocks[here])
        for last in pinned.get(number, {}).values():
            changes[0] += 1
            changes[last + 1] -= 1
        yield divmod(number, workers), np.cumsum(changes)[:-1]


def _pin_nodes(c: Columns) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Nodes whose blocks on the device are the cache's own."""
    pins = np.zeros(len(c.nodes), dtype=bool)
    for i in places(c.is_fetch & (c.source == NONE)):
        node = c.nodes[i]
        pins[i] = isinstance(node, KVFetch) and node.src == DEVICE
    return pins


def _pins(c: Columns) -> dict[int, dict[int, int]]:
    """For each tier and worker, the last step that needs each cached block."""
    size, workers = c.graph.target.block_size, len(c.worker_index)
    pinned: dict[int, dict[int, int]] = {}
    for i in places(c.is_fetch & (c.source == NONE)):
        node = c.nodes[i]
        assert isinstance(node, KVFetch)
        place = c.tier_index[node.src] * workers + max(int(c.worker[i]), 0)
        last = int(c.last_use[i] if node.src == DEVICE else c.step[i])
        held = pinned.setdefault(place, {})
        blocks = c.graph.requests[c.request[i]].blocks
        for block in blocks[node.start // size : node.stop // size]:
            held[block] = max(last, held.get(block, 0))
    return pinned
