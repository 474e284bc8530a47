"""`kv-reuse`: what the engine's tiers hold already is fetched, not computed."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import ClassVar

import numpy as np
from attrs import frozen

from sagellm_ir.arrays import Ints
from sagellm_ir.cost import CostModel
from sagellm_ir.graph import CachedBlocks, IRGraph
from sagellm_ir.nodes import AllReduce, IRNode, KVFetch, Origin, Prefill
from sagellm_ir.passes.base import Pass, PassContext
from sagellm_ir.passes.blocks import BlockTable, ends_run
from sagellm_ir.passes.rewrite import Names, finish, sources
from sagellm_ir.target import DEVICE

__all__ = ["KVReuse"]

Hits = list[tuple[int, str]]
"""Runs of cached blocks from a prompt's start on: the token each ends before, and its tier."""


@frozen
class KVReuse(Pass):
    """Fetches what the graph's `cache` lines hold instead of computing it.

    A hit is the leading run of a prompt's blocks that some tier holds, each in the fastest one that
    does. A prefill `%x` inside it becomes a `kv_fetch` for each run of one tier (`%x.h0`, `%x.h1`,
    ...), and a prefill of what is left; the last of them is called `%x`, so users stay as they are.

    - From `device` a hit is free. From another tier it is taken if the transfer is faster than
      the work it saves; if not, this prefill computes from there on.
    - The last token of a prompt is always computed: the first new token comes out of it.
    - With several workers, all prompts that begin with the same block use the cache of one
      worker: the one that holds most of them.
    - A prefill that starts inside a block, or that a move copies, stays as it is.

    Run it after `prefix-dedup`, so that a shared prefix is fetched once; before it works too, since
    equal fetches are shared like equal prefills.
    """

    name: ClassVar[str] = "kv-reuse"
    needs: ClassVar[tuple[str, ...]] = ("built",)

    def run(self, graph: IRGraph, ctx: PassContext) -> IRGraph:
        if not graph.cache:
            return graph
        hits, copied = _hits(graph), sources(graph)
        cost, names = CostModel(graph.target), Names(graph)
        nodes: list[IRNode] = []
        for node in graph.nodes:
            if isinstance(node, AllReduce):
                continue
            runs: Hits = []
            if isinstance(node, Prefill) and node.request in hits and node.name not in copied:
                runs = _worth_it(node, hits[node.request], cost)
            if runs and isinstance(node, Prefill) and ctx.may_rewrite():
                nodes += _fetched(node, runs, names)
                ctx.count("hits")
                ctx.count("tokens saved", runs[-1][0] - node.start)
            else:
                nodes.append(node)
        return finish(graph, nodes) if ctx.counts else graph


def _worth_it(node: Prefill, hits: Hits, cost: CostModel) -> Hits:
    """The runs of hits at the start of a prefill that are faster to fetch than to compute."""
    block, start = cost.target.block_size, node.start
    most = node.stop - node.stop % block
    if start % block:
        return []
    runs: Hits = []
    for stop, tier in hits[bisect_right(hits, start, key=lambda hit: hit[0]) :]:
        stop = min(stop, most)
        if stop <= start:
            break
        blocks = (stop - start) // block
        if tier != DEVICE and cost.transfer(blocks, tier) >= cost.saved(start, stop):
            break
        runs.append((stop, tier))
        start = stop
    return runs


def _fetched(node: Prefill, runs: Hits, names: Names) -> Iterator[IRNode]:
    """The fetches of some runs, then the prefill of the rest, if any."""
    start, operands, after = node.start, node.operands, node.after
    fresh = names.numbered(f"{node.name}.h")
    for stop, tier in runs:
        name = node.name if stop == node.stop else next(fresh)
        yield KVFetch(
            name,
            node.request,
            start,
            stop,
            operands=operands,
            after=after,
            src=tier,
            loc=node.loc,
            origin=Origin(KVReuse.name, (node.name,)),
        )
        start, operands, after = stop, (name,), ()
    if start < node.stop:
        yield node.replace(start=start, operands=operands, after=after)


def _hits(graph: IRGraph) -> dict[str, Hits]:
    """The hits of each request that has some."""
    table = BlockTable(graph.columns, np.arange(len(graph.requests)))
    cost = CostModel(graph.target)
    names = {line.tier for line in graph.cache}
    tiers = sorted(names, key=lambda tier: (tier != DEVICE, cost.transfer(1, tier), tier))
    level = _levels_of_best_worker(table, graph.cache, tiers)
    ends = np.flatnonzero((level >= 0) & (ends_run(level) | ends_run(table.owner)))
    stops, found = table.stops(ends).tolist(), [tiers[i] for i in level[ends].tolist()]
    runs = list(zip(stops, found, strict=True))
    parts = zip(graph.requests, *table.parts(ends), strict=True)
    return {request.id: runs[low:high] for request, low, high in parts if low < high}


def _levels_of_best_worker(
    table: BlockTable, cache: Sequence[CachedBlocks], tiers: Sequence[str]
) -> Ints:
    """For each block of the leading runs, the index of the tier to take it from; -1 elsewhere.

    Prompts with the same first block take theirs from one worker, the one that holds most."""
    named = sorted({line.worker for line in cache if line.worker is not None})
    workers: list[str | None] = [*named] or [None]
    levels = [_leading(table, _levels(table.ids, cache, tiers, worker)) for worker in workers]
    if len(levels) == 1:
        return levels[0]
    _, root = np.unique(table.ids[table.first[table.owner]], return_inverse=True)
    held = np.stack([np.bincount(root, weights=level >= 0) for level in levels])
    best = held.argmax(axis=0)[root]
    chosen: Ints = np.stack(levels)[best, np.arange(len(root))]
    return chosen


def _levels(
    ids: Ints, cache: Sequence[CachedBlocks], tiers: Sequence[str], worker: str | None
) -> Ints:
    """For each block, the index of the first tier of a worker that holds it, or -1."""
    level: Ints = np.full(len(ids), -1)
    for i, tier in reversed(list(enumerate(tiers))):
        lines = (line for line in cache if line.tier == tier and line.worker in (None, worker))
        held = np.fromiter(chain.from_iterable(line.blocks for line in lines), np.int64)
        level[np.isin(ids, held)] = i
    return level


def _leading(table: BlockTable, level: Ints) -> Ints:
    """The levels, -1 from the first block of each prompt on that is not held or must be computed."""
    missing = np.flatnonzero((level < 0) | ~table.shareable)
    stops = np.append(missing, len(level))[np.searchsorted(missing, table.first[:-1])]
    leading = np.arange(len(level)) < stops[table.owner]
    return np.where(leading, level, -1)
