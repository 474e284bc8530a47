"""Live ranges: a scheduled graph as flat lists by node index."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from attrs import frozen

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import Decode, KVFetch, KVMigrate, KVNode, Prefill
from sagellm_ir.target import DEVICE

__all__ = ["Live", "flatten"]


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

    def fits(self) -> bool:
        """Whether no tier of any worker ever holds more than it can."""
        room = np.array([tier.blocks for tier in self.graph.target.tiers])
        return bool((self.peaks() <= room[:, np.newaxis]).all())

    def peaks(self) -> npt.NDArray[np.int64]:
        """For each tier and worker, the most blocks that are live in any step.

        What a fetch takes from the engine's cache is there from the first step on, as nothing
        may overwrite it before. Cached blocks that two fetches take count twice.
        """
        target, steps = self.graph.target, len(self.graph.loops)
        tiers, workers = len(target.tiers), len(target.workers)
        tier, first, last = map(_ints, (self.tier, self.step, self.last))
        rows: npt.NDArray[np.int64] = np.flatnonzero(tier >= 0)
        first[self.pins] = 0
        tier, first, last = tier[rows], first[rows], last[rows]
        if self.cached:
            more = _ints(self.cached)
            rows = np.concatenate((rows, more))
            tier = np.concatenate((tier, _ints(self.cached.values())))
            first = np.concatenate((first, np.zeros_like(more)))
            last = np.concatenate((last, _ints(self.step)[more]))
        place = (tier * workers + _ints(self.worker)[rows]) * (steps + 1)
        blocks, count = _ints(self.blocks)[rows], tiers * workers * (steps + 1)
        changes = np.bincount(place + first, blocks, count)
        changes -= np.bincount(place + last + 1, blocks, count)
        held = changes.reshape(tiers, workers, -1).cumsum(axis=2)
        peaks: npt.NDArray[np.int64] = held.max(axis=2, initial=0).astype(np.int64)
        return peaks


def _ints(values: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.array(list(values), dtype=np.int64)


def flatten(graph: IRGraph) -> Live:
    """Looks at every node twice: in order for its operands, in reverse for its last use."""
    nodes, count, size = graph.nodes, len(graph.nodes), graph.target.block_size
    index: dict[str, int] = {}
    workers = {worker.name: i for i, worker in enumerate(graph.target.workers)}
    tiers = {tier.name: i for i, tier in enumerate(graph.target.tiers)}
    device = tiers[DEVICE]
    worker, tier = [0] * count, [-1] * count
    prefix, source, blocks = [-1] * count, [-1] * count, [0] * count
    step, end = [0] * count, [0] * count
    pins: list[int] = []
    cached: dict[int, int] = {}
    for i, node in enumerate(nodes):
        assert node.step is not None, "the stage is scheduled"
        index[node.name] = i
        step[i] = end[i] = node.step
        if node.worker:
            worker[i] = workers[node.worker]
        if not isinstance(node, KVNode):
            continue
        start = node.start
        blocks[i] = -(-node.stop // size) + -start // size
        if isinstance(node, (Prefill, Decode)):
            tier[i] = device
            if start:
                prefix[i] = index[node.operands[-1]]
            if isinstance(node, Decode):
                assert node.until is not None, "the stage is scheduled"
                end[i] = node.until
            continue
        tier[i] = tiers[node.tier]
        if node.prefix:
            prefix[i] = index[node.prefix]
        if isinstance(node, (KVFetch, KVMigrate)):
            if node.source is not None:
                source[i] = index[node.source]
            elif isinstance(node, KVFetch) and node.src != DEVICE:
                cached[i] = tiers[node.src]
            else:
                pins.append(i)
    last = end.copy()
    for i in range(count - 1, -1, -1):
        if (at := prefix[i]) >= 0 and last[at] < last[i]:
            last[at] = last[i]
        if (at := source[i]) >= 0 and last[at] < end[i]:
            last[at] = end[i]
    return Live(graph, worker, prefix, source, blocks, step, end, last, tier, device, pins, cached)
