"""Live ranges: a scheduled graph as flat lists by node index."""

from itertools import accumulate

from attrs import frozen

from sagellm_ir.graph import IRGraph
from sagellm_ir.nodes import Decode, KVFetch, KVMigrate, KVNode
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
        target = self.graph.target
        return all(
            max(held, default=0) <= target.tiers[tier].blocks
            for (tier, _), held in self.held().items()
        )

    def held(self) -> dict[tuple[int, int], list[int]]:
        """For each tier and worker that the graph uses, the live blocks of each step.

        What a fetch takes from the engine's cache is there from the first step on, as nothing
        may overwrite it before. Cached blocks that two fetches take count twice.
        """
        deltas: dict[tuple[int, int], list[int]] = {}
        steps = len(self.graph.loops)

        def add(tier: int, worker: int, first: int, last: int, blocks: int) -> None:
            if (tier, worker) not in deltas:
                deltas[tier, worker] = [0] * (steps + 1)
            deltas[tier, worker][first] += blocks
            deltas[tier, worker][last + 1] -= blocks

        pins = set(self.pins)
        for i, blocks in enumerate(self.blocks):
            if blocks:
                first = 0 if i in pins else self.step[i]
                add(self.tier[i], self.worker[i], first, self.last[i], blocks)
        for i, tier in self.cached.items():
            add(tier, self.worker[i], 0, self.step[i], self.blocks[i])
        return {place: list(accumulate(changes)) for place, changes in deltas.items()}


def flatten(graph: IRGraph) -> Live:
    """Looks at every node twice: in order for its operands, in reverse for its last use."""
    nodes, size = graph.nodes, graph.target.block_size
    index = {node.name: i for i, node in enumerate(nodes)}
    workers = {worker.name: i for i, worker in enumerate(graph.target.workers)}
    tiers = {tier.name: i for i, tier in enumerate(graph.target.tiers)}
    count = len(nodes)
    prefix, source, blocks, tier = [-1] * count, [-1] * count, [0] * count, [-1] * count
    step, end = [0] * count, [0] * count
    pins: list[int] = []
    cached: dict[int, int] = {}
    for i, node in enumerate(nodes):
        assert node.step is not None, "the stage is scheduled"
        step[i] = end[i] = node.step
        if not isinstance(node, KVNode):
            continue
        blocks[i] = -(-node.stop // size) + -node.start // size
        tier[i] = tiers[node.tier]
        if node.prefix:
            prefix[i] = index[node.prefix]
        if isinstance(node, Decode):
            assert node.until is not None, "the stage is scheduled"
            end[i] = node.until
        elif isinstance(node, KVFetch | KVMigrate):
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
    return Live(
        graph=graph,
        worker=[workers[node.worker] if node.worker else 0 for node in nodes],
        prefix=prefix,
        source=source,
        blocks=blocks,
        step=step,
        end=end,
        last=last,
        tier=tier,
        device=tiers[DEVICE],
        pins=pins,
        cached=cached,
    )
