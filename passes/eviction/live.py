"""Live ranges: a scheduled graph as flat lists by node index."""

import numpy as np
from attrs import frozen

from sagellm_ir.arrays import NONE, Ints
from sagellm_ir.columns import Columns
from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import KVFetch
from sagellm_ir.target import DEVICE

__all__ = ["Live", "fits", "flatten", "peaks"]


@frozen
class Live:
    """Lists by node index, unless they say otherwise. A missing node is -1."""

    graph: IRGraph
    worker: list[int]
    prefix: list[int]
    source: list[int]
    """What a move copies."""
    blocks: list[int]
    """Blocks that the node owns, in the tier its result lives in."""
    step: list[int]
    end: list[int]
    """The last step the node runs in."""
    last: list[int]
    """The last step that needs the node's KV."""
    tier: list[int]
    """Index of the tier the result lives in; the device is told by `device`."""
    device: int
    """Index of the device tier."""
    pins: list[int]
    """Fetches of what the device's cache holds: there from the first step on."""
    cached: dict[int, int]
    """Fetches of what the cache of a lower tier holds, and that tier."""


def fits(graph: IRGraph) -> bool:
    """Whether no tier of any worker ever holds more than it can."""
    room = np.array([tier.blocks for tier in graph.target.tiers])
    return bool((peaks(graph) <= room[:, np.newaxis]).all())


def peaks(graph: IRGraph) -> Ints:
    """For each tier and worker, the most blocks that are live in any step.

    What a fetch takes from the engine's cache is there from the first step on, as nothing
    may overwrite it before. Cached blocks that two fetches take count twice.
    """
    c, target, steps = graph.columns, graph.target, len(graph.loops)
    tiers, workers = len(target.tiers), len(target.workers)
    pins, cached = _hits(c)
    first = c.step.copy()
    first[pins] = 0
    more: Ints = np.array(list(cached), dtype=np.int64)
    rows = np.concatenate((np.flatnonzero(c.is_kv), more))
    own = np.arange(len(rows)) < len(rows) - len(more)
    tier = np.concatenate((c.tier[c.is_kv], np.array(list(cached.values()), dtype=np.int64)))
    begin, end = np.where(own, first[rows], 0), np.where(own, c.last_use[rows], c.step[rows])
    place = (tier * workers + np.maximum(c.worker[rows], 0)) * (steps + 1)
    blocks, count = c.blocks[rows], tiers * workers * (steps + 1)
    changes = np.bincount(place + begin, blocks, count)
    changes -= np.bincount(place + end + 1, blocks, count)
    held = changes.reshape(tiers, workers, -1).cumsum(axis=2)
    most: Ints = held.max(axis=2, initial=0).astype(np.int64)
    return most


def flatten(graph: IRGraph) -> Live:
    """The graph's columns as lists."""
    c = graph.columns
    pins, cached = _hits(c)
    return Live(
        graph,
        np.maximum(c.worker, 0).tolist(),
        c.prefix.tolist(),
        c.source.tolist(),
        np.where(c.is_kv, c.blocks, 0).tolist(),
        c.step.tolist(),
        c.finish.tolist(),
        c.last_use.tolist(),
        c.tier.tolist(),
        c.device,
        pins,
        cached,
    )


def _hits(c: Columns) -> tuple[list[int], dict[int, int]]:
    """What reads the engine's cache: fetches from the device, and those from lower tiers."""
    pins: list[int] = []
    cached: dict[int, int] = {}
    for i in np.flatnonzero(c.is_fetch & (c.source == NONE)).tolist():
        node = c.nodes[i]
        assert isinstance(node, KVFetch)
        if node.src == DEVICE:
            pins.append(i)
        else:
            cached[i] = c.tier_index[node.src]
    return pins, cached
